"""Draw with a DiT, SiT or PixArt on the page, as `tqdit.sample` does; the model's decoder shows previews."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import torch
from torch import nn

from tqdit import drawing
from tqdit.architectures import registry
from tqdit.artifact import folder as artifact
from tqdit.imaging import generate
from tqdit.imaging.images import Images
from tqdit.imaging.request import chosen_classes
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import AUTO, Conditions, Sampling
from tqdit.sampling.schedules import family
from tqdit.sampling.trajectory import noise_generators, trajectory
from tqdit.serving.drawing import Frame, is_shown, stopwatch
from tqdit.serving.labels import label
from tqdit.serving.request import Request
from tqdit.sources.conditions import suitable
from tqdit.sources.sizes import float_sizes
from tqdit.sources.source import ModelSource
from tqdit.speed import cost
from tqdit.system.isolation import isolated

WARM_UP = Sampling(steps=2)  # the first call may compile, the second may record a CUDA graph


@dataclass(frozen=True)
class Sampled:
    """A loaded model and its decoder. The page's image is the one that `tqdit.sample` draws with `num=1`."""

    source: ModelSource
    model: nn.Module
    device: torch.device
    conditions: Conditions | None
    label: str
    weight_bytes: int
    peak_bytes: int | None
    decode: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def quantized(self) -> bool:
        return self.source.quantized

    @property
    def asks_for(self) -> str:
        """Return "class" or "prompt", of which there is one for each choice."""
        return "class" if self.conditions is None else "prompt"

    @property
    def defaults(self) -> Sampling:
        return Sampling()

    @property
    def pixelated(self) -> bool:
        """Say whether images are the model's own small output, which a page enlarges without smoothing."""
        return self.source.vae is None

    @property
    def choices(self) -> list[tuple[str, int]]:
        """Return the name and number of every class or prompt that can be asked for."""
        if self.conditions is not None:
            return [(f"prompt {i}", i) for i in range(self.conditions.count)]
        labels, count = self.source.labels, registry.conditions(self.source.config).count
        return [(labels.get(i, f"class {i}"), i) for i in range(count)]

    @property
    def samplers(self) -> tuple[str, ...]:
        """Return the samplers that suit the model's scheduler."""
        return (AUTO, *family(self.source.scheduler).samplers)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of the state that is denoised."""
        return registry.sample(self.source.config).shape

    def wanted(self, request: Request) -> Images:
        """Return the request as images of this model. Raises `InputError` for one that is not legal."""
        asked = suitable(self.source.config, self.conditions)
        classes = chosen_classes(self.source, asked, [request.condition])
        return Images(self.source, classes, 1, request.sampling, request.seed, 1, self.conditions)

    def check(self, request: Request) -> None:
        self.wanted(request)

    def frames(self, request: Request) -> Generator[Frame, None, None]:
        wanted, steps, seen = self.wanted(request), request.sampling.steps, [torch.empty(0)]

        def watch(_: int, clean: torch.Tensor) -> None:
            seen[0] = clean

        config, members = self.source.config, range(1)
        states = trajectory(
            self.model, self.source.scheduler, request.sampling, torch.tensor(wanted.classes, device=self.device),
            noise_generators(request.seed, members), self.conditions or registry.conditions(config),
            registry.sample(config), watch,
        )  # fmt: skip
        with stopwatch(self.model, self.device) as call_ms:
            for step, (_, x) in enumerate(states):
                latents = None
                if is_shown(step, steps):
                    latents = generate.finite(x, members) if step == steps else (seen[0] if step else x).cpu()
                yield Frame(step, steps, None if latents is None else self.decode(latents)[0], tuple(call_ms))


@isolated()
def load(model: str, target: Target, conditions: Conditions | None = None, measure: bool = True) -> Sampled:
    """Load a model to be served, and call it until it is warm. Raises `InputError` as `drawing.images_of` does.

    `measure`: first measure its memory in a process of its own, which takes seconds.
    """
    wanted = drawing.images_of(model, [0], 1, WARM_UP, batch=1, conditions=conditions)
    source, peak = wanted.source, None
    if measure:
        folder = str(source.folder) if source.quantized else None
        config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        measured = cost.memory(
            config, 2, target.device, folder, target.dtype_name
        )  # 2: guidance calls a model for both
        peak = measured.peak_bytes if measured else None
    own = target if source.quantized else Target(device=target.device)
    module = drawing.load_to_sample(wanted, own)
    size = artifact.size_bytes(source.folder) if source.quantized else float_sizes(source, module).float32_bytes
    decode = generate.decoder(source.vae, target.device)
    found = Sampled(source, module, target.device, conditions, label(source, "float32"), size, peak, decode)
    for _ in found.frames(Request(0, 0, WARM_UP)):
        pass
    return found
