"""Feature networks from files: what is reached inside the Inception network, and what is never loaded."""

import io
import json
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inception_like
from tqdit.errors import InputError
from tqdit.evaluation.exported import short_reason
from tqdit.evaluation.networks import CLASSES, SPATIAL, load_network


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (3, 3, 40, 32), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("network") / "inception-2015-12-05.pt"
    return path, inception_like.save(path)


def test_the_features_of_the_inception_interface(inception, images) -> None:
    """The spatial ones are seven channels in the order of TensorFlow: row, column, channel."""
    path, eager = inception
    maps = []
    eager.layers.mixed_6.conv.register_forward_hook(lambda _, __, output: maps.append(output))
    with torch.no_grad():
        pooled, classes = eager(images, return_features=True), eager(images, no_output_bias=True)
    network = load_network(path)
    found = network(images)
    assert (network.inception, network.missing, network.name) == (True, {}, path.name)
    torch.testing.assert_close(found.pooled, pooled)
    torch.testing.assert_close(found.probabilities, classes)
    height, width = maps[0].shape[2:]
    expected = [[[m[c, i, j] for c in range(7)] for i in range(height) for j in range(width)] for m in maps[0]]
    torch.testing.assert_close(found.spatial, torch.tensor(expected).flatten(1), rtol=1e-4, atol=1e-4)


def test_grey_images_get_three_channels(inception, images) -> None:
    network = load_network(inception[0])
    grey = images[:, :1]
    assert torch.equal(network(grey).pooled, network(grey.expand(-1, 3, -1, -1)).pooled)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"corner": True}, "its layers, called one after another, do not give its features"),
        ({"name": "mixed_5"}, "no layers.mixed_6.conv that can be called"),
    ],
)
def test_spatial_features_that_cannot_be_trusted_are_absent(tmp_path, images, options, reason: str) -> None:
    inception_like.save(tmp_path / "other.pt", **options)
    network = load_network(tmp_path / "other.pt")
    assert network(images).spatial is None
    assert network(images).probabilities is not None
    assert reason in network.missing[SPATIAL]


class Tuple(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x.float()
        return x.mean((2, 3)), F.avg_pool2d(x, 4), x.mean((2, 3))


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3)) / 0


@pytest.mark.parametrize("kind", ["TorchScript", "export"])
def test_any_network_stands_in(tmp_path, images, kind: str) -> None:
    if kind == "export":
        path = exported(tmp_path / "own.pt2", Tuple())
    else:
        path = tmp_path / "own.pt"
        torch.jit.script(Tuple()).save(str(path))
    network = load_network(path)
    found = network(images)
    assert not network.inception
    torch.testing.assert_close(found.pooled, images.float().mean((2, 3)))
    torch.testing.assert_close(found.spatial, F.avg_pool2d(images.float(), 4).permute(0, 2, 3, 1).flatten(1))
    torch.testing.assert_close(found.probabilities, images.float().mean((2, 3)).softmax(1))


def test_the_bundled_classifier(images) -> None:
    network = load_network("fashion")
    grey = F.interpolate(images[:, :1], (32, 32))
    found = network(grey)
    assert found.pooled.shape == (3, 128)
    assert found.probabilities.sum(1).tolist() == pytest.approx([1, 1, 1])
    assert set(network.missing) >= {SPATIAL}
    torch.testing.assert_close(network(grey.expand(-1, 3, -1, -1)).pooled, found.pooled)
    with pytest.raises(InputError, match="takes grey images, these have colours"):
        network(F.interpolate(images, (32, 32)))
    with pytest.raises(InputError, match="network 'fashion' fails on images \\[3, 1, 40, 32\\]"):
        network(images[:, :1])


