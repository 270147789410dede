"""Measure how much the image of a sampling run moves with an error of the model's output at each timestep.

A quantized model errs at every step, and the rest of the run carries each error to the image. With J_k the Jacobian of
x_0 by the guided output at step k, a white error of variance s^2 there moves x_0 by s^2 |J_k|_F^2 in the mean square.
|J_k|_F^2 is the mean of |J_k^T v|^2 over random v ~ N(0, I), which is Hutchinson's estimator of the trace of J_k J_k^T
(Hutchinson 1990). J_k^T v is a gradient: one backward sweep through the sampler gives that of every step.

The rest of a run removes much of a white error, as it removes noise, and carries on what looks like an image. Errors of
a quantized model arise in its layers and look more like an image. So the errors that are measured are those that noise
at the outputs of the layers makes: noise that is white in each layer, its variance in proportion to the mean square of
the layer's output. The same gradients, continued to the layers, give how far they move x_0, and gradients of the output
alone how far they move the output. White errors of the output itself are measured on demand.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.calibration.adjoint import FORWARD, moves
from tqdit.calibration.batches import Batches
from tqdit.calibration.records import join
from tqdit.calibration.store import Forgetful, Store
from tqdit.errors import InputError
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.sampling.schedules import resolved, schedule
from tqdit.sampling.trajectory import Progress, noise_generators
from tqdit.system import distributed
from tqdit.timegroups import TimeGroups

SENSITIVITY_STREAM = 750_000  # first noise stream, far from those of images, of trajectories and of Fisher probes
SAMPLES = 8
BATCH = 4  # samples at once, and what ranks share
LEAST = 1e-6  # of the largest: what a step counts, at least, that the sampler makes without the output
NOTHING = 1e-30  # instead of 0, where noise in the layers does not reach the output at all


@dataclass(frozen=True)
class Sensitivity:
    """The mean square by which an error of the guided output at one step moves x_0, over that of the error itself.

    t (steps,): the timesteps of the sampling run, decreasing, in the units of the model's `timestep`. squared (steps,):
    fp32. It holds to first order, for errors that arise as `measure` says.
    """

    t: torch.Tensor
    squared: torch.Tensor

    def by_timestep(self, t: torch.Tensor) -> torch.Tensor:
        """Return the squared sensitivity at the timesteps t, fp32, of the shape of t.

        Between two timesteps of the run its logarithm is interpolated linearly. Outside it is that of the nearest. A
        value below `LEAST` of the largest is raised to that first, since the last step of some samplers is exactly 0.
        """
        at, order = t.detach().cpu().double(), self.t.double().argsort()
        known, logs = self.t.double()[order], self._logs()[order]
        if len(known) == 1:
            return logs.exp().float().expand(t.shape)
        right = torch.searchsorted(known, at.contiguous()).clamp(1, len(known) - 1)
        low, high = known[right - 1], known[right]
        share = ((at - low) / (high - low)).clamp(0, 1)
        return torch.lerp(logs[right - 1], logs[right], share).exp().float()

    def weights(self, t: torch.Tensor, groups: TimeGroups) -> torch.Tensor:
        """Return what an error of the output at states of the timesteps t weighs in the image: fp32, the largest is 1.

        The weight is the squared sensitivity at t, times the number of steps of the run in the time group of t, over
        the number of states there. A weighted sum over states then estimates the sum over all steps of the run, however
        the states are spread. A group that the run leaves out counts as one step, since another run may visit it.
        """
        weight = self.contributions(t, groups)
        return (weight / weight.max()).float()

    def contributions(self, t: torch.Tensor, groups: TimeGroups) -> torch.Tensor:
        """Return `weights` in absolute units, fp64.

        Their sum with the mean squared errors of the output at the states is the mean squared error of x_0, if errors
        of different steps are independent.
        """
        group, count = groups.index(t), groups.num_groups
        steps = torch.bincount(groups.index(self.t), minlength=count).clamp(min=1)
        states = torch.bincount(group, minlength=count)
        return self.by_timestep(t).double() * steps[group] / states[group]

    def _logs(self) -> torch.Tensor:
        squared = self.squared.double()
        return squared.clamp(min=max(LEAST * float(squared.max()), NOTHING)).log()


def image_sampling(scheduler_config: Mapping[str, Any] | None, guidance: float) -> Sampling:
    """Return the sampling whose images the sensitivity is of: the default one, with the guidance of a recipe.

    The sampler is the default of the model's scheduler. It takes as many steps as the default of `Sampling`, or one for
    each training timestep if there are fewer.
    """
    total = int((scheduler_config or {}).get("num_train_timesteps", Sampling.steps))
    return resolved(Sampling(steps=min(Sampling.steps, total), guidance=guidance), scheduler_config)


def work(sampling: Sampling, samples: int = SAMPLES) -> float:
    """Return how many calls of the model with one sample take as long as a measurement."""
    return samples * sampling.steps / FORWARD


def measure(  # noqa: PLR0913 - one for each choice
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    sampling: Sampling,
    conditions: Conditions | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    *,
    progress: Progress = lambda _: None,
    white: bool = False,
    drawing: nn.Module | None = None,
    store: Store | None = None,
) -> Sensitivity:
    """Measure the sensitivity of x_0 over `samples` guided sampling runs, each with a random probe of its own.

    The sampler "auto" is the one that draws images. Each run has one of `conditions`, which are the model's classes if
    not given, and a generator of its own: the number of runs at once changes rounding alone. The errors are those of
    noise in the linear layers of the model's blocks, or `white` errors of the output. The model computes in its own
    dtype, forward and backward. `drawing` computes the states of the runs, if it is given: a faster copy of the
    model. Each batch is one piece of `store`. Inside `distributed.joined` the ranks share the batches, and each returns
    the same bytes.
    Raises `InputError` for a sensitivity that is not finite, and as `schedule` does.
    """
    config = registry.config_of(model)
    conditions, sample = conditions or registry.conditions(config), registry.sample(config)
    sampling, device = resolved(sampling, scheduler_config), next(model.parameters()).device
    timesteps = schedule(scheduler_config, sampling, sample).timesteps
    order = torch.randperm(conditions.count, generator=torch.Generator().manual_seed(seed))
    labels = order.repeat(-(-samples // len(order)))[:samples]
    division, world, batches = distributed.batches(samples, BATCH), distributed.current(), Batches(BATCH)
    share, keep = world.share(division), store or Forgetful()
    layers = [] if white else _layers(model)

    def run(told: Progress, members: range) -> dict[str, torch.Tensor]:
        first = SENSITIVITY_STREAM + members.start
        generators = noise_generators(seed, range(first, first + len(members)))
        chosen = labels[members.start : members.stop].to(device)
        given = (model, scheduler_config, sampling, chosen, generators, conditions, sample)
        image, output = moves(*given, layers=layers, drawing=drawing, progress=told)
        return {"image": image, "output": output}

    def make(done: int, members: range) -> dict[str, torch.Tensor]:
        parts = batches.over(members, partial(run, lambda fraction: progress((done + fraction) / len(share))))
        return {key: join(key, parts) for key in parts[0]}

    def finished() -> Iterator[Mapping[str, torch.Tensor]]:
        for done, members in enumerate(share):
            name = f"sensitivity-{members.start:06d}-{members.stop:06d}"
            yield keep.once(name, partial(make, done, members)).read()
            progress((done + 1) / len(share))

    pieces = world.gather_named(finished(), len(division))
    squared = join("image", pieces).mean(0) / join("output", pieces).mean(0).clamp(min=NOTHING)
    _check_finite(squared, timesteps)
    return Sensitivity(timesteps, squared)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the linear layers of the model's blocks."""
    blocks = registry.graph(registry.config_of(model)).blocks
    return [model.get_submodule(name) for block in blocks for linear in block.linears for name in linear.modules]


def _check_finite(squared: torch.Tensor, t: torch.Tensor) -> None:
    """Raise `InputError` naming the first timestep, in the order of sampling, of a sensitivity that is no number."""
    wrong = ~torch.isfinite(squared)
    if wrong.any():
        raise InputError(
            "the sensitivity of the image to the float model's output has NaN or Inf values at timestep "
            f"{t[wrong].max().item():g}; errors cannot be weighed by the image with this scheduler and these settings"
        )
