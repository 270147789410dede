"""HO's weights: the diagonal of the Gauss-Newton/Fisher matrix at every matmul output, by random probes.

The diffusion loss is a squared error on the model output, so the Fisher diagonal at an intermediate z is
diag(J^T J) with J = d output / d z. For v ~ N(0, I), E[(J^T v)_j^2] = (J^T J)_jj (METHOD, section 5).
"""

import torch


def probe_gradients(output: torch.Tensor, intermediates: list[torch.Tensor], noise: torch.Tensor) -> list[torch.Tensor]:
    """Mean over probes of the squared gradient of <v, output>, in the shape of each intermediate.

    `output`: what the sampler uses, the guided epsilon, so that both guidance halves get their true weight. `noise`:
    (probes, *output.shape), standard normal. An intermediate that the output does not depend on gets zeros.
    """
    totals = [torch.zeros_like(z) for z in intermediates]
    for left, v in zip(range(len(noise) - 1, -1, -1), noise, strict=True):
        gradients = torch.autograd.grad(output, intermediates, v, retain_graph=left > 0, allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total.addcmul_(gradient, gradient, value=1 / len(noise))
    return totals


def normalized(weights: torch.Tensor) -> torch.Tensor | None:
    """Weights with mean 1, or None if they carry no information (a module that the output ignores)."""
    mean = weights.mean()
    return weights / mean if torch.isfinite(mean) and mean > 0 else None
