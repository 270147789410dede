"""A tiny DiT whose every weight matters, its calibration, its solutions, and a pipeline folder of it on disk."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported, and diffusers imports Triton
    assert "triton" not in sys.modules, "a conftest.py of a folder imports Triton too early"
    os.environ["TRITON_INTERPRET"] = "1"

from torch import nn

from tiny_dit import GROUPS, SCHEDULER, build_dit, build_recipe, write_pipeline
from tqdit.calibration import trajectories
from tqdit.calibration.recorder import record
from tqdit.calibration.records import Records
from tqdit.calibration.trajectories import CalibrationSet, collect
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.search.solver import solve
from tqdit.spec import Solution
from tqdit.system import distributed
from tqdit.timegroups import TimeGroups


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: on a busy machine, waiting for a second thread takes 100 times the work itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def automatic_device() -> Iterator[Callable[..., str]]:
    """Choose the CPU on every machine where a test names no device; yield the function that would choose."""
    choose = distributed.chosen_device

    def on_the_cpu(device: str | torch.device = "auto") -> str:
        return "cpu" if device == "auto" else choose(device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "chosen_device", on_the_cpu)
        yield choose


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_dit() -> Callable[..., nn.Module]:
    """Factory of tiny models: seed and changes of the config."""
    return build_dit


@pytest.fixture(scope="session")
def tiny_recipe() -> Callable[..., Recipe]:
    """Factory of recipes small enough for the tiny model."""
    return build_recipe


@pytest.fixture(scope="session")
def scheduler_config() -> dict[str, Any]:
    return SCHEDULER


@pytest.fixture(scope="session")
def model() -> nn.Module:
    """The float model that every other session fixture is made from; never to be changed."""
    return build_dit()


@pytest.fixture(scope="session")
def data(model: nn.Module) -> CalibrationSet:
    """All that is made from it is the same on every CPU but for the order of sums."""
    with pytest.MonkeyPatch.context() as patch:
        draw_in_float32(patch)
        return collect(model, SCHEDULER, build_recipe())


@pytest.fixture
def states_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like those of `data`."""
    draw_in_float32(monkeypatch)


def draw_in_float32(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trajectories, "draws_in_bf16", lambda device: False)


@pytest.fixture(scope="session")
def records(model: nn.Module, data: CalibrationSet) -> Records:
    return record(model, data, build_recipe())


@pytest.fixture(scope="session")
def solved(model: nn.Module, records: Records) -> Callable[..., Solution]:
    """Solutions of the tiny model by recipe; solved once each, never to be changed."""
    cache: dict[str, Solution] = {}

    def get(preset: str = "paper", bits: str = "w8a8", **overrides: Any) -> Solution:
        recipe = build_recipe(preset, bits, **overrides)
        key = recipe.to_toml()
        if key not in cache:
            provenance = Provenance(recipe=recipe.model_dump(mode="json"))
            cache[key] = solve(model, records, recipe, TimeGroups.uniform(0, 1000, GROUPS), provenance)
        return cache[key]

    return get


@pytest.fixture(scope="session")
def pipeline(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a diffusers pipeline folder; read only."""
    return write_pipeline(tmp_path_factory.mktemp("source") / "tiny-dit", model)


@pytest.fixture
def own_pipeline(model: nn.Module, tmp_path: Path) -> Path:
    """A pipeline folder that the test may damage."""
    return write_pipeline(tmp_path / "tiny-dit", model)


@pytest.fixture
def model_inputs(data: CalibrationSet) -> dict[str, torch.Tensor]:
    """Keyword arguments of a denoiser call whose samples are in different time groups."""
    return {"hidden_states": data.x, "timestep": data.t, "class_labels": data.labels}
