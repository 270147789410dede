"""`tqdit evaluate`, from a model to its result file: one protocol, and resumed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import inception_like
import tqdit
from tqdit.cli.main import app
from tqdit.errors import InputError
from tqdit.evaluation import contenders
from tqdit.evaluation import evaluate as verb
from tqdit.evaluation.results import read_evaluation
from tqdit.imaging import generate
from tqdit.sampling.guidance import Sampling

SAMPLING = Sampling("ddim", 2, 1.5)
OPTIONS = {"num": 12, "sampling": SAMPLING, "batch": 5}


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("network") / "inception-2015-12-05.pt"
    inception_like.save(path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (15, 8, 8, 3), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def finished(network, reference, pipeline, tmp_path_factory) -> Path:
    """A folder with the results and the images of one evaluation; read only."""
    folder = tmp_path_factory.mktemp("finished")
    tqdit.evaluate(pipeline, reference, folder / "results.json", network=network, **OPTIONS)
    return folder


@pytest.fixture
def begun(finished, tmp_path) -> Path:
    """A copy of that folder, which a test may change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "results.json"


@pytest.fixture
def evaluate(network, reference, tmp_path):
    def call(*models: str | Path, **options):
        given = {"network": network, "reference": reference, **OPTIONS, **options}
        return tqdit.evaluate(models, given.pop("reference"), tmp_path / "results.json", **given)

    return call


def test_a_result_file_has_the_scores_and_the_whole_protocol(finished) -> None:
    found = json.loads((finished / "results.json").read_text())
    assert list(found["rows"][0]["scores"]) == [
        "frechet_distance", "spatial_frechet_distance", "inception_score", "precision", "recall", "kernel_distance",
    ]  # fmt: skip
    protocol = found["protocol"]
    expected = {"num": 12, "sampler": "ddim", "steps": 2, "guidance": 1.5, "seed": 0, "classes": list(range(10))}
    assert protocol["images"] == {**expected, "conditions_sha256": None}
    assert all(len(protocol[part]["sha256"]) == 64 for part in ("network", "reference"))
    row = found["rows"][0]
    assert len(row["run"]["model_sha256"]) == 64
    assert {"torch", "tqdit", "device"} <= set(row["environment"])
    assert set(row["seconds"]) == {"images", "features", "scores"}
    assert row["peak_memory_bytes"] > 2**20
    assert row["absent"] == {}


def test_what_is_there_is_not_made_again(evaluate, begun, pipeline, monkeypatch) -> None:
    before = begun.read_bytes()
    begun.unlink()
    monkeypatch.setattr(generate, "trajectory", lambda *_: pytest.fail("drawn again"))
    assert evaluate(pipeline).rows[0].scores == json.loads(before)["rows"][0]["scores"]
    before = begun.read_bytes()
    monkeypatch.setattr(contenders.Model, "images", lambda *_: pytest.fail("evaluated again"))
    evaluate(pipeline)
    assert begun.read_bytes() == before


def test_an_interrupted_evaluation_goes_on_with_the_same_scores(evaluate, begun, pipeline) -> None:
    scores = json.loads(begun.read_text())["rows"][0]["scores"]
    begun.unlink()
    for file in list(begun.with_suffix(".images").rglob("*.png"))[3:7]:
        file.unlink()
    assert evaluate(pipeline).rows[0].scores == scores


