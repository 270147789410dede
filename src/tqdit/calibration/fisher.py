"""HO's weights: the diagonal of the Gauss-Newton/Fisher matrix at every matmul output, by random probes.

The diffusion loss is a squared error on the model output, so the Fisher diagonal at an intermediate z is
diag(J^T J) with J = d output / d z. For v ~ N(0, I), E[(J^T v)_j^2] = (J^T J)_jj.
"""

from collections.abc import Callable

import torch

Pick = Callable[[torch.Tensor], torch.Tensor]


class Probes:
    """The mean over probes of the squared gradient of <v, output>, at picked elements of every watched intermediate.

    A gradient is squared and dropped as soon as the backward pass has it: the gradients of a whole model would take
    more memory than its activations.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.means: dict[str, torch.Tensor] = {}
        self.leaves: list[torch.Tensor] = []  # intermediates that are no function of the source: a prompt's keys

    def watch(self, name: str, z: torch.Tensor, pick: Pick) -> None:
        """Collect an intermediate's gradients under `name` from now on.

        An intermediate on which the output does not depend keeps zeros.
        """
        self.means[name] = torch.zeros_like(pick(z.detach()))
        if not z.requires_grad:
            self.leaves.append(z.requires_grad_())

        def collect(gradient: torch.Tensor) -> None:
            picked = pick(gradient)
            self.means[name].addcmul_(picked, picked, value=1 / self.count)

        z.register_hook(collect)

    def run(self, output: torch.Tensor, source: torch.Tensor, noise: torch.Tensor) -> None:
        """Propagate every probe back to all watched intermediates and to `source`, the model's input.

        `output`: what the sampler uses, the guided epsilon, so that both guidance halves get their true weight.
        `noise`: (count, *output.shape), standard normal.
        """
        for left, v in zip(range(self.count - 1, -1, -1), noise, strict=True):
            torch.autograd.grad(output, (source, *self.leaves), v, retain_graph=left > 0, allow_unused=True)


def normalized(weights: torch.Tensor) -> torch.Tensor | None:
    """Return weights with mean 1, or None if they carry no information (a module that the output ignores)."""
    mean = weights.mean()
    return weights / mean if torch.isfinite(mean) and mean > 0 else None
