"""Calls as values: what is stored of them, when they suit a model, their time groups, and their file."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tiny_called import TOKENS, flux, flux_arguments, z_image
from tqdit.calibration import call_file
from tqdit.calibration.calls import Calls, RecordedCall
from tqdit.calibration.pipeline_calls import Recording, read_calls
from tqdit.errors import InputError

TIMES = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return flux()


@pytest.fixture(scope="module")
def calls(model: nn.Module) -> Calls:
    return Calls.of(model, [flux_arguments(t, prompt) for prompt in range(5) for t in TIMES])


@pytest.fixture
def file(calls: Calls, tmp_path: Path) -> Path:
    calls.save(tmp_path / "calls.safetensors")
    return tmp_path / "calls.safetensors"


class Latents(nn.Module):
    """A model of which only the config and the arguments matter."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, condition_mask: Any = None) -> None: ...


def at(times: Any, timestep: str = "timestep") -> Calls:
    """Calls of which only the times matter."""
    return Calls("Kind", {}, timestep, [RecordedCall.of({timestep: t}, timestep) for t in times])


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and first == second


# Values --------------------------------------------------------------------------------------------------------------


def test_calls_run_again(model: nn.Module, calls: Calls) -> None:
    for index, t in enumerate(TIMES):
        arguments = flux_arguments(t)
        with torch.no_grad():
            expected, found = model(**arguments)[0], model(**calls[index].to("cpu"))[0]
        assert torch.equal(found, expected)
    assert calls.kind == "FluxTransformer2DModel"
    assert calls.config["axes_dims_rope"] == [4, 4, 8]
    assert not [key for key in calls.config if key.startswith("_")]
    assert (len(calls), calls.timestep, calls.times.dtype) == (20, "timestep", torch.float64)
    assert calls.times.tolist() == list(TIMES) * 5


def test_later_changes_of_an_argument_do_not_show(model: nn.Module) -> None:
    arguments = flux_arguments(1.0)
    latents = arguments["hidden_states"]
    before = latents.clone()
    made = Calls.of(model, [arguments])
    latents.zero_()
    arguments["joint_attention_kwargs"]["scale"] = 9.0
    assert torch.equal(made[0].arguments["hidden_states"], before)
    assert made[0].arguments["joint_attention_kwargs"] == {"scale": 0.5}


def test_equal_tensors_are_kept_once(calls: Calls) -> None:
    prompts = {id(call.arguments["encoder_hidden_states"]) for call in calls}
    assert len(prompts) == 5
    assert len({id(call.arguments["img_ids"]) for call in calls}) == 1


def test_tensors_made_under_inference_mode_may_be_used_by_autograd(model: nn.Module) -> None:
    with torch.inference_mode():
        made = Calls.of(model, [flux_arguments(1.0)])
    arguments = made[0].to("cpu")
    model(**arguments)[0].sum().backward()
    assert model.x_embedder.weight.grad is not None
    model.zero_grad()
    assert not any(t.is_inference() for t in arguments.values() if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (torch.tensor([999]), 999.0), (7, 7.0), (0.5, 0.5), (torch.tensor(0.3, dtype=torch.bfloat16), 0.30078125),
        (torch.tensor([[0.0, 0.25], [0.5, 0.0]]), 0.5), ([0.1, torch.tensor([0.7])], pytest.approx(0.7)),
    ],
)  # fmt: skip
def test_the_time_is_the_largest(time: Any, expected: float) -> None:
    assert RecordedCall.of({"t": time}, "t").t == expected


@pytest.mark.parametrize("time", [None, "now", True, torch.tensor([]), torch.tensor([0.5, float("nan")]), []])
def test_a_time_that_is_none(time: Any) -> None:
    with pytest.raises(InputError, match="argument 't' must be a finite number"):
        RecordedCall.of({"t": time}, "t")