def test_the_batch_that_is_written_has_the_scores_of_the_model(evaluate, begun, pipeline, tmp_path) -> None:
    model = evaluate(pipeline, npz=tmp_path / "batches")
    with np.load(tmp_path / "batches" / "tiny-dit.npz") as archive:
        assert archive["arr_0"].shape == (12, 8, 8, 3)
        assert archive["arr_1"].tolist() == [*range(10), 0, 1]
    with pytest.raises(InputError, match=r"images.sampler is 'ddim' and None"):
        evaluate(tmp_path / "batches" / "tiny-dit.npz")
    (tmp_path / "results.json").unlink()
    batch = evaluate(tmp_path / "batches" / "tiny-dit.npz")
    assert batch.rows[0].scores == model.rows[0].scores


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num": 10}, "images.num is 12 and 10"),
        ({"seed": 1}, "images.seed is 0 and 1"),
        ({"sampling": Sampling("ddim", 3, 1.0)}, "images.steps is 2 and 3; images.guidance is 1.5 and 1.0"),
        ({"classes": [3]}, r"images.classes is \[0, 1.* and \[3\]"),
    ],
)
def test_another_protocol_is_refused_before_any_work(evaluate, begun, pipeline, monkeypatch, changes, named) -> None:
    assert begun.exists()
    monkeypatch.setattr(contenders.Model, "images", lambda *_: pytest.fail("drawn"))
    with pytest.raises(InputError, match=f"different protocols, and go into no common table: {named}$"):
        evaluate(pipeline, **changes)


