"""Draw with a pipeline of diffusers on the page: any class that makes an image of a prompt's text."""

import inspect
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.quality.traced_artifacts import artifact_folder, load_pipeline
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import AUTO, Sampling
from tqdit.serving.drawing import Frame, is_shown, stopwatch
from tqdit.serving.labels import label
from tqdit.serving.request import Request
from tqdit.sources.components import transformers
from tqdit.sources.source import ModelSource
from tqdit.system.isolation import isolated

NO_SIZE: Mapping[str, int] = {}
STEPS, GUIDANCE = "num_inference_steps", "guidance_scale"  # arguments of pipelines


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """The page wants no more of a drawing, whose thread ends by this."""


@dataclass(frozen=True)
class Pipeline:
    """A loaded pipeline. It draws as `tqdit compare --calls --prompts` does, with its own scheduler.

    Its previews are the state at the step, decoded: noise is left in it. Pipelines whose states need more than a
    decoder show none.
    """

    name: str
    pipe: Any
    device: torch.device
    label: str
    weight_bytes: int
    size: Mapping[str, int] = field(default_factory=dict)  # height and width, or the pipeline's own
    quantized: bool = False
    asks_for = "text"
    samplers = (AUTO,)
    peak_bytes = choices = shape = (
        None  # memory is not measured: the rest of a pipeline takes more than its transformer
    )
    pixelated = False

    @property
    def defaults(self) -> Sampling:
        """Return the steps and the guidance that the pipeline's class draws with."""
        taken = inspect.signature(type(self.pipe).__call__).parameters
        own = Sampling()
        steps, guidance = taken[STEPS].default, getattr(taken.get(GUIDANCE), "default", own.guidance)
        return Sampling(AUTO, steps or own.steps, own.guidance if guidance is None else guidance)

    def check(self, request: Request) -> None:
        if not isinstance(request.condition, str):
            raise InputError(f"'{self.name}' draws a prompt's text, got the number {request.condition}")
        if request.sampling.sampler != AUTO:
            raise InputError(f"'{self.name}' draws with its own scheduler; the sampler must be {AUTO}")

    def frames(self, request: Request) -> Generator[Frame, None, None]:
        steps = request.sampling.steps
        with stopwatch(_denoiser(self.pipe), self.device) as call_ms:
            run = _Run(self, request)
            try:
                yield Frame(0, steps, None, ())
                for step, pixels in run.results():
                    yield Frame(step, steps, pixels, tuple(call_ms))
            finally:
                run.stop()


