"""`bench/objective.py`: its parts, and a run on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "objective.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_objective", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rank_correlation(script) -> None:
    assert script.spearman([1, 2, 3, 10], [0, 5, 6, 7]) == pytest.approx(1)
    assert script.spearman([1, 2, 3], [3, 2, -9]) == pytest.approx(-1)
    assert script.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert script.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)  # a shared rank of 0.5
    assert script.spearman([1, 1], [1, 2]) is None


def test_another_model_answers_within_its_timesteps_alone(script) -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x, timestep, class_labels, return_dict):
            return (torch.full_like(x, self.value) + class_labels[:, None, None, None],)

    model = script.Within(Constant(0.0), Constant(10.0), 250, 500)
    t, labels = torch.tensor([249, 250, 499, 500]), torch.arange(4)
    output = model(torch.zeros(4, 1, 2, 2), timestep=t, class_labels=labels, return_dict=False)[0]
    assert output[:, 0, 0, 0].tolist() == [0, 11, 12, 3]


def test_rounded_layers_have_as_many_levels_as_bits_say(script, model, model_inputs) -> None:
    name = "transformer_blocks.0.ff.net.2"
    weights = script.rounded_weights(model, 3).get_submodule(name).weight
    assert max(len(row.unique()) for row in weights) <= 7
    assert not torch.equal(weights, model.get_submodule(name).weight)
    seen = []
    rounded = script.rounded_inputs(model, 3)
    rounded.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    rounded(**model_inputs, return_dict=False)
    assert all(len((sample * 1e4).round().unique()) <= 8 for sample in seen[0])


def test_a_run_writes_correlations_and_what_they_are_of(script, pipeline, monkeypatch, tmp_path, capsys) -> None:
    out = tmp_path / "objective.json"
    small = ["--bits", "3", "5", "--images", "2", "--steps", "10", "--states", "1", "--probes", "2"]
    monkeypatch.setattr(sys, "argv", ["objective.py", "--model", str(pipeline), *small, "--json", str(out)])
    script.main()
    result = json.loads(out.read_text())
    rows = {row["variant"]: row for row in result["variants"]}
    assert len(rows) == len(result["variants"]) == 20
    assert set(result["spearman"]) == {"plain", "sampler", "white", "image"}
    for loss, value in result["spearman"].items():
        assert -1 <= value <= 1
        assert rows["rounded_weights 3 bits t 0-1000"][loss] > rows["rounded_weights 5 bits t 0-1000"][loss] > 0
    assert rows["rounded_inputs 3 bits t 0-1000"]["psnr_db"] < rows["rounded_inputs 5 bits t 0-1000"]["psnr_db"]
    assert len(result["sensitivity"]["image"]["by_group"]) == 10
    assert result["environment"]["torch"] == torch.__version__
    assert "mean sensitivity by time group" in capsys.readouterr().out
