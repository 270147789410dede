"""What single sites cost: against a model in which the same site is rounded by hand, and against the integer model."""

import math
from dataclasses import replace

import pytest
import torch

from tqdit.architectures.registry import graph
from tqdit.quality import site_errors
from tqdit.quality.metrics import sqnr_db
from tqdit.quality.one_site import OneSite, dequantized
from tqdit.quality.site_errors import State, measured_sites, sampled_states
from tqdit.runtime.convert import convert
from tqdit.stages import silent

QKV = "transformer_blocks.1.attn1.qkv_input"


@pytest.fixture
def structure(model):
    return graph(dict(model.config) | {"_class_name": "DiTTransformer2DModel"})


@pytest.fixture
def states(model, data) -> list[State]:
    return sampled_states(model, data)


def measured(model, structure, solution, states, passes=256):
    return measured_sites(model, structure, solution, states, silent, "sites", passes)


def test_every_site_of_every_preset_is_measured_and_the_model_is_left_alone(model, structure, states, solved) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for preset in ("paper", "plus"):
        solution = solved(preset)
        sites, in_all = measured(model, structure, solution, states)
        assert {site.name for site in sites} == set(solution.params)
        assert in_all == len(solution.params)
        assert sum(site.share for site in sites) == pytest.approx(1)
        decibels = [site.sqnr_db for site in sites if site.sqnr_db is not None]
        assert decibels == sorted(decibels), "the most sensitive first"
        assert [site.histogram is not None for site in sites] == [i < 10 for i in range(len(sites))]
        assert all(sum(site.histogram.counts) > 0 for site in sites[:10])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_weight_alone_is_the_error_of_its_codes(model, structure, states, solved) -> None:
    solution, name = solved("paper", "w4a8"), "transformer_blocks.0.ff.net.2.weight"
    site = next(site for site in measured(model, structure, solution, states)[0] if site.name == name)
    weight, (state,) = model.get_parameter(name), states
    expected, kept = state.run(model), weight.data
    try:
        weight.data = solution.codes[name].float() * solution.params[name].scale[0][:, None]
        actual = state.run(model)
    finally:
        weight.data = kept
    assert site.sqnr_db == pytest.approx(sqnr_db(expected, actual), abs=1e-4)


def test_factors_of_channels_are_undone(model, structure, solved) -> None:
    solution = solved("plus", "w8a8")
    name = next(n for n, p in solution.params.items() if p.channels is not None)
    linear = next(li for block in structure.blocks for li in block.linears if li.source.name == name)
    weight = model.get_parameter(linear.weights[0])
    assert sqnr_db(weight, dequantized(solution, structure, linear.weights[0])) > 35
    simulated = OneSite(model, structure, solution)
    x = torch.nn.functional.gelu(torch.randn(1, 5, weight.shape[1]))
    assert (x - simulated._rounded_rows(name, x)).abs().median() < 0.02


def test_all_sites_together_are_the_integer_model(model, structure, data, states, solved) -> None:
    """The simulation of every site at once has the error of the integer model, up to the order of sums."""
    for preset in ("paper", "plus"):
        solution, (state,) = solved(preset), states
        simulated = OneSite(model, structure, solution, solution.time_groups.index(state.t))
        with simulated.attached(), torch.no_grad():
            expected = state.run(model)
            with simulated.quantizing(list(solution.params)):
                found = state.run(model)
        integer = convert(solution, device="cpu")
        actual = state.run(integer)
        assert sqnr_db(actual, found) > sqnr_db(expected, actual) + 6
        assert sqnr_db(expected, found) == pytest.approx(sqnr_db(expected, actual), abs=1)


def test_of_too_many_sites_the_worst_blocks_are_measured(model, structure, states, solved, monkeypatch) -> None:
    solution, calls = solved("paper"), []
    monkeypatch.setattr(site_errors._Probe, "error", lambda self, names: calls.append(names) or float(len(calls)))
    passes = 20
    sites, in_all = measured(model, structure, solution, states, passes)
    assert in_all > passes
    assert len(calls) == passes
    assert len(sites) == passes - len(structure.blocks)
    assert all(len(names) > 1 for names in calls[:2])
    inside = [site.name for site in sites if site.name.startswith("transformer_blocks")]
    outside = [name for name in solution.params if not name.startswith("transformer_blocks")]
    assert {site.name for site in sites} - set(inside) == set(outside)
    assert {name.split(".")[1] for name in inside[:1]} == {"1"}, "the block with the larger error comes first"


def test_values_of_a_static_scale_that_are_clipped_are_counted(model, structure, states, solved) -> None:
    solution = solved("paper")
    params = dict(solution.params)
    name = next(n for n, p in params.items() if p.spec.role == "input" and p.spec.grid == "uniform")
    params[name] = replace(params[name], scale=params[name].scale / 4)
    found = measured(model, structure, replace(solution, params=params), states)[0][0]
    assert found.name == name, "a scale that clips most is the worst site"
    assert 0.05 < found.histogram.clipped < 1
    (region,) = found.histogram.regions
    assert len(region.low) == found.groups
    assert all(math.isfinite(end) for end in (*region.low, *region.high))
