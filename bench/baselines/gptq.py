"""GPTQ: round a weight column by column, and let the columns that are left make up for the error.

Frantar et al. 2023 ("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm 1).
With the Hessian H = X^T X of the layer's inputs and U the upper Cholesky factor of its inverse, column j is rounded,
its error over U_jj is multiplied with row j of U, and the columns after j are changed by the product.

The paper is followed with these choices: columns in the order of falling H_jj (the authors' "act-order"), damping by
1 % of the mean of the diagonal, scales fixed beforehand, and no blocks of columns, which change speed alone.
"""

import torch

from baselines.fake import Grid

DAMPING = 0.01


@torch.no_grad()
def solve(weight: torch.Tensor, rows: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return a weight (out, in) on its grid, rounded so that the outputs for `rows` (R, in) change little."""
    grid = grid.expanded(weight.shape)
    hessian = (rows.T.double() @ rows.double()) / len(rows)
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True)
    damped = hessian[order][:, order] + torch.eye(len(order), device=rows.device) * _damping(diagonal)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).to(weight.dtype)
    left, result = weight[:, order].clone(), torch.empty_like(weight)
    for position, column in enumerate(order.tolist()):
        steps = Grid(*(part[:, column] for part in (grid.step, grid.lowest, grid.highest)))
        result[:, column] = rounded = steps(left[:, position])
        error = (left[:, position] - rounded) / factor[position, position]
        left[:, position + 1 :] -= error[:, None] * factor[position, position + 1 :]
    return result


def _damping(diagonal: torch.Tensor) -> torch.Tensor:
    """Return 1 % of the mean of the Hessian's diagonal; 1 for inputs that are all zero, which need no rounding."""
    mean = diagonal.mean()
    return torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
