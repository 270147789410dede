"""The alternating search: one operand's scale at a time, all candidates scored, each parameter by its own share."""

import importlib.util
from collections.abc import Callable

import torch

from tqdit.recipe import Recipe
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand

# Scale table of the searched operand -> loss by (group, unit) of that operand.
LossOf = Callable[[torch.Tensor], torch.Tensor]


def alternate(objective: MatmulObjective, a: Operand, b: Operand, recipe: Recipe) -> tuple[Operand, Operand, float]:
    """`rounds` of: best scale of `b` given `a`, then of `a` given `b` (the paper's order: weight, then activation).

    Never worse than the min-max start: the current scale competes with the candidates. Ends early where another search
    could change nothing: a choice is a function of the other operand's scale, and a tie keeps the current one. `b` has
    one region. Returns both operands and the final loss.
    """
    loss = loss_of_steps if a.values.is_cuda and importlib.util.find_spec("triton") else loss_of_values
    base_a, base_b = a.scale, b.scale
    for turn in range(recipe.rounds):
        former_a, former_b = a.scale, b.scale
        b = _search(b, base_b, recipe, loss(objective, a, b, b))
        if turn and torch.equal(b.scale, former_b) and len(a.candidate_scales(base_a, recipe)) == 1:
            break
        a = _search(a, base_a, recipe, loss(objective, a, b, a))
        if torch.equal(a.scale, former_a):
            break
    return a, b, float(loss(objective, a, b, a)(a.scale).sum())


def loss_of_values(objective: MatmulObjective, a: Operand, b: Operand, searched: Operand) -> LossOf:
    """The loss as a function of the scale of `searched`, which is `a` or `b`; the other operand is coded once."""
    if searched is a:
        fixed = b.fake()
        return lambda scale: a.reduce(objective.loss(a.fake(scale), fixed))
    fixed = a.fake()
    return lambda scale: b.reduce(objective.loss(fixed, b.fake(scale)))


def loss_of_steps(objective: MatmulObjective, a: Operand, b: Operand, searched: Operand) -> LossOf:
    """The same by kernels for GPUs: other roundings in fp32, nothing else."""
    from tqdit.search import fused

    stacked = not b.is_weight
    if searched is a:
        fixed = fused.steps(b, b.scale)
        return lambda scale: a.totals(fused.sums(objective, fused.steps(a, scale), fixed, False, stacked))
    fixed = fused.steps(a, a.scale)
    return lambda scale: b.totals(fused.sums(objective, fixed, fused.steps(b, scale), b.is_weight, stacked))


def _search(operand: Operand, base: torch.Tensor, recipe: Recipe, loss: LossOf) -> Operand:
    """The operand with, for every (group, unit), its best table; regions one after the other."""
    for region in range(len(operand.candidate_scales(base, recipe))):
        tables = [operand.scale, *operand.candidate_scales(base, recipe)[region]]
        totals = torch.stack([loss(table) for table in tables])
        best = totals.argmin(0)  # (groups, units)
        stacked = torch.stack(tables)
        index = best.reshape(1, *best.shape, *(1,) * (stacked.ndim - 3)).expand(1, *stacked.shape[1:])
        operand = operand.with_scale(stacked.gather(0, index)[0])
    return operand