class _Run:
    """One call of a pipeline in a thread of its own, which goes on only while a result is waited for."""

    def __init__(self, model: Pipeline, request: Request) -> None:
        self._model, self._request = model, request
        self._go = threading.Semaphore(0)
        self._found: queue.SimpleQueue[tuple[int, torch.Tensor | None] | Exception] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def results(self) -> Iterator[tuple[int, torch.Tensor | None]]:
        """Yield every step that is done and what it shows. Raises what the pipeline raises."""
        self._thread.start()
        for _ in range(self._request.sampling.steps):
            self._go.release()
            found = self._found.get()
            if isinstance(found, Exception):
                raise found
            yield found
            if found[0] == self._request.sampling.steps:
                return

    def stop(self) -> None:
        """End the thread at the step where it waits."""
        self._stopped = True
        self._go.release()
        if self._thread.is_alive():
            self._thread.join()

    def _draw(self) -> None:
        try:
            self._wait()
            with isolated():
                made = self._called()
            self._found.put((self._request.sampling.steps, made))
        except Stopped:
            return
        except Exception as error:
            self._found.put(error)

    def _wait(self) -> None:
        self._go.acquire()
        if self._stopped:
            raise Stopped

    def _called(self) -> torch.Tensor:
        """Return the image (C, H, W) in [-1, 1]."""
        pipe, sampling = self._model.pipe, self._request.sampling
        options: dict[str, Any] = {STEPS: sampling.steps, **self._model.size}
        if GUIDANCE in inspect.signature(type(pipe).__call__).parameters:
            options[GUIDANCE] = sampling.guidance
        generator = torch.Generator().manual_seed(self._request.seed)
        try:
            images = pipe(
                prompt=self._request.condition, generator=generator, output_type="np", return_dict=False,
                callback_on_step_end=self._step, **options,
            )[0]  # fmt: skip
        except InputError:
            raise
        except ValueError as error:  # so a pipeline says what it is wrongly called with
            raise InputError(f"the pipeline refuses the call: {error}") from error
        made = torch.as_tensor(images)
        if made.ndim != 4 or not bool(made.isfinite().all()):
            what = "NaN or Inf" if made.ndim == 4 else f"an array of shape {tuple(made.shape)}"
            raise InputError(f"'{self._model.name}' gave {what}, which is no image")
        return 2 * made[0].permute(2, 0, 1).float() - 1

    def _step(self, pipe: Any, i: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step, steps = i + 1, self._request.sampling.steps
        if step < steps:  # the last one is followed by the image
            self._found.put(
                (step, _decoded(pipe, tensors.get("latents"), self._model.size) if is_shown(step, steps) else None)
            )
            self._wait()
        return tensors


def load(source: ModelSource, target: Target, size: Mapping[str, int] = NO_SIZE) -> Pipeline:
    """Load the pipeline of a float model or an artifact. `size`: "height" and "width" in pixels, or its own.

    Raises `InputError` for a pipeline that draws no prompt's text.
    """
    if source.pipeline is None or source.root is None:
        raise InputError(f"'{source.name}' is a transformer alone; a page draws with a pipeline's folder")
    if target.backend != "auto":
        raise InputError(
            f"'{source.name}' is a pipeline, whose backend is chosen by its device; got '{target.backend}'"
        )
    pipe = load_pipeline(source.root, target.dtype).to(target.device)
    taken = inspect.signature(type(pipe).__call__).parameters
    for name in ("prompt", STEPS, "callback_on_step_end", "output_type", *size):
        if name not in taken:
            raise InputError(f"'{source.name}' is drawn by a {type(pipe).__name__}, which takes no {name}")
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "vae", None) is None:
        raise InputError(f"the pipeline '{source.name}' needs a text_encoder and a vae to draw a prompt's text")
    weight_bytes = _weight_bytes(source, pipe)
    named = label(source, target.dtype_name)
    return Pipeline(source.name, pipe, target.device, named, weight_bytes, size, source.quantized)


def _weight_bytes(source: ModelSource, pipe: Any) -> int:
    """Return the bytes of all transformers: of an artifact its files, of a float model as it is loaded."""
    assert source.root is not None
    names = [name for name in transformers(source.pipeline or {}) if getattr(pipe, name, None) is not None]
    if source.quantized:
        return sum(artifact.size_bytes(artifact_folder(source.root, name)) for name in names)
    return sum(parameter.nbytes for name in names for parameter in getattr(pipe, name).parameters())


def _denoiser(pipe: Any) -> nn.Module:
    return pipe.transformer


@torch.no_grad()
def _decoded(pipe: Any, latents: Any, size: Mapping[str, int]) -> torch.Tensor | None:
    """Return the image of a state, (C, H, W) in [-1, 1]; None where a decoder alone cannot make one."""
    from diffusers import AutoencoderKL

    if not isinstance(latents, torch.Tensor) or not isinstance(pipe.vae, AutoencoderKL):
        return None
    if latents.ndim == 3 and hasattr(pipe, "_unpack_latents"):
        side = round(latents.shape[1] ** 0.5) * 2 * pipe.vae_scale_factor  # pixels; images are square by default
        height, width = size.get("height", side), size.get("width", side)
        with suppress(RuntimeError, TypeError):  # another class may pack its states in another way
            latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    if latents.ndim != 4:
        return None
    config = pipe.vae.config
    scaled = latents[:1] / config.scaling_factor + (config.shift_factor or 0.0)
    return pipe.vae.decode(scaled.to(pipe.vae.dtype)).sample[0].float().cpu().clamp(-1, 1)
