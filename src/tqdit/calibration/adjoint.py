"""Carry the gradient of an image back through its sampling run: an adjoint sweep over the sampler's steps.

The method is that of Chen et al. 2018 ("Neural Ordinary Differential Equations"), on the discrete steps themselves: the
states of the run are kept, and each step's call of the model is made again with a graph of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.sampling.guidance import Conditions, Sample, Sampling, arguments, joined, predict_joined
from tqdit.sampling.schedules import schedule
from tqdit.sampling.trajectory import Progress
from tqdit.system.hooks import hooks

FORWARD = 1 / 4  # of the work: a backward sweep computes the output again, then two gradients of it


class _Taken(NamedTuple):
    """A step of the sampler with its graph, which is that of a few elementwise operations: x and output are leaves."""

    t: float
    x: torch.Tensor
    output: torch.Tensor
    following: torch.Tensor


def moves(  # noqa: PLR0913 - those of `trajectory`
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    sampling: Sampling,
    labels: torch.Tensor,
    generators: list[torch.Generator],
    conditions: Conditions,
    sample: Sample,
    *,
    layers: Sequence[nn.Module] = (),
    drawing: nn.Module | None = None,
    progress: Progress = lambda _: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far noise at each step moves the image and the output, estimated by one probe each of every run.

    Both are (B, steps), fp32, on the CPU. Without `layers` the noise is white, of variance 1, at the guided output: the
    image moves by |J_k^T v|^2 over the number of elements, the output by 1. With layers it is at their outputs, and
    only the quotient of the two has a meaning.
    The other arguments are those of `trajectory`, besides the progress and `drawing` of `measure`. The noise and the
    probes of a run come from the run's own generator. Memory is that of one call of the model with its graph, and of
    all states.
    """
    device, guidance = labels.device, sampling.guidance
    probes, noise = (_normal(sample, generators).to(device) for _ in range(2))
    inputs = joined(*arguments(conditions, labels, guidance), guidance)

    def output(denoiser: nn.Module, x: torch.Tensor, t: float) -> torch.Tensor:
        return predict_joined(denoiser, x, torch.full((len(x),), t, device=device), inputs, guidance)

    steps = schedule(scheduler_config, sampling, sample)
    taken, x = list[_Taken](), noise
    for i, t in enumerate(steps.timesteps.tolist()):
        with torch.no_grad():
            guided = output(drawing or model, x, t)
        leaves = x.detach().requires_grad_(), guided.detach().requires_grad_()
        with torch.enable_grad():
            taken.append(_Taken(t, *leaves, steps.step(leaves[1], i, leaves[0], generators)))
        x = taken[-1].following.detach()
        progress(FORWARD * (i + 1) / len(steps.timesteps))
    told = lambda fraction: progress(FORWARD + (1 - FORWARD) * fraction)  # noqa: E731
    with _Watched(layers) as watched:
        return _backwards(
            taken, probes, lambda x, t: output(model, x, t), lambda: _normal(sample, generators).to(device), watched,
            told,
        )  # fmt: skip


class _Watched:
    """The outputs of some layers in the last call that had a graph, and the gradients that reach them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers, self._hooks, self._outputs = layers, ExitStack(), list[torch.Tensor]()

    def __enter__(self) -> "_Watched":
        keep = self._hooks.enter_context(hooks())
        for layer in self.layers:
            keep(layer.register_forward_hook(self._keep))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _keep(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        if output.requires_grad:  # what does not depend on the state, as keys of a prompt, is left out
            self._outputs.append(output)

    def begin(self) -> None:
        """Forget the outputs of the call before."""
        self._outputs.clear()

    def gradients(
        self, output: torch.Tensor, x: torch.Tensor, by_output: torch.Tensor, keep: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient of <by_output, output> by x, and for each sample its squares by the layers' outputs.

        These are summed over all elements, times the mean square of a layer's output for the sample: (B,). With
        guidance the layers have two rows of each sample.
        """
        outputs = tuple(self._outputs)  # gradient checkpointing runs the layers, and their hooks, once more
        at = [x, *outputs]
        by_state, *others = torch.autograd.grad(output, at, by_output, retain_graph=keep, materialize_grads=True)
        total = torch.zeros(len(x), device=x.device)
        for value, gradient in zip(outputs, others, strict=True):
            size = value.detach().square().flatten(1).mean(1)
            total = total + (size * gradient.square().flatten(1).sum(1)).unflatten(0, (-1, len(x))).sum(0)
        return by_state, total


def _backwards(
    taken: list[_Taken],
    adjoint: torch.Tensor,
    output: Callable[[torch.Tensor, float], torch.Tensor],
    probe: Callable[[], torch.Tensor],
    watched: _Watched,
    told: Progress,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry `adjoint`, the gradient of <v, x_0> by the last state, to the first step. `taken` is used up.

    `probe` draws a random vector of the output's first channels.
    """
    count, image, own = len(taken), list[torch.Tensor](), list[torch.Tensor]()
    while taken:
        step = taken.pop()
        at = (step.x, step.output)
        by_state, by_output = torch.autograd.grad(step.following, at, adjoint, materialize_grads=True)
        channels = step.x.shape[1]  # behind them is a learned variance, which carries a gradient but is not weighed
        x = step.x.detach().requires_grad_()
        watched.begin()
        with torch.enable_grad():
            guided = output(x, step.t)
        if watched.layers:
            random = torch.zeros_like(by_output)
            random[:, :channels] = probe()
            own.append(watched.gradients(guided, x, random, keep=True)[1])
        through_model, by_layers = watched.gradients(guided, x, by_output)
        white = by_output[:, :channels].float().square().flatten(1).mean(1)
        image.append(by_layers if watched.layers else white)
        adjoint = by_state + through_model
        told(1 - len(taken) / count)
    moved = torch.stack(image[::-1], 1).cpu()
    return moved, torch.stack(own[::-1], 1).cpu() if own else torch.ones_like(moved)


def _normal(sample: Sample, generators: list[torch.Generator]) -> torch.Tensor:
    return torch.cat([torch.randn((1, *sample.shape), generator=generator) for generator in generators])
