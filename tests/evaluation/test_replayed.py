"""Comparisons on recorded calls."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO

from tqdit.calibration.calls import Calls
from tqdit.errors import InputError
from tqdit.quality.replayed import compare_calls, compare_images, held_out

NAME = "DiTTransformer2DModel"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return ZOO[NAME].build()


@pytest.fixture(scope="module")
def calls(model: nn.Module) -> Calls:
    made = [{**ZOO[NAME].call(seed=n, batch=1), "timestep": torch.tensor([200 * n])} for n in range(4)]
    return Calls.of(model, made)


def noisy(model: nn.Module, level: float) -> nn.Module:
    """Return a model whose outputs have an error of a known size, that of `level` times their own."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, **arguments):
            return (self.inner(**arguments, return_dict=False)[0] * (1 + level),)

    return Noisy()


def test_sqnr_is_that_of_a_known_error(model, calls) -> None:
    found = compare_calls(model, {"a": noisy(model, 0.1), "b": noisy(model, 0.01), "same": model}, calls, groups=2)
    rows = {row.name: row for row in found.rows}
    assert rows["a"].sqnr_db == pytest.approx(20, abs=1e-3)
    assert rows["b"].sqnr_db == pytest.approx(40, abs=1e-2)
    assert rows["same"].sqnr_db is None
    assert rows["a"].by_group == pytest.approx((20, 20), abs=1e-3)
    assert rows["a"].worst_db == pytest.approx(20, abs=1e-3)
    assert [count for *_, count in found.groups] == [2, 2]


def test_a_group_is_judged_by_its_own_calls(model, calls) -> None:
    class Late(nn.Module):
        """Wrong at late times alone."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **arguments):
            factor = 1.1 if float(arguments["timestep"].max()) >= 400 else 1.0
            return (self.inner(**arguments, return_dict=False)[0] * factor,)

    (row,) = compare_calls(model, {"late": Late()}, calls, groups=2).rows
    assert row.by_group[0] is None
    assert row.by_group[1] == pytest.approx(20, abs=1e-3)
    assert 20 < row.sqnr_db < 30


def test_outputs_that_are_not_finite_have_no_figure(model, calls) -> None:
    (row,) = compare_calls(model, {"nan": noisy(model, math.nan)}, calls).rows
    assert row.sqnr_db is None


def test_one_call_that_is_not_finite_leaves_no_worst_call(model, calls) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **arguments):
            factor = math.nan if float(arguments["timestep"].max()) >= 600 else 1.1
            return (self.inner(**arguments, return_dict=False)[0] * factor,)

    (row,) = compare_calls(model, {"breaks": Breaks()}, calls, groups=4).rows
    assert row.by_group[0] == pytest.approx(20, abs=1e-3)
    assert (row.sqnr_db, row.worst_db) == (None, None)


def test_an_image_that_is_not_finite_leaves_no_figure(model) -> None:
    class Pipe:
        components = ("transformer",)
        transformer: Any = None

        def register_modules(self, transformer: Any) -> None:
            self.transformer = transformer

        def __call__(self, prompt: str, generator: Any, output_type: str, return_dict: bool) -> Any:
            image = torch.full((1, 2, 2, 3), 0.5)
            if self.transformer is model:
                image += math.nan if prompt == "b" else 0.1
            return (image.numpy(),)

    (row,) = compare_images(Pipe(), {"broken": {"transformer": model}}, ["a", "b"])
    assert row.each_db[0] == pytest.approx(20, abs=1e-3)
    assert (row.mean_db, row.worst_db, row.worst_prompt) == (None, None, "")


def test_models_are_read_one_after_another(model, calls) -> None:
    read = []

    class Lazy(dict):
        def __getitem__(self, name):
            read.append(name)
            return model

    compare_calls(model, Lazy(a=None, b=None), calls)
    assert read == ["a", "b"]


def test_calls_of_another_class_are_refused(calls) -> None:
    other = ZOO["FluxTransformer2DModel"].build()
    with pytest.raises(InputError, match="these are calls of a DiTTransformer2DModel"):
        compare_calls(other, {}, calls)


def test_held_out_calls_are_those_that_no_calibration_drew(calls) -> None:
    recipe = {"samples": 1, "groups": 2, "seed": 0}
    used = calls.thinned(1, 2, 0)
    left, fresh = held_out(calls, [(recipe, used.sha256), (recipe, None)])
    assert fresh
    assert sorted([*left.times.tolist(), *used.times.tolist()]) == calls.times.tolist()
    assert len(held_out(calls, [(recipe, "0" * 64)])[0]) == 4  # calibrated on other calls
    everything = {"samples": 9, "groups": 2, "seed": 0}
    left, fresh = held_out(calls, [(everything, calls.thinned(9, 2, 0).sha256)])
    assert (len(left), fresh) == (4, False)
