"""Records of traced models: ranges, rows and Fisher weights of recorded calls, in the model's own dtype."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from zoo import ZOO

from tqdit.architectures.traced_graph import trace
from tqdit.calibration import replay
from tqdit.calibration.calls import Calls
from tqdit.calibration.records import Records, channels_of
from tqdit.errors import InputError
from tqdit.graph import Graph, Linear, Operand
from tqdit.recipe import Recipe
from tqdit.spec import Role

FLUX = ZOO["FluxTransformer2DModel"]
TIMES = (0.9, 0.9, 0.6, 0.6, 0.3, 0.3)
RECIPE = Recipe("plus", rows=96, groups=3)


def calls_of(model: nn.Module, entry: Any = FLUX, times: tuple[float, ...] = TIMES) -> Calls:
    """Calls of one sample each, at these times in the units of the model."""
    made = [entry.call(seed, batch=1) for seed in range(len(times))]
    return Calls.of(model, [{**call, entry.timestep: torch.full((1,), t)} for call, t in zip(made, times, strict=True)])


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    return FLUX.build().requires_grad_(False)


@pytest.fixture(scope="module")
def flux_calls(flux) -> Calls:
    return calls_of(flux)


@pytest.fixture(scope="module")
def flux_graph(flux) -> Graph:
    return trace(flux, FLUX.call(batch=1), "timestep")


@pytest.fixture(scope="module")
def recorded(flux, flux_graph, flux_calls) -> Records:
    return replay.record(flux, flux_graph, flux_calls, flux_calls.time_groups(3), RECIPE)


def linears(graph: Graph) -> list[Linear]:
    return [linear for block in graph.blocks for linear in block.linears]


@pytest.fixture(scope="module")
def inputs(flux, flux_graph, flux_calls) -> dict[str, list[torch.Tensor]]:
    """The inputs of every site in each call, (rows, in), by the definition: hooks and nothing else."""
    found: dict[str, list[torch.Tensor]] = {linear.source.name: [] for linear in linears(flux_graph)}
    handles = [
        flux.get_submodule(linear.modules[0]).register_forward_pre_hook(
            lambda _, args, kept=found[linear.source.name]: kept.append(args[0].flatten(0, -2))
        )
        for linear in linears(flux_graph)
    ]
    with torch.no_grad():
        for call in flux_calls:
            flux(**call.to("cpu"))
    for handle in handles:
        handle.remove()
    return found


def test_ranges_are_those_of_each_time_group(flux_graph, flux_calls, inputs, recorded) -> None:
    groups = flux_calls.time_groups(3)
    assert groups.index(flux_calls.times).tolist() == [2, 2, 1, 1, 0, 0]
    for linear in linears(flux_graph):
        x = inputs[linear.source.name]
        own = [torch.cat(x[i : i + 2]) for i in (4, 2, 0)] if linear.source.timed else [torch.cat(x)]
        low, high = (torch.stack([getattr(values, end)(0) for values in own]) for end in ("amin", "amax"))
        channels, whole = recorded.ranges[channels_of(linear.source.name)], recorded.ranges[linear.source.name]
        assert torch.allclose(channels.low, low, atol=1e-6)
        assert torch.allclose(channels.high, high, atol=1e-6)
        assert torch.equal(whole.high, channels.high.amax(1, keepdim=True))
        assert torch.equal(whole.low, channels.low.amin(1, keepdim=True))


def test_rows_are_the_models_own_and_spread_over_the_calls(flux_graph, inputs, recorded) -> None:
    for linear in linears(flux_graph):
        record = recorded.linears[linear.source.name]
        own = inputs[linear.source.name]
        assert record.x.shape == (96, own[0].shape[1])
        nearest = torch.stack([torch.cdist(record.x, x, p=torch.inf).amin(1) for x in own])  # (calls, rows)
        assert nearest.amin(0).max() < 1e-5
        which = nearest.argmin(0).tolist()
        if linear.source.timed:  # else all calls with one prompt have the same rows
            assert [which.count(i) for i in range(6)] == [16] * 6
            assert record.group.tolist() == [(2, 2, 1, 1, 0, 0)[i] for i in which]
        assert recorded.tokens[linear.source.name] == len(own[0])
        assert len(record.x.unique(dim=0)) == 96 or not linear.source.timed
        assert record.image_weight.tolist() == [1.0] * 96


def test_the_seed_decides_the_rows(flux, flux_graph, flux_calls, recorded) -> None:
    def rows(seed: int) -> torch.Tensor:
        recipe = Recipe("plus", rows=96, groups=3, seed=seed, hessian="none")
        made = replay.record(flux, flux_graph, flux_calls, flux_calls.time_groups(3), recipe)
        return next(iter(made.linears.values())).x

    same = next(iter(recorded.linears.values())).x
    assert torch.equal(rows(0), same)
    assert not torch.equal(rows(1), same)


def test_a_site_with_fewer_rows_keeps_all(flux, flux_graph, flux_calls, inputs) -> None:
    recipe = Recipe("plus", rows=10**6, hessian="none")
    made = replay.record(flux, flux_graph, flux_calls, flux_calls.time_groups(3), recipe)
    for linear in linears(flux_graph):
        every = torch.cat(inputs[linear.source.name])
        torch.testing.assert_close(made.linears[linear.source.name].x, every, rtol=1e-5, atol=1e-5)
        assert made.linears[linear.source.name].fisher is None


def test_fisher_weights_are_squared_gradients_of_probes(flux, flux_graph, flux_calls) -> None:
    """The weights of all rows of one call equal those of autograd without checkpoints or hooks, as means of probes."""
    recipe = Recipe("plus", rows=10**6, groups=1)
    one = flux_calls[:1]
    made = replay.record(flux, flux_graph, one, one.time_groups(1), recipe)
    linear = next(linear for linear in linears(flux_graph) if len(linear.modules) == 3)
    kept: list[torch.Tensor] = []
    handles = [
        flux.get_submodule(name).register_forward_hook(lambda _, __, z: kept.append(z.requires_grad_()))
        for name in linear.modules
    ]
    output = flux(**one[0].to("cpu")).sample
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(replay.probe_seed(0, 0))
    probe = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad(output, kept, probe)
    expected = torch.cat([gradient.flatten(0, -2) for gradient in gradients], -1).square()
    found = made.linears[linear.source.name].fisher
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    assert found.mean() > 0


def test_every_site_has_fisher_weights(recorded, flux_graph) -> None:
    for linear in linears(flux_graph):
        fisher = recorded.linears[linear.source.name].fisher
        assert fisher is not None
        assert fisher.shape == (96, flux_graph.features(linear)[1])
        assert torch.isfinite(fisher).all()
        assert (fisher.mean(1) > 0).sum() > 48  # the last block's text changes nothing


def test_the_model_is_left_as_it_was(flux, flux_graph, flux_calls) -> None:
    model = copy.deepcopy(flux).requires_grad_(True)
    model.x_embedder.weight.requires_grad_(False)
    asking = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    replay.record(model, flux_graph, flux_calls[:2], flux_calls.time_groups(3), RECIPE)
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_large_models_have_no_backward_pass(flux, flux_graph, flux_calls, monkeypatch) -> None:
    monkeypatch.setattr(replay, "FISHER_PARAMETERS", 1000)
    made = replay.record(flux, flux_graph, flux_calls, flux_calls.time_groups(3), RECIPE)
    assert all(record.fisher is None for record in made.linears.values())
    assert "billion parameters" in made.notes[replay.FISHER]
    without = Recipe("plus", rows=8, hessian="none")
    assert replay.record(flux, flux_graph, flux_calls[:1], flux_calls.time_groups(3), without).notes == {}


def test_an_operation_without_a_backward_pass_leaves_out_the_fisher_weights(
    flux, flux_graph, flux_calls, recorded, monkeypatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError("this attention has no backward pass on a CPU\nsecond line")

    monkeypatch.setattr(replay._Replay, "_probe", refuse)
    found = replay.record(flux, flux_graph, flux_calls, flux_calls.time_groups(3), RECIPE)
    assert "(this attention has no backward pass on a CPU)" in found.notes[replay.FISHER]
    name = linears(flux_graph)[0].source.name
    assert torch.equal(found.linears[name].x, recorded.linears[name].x)

    def refuse_silently(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(replay._Replay, "_probe", refuse_silently)
    found = replay.record(flux, flux_graph, flux_calls[:1], flux_calls.time_groups(3), RECIPE)
    assert found.notes[replay.FISHER].endswith("(NotImplementedError)")


@pytest.mark.parametrize("name", ["ZImageTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_classes_in_their_own_dtype(name: str, dtype: torch.dtype) -> None:
    entry = ZOO[name]
    model = entry.build().requires_grad_(False).to(dtype)
    calls = calls_of(model, entry, (0.9, 0.5))
    graph = trace(model, calls[0].to("cpu", dtype), entry.timestep)
    recipe = Recipe("plus", rows=32, groups=2)
    made = replay.record(model, graph, calls, calls.time_groups(2), recipe)
    for linear in linears(graph):
        record = made.linears[linear.source.name]
        assert record.x.dtype == dtype
        assert record.fisher is not None
        assert record.fisher.dtype == dtype
        assert made.ranges[linear.source.name].low.dtype == torch.float32
    assert sum(float(record.fisher.sum()) for record in made.linears.values()) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_site_and_time(flux, flux_graph, flux_calls, bad: float) -> None:
    model, seen = copy.deepcopy(flux), list[int]()
    last = flux_graph.blocks[-1]

    def spoil(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen.append(1)
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * (bad if len(seen) == 3 else 1.0)}

    model.get_submodule(last.prefix).register_forward_pre_hook(spoil, with_kwargs=True)
    name = last.linears[0].source.name
    with pytest.raises(InputError, match=rf"site '{name}': .* NaN or Inf .* timestep 0\.6 \(time group 1 of 3\)"):
        replay.record(model, flux_graph, flux_calls, flux_calls.time_groups(3), Recipe(rows=8, hessian="none"))


def test_a_layer_that_no_call_reaches_is_named(flux, flux_graph, flux_calls) -> None:
    lost = Linear(Operand("lost", Role.INPUT, apart=True), ("norm_out.unused",))
    model = copy.deepcopy(flux)
    model.norm_out.add_module("unused", nn.Linear(8, 8))
    shapes = {**flux_graph.shapes, "norm_out.unused.weight": torch.Size((8, 8))}
    block = replace(flux_graph.blocks[0], matmuls=(*flux_graph.blocks[0].matmuls, lost))
    graph = replace(flux_graph, blocks=(block, *flux_graph.blocks[1:]), shapes=shapes)
    with pytest.raises(InputError, match=r"site 'lost': no call reaches the layer 'norm_out\.unused'"):
        replay.record(model, graph, flux_calls, flux_calls.time_groups(3), RECIPE)


def test_a_time_group_that_does_not_reach_a_layer_gets_the_range_of_all(flux, flux_graph, flux_calls) -> None:
    name = linears(flux_graph)[0].source.name
    made = replay.record(flux, flux_graph, flux_calls[:2], flux_calls.time_groups(3), RECIPE)
    ranges = made.ranges[name]
    assert torch.isfinite(ranges.low).all()
    assert torch.equal(ranges.low[0], ranges.low[2])
    assert torch.equal(ranges.high[1], ranges.high[2])


def test_calls_are_needed(flux, flux_graph, flux_calls) -> None:
    with pytest.raises(InputError, match="no calls"):
        replay.record(flux, flux_graph, flux_calls[:0], flux_calls.time_groups(3), RECIPE)


def test_progress_is_told(flux, flux_graph, flux_calls) -> None:
    told: list[float] = []
    receive: Callable[[float], None] = told.append
    replay.record(flux, flux_graph, flux_calls[:3], flux_calls.time_groups(3), Recipe(rows=8, hessian="none"), receive)
    assert told == [1 / 3, 2 / 3, 1.0]