def test_what_a_model_is_given_is_a_copy(calls: Calls, file: Path) -> None:
    """A model may change its arguments; and memory of a mapped file is aligned otherwise than a tensor of its own."""
    for made in (calls, Calls.load(file)):
        given = made[0].to("cpu")["hidden_states"]
        assert given.data_ptr() % 64 == 0
        given.zero_()
        assert made[0].arguments["hidden_states"].any()


def test_patches_may_be_made_before_the_call() -> None:
    model = Latents({"in_channels": 4, "patch_size": [1, 2, 2]})
    for channels in (4, 16):
        Calls.of(model, [{"hidden_states": torch.ones(1, 7, channels), "timestep": 1.0}])
    with pytest.raises(InputError, match="the model takes 4 channels"):
        Calls.of(model, [{"hidden_states": torch.ones(1, 7, 6), "timestep": 1.0}])


def test_moving_casts_floats_but_not_times_and_positions(calls: Calls) -> None:
    arguments = calls[0].to("cpu", torch.bfloat16)
    kept = {name for name, value in arguments.items() if isinstance(value, torch.Tensor)} - {
        name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16
    }
    assert kept == {"timestep", "img_ids", "txt_ids"}
    rope = RecordedCall(
        {"t": 1.0, "image_rotary_emb": (torch.ones(2), torch.ones(2)), "n": torch.ones(2).long()}, 1, "t"
    )
    moved = rope.to("cpu", torch.float16)
    assert [part.dtype for part in moved["image_rotary_emb"]] == [torch.float32] * 2
    assert moved["n"].dtype is torch.int64


# Checks --------------------------------------------------------------------------------------------------------------


def with_tensor(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name] = value

    return change


INFINITE = torch.full((1, 6, 16), float("inf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_tensor("hidden_states", torch.ones(1, TOKENS, 7)), r"'hidden_states' has shape \(1, 16, 7\).*4 channels"),
        (with_tensor("hidden_states", torch.ones(1, TOKENS, 4).double()), "'hidden_states' is of torch.float64"),
        (with_tensor("hidden_states", torch.ones(0, TOKENS, 4)), "'hidden_states' must be a tensor with values"),
        (with_tensor("hidden_states", None), "'hidden_states' must be a tensor with values"),
        (with_tensor("hidden_states", torch.ones(1, TOKENS, 4, dtype=torch.complex64)), "dtype torch.complex64"),
        (with_tensor("encoder_hidden_states", INFINITE), "'encoder_hidden_states' has NaN or Inf"),
        (with_tensor("pooled_projections", torch.full((1, 16), float("nan"))), "'pooled_projections' has NaN or Inf"),
        (with_tensor("joint_attention_kwargs", {"cache": object()}), r"'joint_attention_kwargs\.cache' is of type obj"),
        (with_tensor("joint_attention_kwargs", {"draw": torch.Generator()}), "of type Generator, which cannot be st"),
        (with_tensor("joint_attention_kwargs", {"run": print}), "is of type builtin_function_or_method"),
        (with_tensor("joint_attention_kwargs", {1.5: 2}), r"'joint_attention_kwargs' has the key 1\.5"),
        (with_tensor("joint_attention_kwargs", {"n": 2**64}), "an integer of more than 64 bits"),
        (with_tensor("img_ids", torch.ones(2, 3).to_sparse()), "'img_ids' is a tensor of layout torch.sparse_coo"),
        (with_tensor("img_ids", torch.ones(2, 3, device="meta")), "'img_ids' is a tensor of the meta device"),
        (with_tensor("timestep", None), "'timestep' must be a finite number"),
        (with_tensor("noise", 1.0), "no arguments of a FluxTransformer2DModel.*'noise'"),
        (lambda arguments: arguments.pop("hidden_states"), "no arguments of a Flux.*missing.*'hidden_states'"),
    ],
)
def test_calls_that_cannot_be_kept(model: nn.Module, change: Callable, message: str) -> None:
    wrong = flux_arguments(0.5)
    change(wrong)
    with pytest.raises(InputError, match=f"^call 1: .*{message}"):
        Calls.of(model, [flux_arguments(1.0), wrong])


