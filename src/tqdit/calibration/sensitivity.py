"""Measure how much the image of a sampling run moves with an error of the model's output at each timestep.

A quantized model errs at every step, and the rest of the run carries each error to the image. With J_k the Jacobian of
x_0 by the guided output at step k, a white error of variance s^2 there moves x_0 by s^2 |J_k|_F^2 in the mean square.
|J_k|_F^2 is the mean of |J_k^T v|^2 over random v ~ N(0, I), which is Hutchinson's estimator of the trace of J_k J_k^T
(Hutchinson 1990). J_k^T v is a gradient: one backward sweep through the sampler gives that of every step. It is the
adjoint method, as Chen et al. 2018 ("Neural Ordinary Differential Equations") use it, on the discrete steps themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.calibration.batches import Batches
from tqdit.calibration.records import join
from tqdit.calibration.store import Forgetful, Store
from tqdit.errors import InputError
from tqdit.sampling.guidance import Conditions, Sample, Sampling, arguments, joined, predict_joined
from tqdit.sampling.schedules import resolved, schedule
from tqdit.sampling.trajectory import Progress, noise_generators
from tqdit.system import distributed
from tqdit.timegroups import TimeGroups

SENSITIVITY_STREAM = 750_000  # first noise stream, far from those of images, of trajectories and of Fisher probes
SAMPLES = 8
BATCH = 4  # samples at once, and what ranks share
LEAST = 1e-6  # of the largest: what a step counts, at least, that the sampler makes without the output
FORWARD = 1 / 3  # of the work: a backward sweep computes the output again, then its gradient


@dataclass(frozen=True)
class Sensitivity:
    """The mean squared change of x_0 by a white error of the guided output, over the variance of the error.

    t (steps,): the timesteps of the sampling run, decreasing, in the units of the model's `timestep`. squared (steps,):
    fp32, the sum over all elements of the squared Jacobian of x_0, over the number of elements. An error of variance
    s^2 at a single step moves x_0 by the mean square s^2 squared, to first order.
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
        group, count = groups.index(t), groups.num_groups
        steps = torch.bincount(groups.index(self.t), minlength=count).clamp(min=1)
        states = torch.bincount(group, minlength=count)
        weight = self.by_timestep(t).double() * steps[group] / states[group]
        return (weight / weight.max()).float()

    def _logs(self) -> torch.Tensor:
        squared = self.squared.double()
        return squared.clamp(min=LEAST * float(squared.max())).log()


def image_sampling(scheduler_config: Mapping[str, Any] | None, guidance: float) -> Sampling:
    """Return how images are drawn that a recipe says no more of than the guidance.

    The sampler is the default of the model's scheduler, in as many steps as the default of `Sampling`, or as all
    timesteps.
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
    drawing: nn.Module | None = None,
    store: Store | None = None,
) -> Sensitivity:
    """Measure the sensitivity of x_0 over `samples` guided sampling runs, each with a random probe of its own.

    The sampler "auto" is the one that draws images. Each run has one of `conditions`, which are the model's classes if
    not given, and a generator of its own: the number of runs at once changes rounding alone. The model computes in its
    own dtype, forward and backward. `drawing` computes the states of the runs, if it is given: a faster copy of the
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

    def run(told: Progress, members: range) -> dict[str, torch.Tensor]:
        first = SENSITIVITY_STREAM + members.start
        generators = noise_generators(seed, range(first, first + len(members)))
        chosen = labels[members.start : members.stop].to(device)
        given = (model, scheduler_config, sampling, chosen, generators, conditions, sample)
        return {"squared": squared_jacobians(*given, drawing=drawing, progress=told)}

    def make(done: int, members: range) -> dict[str, torch.Tensor]:
        parts = batches.over(members, partial(run, lambda fraction: progress((done + fraction) / len(share))))
        return {"squared": join("squared", parts)}

    def finished() -> Iterator[Mapping[str, torch.Tensor]]:
        for done, members in enumerate(share):
            name = f"sensitivity-{members.start:06d}-{members.stop:06d}"
            yield keep.once(name, partial(make, done, members)).read()
            progress((done + 1) / len(share))

    squared = join("squared", world.gather_named(finished(), len(division))).mean(0)
    _check_finite(squared, timesteps)
    return Sensitivity(timesteps, squared)


class _Taken(NamedTuple):
    """A step of the sampler with its graph, which is that of a few elementwise operations: x and output are leaves."""

    t: float
    x: torch.Tensor
    output: torch.Tensor
    following: torch.Tensor


def squared_jacobians(  # noqa: PLR0913 - those of `trajectory`
    model: nn.Module,
    scheduler_config: Mapping[str, Any] | None,
    sampling: Sampling,
    labels: torch.Tensor,
    generators: list[torch.Generator],
    conditions: Conditions,
    sample: Sample,
    *,
    drawing: nn.Module | None = None,
    progress: Progress = lambda _: None,
) -> torch.Tensor:
    """Return |J_k^T v|^2 over the number of elements for one v of each run and every step k: (B, steps), fp32, CPU.

    The arguments are those of `trajectory`, besides the progress and `drawing` of `measure`. v and the noise of a run
    come from the run's own generator. Memory is that of one call of the model with its graph, and of all states.
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
    return _backwards(taken, probes, lambda x, t: output(model, x, t), told)


def _backwards(
    taken: list[_Taken], adjoint: torch.Tensor, output: Callable[[torch.Tensor, float], torch.Tensor], told: Progress
) -> torch.Tensor:
    """Carry `adjoint`, the gradient of <v, x_0> by the last state, to the first step. `taken` is used up."""
    count, squared = len(taken), list[torch.Tensor]()
    while taken:
        step = taken.pop()
        at = (step.x, step.output)
        by_state, by_output = torch.autograd.grad(step.following, at, adjoint, materialize_grads=True)
        channels = step.x.shape[1]  # behind them is a learned variance, which carries a gradient but is not weighed
        squared.append(by_output[:, :channels].float().square().flatten(1).mean(1))
        if taken:  # nobody asks for the gradient by the initial noise
            x = step.x.detach().requires_grad_()
            with torch.enable_grad():
                through_model = torch.autograd.grad(output(x, step.t), x, by_output, materialize_grads=True)[0]
            adjoint = by_state + through_model
        told(1 - len(taken) / count)
    return torch.stack(squared[::-1], 1).cpu()


def _normal(sample: Sample, generators: list[torch.Generator]) -> torch.Tensor:
    return torch.cat([torch.randn((1, *sample.shape), generator=generator) for generator in generators])


def _check_finite(squared: torch.Tensor, t: torch.Tensor) -> None:
    """Raise `InputError` naming the first timestep, in the order of sampling, of a sensitivity that is no number."""
    wrong = ~torch.isfinite(squared)
    if wrong.any():
        raise InputError(
            "the sensitivity of the image to the float model's output has NaN or Inf values at timestep "
            f"{t[wrong].max().item():g}; errors cannot be weighed by the image with this scheduler and these settings"
        )
