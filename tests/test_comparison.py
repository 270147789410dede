"""A float model and its artifacts side by side."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch

from tqdit import workflow
from tqdit.errors import InputError
from tqdit.imaging import generate
from tqdit.quality import comparison as comparison_module
from tqdit.quality.compare import compare
from tqdit.quality.comparison import HELD_OUT_SEED, fd_fashion, held_out
from tqdit.quality.fashion import FASHION
from tqdit.quality.fidelity import EpsilonFidelity
from tqdit.quality.samples import ModelRow
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import Sampling
from tqdit.sources.resolve import load_float, resolve
from tqdit.speed import cost
from tqdit.speed.memory_probe import Footprint

FAST = Sampling("ddim", 4, 1.5)


@pytest.fixture(scope="module")
def artifacts(pipeline, tiny_recipe, tmp_path_factory) -> list:
    root = tmp_path_factory.mktemp("artifacts")
    prepared = workflow.prepare(pipeline, tiny_recipe("plus"))
    for bits in ("w8a8", "w4a4"):
        solution, _ = workflow.solve_prepared(prepared, tiny_recipe("plus", bits))
        workflow.save(solution, prepared.source, root / bits)
    return [root / "w8a8", root / "w4a4"]


@pytest.fixture(scope="module")
def comparison(pipeline, artifacts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "footprint", lambda request: Footprint(1000, 3000, None))
        return compare(pipeline, artifacts, num=3, sampling=FAST, samples=2)


def test_a_residual_stream_in_bf16_is_another_model(pipeline, artifacts, comparison) -> None:
    found = compare(pipeline, artifacts[:1], num=3, sampling=FAST, samples=2, dtype=torch.bfloat16, cost=False)
    assert found.settings["dtype"] == "bfloat16"
    assert [row.stream_dtype for row in (found.float_model, *found.models)] == [None, "bfloat16"]
    assert torch.equal(found.float_model.images, comparison.float_model.images)
    (ours,), (before, _) = found.models, comparison.models
    assert ours.eps.overall != before.eps.overall
    assert abs(ours.eps.overall - before.eps.overall) < 3
    with pytest.raises(InputError, match="dtype 'int8' is not one of float32, float16, bfloat16"):
        compare(pipeline, artifacts[:1], dtype="int8")


def test_json_has_every_figure(comparison, model) -> None:
    value = json.loads(comparison.with_seconds([1.0, 2.0]).to_json())
    assert set(value) == {"environment", "settings", "reference", "models"}
    assert value["settings"] == {
        "num": 3, "samples_per_group": 2, "groups": 10, "states": 20, "call_batch": 6,
        "seed": 0, "dtype": "float32", "sampler": "ddim", "steps": 4,
        "guidance": 1.5,
    }  # fmt: skip
    reference = value["reference"]
    assert reference["bits"] == "float32"
    assert reference["eps_sqnr_db"] is None
    assert reference["size_bytes"] == 4 * sum(p.numel() for p in model.parameters())
    assert reference["file_dtype"] == "float32"
    assert reference["speedup_over_float32_eager"] == 1
    assert [row["name"] for row in value["models"]] == ["w8a8", "w4a4"]
    assert [row["bits"] for row in value["models"]] == ["w8a8", "w4a4"]
    assert [row["calibration_seconds"] for row in value["models"]] == [1.0, 2.0]
    for row in value["models"]:
        assert row["preset"] == "plus"
        assert len(row["eps_sqnr_db_by_group"]) == 4
        assert row["size_ratio_bfloat16"] == pytest.approx(2 * row["size_ratio"])
        assert row["size_ratio_file"] == row["size_bytes"] / reference["file_bytes"]
        assert (row["resident_bytes"], row["peak_bytes"]) == (1000, 3000)
        assert row["speedup_over_float32_eager"] > 0
        assert min(row["eps_sqnr_db_by_group"]) <= row["eps_sqnr_db"] <= max(row["eps_sqnr_db_by_group"])
        assert row["size_bytes"] > 0
        assert row["size_ratio"] == pytest.approx(row["size_bytes"] / reference["size_bytes"])
        assert row["fd_fashion"] is None  # the bundled classifier wants 32 x 32 images


def test_more_bits_are_closer(comparison) -> None:
    eight, four = comparison.models
    assert eight.eps.overall > 20
    assert eight.eps.overall > four.eps.overall + 5
    assert eight.psnr_db > four.psnr_db + 5
    assert eight.size_bytes > four.size_bytes


def test_images_are_those_of_sample(comparison, pipeline, artifacts) -> None:
    for row, source in zip((comparison.float_model, *comparison.models), (pipeline, *artifacts), strict=True):
        assert torch.equal(row.images, workflow.sample(source, [], 3, FAST))


def test_states_by_timestep(comparison) -> None:
    by_timestep = comparison.models[0].eps.by_timestep
    assert [t * 10 // 1000 for t, _ in by_timestep] == [g for g in range(10) for _ in range(2)]


def test_same_states_whatever_stands_beside(comparison, pipeline, artifacts, tiny_recipe, tmp_path) -> None:
    """Alone, and beside a model of other time groups, a model has the same figures."""
    recipe = tiny_recipe(groups=25, rounds=0, hessian=False, samples=1, steps=50)
    workflow.quantize(pipeline, tmp_path / "fine", recipe)
    both = compare(pipeline, [*artifacts[:1], tmp_path / "fine"], num=3, sampling=FAST, samples=2, cost=False)
    assert both.models[0] == replace(comparison.models[0], cost=None, images=ANY, solution=ANY)
    assert len(both.models[1].eps.by_group) == 25
    assert any(math.isnan(db) for db in both.models[1].eps.by_group)  # 20 states do not visit 25 groups


def test_largest_seed(pipeline, artifacts) -> None:
    found = compare(pipeline, artifacts[:1], num=1, sampling=FAST, samples=1, seed=2**31 - 1, cost=False)
    assert found.models[0].psnr_db > 10


def test_held_out_states_are_not_calibration_states(pipeline, data) -> None:
    source = resolve(pipeline)
    model = load_float(source)
    other = held_out(source, model, 4, 2, HELD_OUT_SEED)
    assert other.group.bincount().tolist() == [2] * 4
    assert torch.cdist(other.x.flatten(1), data.x.flatten(1)).min() > 0.1


@pytest.mark.parametrize("groups", [1, 7, 10, 25, 30, 45, 64])
def test_held_out_states_for_any_number_of_groups(pipeline, tiny_dit, groups: int) -> None:
    source = resolve(pipeline)
    other = held_out(source, tiny_dit(num_layers=1), groups, 1, HELD_OUT_SEED)
    assert other.group.tolist() == list(range(groups))


@pytest.mark.parametrize(("total", "groups"), [(37, 37), (100, 30), (500, 7), (2000, 1100)])
def test_held_out_states_of_any_number_of_timesteps(pipeline, tiny_dit, scheduler_config, total, groups) -> None:
    source = replace(resolve(pipeline), scheduler={**scheduler_config, "num_train_timesteps": total})
    other = held_out(source, tiny_dit(num_layers=1), groups, 1, HELD_OUT_SEED)
    assert other.group.tolist() == list(range(groups))


@pytest.mark.parametrize("arguments", [{"num": 0}, {"samples": 0}])
def test_nothing_to_compare_is_an_error(pipeline, artifacts, arguments: dict) -> None:
    with pytest.raises(InputError, match="at least 1"):
        compare(pipeline, artifacts, **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"samples": "3"}, "samples must be a whole number of at least 1, got '3'"),
        ({"samples": 1.5}, "samples must be a whole number of at least 1, got 1.5"),
        ({"num": True}, "num must be a whole number of at least 1, got True"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2147483647, got -1"),
        ({"seed": "a"}, "seed must be a whole number from 0 to 2147483647, got 'a'"),
        ({"sampling": [1]}, "sampling must be a tqdit.Sampling, got [1]"),
        ({"cost": "no"}, "cost must be True or False, got 'no'"),
        ({"quantized": 5}, "quantized must be the path of an artifact or a list of them, got 5"),
        ({"quantized": [5]}, "quantized must be the path of an artifact or a list of them, got [5]"),
        ({"quantized": []}, "quantized must name at least one artifact, got an empty list"),
    ],
)
def test_nonsense_is_named_before_any_work(pipeline, artifacts, monkeypatch, arguments: dict, said: str) -> None:
    monkeypatch.setattr(comparison_module, "load_float", pytest.fail)
    with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
        compare(**{"reference": pipeline, "quantized": artifacts, **arguments})


def test_float_model_among_the_artifacts(pipeline) -> None:
    with pytest.raises(InputError, match="not quantized"):
        compare(pipeline, [pipeline], num=1)


def test_artifact_as_the_reference(artifacts) -> None:
    with pytest.raises(InputError, match="already quantized"):
        compare(artifacts[0], artifacts, num=1)


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_layers": 1}])
def test_artifact_of_another_model(tiny_dit, artifacts, tmp_path, change: dict) -> None:
    tiny_dit(**change).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"w8a8' was not made from 'other'.*'tiny-dit'"):
        compare(tmp_path / "other", artifacts, num=1)


def test_the_same_weights_in_other_heads(own_pipeline, artifacts) -> None:
    path = own_pipeline / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 4, "attention_head_dim": 8}))
    with pytest.raises(InputError, match="was made of a model with attention_head_dim 16, 'tiny-dit' has 8"):
        compare(own_pipeline, artifacts, num=1)


def test_scheduler_of_another_length(own_pipeline, artifacts, scheduler_config) -> None:
    config = {**scheduler_config, "num_train_timesteps": 500}
    (own_pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"\[0, 1000\).*\[0, 500\)"):
        compare(own_pipeline, artifacts, num=1)


def test_latent_model_without_its_vae_stops_before_sampling(tiny_dit, tmp_path, monkeypatch) -> None:
    tiny_dit(in_channels=4, out_channels=8, num_layers=1).save_pretrained(tmp_path / "latent")
    monkeypatch.setattr(generate, "sample_latents", pytest.fail)
    with pytest.raises(InputError, match="vae"):
        compare(tmp_path / "latent", [], num=1)


def test_figures_that_are_not_finite_are_null(comparison) -> None:
    eps = EpsilonFidelity(math.inf, [math.nan, 30.0], [])
    row = replace(comparison.models[0], eps=eps, psnr_db=math.nan, fd_fashion=math.inf)
    figures = row.figures()
    assert figures["eps_sqnr_db_by_group"] == [None, 30.0]
    assert {figures[key] for key in ("eps_sqnr_db", "psnr_db", "fd_fashion")} == {None}
    replace(comparison, models=(row,)).to_json()


def test_fd_fashion_is_for_fashion_alone() -> None:
    source = resolve("fashion-dit")
    pixels = torch.rand(3, 1, 32, 32) * 2 - 1
    assert fd_fashion(source, pixels) > 0
    digits = replace(source, labels={i: str(i) for i in range(len(FASHION))})
    assert fd_fashion(digits, pixels) is None
    assert fd_fashion(source, pixels[:1]) is None
    assert fd_fashion(source, pixels[..., 1:]) is None
    assert fd_fashion(source, pixels * math.nan) is None


def test_memory_that_cannot_be_measured_is_none(model, monkeypatch, caplog) -> None:
    def fail(request: dict) -> Footprint:
        raise RuntimeError("killed")

    monkeypatch.setattr(cost, "footprint", fail)
    assert cost.memory({}, 2, torch.device("cpu"), None) is None
    assert "memory of the float model could not be measured: killed" in caplog.text


def test_time_is_the_median_of_interleaved_calls(model, monkeypatch) -> None:
    called = []

    def interleaved(calls: dict, repeats: int, progress) -> dict:
        assert [call(number).shape for call in calls.values() for number in range(repeats)]
        called.extend(calls)
        return dict(zip(calls, ([400.0, 4.0, 6.0], [2.0, 1.0, 90.0], [3.0, 3.0, 9.0]), strict=True))

    monkeypatch.setattr(cost, "interleaved", interleaved)
    found = cost.timed(model, {"one": model, "two": model}, model.config, 4, 1000)
    assert len(set(called)) == len(called) == 3
    assert (found["one"].ms_per_call, found["one"].float32_ms, found["one"].speedup) == (2.0, 6.0, 3.0)
    assert found["two"] == cost.Cost(3.0, 6.0)


@pytest.mark.parametrize(("together", "shared"), [(2**30, 1), (0, 2)], ids=["small", "large"])
def test_small_artifacts_are_timed_in_turn(model, monkeypatch, together: int, shared: int) -> None:
    """Two in one run with the float model, or a run for each."""
    runs = []

    def timed(float_model, models: dict, *_: object) -> dict:
        runs.append(list(models))
        return {name: cost.Cost(float(len(runs)), 8.0) for name in models}

    monkeypatch.setattr(comparison_module, "timed", timed)
    monkeypatch.setattr(comparison_module, "convert", lambda *_: model)
    monkeypatch.setattr(comparison_module, "TOGETHER", together)
    calls = comparison_module._Calls(SimpleNamespace(config={}, num_timesteps=10), Sampling(), 4, Target())
    pixels = torch.zeros(1, 1, 2, 2)
    rows = [ModelRow(name, "plus", "w8a8", 1, 0.25, pixels, None) for name in ("a", "b")]
    found = [SimpleNamespace(solution=None) for _ in rows]
    reported = []
    done = calls.timed(model, found, rows, lambda stage, fraction: reported.append((stage, fraction)))
    assert len(runs) == shared
    assert sorted(name for names in runs for name in names) == ["0", "1"]
    assert [row.cost.ms_per_call for row in done] == [1.0, float(shared)]
    assert reported == [("timing", at / shared) for at in range(shared)]