def test_a_nest_without_end(model: nn.Module) -> None:
    nest: list[Any] = []
    nest.append(nest)
    with pytest.raises(InputError, match="more than 16 dicts, lists and tuples"):
        Calls.of(model, [flux_arguments(1.0) | {"joint_attention_kwargs": {"nest": nest}}])


def test_infinity_is_legal_in_a_mask_alone() -> None:
    model = z_image()
    x, prompt = [torch.ones(4, 1, 8, 8)], [torch.ones(5, 16)]
    Calls.of(model, [{"x": x, "t": torch.tensor([0.5]), "cap_feats": prompt}])
    with pytest.raises(InputError, match=r"call 0: argument 'cap_feats\[0\]' has NaN or Inf"):
        Calls.of(model, [{"x": x, "t": torch.tensor([0.5]), "cap_feats": [torch.full((5, 16), -torch.inf)]}])


def test_calls_of_another_model(calls: Calls, model: nn.Module) -> None:
    with pytest.raises(InputError, match="of a FluxTransformer2DModel, the model is a ZImageTransformer2DModel"):
        calls.check(z_image())
    with pytest.raises(InputError, match="whose num_layers is 1; the model's is 2"):
        calls.check(flux(num_layers=2))
    with pytest.raises(InputError, match="there are no calls"):
        calls[:0].check(model)
    with pytest.raises(InputError, match="there are no calls"):
        Calls.of(model, [])
    with pytest.raises(InputError, match="a Linear takes no timestep, timesteps or t: it is no denoiser"):
        Calls.of(nn.Linear(1, 1), [{"input": torch.ones(1)}])


def test_latents_that_join_another_argument_may_have_fewer_channels() -> None:
    """A model such as Cosmos adds the channel of a mask to those of its latents."""

    model, given = Latents({"in_channels": 5}), {"hidden_states": torch.ones(1, 4, 2, 2), "timestep": 1.0}
    Calls.of(model, [given | {"condition_mask": torch.ones(1, 1, 2, 2)}])
    with pytest.raises(InputError, match="the model takes 5 channels"):
        Calls.of(model, [given])


# Time groups and thinning --------------------------------------------------------------------------------------------


def test_few_steps_have_a_group_each(calls: Calls) -> None:
    groups = calls.time_groups(10)
    assert groups.edges == (0.375, 0.625, 0.875)
    assert (groups.low, groups.high, groups.closed) == (0.0, 1.0, True)
    assert groups.index(calls.times).bincount().tolist() == [5] * 4


@pytest.mark.parametrize(
    ("times", "low", "high"),
    [
        ([1.0], 0, 1), ([0.0, 0.4], 0, 1), ([1000.0, 3.5], 0, 1000), (torch.arange(0, 1000, 50), 0, 1000),
        ([torch.tensor([1]), torch.tensor([0])], 0, 1000), ([1], 0, 1000), ([1500.0, 20.0], 0, 3000),
        ([-1.5, 0.5], -3, 3), ([-1.0], -2, 2), ([900_000.0], 0, 1_000_000),
    ],
)  # fmt: skip
def test_every_time_has_a_group_and_every_group_a_time(times: Any, low: float, high: float) -> None:
    made = at(times)
    for count in (1, 3, 10):
        groups = made.time_groups(count)
        assert (groups.low, groups.high) == (low, high)
        counts = groups.index(made.times).bincount(minlength=groups.num_groups)
        assert counts.min() > 0
        assert groups.num_groups == min(count, len(made.times.unique()))


