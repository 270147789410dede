"""What the equivalence test draws, the real images and features that it reads, and its verdicts in a comparison."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tqdit import workflow
from tqdit.calibration.trajectories import InBfloat16
from tqdit.cli.console import print_comparison
from tqdit.errors import InputError
from tqdit.imaging.images import Images
from tqdit.quality import comparison, fashion, trial
from tqdit.quality.equivalence import verdicts
from tqdit.quality.fashion import load_real_features, read_test_images, write_real_features
from tqdit.quality.features import FEATURES, load_real_statistics
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sources.resolve import load_float, resolve

FAST, NUM = Sampling("ddim", 2, 1.5), 40


def some_features(pixels: torch.Tensor) -> torch.Tensor:
    """Six means over parts of an image of 8 x 8 pixels."""
    return pixels.flatten(1)[:, :60].unflatten(1, (6, 10)).mean(2)


def idx_file(count: int, side: int = 28, magic: int = 2051) -> bytes:
    header = b"".join(value.to_bytes(4, "big") for value in (magic, count, side, side))
    return header + bytes(i % 256 for i in range(count * side * side))


@pytest.fixture(scope="module")
def wanted(pipeline) -> Images:
    return Images(resolve(pipeline), range(10), NUM, FAST, seed=3, batch=20)


@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) / 4


def test_a_trial_draws_the_same_and_other_seeds(pipeline, wanted, real) -> None:
    model = load_float(wanted.source)
    made = trial.Trial(wanted, 4, some_features, real)
    first = made.draw(model, "float")
    assert torch.equal(first.features, some_features(first.pixels))
    yardstick = made.yardstick(model, first.pixels)
    assert torch.equal(yardstick.reference.pixels, first.pixels)
    assert torch.equal(yardstick.bfloat16, made.draw(InBfloat16(model), "bf16").pixels)
    apart = (yardstick.bfloat16 - first.pixels).abs()
    assert 0 < apart.mean() < 0.05
    other = some_features(workflow.sample(pipeline, [], NUM, FAST, 4))
    torch.testing.assert_close(yardstick.other_seeds, other)
    assert (other - first.features).abs().mean() > 0.05


def test_verdicts_of_drawn_models(wanted, real, solved) -> None:
    model = load_float(wanted.source)
    made = trial.Trial(wanted, 4, some_features, real)
    drawn = {"float": made.draw(model, "float"), "w4a4": made.draw(convert(solved("paper", "w4a4")), "w4a4")}
    pixels = {name: found.pixels for name, found in drawn.items()}
    found = made.judge(model, drawn["float"].pixels, pixels)
    assert found == verdicts(drawn, made.yardstick(model, drawn["float"].pixels))
    assert (found["float"].equivalent, found["float"].exact) == (True, NUM)
    assert not found["w4a4"].closer_than_bf16
    assert found["w4a4"].log_error.lower > 1


def test_settings_that_no_trial_can_have(wanted, real) -> None:
    with pytest.raises(InputError, match="multiple of 20, at least 40, got 50"):
        trial.Trial(replace(wanted, num=50), 4, some_features, real)
    with pytest.raises(InputError, match="got 20"):
        trial.Trial(replace(wanted, num=20), 4, some_features, real)
    with pytest.raises(InputError, match="two seeds, got 3 twice"):
        trial.Trial(wanted, 3, some_features, real)


def test_a_comparison_has_verdicts_of_its_own_images(
    pipeline, wanted, real, tiny_recipe, tmp_path, monkeypatch, capsys
) -> None:
    with pytest.raises(InputError, match="'tiny-dit' is none"):
        comparison.compare_samples(pipeline, [], NUM, equivalence=True)
    prepared = workflow.prepare(pipeline, tiny_recipe())
    solution, _ = workflow.solve_prepared(prepared, tiny_recipe(rounds=0))
    workflow.save(solution, prepared.source, tmp_path / "w8a8")
    made = trial.Trial(replace(wanted, batch=16), 4, some_features, real)
    monkeypatch.setattr(comparison, "fashion_trial", lambda images, device: made)
    paths = [tmp_path / "w8a8"] * 2
    found = comparison.compare_samples(pipeline, paths, NUM, FAST, 1, seed=3, cost=False, equivalence=True)
    row, again = found.models
    model = load_float(wanted.source)
    images = {"a": row.images, "b": again.images}
    assert [row.verdict, again.verdict] == list(made.judge(model, found.float_model.images, images).values())
    value = json.loads(found.to_json())
    assert value["models"][0]["verdict"] == row.verdict.figures()
    assert value["reference"]["verdict"] is None
    print_comparison(found)
    assert "closer to float32 than bfloat16: " in " ".join(capsys.readouterr().out.split())


def test_the_trial_of_the_bundled_model(monkeypatch) -> None:
    features = torch.zeros(10_000, FEATURES)
    monkeypatch.setattr(fashion, "load_real_features", lambda: features)
    images = Images(resolve("fashion-dit"), range(10), NUM, FAST, seed=2**31 - 1)
    made = trial.fashion_trial(images, torch.device("cpu"))
    assert (made.other_seed, len(made.real)) == (0, 10_000)
    assert made.with_features(torch.zeros(2, 1, 32, 32)).features.shape == (2, FEATURES)


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz", "mine.idx"])
def test_images_of_an_idx_file(tmp_path: Path, name: str) -> None:
    content = idx_file(3)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    images = read_test_images(tmp_path / name)
    assert images.shape == (3, 1, 32, 32)
    assert images.dtype == torch.float32
    assert (images[:, :, :2] == -1).all()
    assert (images[..., -2:] == -1).all()
    flat = images[1, 0, 2:30, 2:30].flatten()
    assert ((flat + 1) * 127.5).round().int().tolist() == [(784 + i) % 256 for i in range(784)]
    if name.startswith("t10k"):
        assert torch.equal(read_test_images(tmp_path), images)


@pytest.mark.parametrize(
    "content",
    [b"", idx_file(0), idx_file(2)[:-1], idx_file(2) + b"0", idx_file(2, side=27), idx_file(2, magic=2049)],
)
def test_what_is_no_idx_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.idx").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.idx is no IDX file"):
        read_test_images(tmp_path / "bad.idx")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz is missing; it has the real images"):
        read_test_images(tmp_path)
    for damaged in (gzip.compress(idx_file(3))[:-40], b"no gzip"):
        (tmp_path / "bad.gz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"bad\.gz cannot be read"):
            read_test_images(tmp_path / "bad.gz")
    with pytest.raises(InputError, match=r"absent\.safetensors is missing"):
        load_real_features(tmp_path / "absent.safetensors")


def test_features_of_the_shipped_statistics_are_read(tmp_path: Path) -> None:
    mean, covariance = load_real_statistics()
    values, vectors = torch.linalg.eigh(covariance)
    noise = torch.randn(10_000, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise - noise.mean(0)
    features = (mean + noise * values.clamp(min=0).sqrt() @ vectors.T).half()
    path = tmp_path / "features.safetensors"
    save_file({"features": features}, path)
    assert path.stat().st_size < 3_000_000
    assert torch.equal(load_real_features(path), features.float())
    wrong = {
        "no tensor 'features'": {"other": features},
        r"torch\.float16 features of shape \[10000, 128\]": {"features": features.float()},
        "must hold": {"features": features[:500].clone()},
        "other features than the shipped statistics": {"features": features + 0.1},
        "other features": {"features": torch.full_like(features, float("nan"))},
    }
    for message, tensors in wrong.items():
        save_file(tensors, path)
        with pytest.raises(InputError, match=f"features.safetensors .*{message}"):
            load_real_features(path)


def test_features_are_written_where_they_can_be_read(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match="must hold"):
        write_real_features(torch.zeros(2, 1, 32, 32), tmp_path / "f.safetensors")
    assert list(tmp_path.iterdir()) == []
    mean, _ = load_real_statistics()
    monkeypatch.setattr(fashion, "image_features", lambda images, classifier: mean.float().repeat(10_000, 1))
    write_real_features(torch.zeros(2, 1, 32, 32), tmp_path / "f.safetensors")
    assert torch.equal(load_real_features(tmp_path / "f.safetensors")[0], mean.half().float())
