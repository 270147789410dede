"""`solve`: records of the float model become a Solution.

It is pure and seeded: the same records give the same result.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from tqdit.architectures.registry import config_of, graph, plain_config
from tqdit.calibration.records import AttentionRecord, LinearRecord, Records, channels_of
from tqdit.calibration.statistics import RangeStats, kept_keys
from tqdit.calibration.store import Forgetful, Store
from tqdit.errors import InputError
from tqdit.graph import Attention, Block, Graph, Linear
from tqdit.graph import Operand as Site
from tqdit.grids import uniform
from tqdit.plan import Objective, SitePlan, plan, second_order_rounding
from tqdit.plan import objective as planned_objective
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.sampling.trajectory import Progress
from tqdit.search import fallback, linears, objectives, operands
from tqdit.search.alternating import alternate
from tqdit.search.linears import LinearProblem
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand
from tqdit.spec import GridParams, SiteSpec, Solution
from tqdit.system import distributed
from tqdit.timegroups import TimeGroups


def solve(
    model: nn.Module,
    records: Records,
    recipe: Recipe,
    time_groups: TimeGroups,
    provenance: Provenance,
    progress: Progress = lambda _: None,
    store: Store | None = None,
    graph: Graph | None = None,
) -> Solution:
    """Choose the grid of every site and code every weight. `model` is the float model; it is only read.

    `graph`: of a traced model, by default that of the model's architecture. In the solution's graph, a layer whose
    outputs lose more than the recipe's `fallback` allows by quantized inputs is among those on float inputs; the
    solution's notes say so. The floats of a traced model keep their dtype.

    Each matmul is one piece of `store`. Inside `distributed.joined` the ranks share the blocks, whose records each has
    of its own alone, and each returns the whole solution. Raises `InputError` where a GPU's memory runs out.
    """
    solver, keep, world = (
        _Solver(model, records, recipe, time_groups.num_groups, graph),
        store or Forgetful(),
        distributed.current(),
    )
    parts = solver.parts()
    share = world.share(parts)
    solved: list[Solved] = []
    done, total = 0, sum(map(len, share))
    with torch.no_grad():  # not in inference mode: a caller could not train with its tensors or write to them
        for part in share:
            solved.append({})
            for name, matmul in part.items():
                try:
                    solved[-1] |= keep.once(f"solved-{name}", matmul).read()
                except torch.OutOfMemoryError:
                    raise InputError(
                        f"the device has too little memory to search the scales of '{name}': set fewer rows and "
                        "queries in a recipe file, or use the device 'cpu', for the calibration too"
                    ) from None
                done += 1
                progress(done / total)
    # Exchanged once, at the end: after each part ranks would wait for the slowest rank of that part.
    for found in world.gather_named(solved, len(parts)):
        solver.take(found)
    return solver.solution(time_groups, provenance)


# "<site>/scale", "<site>/zero_point", "<site>/channels" and "<site>/codes" of matmuls, on the CPU; and the SQNR of a
# site whose layers take float inputs after all, "<site>/fallen".
Solved = dict[str, torch.Tensor]
FALLEN = "fallen"
Record = TypeVar("Record", LinearRecord, AttentionRecord, RangeStats)


class _Solver:
    """A solver of one matmul after another.

    Matmuls share nothing, so any order gives the same result.
    """

    def __init__(
        self, model: nn.Module, records: Records, recipe: Recipe, groups: int, traced: Graph | None = None
    ) -> None:
        self.model = model
        self.records = records
        self.recipe = recipe
        self.objective = planned_objective(recipe)
        self.traced, self.groups = traced is not None, groups
        self.graph = graph(config_of(model)) if traced is None else traced
        self.original = self.graph  # before layers fall back
        self.plan = plan(self.graph, recipe, groups)
        self.specs = {name: site.spec for name, site in self.plan.items()}
        self.state = model.state_dict()
        self.device = next(model.parameters()).device
        self.params: dict[str, GridParams] = {}
        self.codes: dict[str, torch.Tensor] = {}
        self.notes: dict[str, str] = dict(records.notes)

    def parts(self) -> list[dict[str, Callable[[], Solved]]]:
        """Return matmuls by name: part i has all of block i, the last part has the matmuls outside of blocks."""
        return [*map(self._block, self.graph.blocks), self._floating(self.graph.outside)]

    def _block(self, block: Block) -> dict[str, Callable[[], Solved]]:
        found = self._floating(block.float_input)
        for attention in block.attentions:
            found[f"{attention.module}.scores"] = partial(self._scores, attention)
            found[f"{attention.module}.values"] = partial(self._values, attention)
        return found | {linear.source.name: partial(self._linear, linear) for linear in block.linears}

    def _floating(self, modules: Iterable[str]) -> dict[str, Callable[[], Solved]]:
        """Return the layers of float inputs."""
        names = [f"{name}.weight" for name in modules]
        return {name: partial(self._weight_only, self.specs[name]) for name in names if name in self.plan}

    def take(self, solved: Mapping[str, torch.Tensor]) -> None:
        """Add parameters and codes. The shape of a scale and the zero points say which grid was chosen."""
        fields = {key: key.rpartition("/")[::2] for key in solved}
        for key, (name, field) in fields.items():
            if field == FALLEN:
                self._fall_back(name, float(solved[key]))
        for key, tensor in solved.items():
            name, field = fields[key]
            if field == "codes":
                self.codes[name] = tensor
            elif field == "scale":
                site, zero_point = self.plan[name], solved.get(f"{name}/zero_point")
                found = (tensor.shape, zero_point is not None)
                spec = next(spec for spec in site.tried if (spec.scale_shape, spec.has_zero_point) == found)
                channels = solved.get(f"{name}/channels")
                self.params[name] = GridParams(spec, tensor, zero_point, channels, site.rotation)

    def solution(self, time_groups: TimeGroups, provenance: Provenance) -> Solution:
        """Return the solution of all that was taken."""
        return Solution(
            dict(plain_config(self.model) if self.traced else config_of(self.model)),
            time_groups,
            {name: self.params[name] for name in self.plan},
            self.codes,
            self.floats(),
            provenance,
            self.records.stream_max,
            self.graph if self.traced else None,
            self.notes,
        )

    def floats(self) -> dict[str, torch.Tensor]:
        """Return the parameters that are not sites: fp32, or of a traced model in their own dtype."""
        kept = {name: t.detach().cpu() for name, t in self.state.items() if name not in self.plan}
        return kept if self.traced else {name: t.float() for name, t in kept.items()}

    def _fall_back(self, name: str, sqnr: float) -> None:
        """Move the layers of a site to those on float inputs, and note why."""
        self.notes[name] = fallback.note(self.original, name, sqnr, self.records.tokens, self.recipe)
        self.graph = fallback.on_float_inputs(self.graph, name)
        self.plan = plan(self.graph, self.recipe, self.groups)

    def _weight_only(self, spec: SiteSpec) -> Solved:
        """Choose a scale per channel by plain squared error on the weight (Frobenius objective)."""
        values = self.state[spec.name].float()
        operand = operands.weight([spec], [values.flatten(1)])
        if self.recipe.rounds:
            steps = uniform.factors(self.recipe.low, self.recipe.high, self.recipe.candidates)
            tables = torch.stack([operand.scale, *(uniform.multiples(operand.scale, c) for c in steps)])
            errors = torch.stack([(operand.fake(t) - operand.values).square().sum(1) for t in tables])
            operand = operand.with_scale(tables.gather(0, errors.argmin(0)[None, None])[0])
        return self._coded(spec, operand)

    def _linear(self, linear: Linear) -> Solved:
        name = linear.source.name
        record = _moved(self.records.linears[name], self.device)
        site = self.plan[name]
        channel_ranges = self._ranges(channels_of(name)) if site.channels else None
        weights = [self.state[weight] for weight in linear.weights]
        errors = self._weights(record, record.fisher)
        if errors is None and self.objective is not Objective.PLAIN:  # Fisher weights were asked for
            errors = linears.relative_weights(record.x, weights)
        problem = LinearProblem(
            site,
            record,
            self._ranges(name),
            channel_ranges,
            [self.specs[weight] for weight in linear.weights],
            weights,
            errors,
            self.recipe,
        )
        solved = linears.solve(problem)
        if solved.sqnr is not None and site.fallback is not None and solved.sqnr < site.fallback:
            return self._fallen(linear, problem, solved.sqnr)
        made = _chosen(solved.activation) | self._split(problem.specs, solved.weight_scale, solved.codes)
        return made if solved.channels is None else made | {f"{name}/channels": solved.channels.cpu()}

    def _fallen(self, linear: Linear, problem: LinearProblem, sqnr: float) -> Solved:
        """Return the weights of layers that take float inputs after all."""
        specs = fallback.specs(self.graph, linear, self.recipe)
        made = {f"{linear.source.name}/{FALLEN}": torch.tensor(sqnr)}
        if not second_order_rounding(self.recipe):
            for spec in specs:
                made |= self._weight_only(spec)
            return made
        return made | self._split(specs, *linears.float_input(replace(problem, specs=specs)))

    def _scores(self, attention: Attention) -> Solved:
        record = _moved(self.records.attentions[attention.module], self.device)
        kept = kept_keys(record.bias)
        counts = None if kept is None else kept[:, None, None]
        weights = self._weights(record, record.fisher_scores, counts)
        if weights is None and counts is not None:
            weights = counts.expand_as(record.fisher_scores).float()
        objective = MatmulObjective.weighted(objectives.scores, record.q, record.k, weights)
        q = self._operand(attention.query, record.q, record)
        k = self._operand(attention.key, record.k, record)
        q, k, _ = alternate(objective, q, k, self.recipe)
        return _chosen(q) | _chosen(k)

    def _values(self, attention: Attention) -> Solved:
        record = _moved(self.records.attentions[attention.module], self.device)
        scores = objectives.scores(record.q, record.k)
        p = (scores if record.bias is None else scores + record.bias[:, None, None]).softmax(-1)
        objective = MatmulObjective.weighted(
            objectives.values, p, record.v, self._weights(record, record.fisher_values)
        )
        v = self._operand(attention.value, record.v, record)
        site = self.plan[attention.probabilities.name]
        ranges = self._ranges(site.spec.name).over_units()

        def attempt(spec: SiteSpec) -> tuple[Operand, Operand, float]:
            left = operands.activation(spec, p, record.group, ranges, site.merging)
            return alternate(objective, left, v, self.recipe)

        left, right, _ = _best_grid(site, attempt)
        return _chosen(left) | _chosen(right)

    def _operand(self, site: Site, values: torch.Tensor, record: AttentionRecord) -> Operand:
        return operands.activation(self.specs[site.name], values, record.group, self._ranges(site.name))

    def _weights(
        self, record: LinearRecord | AttentionRecord, fisher: torch.Tensor | None, counts: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return the weights of squared errors, or None for plain squared error; `counts` as in `within_groups`."""
        if self.objective is Objective.PLAIN or fisher is None:
            return None
        fisher = fisher.float()
        if self.objective is Objective.FISHER:
            return fisher
        shape = (-1, *(1,) * (fisher.ndim - 1))
        if self.objective is Objective.FISHER_BY_STEP:
            return fisher * record.step_weight.reshape(shape)
        return objectives.within_groups(fisher, record.group, counts) * record.image_weight.reshape(shape)

    def _ranges(self, site: str) -> RangeStats:
        return _moved(self.records.ranges[site], self.device)

    def _coded(self, spec: SiteSpec, operand: Operand) -> Solved:
        """Return the scale and the codes of a weight, rounded to nearest."""
        codes = uniform.quantize(operand.values, operand.scale[0][:, None], 0, spec.bits)
        return self._split([spec], operand.scale[0], codes)

    def _split(self, specs: Sequence[SiteSpec], scale: torch.Tensor, codes: torch.Tensor) -> Solved:
        """Return scales and codes of stacked weights by site."""
        found: Solved = {}
        scales = scale.split([spec.units for spec in specs])
        parts = codes.split([self.state[spec.name].shape[0] for spec in specs])
        for spec, own, part in zip(specs, scales, parts, strict=True):
            shape = self.state[spec.name].shape
            found |= {f"{spec.name}/scale": _sound(own[None]), f"{spec.name}/codes": part.reshape(shape).cpu()}
        return found


def _best_grid(
    site: SitePlan, attempt: Callable[[SiteSpec], tuple[Operand, Operand, float]]
) -> tuple[Operand, Operand, float]:
    """Return the best of the attempts under the grids of a site; the first of equal ones."""
    return min(map(attempt, site.tried), key=lambda result: result[2])


def _chosen(operand: Operand) -> Solved:
    """Return the tensors that are kept of a searched activation operand, by "<site>/<field>", on the CPU."""
    name = operand.spec.name
    found = {f"{name}/scale": _sound(operand.scale)}
    return found | {f"{name}/zero_point": operand.zero_point.cpu()} if operand.spec.has_zero_point else found


def _sound(scale: torch.Tensor) -> torch.Tensor:
    """Return a chosen scale on the CPU.

    It is finite and no smaller than a normal number, so that its reciprocal is finite too.
    """
    assert bool(torch.isfinite(scale).all() and (scale >= uniform.SMALLEST).all()), "a candidate that is no scale"
    return scale.cpu()


def _moved(record: Record, device: torch.device) -> Record:
    """Return a record with its tensors on another device."""
    held = {f.name: getattr(record, f.name) for f in fields(record)}
    return replace(record, **{name: tensor.to(device) for name, tensor in held.items() if tensor is not None})
