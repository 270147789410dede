"""The alternating search: one operand's scale at a time, all candidates scored, each parameter by its own share."""

from collections.abc import Callable
from functools import partial

import torch

from tqdit.recipe import Recipe
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand

LossOf = Callable[[torch.Tensor], torch.Tensor]  # fake values of the searched operand -> elementwise loss


def alternate(objective: MatmulObjective, a: Operand, b: Operand, recipe: Recipe) -> tuple[Operand, Operand, float]:
    """`rounds` of: best scale of `b` given `a`, then of `a` given `b` (the paper's order: weight, then activation).

    Never worse than the min-max start: the current scale competes with the candidates. Returns both operands and the
    final loss.
    """
    base_a, base_b = a.scale, b.scale
    for _ in range(recipe.rounds):
        b = _search(b, base_b, recipe, partial(objective.loss, a.fake()))
        a = _search(a, base_a, recipe, partial(objective.loss, b=b.fake()))
    return a, b, float(objective.loss(a.fake(), b.fake()).sum())


def _search(operand: Operand, base: torch.Tensor, recipe: Recipe, loss: LossOf) -> Operand:
    """The operand with, for every (group, unit), its best table; regions one after the other."""
    for region in range(len(operand.candidate_scales(base, recipe))):
        tables = [operand.scale, *operand.candidate_scales(base, recipe)[region]]
        totals = torch.stack([operand.reduce(loss(operand.fake(table))) for table in tables])
        best = totals.argmin(0)  # (groups, units)
        stacked = torch.stack(tables)
        index = best.reshape(1, *best.shape, *(1,) * (stacked.ndim - 3)).expand(1, *stacked.shape[1:])
        operand = operand.with_scale(stacked.gather(0, index)[0])
    return operand
