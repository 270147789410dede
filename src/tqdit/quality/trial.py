"""Draw what the equivalence test needs: images of a float model, of the same model in bf16, and of quantized ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tqdit.architectures import registry
from tqdit.calibration.trajectories import InBfloat16
from tqdit.errors import InputError
from tqdit.imaging import images
from tqdit.imaging.images import Images
from tqdit.quality import fashion, features
from tqdit.quality.equivalence import BLOCKS, Drawn, Verdict, Yardstick, verdicts
from tqdit.stages import Report, silent


@dataclass(frozen=True)
class Trial:
    """The images of one test: `wanted` of every model, and features of as many real images as there are.

    `other_seed` is the seed of the float model's other images. `features` maps pixels [N, C, H, W] to features [N, D],
    and `real` [M, D] are those of real images. Raises `InputError` for a number of images that is no multiple of the
    blocks, and where both seeds are the same.
    """

    wanted: Images
    other_seed: int
    features: Callable[[Tensor], Tensor]
    real: Tensor

    def __post_init__(self) -> None:
        if self.wanted.num % BLOCKS or self.wanted.num < 2 * BLOCKS:
            raise InputError(
                f"the equivalence test needs a number of images that is a multiple of {BLOCKS}, at least {2 * BLOCKS}, "
                f"got {self.wanted.num}"
            )
        if self.wanted.seed == self.other_seed:
            raise InputError(f"the equivalence test needs two seeds, got {self.other_seed} twice")

    def draw(self, model: nn.Module, name: str, seed: int | None = None, report: Report = silent) -> Drawn:
        """Return the images of a model and their features; `seed` is by default that of `wanted`."""
        chosen = self.wanted if seed is None else replace(self.wanted, seed=seed)
        stage = f"images of {name}"
        report(stage, 0.0)
        return self.with_features(images.gathered(chosen, model, lambda f: report(stage, f)))

    def with_features(self, pixels: Tensor) -> Drawn:
        """Return images that have been drawn before together with their features."""
        return Drawn(pixels, self.features(pixels).to(self.real.device))

    def yardstick(self, model: nn.Module, pixels: Tensor, report: Report = silent, bfloat16: bool = True) -> Yardstick:
        """Return what quantized models are measured by, given the float model and its images `pixels`.

        The float model is drawn with the other seed, and, with `bfloat16`, in that dtype with the same one. The sampler
        itself computes in fp32 beside a bf16 model, as it does beside an integer one.
        """
        name = self.wanted.source.name
        bf16 = self.draw(InBfloat16(model), f"{name} in bf16", report=report).pixels if bfloat16 else None
        other = self.draw(model, f"{name}, other seeds", self.other_seed, report).features
        return Yardstick(self.with_features(pixels), bf16, other, self.real)

    def judge(
        self,
        model: nn.Module,
        pixels: Tensor,
        quantized: Mapping[str, Tensor],
        report: Report = silent,
        bfloat16: bool = True,
    ) -> dict[str, Verdict]:
        """Return the verdict of every quantized model by its pixels, which are all of `wanted`'s seeds.

        `pixels` are those of the float `model`. `bfloat16`: whether to compare with that dtype, too.
        """
        drawn = {name: self.with_features(found) for name, found in quantized.items()}
        return verdicts(drawn, self.yardstick(model, pixels, report, bfloat16))


def fashion_trial(wanted: Images, device: torch.device) -> Trial:
    """Return the test of these images with the bundled classifier's features; the other seed is the next one.

    Raises `InputError` for a model that does not make Fashion-MNIST's classes, and as `Trial` does.
    """
    source = wanted.source
    if not fashion.is_fashion(source.labels, registry.sample(source.config).shape):
        raise InputError(f"the equivalence test needs a model of Fashion-MNIST, '{source.name}' is none")
    device = device if device.type == "cuda" else torch.device("cpu")  # others may have no float64
    classifier = features.load_fashion_classifier(device)
    real, other = fashion.load_real_features().to(device), (wanted.seed + 1) % 2**31
    return Trial(wanted, other, lambda pixels: features.image_features(pixels, classifier), real)
