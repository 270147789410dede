"""The alternating search: one operand's scale at a time, all candidates scored, each parameter by its own share."""

from collections.abc import Callable

import torch

from tqdit.backends.triton import unavailable
from tqdit.recipe import Recipe
from tqdit.search.objectives import MatmulObjective
from tqdit.search.operands import Operand
from tqdit.spec import Grid

KERNEL_GRIDS = (Grid.UNIFORM, Grid.MRQ_SOFTMAX, Grid.MRQ_GELU)

# Stack of scale tables of the searched operand (K, groups, units[, 2]) -> losses (K, groups, units).
LossOf = Callable[[torch.Tensor], torch.Tensor]


def alternate(objective: MatmulObjective, a: Operand, b: Operand, recipe: Recipe) -> tuple[Operand, Operand, float]:
    """Choose the best scale of `b` given `a`, then of `a` given `b`, for up to `rounds` rounds.

    The order is the paper's: weight, then activation. The result is never worse than the min-max start: the current
    scale competes with the candidates. The search ends early where another round could change nothing: a choice is a
    function of the other operand's scale, and a tie keeps the current one. `b` has one region. Returns both operands
    and the final loss.
    """
    loss = loss_of_steps if _has_kernels(a, b) else loss_of_values
    base_a, base_b = a.scale, b.scale
    for turn in range(recipe.rounds):
        former_a, former_b = a.scale, b.scale
        b = _search(b, base_b, recipe, loss(objective, a, b, b))
        if turn and torch.equal(b.scale, former_b) and not a.independent_regions:
            break
        a = _search(a, base_a, recipe, loss(objective, a, b, a))
        if torch.equal(a.scale, former_a):
            break
    return a, b, float(loss(objective, a, b, a)(a.scale[None]).sum())


def best_first(objective: MatmulObjective, a: Operand, b: Operand, recipe: Recipe) -> Operand:
    """Return `a` with the best of its scales beside `b` as it is; without rounds its min-max scale."""
    if not recipe.rounds:
        return a
    loss = loss_of_steps if _has_kernels(a, b) else loss_of_values
    return _search(a, a.scale, recipe, loss(objective, a, b, a))


def _has_kernels(*operands: Operand) -> bool:
    """Say whether a GPU and kernels for it compute the losses of these operands."""
    device = operands[0].values.device
    known = all(operand.spec.grid in KERNEL_GRIDS for operand in operands)
    return device.type == "cuda" and unavailable(device) is None and known


def loss_of_values(objective: MatmulObjective, a: Operand, b: Operand, searched: Operand) -> LossOf:
    """Return the loss as a function of scales of `searched`, which is `a` or `b`.

    The other operand is coded once.
    """
    if searched is a:
        fixed = b.fake()
        return lambda tables: torch.stack([a.reduce(objective.loss(a.fake(table), fixed)) for table in tables])
    fixed = a.fake()
    return lambda tables: torch.stack([b.reduce(objective.loss(fixed, b.fake(table))) for table in tables])


def loss_of_steps(objective: MatmulObjective, a: Operand, b: Operand, searched: Operand) -> LossOf:
    """Return the loss as `loss_of_values` does, by kernels for GPUs that score many tables at once.

    Only roundings in fp32 differ. Half as many tables are taken at once from where memory runs out on; near ties may
    then fall otherwise.
    """
    from tqdit.search import fused

    other = b if searched is a else a
    fixed = fused.steps(other, other.scale[None])

    def loss(tables: torch.Tensor) -> torch.Tensor:
        tried = fused.steps(searched, tables)
        pair = (tried, fixed) if searched is a else (fixed, tried)
        sums = fused.sums(objective, *pair, over_rows=searched.is_weight, stacked=not b.is_weight)
        return searched.totals(sums).movedim(-1, 0)

    at_once = fused.at_once(objective, a, searched)

    def losses(tables: torch.Tensor) -> torch.Tensor:
        nonlocal at_once
        while True:
            try:
                return torch.cat([loss(part) for part in tables.split(at_once)])
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
                at_once //= 2

    return losses


def _search(operand: Operand, base: torch.Tensor, recipe: Recipe, loss: LossOf) -> Operand:
    """Return the operand with the best table for every (group, unit); regions are searched one after the other."""
    for region in range(1 + operand.independent_regions):
        tables = torch.cat([operand.scale[None], operand.candidate_scales(base, recipe)[region]])
        losses = loss(tables).nan_to_num(nan=torch.inf, posinf=torch.inf)  # argmin would return a NaN's place
        best = losses.argmin(0, keepdim=True)  # (1, groups, units)
        index = best.reshape(*best.shape, *(1,) * (tables.ndim - 3)).expand(1, *tables.shape[1:])
        operand = operand.with_scale(tables.gather(0, index)[0])
    return operand