def test_thinning_keeps_order_and_is_seeded() -> None:
    made = at([i / 100 for i in range(100) for _ in range(3)])
    thin = made.thinned(8, 5, seed=1)
    groups = made.time_groups(5)
    assert groups.index(thin.times).bincount().tolist() == [8] * 5
    assert thin.times.tolist() == sorted(thin.times.tolist())
    assert [call.t for call in made.thinned(8, 5, seed=1)] == [call.t for call in thin]
    assert [call.t for call in made.thinned(8, 5, seed=2)] != [call.t for call in thin]
    assert len(made.thinned(100, 5)) == 300


def test_thinning_a_group_does_not_depend_on_other_groups() -> None:
    late = [0.9 + i / 1000 for i in range(40)]
    one = at([0.1, *late])
    other = at([0.1] * 70 + late)
    assert one.time_groups(2).edges != (0.5,)
    for groups in (1, 2):
        kept = [
            [call.t for call in made.thinned(5, groups) if call.t > one.time_groups(2).edges[0]]
            for made in (one, other)
        ]
        assert (kept[0] == kept[1]) is (groups == 2)


@pytest.mark.parametrize("seed", range(3))
def test_every_call_is_as_likely_to_stay(seed: int) -> None:
    """Each of 20 calls stays in 4 of 20 draws on average; 500 draws differ from that by 5 deviations at most."""
    made = Calls("K", {}, "t", [RecordedCall({"t": 1.0, "i": i}, 1.0, "t") for i in range(20)])
    counts = torch.zeros(20)
    for draw in range(500):
        for call in made.thinned(4, 1, seed=1000 * seed + draw):
            counts[call.arguments["i"]] += 1
    assert (counts - 100).abs().max() < 5 * (500 * 0.2 * 0.8) ** 0.5


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_file_has_everything(calls: Calls, file: Path, model: nn.Module) -> None:
    loaded = Calls.load(file)
    assert (loaded.kind, loaded.config, loaded.timestep) == (calls.kind, calls.config, calls.timestep)
    assert all(equal(found.arguments, call.arguments) for found, call in zip(loaded, calls, strict=True))
    assert loaded.sha256 == calls.sha256
    loaded.check(model)
    loaded.save(other := file.with_name("other"))
    assert other.read_bytes() == file.read_bytes()
    other.unlink()
    assert os.listdir(file.parent) == [file.name]
    assert file.stat().st_mode & 0o777 == 0o644


def test_equal_tensors_are_written_once(calls: Calls, file: Path) -> None:
    names = load_file(file)
    different = {call_file.digest(t) for call in calls for t in call.arguments.values() if isinstance(t, torch.Tensor)}
    assert names.keys() == different | {call_file.MANIFEST}


def test_every_kind_of_value_is_read_as_it_was(tmp_path: Path) -> None:
    arguments = {
        "t": torch.tensor(0.5), "none": None, "flag": True, "one": 1, "half": 0.5, "text": "a\nb", "empty": [],
        "nothing": {}, "pair": (torch.ones(2), [torch.zeros(3, dtype=torch.bool), {"x": torch.ones(1).half()}]),
        "sizes": {0: [1, 2], "a": torch.ones(1)},
        "inf": float("-inf"), "scalar": torch.tensor(3, dtype=torch.int32), "ids": torch.ones(2).double(),
        "no values": torch.ones(0, 4), "tensor": {"tensor": "a key that looks like one of the file's own"},
    }  # fmt: skip
    made = Calls("Kind", {"a": [1, {"b": None}]}, "t", [RecordedCall.of(arguments, "t")])
    made.save(tmp_path / "c.safetensors")
    found = Calls.load(tmp_path / "c.safetensors")
    assert equal(dict(found[0].arguments), arguments)
    assert found.config == made.config


def test_loaded_calls_can_be_saved_again(calls: Calls, file: Path, tmp_path: Path) -> None:
    loaded = Calls.load(file)
    loaded[3:5].save(tmp_path / "some.safetensors")
    assert Calls.load(tmp_path / "some.safetensors").times.tolist() == [0.25, 1.0]
    loaded.save(file)
    assert Calls.load(file).sha256 == calls.sha256


