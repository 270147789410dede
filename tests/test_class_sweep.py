"""The sweep over transformer classes finds the cases of a checkout, and says what is wrong with a class."""

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import tqdit
from tqdit.layers.quantized import QuantizedLinear

SCRIPT = Path(__file__).resolve().parent.parent / "bench/class_sweep.py"
TARGET = 30.0
COMMON = "class BaseModelTesterConfig:\n    pass\n"
MODULE = """
import os

import torch
from diffusers import DiTTransformer2DModel, ZImageTransformer2DModel

from ..testing_utils import BaseModelTesterConfig


class DiTTesterConfig(BaseModelTesterConfig):
    model_class = DiTTransformer2DModel

    def get_init_dict(self):
        return {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "sample_size": 8, "patch_size": 2,
                "in_channels": 1, "out_channels": 1, "num_embeds_ada_norm": 10}

    def get_dummy_inputs(self):
        labels = torch.tensor([3, 4])
        return {"hidden_states": torch.zeros(2, 1, 8, 8), "timestep": torch.tensor([900, 900]), "class_labels": labels}


class DiTHubTesterConfig(DiTTesterConfig):
    def get_dummy_inputs(self):
        raise AssertionError("arguments of a model that is not here")


class TestDiT(DiTTesterConfig):
    def get_init_dict(self):
        raise AssertionError("a test, no config")


class ZImageTesterConfig(BaseModelTesterConfig):
    model_class = ZImageTransformer2DModel

    def get_init_dict(self):
        return {"dim": "wide"}

    def get_dummy_inputs(self):
        return {}
"""


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with few settings of a search."""
    spec = importlib.util.spec_from_file_location("class_sweep", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "class_sweep", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECIPE", {**module.RECIPE, "rounds": 0, "hessian": "none", "rows": 16})
    return module


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout with two classes, one of which cannot be built, and modules that cannot be imported or crash."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "tests"}
    for name in before:
        del sys.modules[name]
    folder = tmp_path / "tests/models/transformers"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").touch()
    (folder.parent / "testing_utils.py").write_text(COMMON)
    (folder / "test_two.py").write_text(MODULE)
    (folder / "test_absent.py").write_text("import a_package_that_is_not_here\n")
    (folder / "test_crash.py").write_text("import os\nos._exit(3)\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    sys.modules.update(before)


def two(sweep: ModuleType, checkout: Path) -> tuple[Any, Any]:
    """The cases of the module of two classes."""
    dit, z_image = sweep.cases(checkout, "test_two")
    return dit, z_image


def test_cases_are_the_configs_of_their_own(sweep: ModuleType, checkout: Path) -> None:
    assert sweep.modules(checkout) == ["test_absent", "test_crash", "test_two"]
    assert [case.name for case in two(sweep, checkout)] == ["DiTTransformer2DModel", "ZImageTransformer2DModel"]
    with pytest.raises(SystemExit, match="no checkout of diffusers"):
        sweep.modules(checkout / "tests")


def test_a_class_passes(sweep: ModuleType, checkout: Path) -> None:
    dit, _ = two(sweep, checkout)
    row = sweep.attempt(dit, TARGET)
    assert row["failures"] == []
    assert row["sqnr_db"] >= TARGET
    assert row["layers_checked"] == row["quantized"] + row["weight_only"]
    assert row["quantized"] == 6, "query, key, value, output, and two layers of feed-forward"
    linears = sum(isinstance(layer, nn.Linear) for layer in sweep.float_model(dit).modules())
    assert row["quantized"] + row["weight_only"] + sum(row["left"].values()) == linears


def test_a_class_that_cannot_be_built_is_skipped(sweep: ModuleType, checkout: Path) -> None:
    _, z_image = two(sweep, checkout)
    assert sweep.attempt(z_image, TARGET)["skipped"].startswith("the float model does not run: TypeError")


def test_errors_and_losses_are_failures(sweep: ModuleType, checkout: Path) -> None:
    dit, _ = two(sweep, checkout)

    def refuse(*_: Any, **__: Any) -> nn.Module:
        raise tqdit.InputError("no such layer in /home")

    def coarse(model: nn.Module, _: tqdit.Recipe, **options: Any) -> nn.Module:
        return tqdit.quantize(model, tqdit.Recipe("dynamic", "w2a4"), **options)

    assert sweep.attempt(dit, TARGET, refuse) == {"failures": ["raised InputError: no such layer in"]}
    (failure,) = sweep.attempt(dit, TARGET, coarse)["failures"]
    assert failure.endswith("dB is below the target of 30.0")


def test_no_parameter_hides_what_is_before_it(sweep: ModuleType, checkout: Path) -> None:
    dit, _ = two(sweep, checkout)
    build = dit.build

    def emptied() -> nn.Module:
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.proj_out_2.bias.fill_(torch.nan)
        return model

    model = sweep.float_model(sweep.Case("emptied", emptied, dit.arguments))
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.min() < parameter.max(), name


def test_a_backend_that_differs_is_found(sweep: ModuleType, checkout: Path) -> None:
    dit, _ = two(sweep, checkout)
    model = sweep.float_model(dit)
    (call,) = sweep.varied(model, dit.arguments(), (0.5,))
    dynamic = partial(tqdit.quantize, model, tqdit.Recipe("dynamic"), device="cpu")
    reference, cpu = dynamic(backend="reference"), dynamic(backend="cpu")
    checked, faults = sweep.against_reference(reference, cpu, call)
    assert checked > 5
    assert faults == []
    layers = {name: layer for name, layer in cpu.named_modules() if isinstance(layer, QuantizedLinear)}
    first = next(layer for layer in layers.values() if layer.source is not None)
    last = next(reversed(layers.values()))
    first.source.params.table.mul_(1.5)
    last.layer.bias.add_(1e-3)
    _, faults = sweep.against_reference(reference, cpu, call)
    assert any("codes differ" in fault for fault in faults)
    assert any("out of its bound" in fault for fault in faults)


def test_every_module_is_a_process(sweep: ModuleType, checkout: Path) -> None:
    crashed = sweep.in_process(checkout, "test_crash", TARGET, 60)
    assert crashed == {"test_crash": {"failures": ["its process ended with 3"]}}
    absent = sweep.in_process(checkout, "test_absent", TARGET, 60)
    assert absent == {"test_absent": {"skipped": "ModuleNotFoundError: No module named 'a_package_that_is_not_here'"}}
    rows = {**crashed, **absent, "A": {"failures": [], "sqnr_db": 41.0, "quantized": 6, "weight_only": 2}}
    assert sweep.summary(rows) == {
        "classes": 2, "failed": 1, "skipped": 1, "lowest_sqnr_db": 41.0, "quantized": 6, "weight_only": 2,
    }  # fmt: skip
