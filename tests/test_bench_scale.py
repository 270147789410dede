"""`bench/calibration_scale.py`: one real run of a small shape, and its arithmetic against counted operations."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tqdit.models.random_weights import random_float
from tqdit.models.sampler import predict
from tqdit.models.shapes import shape_config
from tqdit.recipe import Recipe

BENCH = Path(__file__).resolve().parent.parent / "bench"
SMALL = (
    "--shape", "DiT-S/8", "--blocks", "1", "--samples", "1", "--steps", "10", "--rounds", "1", "--candidates", "2",
    "--rows", "64", "--queries", "32", "--work-folder",
)  # fmt: skip


def test_a_small_run_is_measured_and_scaled_up(tmp_path) -> None:
    out = tmp_path / "scale.json"
    command = [sys.executable, BENCH / "calibration_scale.py", *SMALL, "--json", out]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert list(result["stages"]) == ["trajectories", "statistics", "search"]
    cases = result["extrapolated"]
    for name, row in result["stages"].items():
        assert cases["all blocks"]["seconds"][name] == pytest.approx(12 * row["seconds"])
        assert cases["published settings"]["seconds"][name] > cases["all blocks"]["seconds"][name]
    assert cases["published settings"]["recipe"]["samples"] == 32
    assert cases["all blocks"]["peak_rss_bytes"] > max(row["peak_rss_bytes"] for row in result["stages"].values())


def test_operations_are_those_of_the_model(monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from scale_arithmetic import operations

    config = {**shape_config("DiT-S/4"), "num_layers": 2}
    recipe = Recipe.build(samples=1, groups=1, steps=1, trajectories=1)
    model = random_float(config)
    state = torch.randn(1, 4, 32, 32)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        predict(model, state, torch.tensor([5]), torch.tensor([1]), 1.5)
    found = operations(config, recipe)
    # Patches, conditioning and final layer are left out.
    assert found["trajectories"] == pytest.approx(counted.get_total_flops(), rel=0.15)
    assert found["statistics"] == 2 * found["trajectories"]