class Wide(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().flatten(1).repeat(1, 6)


def test_features_that_have_no_covariance_are_refused(tmp_path, images) -> None:
    torch.jit.script(Wide()).save(str(tmp_path / "wide.pt"))
    with pytest.raises(InputError, match=r"'wide\.pt' gives 23040 features of an image; at most 16384"):
        load_network(tmp_path / "wide.pt")(images)


def test_nan_and_missing_files_are_named(tmp_path, images) -> None:
    torch.jit.script(Broken()).save(str(tmp_path / "nan.pt"))
    network = load_network(tmp_path / "nan.pt")
    assert set(network.missing) == {SPATIAL, CLASSES}
    with pytest.raises(InputError, match=r"network 'nan.pt' gives NaN or Inf"):
        network(images)
    with pytest.raises(InputError, match=r"none.pt is missing; a network is a TorchScript file"):
        load_network(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(InputError, match=r"text.pt is damaged or no TorchScript file"):
        load_network(tmp_path / "text.pt")
    (tmp_path / "text.pt2").write_text("no network")
    with pytest.raises(InputError, match=r"text.pt2 is damaged or no file of torch.export.save"):
        load_network(tmp_path / "text.pt2")


@pytest.mark.parametrize("damage", ["cut off", "in the middle", "code", "long record"])
@pytest.mark.parametrize("kind", ["pt", "pt2"])
def test_an_error_about_a_damaged_file_is_one_short_line(tmp_path, kind: str, damage: str) -> None:
    path = tmp_path / f"own.{kind}"
    if kind == "pt2":
        exported(path, Tuple())
    else:
        torch.jit.script(Tuple()).save(str(path))
    content = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "in the middle":
        path.write_bytes(content[:150] + bytes(20) + content[170:])
    elif damage == "code":
        names = zipfile.ZipFile(path).namelist()
        inner = next(name for name in names if name.endswith((".py", "model.json"))).partition("/")[2]
        rewritten(path, {inner: b"def forward(self,\n" + 200 * b"x "})
    else:
        rewritten(path, {f"data/{200 * 'long'}.pkl" if kind == "pt2" else "data.pkl": b"no pickle"})
    with pytest.raises(InputError) as refused:
        load_network(path)
    message = str(refused.value)
    assert message.startswith(f"{path}")
    reason = message.removeprefix(str(path)).removeprefix(" is damaged or no ")
    assert 10 < len(reason) <= 150
    assert reason.isprintable()


def test_reasons_of_torch_are_cut_after_their_first_sentence() -> None:
    assert (
        short_reason(RuntimeError("it failed: no end. This is an internal miniz error.\nmore")) == "it failed: no end"
    )
    assert short_reason(RuntimeError('x INTERNAL ASSERT FAILED at "a.cpp":5, please report')) == (
        "a check inside torch failed"
    )
    assert short_reason(KeyError()) == "KeyError"
    assert short_reason(ValueError("word " * 40)) == "word " * 19 + "…"
    assert short_reason(ValueError("x" * 200)) == "x" * 98 + " …"
    assert short_reason(ValueError("a\x1b[31m red")) == "a?[31m red"


# What is never loaded ------------------------------------------------------------------------------------------------


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


def exported(path: Path, module: nn.Module) -> Path:
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = torch.zeros(2, 3, 40, 32, dtype=torch.uint8)
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path


def rewritten(path: Path, change: dict[str, bytes]) -> None:
    """Replace records of an archive, or add them; their names are without the archive's own folder."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(content)).partition("/")[0]
    content |= {f"{root}/{name}": data for name, data in change.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def record(path: Path, name: str) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(f"{archive.namelist()[0].partition('/')[0]}/{name}"))


def test_a_torchscript_file_unpickles_no_python(tmp_path) -> None:
    path, mark = tmp_path / "own.pt", tmp_path / "mark"
    torch.jit.script(Tuple()).save(str(path))
    assert load_network(path).name == "own.pt"
    rewritten(path, {"data.pkl": pickle.dumps(Trap(mark), protocol=2)})
    with pytest.raises(InputError, match=r"own.pt is damaged or no TorchScript file"):
        load_network(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark), protocol=2))
    assert mark.exists()  # the trap works where Python unpickles it


GRAPH, INPUTS, CONSTANTS = (
    "models/model.json",
    "data/sample_inputs/model.pt",
    "data/constants/model_constants_config.json",
)


@pytest.mark.parametrize("way", ["inputs", "constant", "library", "operator", "size", "argument"])
def test_an_exported_program_runs_nothing_of_its_own(tmp_path, way: str) -> None:
    path, mark = exported(tmp_path / "own.pt2", Tuple()), tmp_path / "mark"
    graph, trap = record(path, GRAPH), pickle.dumps(Trap(mark), protocol=2)
    if way == "inputs":
        buffer = io.BytesIO()
        torch.save(Trap(mark), buffer)
        change = {INPUTS: buffer.getvalue()}
    elif way == "constant":
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        change = {CONSTANTS: json.dumps({"config": {"c": payload}}).encode(), "data/constants/opaque_obj_0": trap}
    elif way == "library":
        change = {"data/aotinductor/model/model.so": b"\x7fELF"}
    else:
        if way == "operator":
            graph["graph_module"]["graph"]["nodes"][0]["target"] = "torch.serialization.os.system"
        elif way == "size":
            text, size = json.dumps(graph), re.compile(r'"expr_str": "[^"]*"')
            assert size.search(text)
            graph = json.loads(size.sub(f'"expr_str": "open({str(mark)!r}, 1)"', text))
        else:
            call = {"inputs": [], "outputs": [], "in_spec": "", "out_spec": "", "forward_arg_names": ["x=exec('1')"]}
            graph["graph_module"]["module_call_graph"].append({"fqn": "", "signature": call})
        change = {GRAPH: json.dumps(graph).encode()}
    rewritten(path, change)
    with pytest.raises(InputError, match=r"own\.pt2: (its|it has|'c' is)"):
        load_network(path)
    assert not mark.exists()


def test_an_exported_program_that_is_rewritten_as_it_was_loads(tmp_path) -> None:
    """So that the refusals of the other test are those of what was changed."""
    path = exported(tmp_path / "own.pt2", Tuple())
    rewritten(path, {GRAPH: json.dumps(record(path, GRAPH)).encode()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_network(path)(torch.zeros(5, 3, 40, 32, dtype=torch.uint8)).pooled.shape == (5, 3)
