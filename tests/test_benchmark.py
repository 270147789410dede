"""The benchmark: what a row says, what is refused, what is skipped. Child processes and peaks are replaced but once."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tqdit.architectures import dit_shapes, shapes
from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.speed import baselines, benchmark, contest, entrants
from tqdit.speed.benchmark import Benchmark, RandomModel, bench, kernel_counts
from tqdit.speed.entrants import BenchSettings, workload
from tqdit.speed.machine import Peaks
from tqdit.speed.memory_probe import Footprint
from tqdit.speed.operations import count_operations

FAST = {"batches": (4,), "repeats": 3, "sampling": Sampling("ddim", 2, 1.5)}
TINY = RandomModel("DiT-T/4", Recipe("plus", "w8a8"))
KEYS = {
    "model", "backend", "workload", "batch", "p20_ms", "p50_ms", "p80_ms", "peak_bytes", "integer", "speedup_over",
    "speedup_over_each", "bits", "preset", "dtype", "resident_bytes", "load_seconds", "images_per_second", "operations",
    "operations_executed", "floor_ms", "floor_fraction", "kernels",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny published shape, no compiler, no children, known peaks."""
    monkeypatch.setattr(dit_shapes, "SIZES", {**dit_shapes.SIZES, "T": (1, 2, 16)})
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(benchmark, "measure_peaks", lambda device: Peaks(100.0, 10.0))
    monkeypatch.setattr(
        contest, "footprint", lambda request: Footprint(1000, 2000, 0.5 if "artifact" in request else None)
    )


