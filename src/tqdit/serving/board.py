"""Keep what a page shows of a drawing: each model's latest frame, as a picture and as figures in words."""

from collections.abc import Sequence

import torch

from tqdit.quality.metrics import psnr_db
from tqdit.serving.drawing import Frame, Served


class Board:
    """The latest frame of every model of a drawing."""

    def __init__(self, models: Sequence[Served]) -> None:
        self.models = models
        # What the other images are measured against: the first float model, wherever it stands.
        self.reference = next((number for number, model in enumerate(models) if not model.quantized), 0)
        self._frames: list[Frame | None] = [None] * len(models)
        self._images: dict[int, torch.Tensor] = {}  # finished ones

    def take(self, number: int, frame: Frame) -> None:
        """Note the next frame of model `number`."""
        self._frames[number] = frame
        if frame.done and frame.pixels is not None:
            self._images[number] = frame.pixels

    @property
    def done(self) -> bool:
        """Say whether every model has finished."""
        return all(frame is not None and frame.done for frame in self._frames)

    def figures(self, number: int) -> list[tuple[str, str]]:
        """Return what is known of model `number`: pairs of a name and a value with its unit."""
        model, frame = self.models[number], self._frames[number]
        rows = [("step", f"{frame.step} of {frame.steps}" if frame else "–")]
        if frame and frame.median_ms is not None:
            total = sum(frame.call_ms) / 1e3
            rows += [("a call (median)", f"{frame.median_ms:.1f} ms"), ("all calls", f"{total:.2f} s")]
        else:
            rows += [("a call (median)", "–"), ("all calls", "–")]
        rows.append(("weights", megabytes(model.weight_bytes)))
        rows.append(("peak memory", "–" if model.peak_bytes is None else megabytes(model.peak_bytes)))
        if number != self.reference:
            rows.append((f"PSNR to {self.models[self.reference].name}", self._psnr(number)))
        return rows

    def _psnr(self, number: int) -> str:
        """Return how near a finished image is to the reference's, if that is finished too."""
        expected, own = self._images.get(self.reference), self._images.get(number)
        if expected is None or own is None or expected.shape != own.shape:
            return "–"
        found = psnr_db(expected[None], own[None])
        return "equal" if torch.equal(expected, own) or found is None else f"{found:.1f} dB"


def megabytes(count: int) -> str:
    """Return bytes as text, in MB of 10^6 bytes."""
    return f"{count / 1e6:.1f} MB"