def test_the_sha256_is_of_the_content(calls: Calls, model: nn.Module) -> None:
    same = Calls.of(model, [flux_arguments(t, prompt) for prompt in range(5) for t in TIMES])
    assert same.sha256 == calls.sha256
    others = [calls[1:], Calls.of(model, [flux_arguments(0.5)]), Calls.of(model, [flux_arguments(0.5, 1)])]
    assert len({made.sha256 for made in [calls, *others]}) == 4


def manifest(change: Callable[[dict[str, Any]], Any], reseal: bool = True) -> Callable[[dict], dict]:
    """A file whose JSON has changed, with the hash that it then needs or the one it had."""

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        found = json.loads(tensors[call_file.MANIFEST].numpy().tobytes())
        change(found)
        text = json.dumps(found).encode()
        tensors[call_file.MANIFEST] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {"sha256": hashlib.sha256(text).hexdigest()} if reseal else {}

    return damage


def drop(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    tensors.pop(min(tensors.keys() - {call_file.MANIFEST}))
    return {}


def flip(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    name = min(tensors.keys() - {call_file.MANIFEST})
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    return {}


def add(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    extra = torch.arange(3)
    tensors[call_file.digest(extra)] = extra
    return {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, "tensor '.*' is missing"),
        (lambda _: {"component": "../x"}, "'../x' is no name of a component"),
        (lambda _: {"sha256": None}, "'tqdit.calls' was changed"),
        (flip, "tensor '.*' was changed"),
        (add, "has a tensor '.*' that no call uses"),
        (manifest(lambda found: found["config"].update(num_layers=3), reseal=False), "'tqdit.calls' was changed"),
        (manifest(lambda found: found.update(version=2)), "version 2 cannot be read"),
        (manifest(lambda found: found.pop("kind")), "malformed"),
        (manifest(lambda found: found.update(kind=3)), "malformed"),
        (manifest(lambda found: found.update(calls=3)), "malformed"),
        (manifest(lambda found: found.update(visited=["1"])), "malformed"),
        (manifest(lambda found: found["calls"].append(3)), "value is malformed|malformed"),
        (manifest(lambda found: found["calls"][0].update(timestep=[1])), "malformed"),
        (manifest(lambda found: found["calls"][0].update(timestep={"code": "x"})), "unknown kind 'code'"),
        (manifest(lambda found: found["calls"][0].update(timestep={"pairs": [[1, 2, 3]]})), "unpack"),
        (manifest(lambda found: found["calls"][0].update(timestep={"pairs": [[[1], 2]]})), "unhashable"),
        (manifest(lambda found: found["calls"][0].update(timestep={"tensor": []})), "unknown kind 'tensor'"),
        (manifest(lambda found: found["calls"][0].pop("timestep")), "'timestep' must be a finite number"),
        (manifest(lambda found: found["calls"][0].update(timestep={"float": "nan"})), "'timestep' must be a finite"),
    ],
)
def test_a_damaged_file(file: Path, damage: Callable, message: str) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        seal = json.loads(opened.metadata()[call_file.SEAL])
    seal |= damage(tensors)
    save_file(tensors, file, metadata={call_file.SEAL: json.dumps(seal)})
    with pytest.raises(InputError, match=f"{file.name} is damaged: .*({message})"):
        Calls.load(file)


def test_a_file_that_is_none_of_calls(file: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other.safetensors has no recorded calls"):
        Calls.load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"none.safetensors is missing"):
        Calls.load(tmp_path / "none.safetensors")
    data = file.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"calls.safetensors is truncated or damaged"):
            Calls.load(file)


