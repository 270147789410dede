"""Draw one image of several models at a time, step by step, as events that a page shows."""

import statistics
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from tqdit.sampling.guidance import Sampling
from tqdit.serving.request import Request
from tqdit.speed.machine import synchronise
from tqdit.system.hooks import hooks
from tqdit.system.isolation import isolated

PREVIEWS = 12  # of an image, at most: a decoder may take as long as a step


@dataclass(frozen=True)
class Frame:
    """Hold what a model has drawn after `step` of `steps` steps.

    `pixels`: (C, H, W) in [-1, 1] on the CPU, or None where the model shows nothing. They are the noise first, then
    the image that the model predicts at the step, and at the end the image itself. `call_ms`: milliseconds of every
    call of the denoiser until now.
    """

    step: int
    steps: int
    pixels: torch.Tensor | None
    call_ms: tuple[float, ...]

    @property
    def done(self) -> bool:
        """Say whether the image is finished."""
        return self.step == self.steps

    @property
    def median_ms(self) -> float | None:
        """Return the median milliseconds of a call; None before the first one."""
        return statistics.median(self.call_ms) if self.call_ms else None


class Served(Protocol):
    """A model that the page draws with."""

    @property
    def name(self) -> str:
        """Return the model's name alone."""

    @property
    def label(self) -> str:
        """Return the name with the bits of an artifact, or the dtype of a float model."""

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of the weights."""

    @property
    def peak_bytes(self) -> int | None:
        """Return the most bytes in use during a call, above the imports; None where it was not measured."""

    @property
    def asks_for(self) -> str:
        """Return "class", "prompt" or "text": what is asked of the model."""

    @property
    def choices(self) -> list[tuple[str, int]] | None:
        """Return the name and number of every class or prompt; None for a text."""

    @property
    def samplers(self) -> tuple[str, ...]:
        """Return the samplers that suit the model."""

    @property
    def defaults(self) -> Sampling:
        """Return how the model draws if a user changes nothing."""

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Return (C, H, W) of the state that is denoised, where it is known."""

    @property
    def pixelated(self) -> bool:
        """Say whether images should be enlarged without smoothing."""

    @property
    def quantized(self) -> bool:
        """Say whether the model is an artifact."""

    def check(self, request: Request) -> None:
        """Raise `InputError` for a request that the model cannot draw."""

    def frames(self, request: Request) -> Generator[Frame, None, None]:
        """Yield what is drawn: the noise, then something after every step, and the image at last."""


def draw(models: Sequence[Served], request: Request) -> Generator[tuple[int, Frame], None, None]:
    """Yield (number of the model, frame), each model in turn after a step of its own.

    All models start from the same noise where their samples have the same shape. Work goes on only while the events
    are read, and ends when the generator is closed. Raises `InputError` before any work if a model refuses the request.
    """
    for model in models:
        model.check(request)
    runs = [model.frames(request) for model in models]
    unfinished = list(enumerate(runs))
    try:
        while unfinished:
            for entry in tuple(unfinished):
                number, run = entry
                frame = _next(run)
                if frame is None:
                    unfinished.remove(entry)
                else:
                    yield number, frame
    finally:
        for run in runs:
            run.close()


@isolated()
def _next(run: Iterator[Frame]) -> Frame | None:
    return next(run, None)


def is_shown(step: int, steps: int) -> bool:
    """Say whether an image is shown after `step` of `steps` steps: about `PREVIEWS` times, and at both ends."""
    return step == steps or step % -(-steps // PREVIEWS) == 0


@contextmanager
def stopwatch(model: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Yield a list that gets the milliseconds of every call of a model, until the device is idle again."""
    found: list[float] = []
    begun: list[float] = []

    def start(*_: Any) -> None:
        synchronise(device)
        begun.append(time.perf_counter())

    def stop(*_: Any) -> None:
        synchronise(device)
        found.append(1e3 * (time.perf_counter() - begun.pop()))

    with hooks() as keep:
        keep(model.register_forward_pre_hook(start))
        keep(model.register_forward_hook(stop))
        yield found