@pytest.fixture(scope="module")
def folder(solved: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts") / "tiny-w6a6"
    folder.mkdir()
    artifact.write(solved("paper", "w6a6"), folder)
    return folder


def run(*models: Path, random: RandomModel | None = None, **settings) -> Benchmark:
    how = BenchSettings(**{**FAST, "against": ("float32", "bfloat16"), **settings})
    return bench(models, [random] if random else [], how)


def test_rows_of_an_artifact(folder: Path, solved: Callable) -> None:
    result = run(folder)
    ours, *floats = result.rows
    assert (ours.model, ours.backend, ours.bits, ours.batch) == ("tiny-w6a6", "cpu", "w6a6", 4)
    assert {row.workload for row in result.rows} == {"8-b4"}, "one channel: pixels, not latents"
    assert ours.integer
    assert [row.backend for row in floats] == [
        "float32-eager", "float32-compiled", "bf16-eager", "bf16-compiled",
    ]  # fmt: skip
    assert not any(row.integer or row.speedup_over or row.speedup_over_each or row.kernels for row in floats)
    assert {row.model for row in floats} == {"DiT-2x32/2@8"}
    for row in result.rows:
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert (row.resident_bytes, row.peak_bytes) == (1000, 2000)
    assert [row.load_seconds for row in result.rows] == [0.5, None, None, None, None]
    medians = {row.backend: row.p50_ms for row in floats}
    assert ours.speedup_over == {
        family: min(medians[f"{prefix}-eager"], medians[f"{prefix}-compiled"]) / ours.p50_ms
        for family, prefix in (("float32", "float32"), ("bfloat16", "bf16"))
    }
    assert ours.speedup_over_each == {name: median / ours.p50_ms for name, median in medians.items()}
    operations = count_operations(solved("paper", "w6a6"), 4)
    assert (ours.operations, ours.operations_executed) == (operations.integer, operations.executed)
    assert ours.floor_ms == pytest.approx(operations.floor_ms(100.0, 10.0))
    assert ours.floor_fraction == pytest.approx(ours.floor_ms / ours.p50_ms)
    assert sum(ours.kernels.values()) == len(solved("paper", "w6a6").sites) == len(result.sites[0][1])


def test_sampling_runs_are_of_the_fastest_of_each_family(folder: Path) -> None:
    result = run(folder)
    rates = {row.backend: row.images_per_second for row in result.rows}
    assert rates["cpu"] > 0
    for prefix in ("float32", "bf16"):
        members = [row for row in result.rows if row.backend.startswith(prefix)]
        fastest = min(members, key=lambda row: row.p50_ms)
        assert [row.images_per_second is not None for row in members] == [row is fastest for row in members]
    assert {row.images_per_second for row in run(folder, sampling=None).rows} == {None}


def test_json_values(folder: Path) -> None:
    value = json.loads(json.dumps(run(folder, random=TINY).figures(), allow_nan=False))
    assert set(value) == {"environment", "settings", "skipped", "rows"}
    assert {"cpu", "torch", "threads", "torchao"} <= set(value["environment"])
    assert (value["environment"]["int8_peak_gops"], value["environment"]["read_gb_per_s"]) == (100.0, 10.0)
    assert value["settings"]["sampling"] == {"sampler": "ddim", "steps": 2, "guidance": 1.5}
    assert (value["settings"]["batches"], value["settings"]["images"], value["settings"]["repeats"]) == ([4], [2], 3)
    assert value["skipped"] == {}
    assert all(set(row) == KEYS for row in value["rows"])


def test_dtype_of_the_residual_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on a GPU unless another is asked for; the process that measures memory has the same."""
    assert {row.dtype for row in run(folder).rows} == {"float32", None}
    assert [entrants.default_dtype(torch.device(kind)) for kind in ("cuda", "cpu")] == ["bfloat16", "float32"]
    asked = []
    monkeypatch.setattr(contest, "footprint", lambda request: asked.append(request) or Footprint(1, 2, None))
    models = []
    monkeypatch.setattr(entrants, "convert", lambda *given: models.append(convert(*given)) or models[-1])
    ours, *_ = run(folder, dtype="bfloat16").rows
    assert ours.dtype == "bfloat16"
    assert [request.get("dtype") for request in asked if "artifact" in request] == ["bfloat16"]
    assert models[0].stream_dtype is torch.bfloat16
    ours, *_ = run(folder, dtype="float16").rows
    assert ours.dtype == "float16"
    assert models[1].stream_dtype is torch.float16
    with pytest.raises(InputError, match="dtype 'float64' is not one of float32, float16, bfloat16"):
        run(folder, dtype="float64")


def test_the_dtype_is_that_of_the_stream_itself(tmp_path: Path, solved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float16 model has an fp32 stream where fp16 might not hold it: that is what the row says."""
    artifact.write(replace(solved("paper", "w6a6"), stream_max=1e5), tmp_path)
    asked = []
    monkeypatch.setattr(contest, "footprint", lambda request: asked.append(request) or Footprint(1, 2, None))
    ours, *_ = run(tmp_path, dtype="float16").rows
    assert ours.dtype == "float32"
    assert [request.get("dtype") for request in asked if "artifact" in request] == ["float16"]


def test_models_of_one_shape_share_baselines_and_others_have_their_own(folder: Path) -> None:
    result = run(folder, folder, random=TINY, against=("float32",))
    assert [(row.model, row.integer) for row in result.rows] == [
        ("tiny-w6a6", True), ("tiny-w6a6", True), ("DiT-2x32/2@8", False), ("DiT-2x32/2@8", False),
        ("DiT-T/4", True), ("DiT-T/4", False), ("DiT-T/4", False),
    ]  # fmt: skip
    rows = result.rows
    for ours, rivals in ((rows[0], rows[2:4]), (rows[1], rows[2:4]), (rows[4], rows[5:])):
        assert ours.speedup_over["float32"] == min(rival.p50_ms for rival in rivals) / ours.p50_ms
    assert [model for model, _ in result.sites] == ["tiny-w6a6", "tiny-w6a6", "DiT-T/4"]


def test_random_model_is_as_its_recipe_says() -> None:
    (row,) = run(random=RandomModel("DiT-T/4@512", Recipe("paper", "w4a6")), against=(), batches=(1,)).rows
    assert (row.model, row.bits, row.preset, row.speedup_over) == ("DiT-T/4@512", "w4a6", "paper", {})


def test_what_the_child_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model is loaded from a real artifact, which is there while the child runs and gone afterwards."""
    requests = []

    def footprint(request) -> Footprint:
        if "artifact" in request:
            artifact.read(Path(request["artifact"]))
        requests.append(request)
        return Footprint(1, 2, 3.0)

    monkeypatch.setattr(contest, "footprint", footprint)
    run(folder, random=TINY, against=("float32",))
    assert [request.get("baseline") for request in requests] == [
        None, "float32-eager", "float32-compiled", None, "float32-eager", "float32-compiled",
    ]  # fmt: skip
    assert requests[0]["artifact"] == str(folder)
    assert not Path(requests[3]["artifact"]).exists()
    assert requests[3]["backend"] == "cpu", "what auto became"
    assert {request["threads"] for request in requests} == {torch.get_num_threads()}
    json.dumps(requests)


def test_timesteps_differ_between_calls_and_are_the_models_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[int]] = {}
    call = baselines.DenoiserCall.__call__

    def spy(self, t: int):
        seen.setdefault(id(self), []).append(t)
        return call(self, t)

    monkeypatch.setattr(baselines.DenoiserCall, "__call__", spy)
    run(folder, sampling=None, against=("float32",), repeats=5)
    assert len(seen) == 3
    assert len({tuple(timesteps) for timesteps in seen.values()}) == 1, "the same for every contender"
    (timesteps,) = {tuple(timesteps) for timesteps in seen.values()}
    warm_up, timed = timesteps[: entrants.WARM_UP], timesteps[entrants.WARM_UP :]
    assert len(set(warm_up)) == 2
    assert len(set(timed)) == 5
    assert max(timed) - min(timed) >= 800


def test_simulated_arithmetic_is_never_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "read", lambda *_: pytest.fail("built"))
    monkeypatch.setattr(benchmark, "random_solution", lambda *_: pytest.fail("built"))
    with pytest.raises(InputError, match="simulated arithmetic is never timed"):
        run(folder, random=TINY, backend="simulated")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"batches": (4, 0)}, "batch"),
        ({"batches": ()}, "batch"),
        ({"repeats": 0}, "repeats"),
        ({"against": ("tensorrt",)}, "tensorrt"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"backend": "abacus"}, "abacus"),
        ({"sampling": Sampling("ddim", 1001)}, "1001"),
        ({"random": RandomModel("DiT-M/2", Recipe())}, "DiT-M/2"),
    ],
)
def test_wrong_settings_stop_before_building(folder: Path, monkeypatch, settings: dict, named: str) -> None:
    for module, name in ((artifact, "read"), (benchmark, "random_solution"), (benchmark, "measure_peaks")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("built"))
    with pytest.raises(InputError, match=named):
        run(folder, **settings)


def test_nothing_to_time(pipeline: Path) -> None:
    with pytest.raises(InputError, match="nothing to time: give an artifact, or a random model"):
        run()
    with pytest.raises(InputError, match=r"nothing to time: '.*tiny-dit' is a float model; quantize it first"):
        run(pipeline)


def test_a_baseline_that_does_not_compile_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model, **_):
        def call(*args, **kwargs):
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    result = run(folder)
    assert result.skipped == {
        "DiT-2x32/2@8 float32-compiled at 8-b4": "no C++ compiler",
        "DiT-2x32/2@8 bf16-compiled at 8-b4": "no C++ compiler",
    }
    assert result.failed == (), "baselines are no failure of ours"
    ours, *floats = result.rows
    assert [row.backend for row in floats] == ["float32-eager", "bf16-eager"]
    assert ours.speedup_over["float32"] == floats[0].p50_ms / ours.p50_ms
    assert floats[0].images_per_second > 0


def test_torchao_that_is_missing_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    result = run(folder, against=("torchao",))
    assert "pip install 'torchao" in result.skipped["DiT-2x32/2@8 torchao-int8"]
    assert [row.speedup_over for row in result.rows] == [{}]


def test_a_baseline_that_cannot_be_built_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = entrants.build

    def without_memory(names, *rest):
        if names[0].startswith("bf16"):
            raise RuntimeError("backend='inductor' raised:\nOutOfMemoryError: not enough memory\nand a long story")
        return build(names, *rest)

    monkeypatch.setattr(entrants, "build", without_memory)
    result = run(folder)
    reason = "backend='inductor' raised: OutOfMemoryError: not enough memory"
    assert result.skipped == {f"DiT-2x32/2@8 bf16-{way}": reason for way in ("eager", "compiled")}
    assert list(result.rows[0].speedup_over) == ["float32"]


def test_single_contenders_can_be_asked_for(folder: Path) -> None:
    result = run(folder, against=("bf16-compiled", "float32-eager"))
    assert [row.backend for row in result.rows] == ["cpu", "float32-eager", "bf16-compiled"]
    assert list(result.rows[0].speedup_over) == ["float32", "bfloat16"]


def test_a_quick_run_measures_peaks_once_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(benchmark, "measure_peaks", lambda device: measured.append(device) or Peaks(100.0, 10.0))
    result = run(folder, quick=True, sampling=None, memory=False)
    assert len(measured) == 1
    assert result.figures()["settings"]["quick"] is True
    assert [row.backend for row in result.rows[1:]] == [
        "float32-eager",
        "float32-compiled",
        "bf16-eager",
        "bf16-compiled",
    ]
    run(folder, against=())
    assert len(measured) == 3


def test_several_batches_are_raced_with_the_same_models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, requests = [], []
    build, convert = entrants.build, entrants.convert
    monkeypatch.setattr(entrants, "build", lambda names, *rest: built.append(names) or build(names, *rest))
    monkeypatch.setattr(entrants, "convert", lambda *given: built.append("ours") or convert(*given))
    monkeypatch.setattr(contest, "footprint", lambda request: requests.append(request) or Footprint(1, 2, 3.0))
    result = run(folder, batches=(4, 2), against=("float32",))
    assert built == ["ours", ["float32-eager", "float32-compiled"]], "once each"
    assert [(row.workload, row.backend) for row in result.rows] == [
        (f"8-b{batch}", backend) for batch in (4, 2) for backend in ("cpu", "float32-eager", "float32-compiled")
    ]
    assert [request["batch"] for request in requests] == [4, 4, 4, 2, 2, 2]
    large, small = result.rows[0], result.rows[3]
    assert large.operations == 2 * small.operations
    for ours, rivals in ((large, result.rows[1:3]), (small, result.rows[4:])):
        assert ours.speedup_over["float32"] == min(rival.p50_ms for rival in rivals) / ours.p50_ms
    assert len(result.sites) == 2


def test_latents_count_as_the_images_they_make() -> None:
    assert workload(shapes.shape_config("DiT-XL/2"), 64) == "256-b64"
    assert workload(shapes.shape_config("DiT-XL/2@512"), 16) == "512-b16"


def test_memory_is_measured_only_if_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "footprint", lambda request: pytest.fail("a process"))
    (row,) = run(folder, against=(), memory=False).rows
    assert (row.peak_bytes, row.resident_bytes, row.load_seconds) == (None, None, None)


def breaking(monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
    """Make converting fail for the artifacts of those numbers, in order."""
    convert, calls = entrants.convert, []

    def sometimes(*given):
        calls.append(given)
        if len(calls) - 1 in numbers:
            raise RuntimeError("broken kernel\nat this line")
        return convert(*given)

    monkeypatch.setattr(entrants, "convert", sometimes)


def test_a_model_of_ours_that_fails_is_named_and_the_rest_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaking(monkeypatch, {1})
    result = run(folder, random=TINY, against=("float32-eager",))
    assert [(row.model, row.backend) for row in result.rows] == [
        ("tiny-w6a6", "cpu"), ("DiT-2x32/2@8", "float32-eager"),
    ]  # fmt: skip
    assert result.skipped == {"DiT-T/4 plus w8a8": "broken kernel"}
    assert result.failed == ("DiT-T/4 plus w8a8",)
    assert "in sometimes" in caplog.text, "where it happened"


def test_a_model_of_ours_that_fails_at_one_batch_is_in_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = entrants.DenoiserCall

    def picky(module, config, batch, device):
        if batch == 4:
            raise RuntimeError("too large")
        return call(module, config, batch, device)

    monkeypatch.setattr(entrants, "DenoiserCall", picky)
    result = run(folder, batches=(4, 2), against=("float32",))
    assert {row.workload for row in result.rows} == {"8-b2"}, "baselines alone are not worth their time"
    assert result.failed == ("tiny-w6a6 at 8-b4",)


def test_nothing_left_of_ours_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, {0, 1})
    with pytest.raises(RuntimeError, match="broken kernel"):
        run(folder, random=TINY)


def test_a_damaged_artifact_is_an_error_whatever_else_there_is(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    file = damaged / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match="safetensors"):
        run(folder, damaged, against=())


def test_memory_that_cannot_be_measured_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(request):
        raise RuntimeError("the process ended with code -9")

    monkeypatch.setattr(contest, "footprint", killed)
    result = run(folder, against=())
    assert result.skipped == {"memory of tiny-w6a6 cpu at 8-b4": "the process ended with code -9"}
    assert (result.rows[0].peak_bytes, result.rows[0].load_seconds) == (None, None)


def test_kernel_counts() -> None:
    report = {"a": "linear", "b": "values", "c": "linear", "d": "another"}
    assert list(kernel_counts(report).items()) == [("linear", 2), ("another", 1), ("values", 1)]


def test_best_of_nothing() -> None:
    assert math.isnan(contest.best_of([], "float32"))


@pytest.mark.long
def test_compiled_baselines_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One layer, compiled, in a child process too: the compiler is imported, so it is not in the memory."""
    monkeypatch.undo()
    monkeypatch.setattr(dit_shapes, "SIZES", {**dit_shapes.SIZES, "T": (1, 2, 16)})
    monkeypatch.setattr(benchmark, "measure_peaks", lambda device: Peaks(100.0, 10.0))
    result = run(random=TINY, against=("float32",))
    assert result.skipped == {} or "C++" in result.skipped["DiT-T/4 float32-compiled at 256-b4"]
    assert result.rows[0].load_seconds > 0
    for row in result.rows:
        assert 0 < row.peak_bytes < 200e6
