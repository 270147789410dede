"""`bench/calibration_scale.py`: real runs of a small shape, their arithmetic against counted operations, their page."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launcher import LOOPBACK, torchrun
from tqdit.architectures.shapes import shape_config
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import ClassLabels, arguments, predict
from tqdit.speed.random_weights import random_float

BENCH = Path(__file__).resolve().parent.parent / "bench"
SMALL = (
    "--shape", "DiT-S/8", "--blocks", "1", "--samples", "1", "--steps", "10", "--rounds", "1", "--candidates", "2",
    "--rows", "64", "--queries", "32",
)  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one process."""
    out = tmp_path_factory.mktemp("scale") / "scale.json"
    command = [sys.executable, BENCH / "calibration_scale.py", *SMALL, "--work-folder", "--json", out]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **LOOPBACK})
    return json.loads(out.read_text())


def test_a_small_run_is_measured_and_scaled_up(result) -> None:
    assert (result["processes"], result["exchange"]) == (1, "none")
    assert list(result["stages"]) == ["trajectories", "statistics", "search"]
    cases = result["extrapolated"]
    for name, row in result["stages"].items():
        assert cases["all blocks"]["seconds"][name] == pytest.approx(12 * row["seconds"])
        assert cases["published settings"]["seconds"][name] > cases["all blocks"]["seconds"][name]
    assert cases["published settings"]["recipe"]["samples"] == 32
    assert cases["all blocks"]["peak_rss_bytes"] > max(row["peak_rss_bytes"] for row in result["stages"].values())


@pytest.mark.long
def test_two_processes_choose_the_same(result, tmp_path) -> None:
    done = torchrun(BENCH / "calibration_scale.py", *SMALL, "--json", tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert (two["processes"], two["exchange"]) == (2, "gloo")
    assert two["command"].startswith("torchrun --standalone --nproc-per-node 2 bench/calibration_scale.py --shape")
    assert two["solution_sha256"] == result["solution_sha256"]
    assert list(two["stages"]) == list(result["stages"])
    # One block is one process's.
    assert two["memory_arithmetic"]["records"] == result["memory_arithmetic"]["records"]


def test_the_page_compares_with_one_process_of_like_conditions(result, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from scale_pages import scaling

    def run(processes: int, seconds: float, **changed: Any) -> dict[str, Any]:
        stages = {name: {"seconds": seconds * (i + 1)} for i, name in enumerate(result["stages"])}
        return {**result, "processes": processes, "exchange": "nccl", "stages": stages, **changed}

    one, two = run(1, 18.0), run(2, 10.0, environment={**result["environment"], "threads": 77})
    others = [run(1, 1.0, environment={**result["environment"], "device": "another"}), run(1, 1.0, blocks=5)]
    assert scaling(one, [one, two]) == []
    text = scaling(two, [*others, one, two])[0]
    assert "2 processes (nccl) take 60 s where one takes 108 s: 1.80× as fast (trajectories 1.80×," in text
    assert "choose the same scales and codes" in text
    assert "not from sharing" not in text
    late = scaling(run(2, 8.0), [one])[0]
    assert "2.25× as fast" in late
    assert "More than 2× is not from sharing" in late
    assert "sharing" not in scaling(run(3, 8.0), [one])[0]
    assert "**another**" in scaling({**two, "solution_sha256": "0"}, [one])[0]
    assert "was not measured" in scaling(two, [*others, two])[0]


def test_the_page_shows_how_sampling_scales(result, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from scale_pages import sampling

    rows = [{"processes": n, "exchange": "nccl", "images_per_second": 9.5 * n, "scaling": 0.95, "sha256": "a"}
            for n in (1, 2)]  # fmt: skip
    run = {"command": "x", "model": "m", "environment": result["environment"], "rows": rows,
           "settings": {"steps": 50, "guidance": 1.5, "batch": 32}}  # fmt: skip
    text = "\n".join(sampling(run))
    assert "the same pixels" in text
    assert "| 2 | nccl | 19 | 0.950 |" in text
    assert "**other pixels**" in "\n".join(sampling({**run, "rows": [rows[0], {**rows[1], "sha256": "b"}]}))


def test_operations_are_those_of_the_model(monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from scale_arithmetic import operations

    config = {**shape_config("DiT-S/4"), "num_layers": 2}
    recipe = Recipe("paper", samples=1, groups=1, steps=1, trajectories=1)
    model = random_float(config)
    state = torch.randn(1, 4, 32, 32)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        predict(model, state, torch.tensor([5]), *arguments(ClassLabels(1000), torch.tensor([1]), 1.5), 1.5)
    found = operations(config, recipe)
    # Patches, conditioning and final layer are left out.
    assert found["trajectories"] == pytest.approx(counted.get_total_flops(), rel=0.15)
    assert found["statistics"] == 2 * found["trajectories"]