def test_a_write_that_fails_leaves_what_was_there(calls: Calls, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    really = call_file.save_file

    def interrupted(*arguments: Any, **options: Any) -> None:
        really(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(call_file, "save_file", interrupted)
    for path in (file, file.parent / "new.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            calls[:1].save(path)
    assert os.listdir(file.parent) == [file.name]
    assert file.read_bytes() == before


# Recordings ----------------------------------------------------------------------------------------------------------


def test_a_recording_of_one_is_a_file(calls: Calls, tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "calls.safetensors"
    Recording({"transformer_2": calls}).save(path)
    assert path.is_file()
    assert list(Recording.load(path)) == ["transformer_2"]
    assert read_calls(str(path), model).sha256 == calls.sha256
    with pytest.raises(InputError, match="exists; choose another path"):
        Recording({"transformer_2": calls}).save(path)
    Recording({"transformer_2": calls[:3]}).save(path, overwrite=True)
    assert len(Calls.load(path)) == 3


def test_a_recording_of_two_is_a_folder(calls: Calls, tmp_path: Path, model: nn.Module) -> None:
    recording, path = Recording({"transformer": calls, "transformer_2": calls[:4]}), tmp_path / "calls"
    recording.save(path)
    assert sorted(os.listdir(path)) == ["transformer.safetensors", "transformer_2.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["calls"]
    loaded = Recording.load(path)
    assert {name: len(found) for name, found in loaded.items()} == {"transformer": 20, "transformer_2": 4}
    with pytest.raises(InputError, match=r"calls of transformer, transformer_2 suit this model; .*\['transformer'\]"):
        read_calls(path, model)
    assert len(read_calls(path / "transformer_2.safetensors", model)) == 4
    with pytest.raises(InputError, match="exists"):
        recording.save(path)
    recording.save(path, overwrite=True)
    (path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is no recording; refusing to overwrite it"):
        recording.save(path, overwrite=True)
    (path / "notes.txt").unlink()
    (path / "copy.safetensors").write_bytes((path / "transformer.safetensors").read_bytes())
    with pytest.raises(InputError, match="two files of calls of the same component"):
        Recording.load(path)
    with pytest.raises(InputError, match=r"has no \.safetensors file of recorded calls"):
        Recording.load(tmp_path)


def test_the_calls_of_a_model_are_those_recorded_of_it(calls: Calls, model: nn.Module) -> None:
    twin = flux()
    recording = Recording(
        {"transformer": calls, "transformer_2": calls[:4]}, {"transformer": model, "transformer_2": twin}
    )
    assert len(recording.of(model)) == 20
    assert len(recording.of(twin)) == 4
    with pytest.raises(InputError, match="suit this model"):
        recording.of(flux())
    with pytest.raises(InputError, match="of a FluxTransformer2DModel, the model is a ZImage"):
        recording.of(z_image())
    with pytest.raises(InputError, match="nothing was recorded"):
        Recording({}).of(model)


def test_a_transformer_that_was_not_called_has_no_calls_of_the_other(calls: Calls, model: nn.Module) -> None:
    """A pipeline as Wan 2.2's may be recorded at times of one of its two transformers alone."""
    twin = flux()
    recording = Recording({"transformer": calls}, {"transformer": model, "transformer_2": twin})
    assert recording.of(model) is calls
    with pytest.raises(InputError, match="the pipeline did not call its transformer_2 while it was recorded"):
        recording.of(twin)


def test_what_quantize_takes_as_calls(calls: Calls, model: nn.Module) -> None:
    assert read_calls(calls, model) is calls
    assert read_calls(Recording({"transformer": calls}), model) is calls
    assert len(read_calls([flux_arguments(0.5)], model)) == 1
    assert len(read_calls((flux_arguments(t) for t in TIMES), model)) == 4
    for wrong in (flux_arguments(0.5), 3, None):
        with pytest.raises(InputError, match="calls must be a recording, the path of one, or a list of keyword"):
            read_calls(wrong, model)
    with pytest.raises(InputError, match="call 0 is of type int, not a dict"):
        read_calls([3], model)
    with pytest.raises(InputError, match="the model is a ZImageTransformer2DModel"):
        read_calls(calls, z_image())
