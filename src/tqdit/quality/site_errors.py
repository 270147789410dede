"""Measure what each site costs: the error of the model's outputs when this site alone is quantized, in a simulation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tqdit.architectures.registry import conditions, config_of
from tqdit.calibration.call_values import floats_of
from tqdit.calibration.called import place_of
from tqdit.calibration.calls import Calls
from tqdit.calibration.trajectories import CalibrationSet
from tqdit.graph import Graph
from tqdit.quality.histograms import Values
from tqdit.quality.one_site import OneSite, coded_weight
from tqdit.quality.run import Site
from tqdit.spec import GridParams, Solution
from tqdit.stages import Report

CALLS = 4  # recorded calls, spread over the timesteps
PASSES = 256  # simulations of one artifact; of more sites the most sensitive blocks' are measured
CALL_PASSES = 96  # the same on recorded calls, whose models are larger
SHOWN = 10  # sites whose values are kept as histograms


@dataclass(frozen=True)
class State:
    """One call of a float model: `run` makes it and returns its output; `t`: its timesteps, (1,) or (B,)."""

    run: Callable[[nn.Module], torch.Tensor]
    t: torch.Tensor


def sampled_states(model: nn.Module, data: CalibrationSet) -> list[State]:
    """Return one call with states of trajectories that are spread over their timesteps.

    They are as many as each time group of `data` has, since every site takes a call with them.
    """
    count = max(1, len(data) // data.time_groups.num_groups)
    chosen = torch.linspace(0, len(data) - 1, min(count, len(data))).round().long()
    device = next(iter(model.parameters())).device
    x, t, labels = (part[chosen].to(device) for part in (data.x, data.t, data.labels))
    inputs = (data.conditions or conditions(config_of(model))).rows(labels)

    def run(module: nn.Module) -> torch.Tensor:
        output: torch.Tensor = module(x, timestep=t, **inputs, return_dict=False)[0]
        return output[:, : x.shape[1]]

    return [State(run, data.t[chosen])]


def called_states(calls: Calls, count: int = CALLS) -> list[State]:
    """Return `count` recorded calls, spread over their times."""
    order = sorted(range(len(calls)), key=lambda number: calls[number].t)
    places = torch.linspace(0, len(order) - 1, min(count, len(order))).round().long().tolist()
    return [_called(calls[order[place]]) for place in places]


def _called(call: Any) -> State:
    def run(module: nn.Module) -> torch.Tensor:
        output = module(**call.to(*place_of(module)))
        return torch.cat([tensor.flatten() for tensor in floats_of(output)])

    return State(run, torch.tensor([call.t], dtype=torch.float64))


def measured_sites(
    model: nn.Module,
    graph: Graph,
    solution: Solution,
    states: Sequence[State],
    report: Report,
    stage: str,
    passes: int = PASSES,
) -> tuple[list[Site], int]:
    """Return the sites that were measured, the most sensitive first, and how many sites there are.

    The first `SHOWN` have a histogram of their values in the float model, at `states`. The model is left as it was.
    With more than `passes` sites all blocks are measured as wholes first, then the sites of the most sensitive ones.
    """
    simulated = OneSite(model, graph, solution)
    report(stage, 0.0)
    with simulated.attached(), torch.no_grad():
        probe = _Probe(simulated, states)
        total = min(len(solution.params), passes) + 1
        errors = probe.errors(_chosen(probe, passes), lambda done: report(stage, done / total))
        ordered = sorted(errors, key=lambda name: errors[name], reverse=True)
        seen = _histograms(simulated, states, ordered[:SHOWN])
    report(stage, 1.0)
    whole = sum(errors.values())
    sites = [_site(graph, solution.params[name], errors[name], whole, probe.signal, seen.get(name)) for name in ordered]
    return sites, len(solution.params)


@dataclass
class _Probe:
    """The error of outputs under simulations, over all states."""

    simulated: OneSite
    states: Sequence[State]

    def __post_init__(self) -> None:
        self.expected = [state.run(self.simulated.model).double().cpu() for state in self.states]
        self.signal = sum(float(output.square().sum()) for output in self.expected)

    def error(self, names: Sequence[str]) -> float:
        """Return the error power of the outputs when these sites are quantized; infinite where they are not finite."""
        power = 0.0
        with self.simulated.quantizing(names):
            for state, expected in zip(self.states, self.expected, strict=True):
                self.simulated.group = self.simulated.solution.time_groups.index(state.t)
                power += float((state.run(self.simulated.model).double().cpu() - expected).square().sum())
        return power if math.isfinite(power) else math.inf

    def errors(self, names: Sequence[str], progress: Callable[[int], None]) -> dict[str, float]:
        found = {}
        for number, name in enumerate(names):
            found[name] = self.error([name])
            progress(number + 1)
        return found


def _chosen(probe: _Probe, passes: int) -> list[str]:
    """Return the sites to measure: all, or those outside of blocks and those of the most sensitive blocks."""
    params, graph = probe.simulated.solution.params, probe.simulated.graph
    if len(params) <= passes:
        return list(params)
    blocks = [[name for name in _names(block) if name in params] for block in graph.blocks]
    inside = {name for names in blocks for name in names}
    errors = [probe.error(names) for names in blocks]
    order = sorted(range(len(blocks)), key=lambda number: errors[number], reverse=True)
    chosen = [name for name in params if name not in inside]
    chosen += [name for number in order for name in blocks[number]]
    return chosen[: max(1, passes - len(blocks))]


def _names(block: Any) -> list[str]:
    weights = [name for linear in block.linears for name in linear.weights]
    return [*(o.name for o in block.operands), *weights, *(f"{module}.weight" for module in block.float_input)]


def _histograms(simulated: OneSite, states: Sequence[State], names: Sequence[str]) -> dict[str, Values]:
    """Return the values of sites in the float model."""
    solution = simulated.solution
    found = {name: Values(solution.params[name]) for name in names}
    for name, values in found.items():
        if name in solution.codes:
            weight = simulated.model.get_parameter(name)
            values.add_weight(coded_weight(weight, solution, simulated.graph, name))

    def seen(name: str, x: torch.Tensor) -> None:
        if name in found:
            found[name].add(x, simulated.operand(name, x.device))

    simulated.seen = seen
    for state in states:
        simulated.group = solution.time_groups.index(state.t)
        state.run(simulated.model)
    simulated.seen = None
    return found


def _site(graph: Graph, params: GridParams, error: float, whole: float, signal: float, values: Values | None) -> Site:
    spec = params.spec
    operand = next((operand for operand in graph.operands if operand.name == spec.name), None)
    finite = 0 < error < math.inf and signal > 0
    return Site(
        name=spec.name, role=str(spec.role.value), bits=spec.bits, grid=str(spec.grid),
        granularity=str(spec.granularity.value), groups=spec.groups, units=spec.units,
        channels=params.channels is not None, rotation=params.rotation, feed=operand.feed if operand else "",
        end=spec.name.removesuffix(".weight") in graph.ends,
        by_row=bool(operand and (operand.quantized_by_row or operand.apart)),
        sqnr_db=10 * math.log10(signal / error) if finite else None,
        share=error / whole if 0 < whole < math.inf else None,
        histogram=values.histogram() if values else None,
    )  # fmt: skip
