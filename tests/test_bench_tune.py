"""`bench/tune.py`: which kernels it times, and what it keeps. No kernel is compiled or timed."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tqdit.architectures import dit_shapes
from tqdit.backends.triton import configurations, naming, timing, tuning
from tqdit.backends.triton.layouts import Config
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.speed.random_solution import random_solution

BENCH = Path(__file__).resolve().parent.parent / "bench"
GPU = "Some GPU 9000"


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; every candidate takes a time by its place, the second the least."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setitem(dit_shapes.SIZES, "T", (1, 2, 16))
    module, kernels = importlib.import_module("tune"), importlib.import_module("dit_kernels")
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(kernels, "compile_all", lambda jobs: None)
    monkeypatch.setattr(kernels, "maker", lambda job: kernels.Kernel(lambda config: None))
    monkeypatch.setattr(timing, "ROUNDS", timing.ROUNDS)
    monkeypatch.setattr(timing, "ROUND_MS", timing.ROUND_MS)
    monkeypatch.setattr(timing, "fastest", lambda candidates, run: [(candidates[1], 1.0), (candidates[0], 2.0)])
    monkeypatch.setattr(module, "environment", lambda device: {"device": GPU})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU)
    return module


AROUND = ("embed ", "unembed ", "poison ")


def main(monkeypatch: pytest.MonkeyPatch, tune: Any, *args: str | Path) -> str:
    """The script's last words; empty if all went well."""
    monkeypatch.setattr(sys, "argv", ["tune.py", *map(str, args)])
    try:
        tune.main()
    except SystemExit as stop:
        return str(stop.code)
    return ""


def test_it_finds_what_calls_ask_for(tune: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of every kernel that both presets launch, in both streams, at several batch sizes.

    The kernels around the blocks have one configuration for a size, which is not looked for.
    """
    loads = tune.workloads(["T"], [1, 2, 4], list(tune.STREAMS), {})
    found = {job.key for jobs in loads.values() for job in jobs}
    assert sum(map(len, loads.values())) == len(found), "each once"
    monkeypatch.setattr(tuning, "NATIVE", True)
    monkeypatch.setattr(configurations, "table", lambda gpu: {})
    config = dit_shapes.shape_config("DiT-T/2")
    for preset in ("plus", "paper"):
        for dtype in (torch.bfloat16, torch.float32):
            model = convert(random_solution(config, Recipe(preset, "w8a8")), "triton", dtype=dtype)
            for batch in (1, 2, 4):
                x, labels = torch.randn(batch, 4, 32, 32, dtype=dtype), torch.arange(batch)
                with tuning.collecting() as jobs, torch.no_grad():
                    model(x, timestep=torch.full((batch,), 500), class_labels=labels)
                assert len(jobs) >= 9
                assert {job.key for job in jobs if not job.key.startswith(AROUND)} <= found
                assert sum(job.key.startswith(AROUND) for job in jobs) == 3 or preset == "paper"


def test_all_sizes_are_asked_for(tune: Any) -> None:
    loads = tune.workloads(tune.MODELS, tune.BATCHES, list(tune.STREAMS), {})
    found = {job.key for jobs in loads.values() for job in jobs}
    for _, heads, head_dim in (dit_shapes.SIZES[name] for name in ("S", "B", "L", "XL")):
        width = heads * head_dim
        for tokens in (256, 1024):
            for batch in (1, 2, 4, 8, 16, 32, 64):
                assert naming.norm_key(batch * tokens, width, torch.bfloat16, True) in found
                assert naming.linear_key("heads", batch * tokens, 3 * width, width, 8, False, 0, True) in found
    first = next(iter(loads))
    assert first == "DiT-XL, 256 tokens, 64 samples, bfloat16"
    half = list(loads).index(next(name for name in loads if name.endswith("float32")))
    assert all(name.endswith("float32") for name in list(loads)[half:]), "streams in fp32 come last"


def test_a_run_is_kept_and_goes_on(tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    small = ("--out", tmp_path, "--models", "T", "--batches", "1", "2")
    file = configurations.tuned_file(tmp_path, GPU)
    clock = iter(range(1000))
    monkeypatch.setattr(tune.time, "monotonic", lambda: float(next(clock)))
    assert "run again" in main(monkeypatch, tune, *small, "--seconds", "3")
    some = json.loads(file.read_text())["configurations"]
    assert some
    file.write_text(json.dumps({"configurations": {key: [1, 2, 3, 8, 4, 3, 0, None, 1, 0] for key in some}}))
    assert main(monkeypatch, tune, *small) == ""
    assert "0 kernels left" in capsys.readouterr().out
    whole = json.loads(file.read_text())
    assert whole["environment"] == {"device": GPU}
    assert len(whole["configurations"]) > len(some)
    assert all(whole["configurations"][key][:3] == [1, 2, 3] for key in some), "not timed again"
    assert configurations.read(file).keys() == whole["configurations"].keys()
    assert main(monkeypatch, tune, *small, "--anew") == ""
    assert all(config[:3] != [1, 2, 3] for config in json.loads(file.read_text())["configurations"].values())


def test_only_the_first_candidates_are_timed(tune: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = []

    def fastest(candidates: tuple[Config, ...], run: Any) -> list[tuple[Config, float]]:
        counts.append(len(candidates))
        return [(candidates[-1], 1.0)]

    monkeypatch.setattr(timing, "fastest", fastest)
    main(monkeypatch, tune, "--out", tmp_path, "--models", "T", "--batches", "1", "--candidates", "2")
    assert set(counts) == {2}