def test_another_network_or_reference_is_another_protocol(evaluate, begun, pipeline, reference, tmp_path) -> None:
    inception_like.save(tmp_path / "inception-2015-12-05.pt", corner=True)
    with pytest.raises(InputError, match=r"network.sha256 is '\w+' and '\w+'$"):
        evaluate(pipeline, network=tmp_path / "inception-2015-12-05.pt")
    np.savez(tmp_path / "reference.npz", np.zeros((15, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=r"reference.sha256 is"):
        evaluate(pipeline, reference=tmp_path / "reference.npz")
    (tmp_path / "renamed.npz").write_bytes(reference.read_bytes())
    assert len(evaluate(pipeline, reference=tmp_path / "renamed.npz").rows) == 1


class Colours(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 3:
            raise ValueError("images with colours alone")
        return x.float().flatten(1)[:, :6]


def test_input_that_is_wrong_is_refused_before_any_image(evaluate, pipeline, network, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(contenders.Model, "images", lambda *_: pytest.fail("drawn"))
    torch.jit.script(Colours()).save(str(tmp_path / "colours.pt"))
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    (tmp_path / "own.json").write_text("{}")
    (tmp_path / "results").mkdir()
    out = tmp_path / "results.json"
    for message, call in {
        "network 'colours.pt' fails on images": lambda: evaluate(pipeline, network=tmp_path / "colours.pt"),
        "of 7 features, the network gives 24": lambda: evaluate(
            pipeline, reference=tmp_path / "other.npz", network=network
        ),
        "none is missing; a reference is an .npz file, a folder of images, or 'fashion-test'": lambda: tqdit.evaluate(
            pipeline, tmp_path / "none", out
        ),
        "own.json is no .npz file; a reference is an .npz file": lambda: evaluate(
            pipeline, reference=tmp_path / "own.json", network=network
        ),
        "none.npz is missing; a batch of images is an .npz file": lambda: evaluate(tmp_path / "none.npz"),
        "results is not a regular file; a network is a TorchScript file": lambda: evaluate(
            pipeline, network=tmp_path / "results"
        ),
        "give the feature network": lambda: tqdit.evaluate(pipeline, reference, out),
        "own.json is no result file of tqdit evaluate": lambda: tqdit.evaluate(
            pipeline, reference, tmp_path / "own.json", network=network
        ),
        "results are a .json file, got '.*results.txt'": lambda: tqdit.evaluate(
            pipeline, reference, tmp_path / "results.txt", network=network
        ),
        "num must be a whole number of at least 1": lambda: evaluate(pipeline, num=0),
        "needs more than 3 images, of the models there are 3": lambda: evaluate(pipeline, num=3),
        "two of the models are called 'tiny-dit.npz'": lambda: evaluate(pipeline, pipeline, npz=tmp_path / "npz"),
        "models must name at least one model": evaluate,
        "models must be a path or a name or a list of them, got 5": lambda: tqdit.evaluate(5, reference, out),
        r"models must be a path or a name or a list of them, got \(5,\)": lambda: evaluate(5),
        r"models must be a path or a name or a list of them, got b'a'": lambda: tqdit.evaluate(b"a", reference, out),
        "reference must be a path, got 5": lambda: evaluate(pipeline, reference=5),
        "out must be a path, got None": lambda: tqdit.evaluate(pipeline, reference, None),
        "network must be a path, got 5": lambda: evaluate(pipeline, network=5),
        "images must be a path, got 5": lambda: evaluate(pipeline, images=5),
        "npz must be a path, got 5": lambda: evaluate(pipeline, npz=5),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    assert not out.exists()
    assert not (tmp_path / "results.images").exists()


MODELS = "a", Path("a"), PurePath("a"), ("a",), {"a"}, (name for name in "a"), {"a": 1}.keys()


@pytest.mark.parametrize("given", MODELS)
def test_models_may_be_given_in_any_collection(given) -> None:
    assert verb._listed(given) in (["a"], [Path("a")])


def test_the_command_prints_papers_names_and_joins_files(pipeline, network, reference, tmp_path) -> None:
    words = [str(pipeline), "--reference", str(reference), "--network", str(network), "-n", "12", "--steps", "2", "-q"]
    run = CliRunner()
    for name in ("a.json", "b.json"):
        images = ["--images", str(tmp_path / "images")]
        done = run.invoke(app, ["evaluate", *words, "-o", str(tmp_path / name), *images], catch_exceptions=False)
        assert done.exit_code == 0
    assert "Fréchet distances of 12 images are biased upwards" in done.stdout
    assert done.stdout.split()[:7] == ["model", "FID", "sFID", "IS", "prec.", "recall", "KID"]
    shown = run.invoke(app, ["evaluate", str(tmp_path / "a.json"), str(tmp_path / "b.json")], catch_exceptions=False)
    assert shown.stdout.count("tiny-dit") == 1  # both files have the scores of the same images
    value = json.loads((tmp_path / "b.json").read_text())
    value["rows"][0]["run"]["seed"] = 1
    (tmp_path / "b.json").write_text(json.dumps(value))
    shown = run.invoke(app, ["evaluate", str(tmp_path / "a.json"), str(tmp_path / "b.json")], catch_exceptions=False)
    assert shown.stdout.count("tiny-dit") == 2
    value["rows"][0]["run"]["seed"] = 0
    value["rows"][0]["scores"]["precision"] = 0.123
    (tmp_path / "b.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"b.json' has other scores for the same images of tiny-dit"):
        run.invoke(app, ["evaluate", str(tmp_path / "a.json"), str(tmp_path / "b.json")], catch_exceptions=False)
    value["protocol"]["images"]["num"] = 50_000
    (tmp_path / "b.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"images\.num is 12 and 50000"):
        run.invoke(app, ["evaluate", str(tmp_path / "a.json"), str(tmp_path / "b.json")], catch_exceptions=False)


DAMAGES: dict[str, Callable[[Any], object]] = {
    "rows.0.name must be a text": lambda v: v["rows"][0].update(name=5),
    "rows.0.scores.recall must be a number": lambda v: v["rows"][0]["scores"].update(recall="high"),
    "rows.0.absent": lambda v: v["rows"][0].update(absent=["recall"]),
    "protocol.images": lambda v: v["protocol"].update(images=3),
    "its scores are of version 2; this tqdit computes version 1": lambda v: v["protocol"].update(version=2),
    "protocol.images has no 'num'": lambda v: v["protocol"]["images"].pop("num"),
    "protocol.images.num must be a whole number": lambda v: v["protocol"]["images"].update(num="many"),
    "protocol.images has neither 'sampler' nor 'batch'": lambda v: v["protocol"]["images"].pop("sampler"),
    "protocol.network has no 'name'": lambda v: v["protocol"]["network"].pop("name"),
    "its kind is None": lambda v: v.pop("kind"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_result_file_is_named(finished, tmp_path, message: str) -> None:
    value = json.loads((finished / "results.json").read_text())
    DAMAGES[message](value)
    (tmp_path / "damaged.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=rf"damaged\.json is no result file of tqdit evaluate: {message}"):
        read_evaluation(tmp_path / "damaged.json")
