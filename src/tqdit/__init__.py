"""tqdit: Diffusion Transformers in integers, by TQ-DiT post-training quantization.

    import tqdit
    tqdit.quantize("fashion-dit", "w8a8", tqdit.Recipe.build(bits="w8a8"))
    images = tqdit.sample("w8a8", ["sneaker", 8], num=16)
    tqdit.save_grid(images, "grid.png")

Importing tqdit lets diffusers' `from_pretrained` load artifacts. The names below are the whole public interface; they
load on first use, so `import tqdit` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tqdit.integrations.on_import import register_with_diffusers
from tqdit.version import VERSION

if TYPE_CHECKING:
    from tqdit.errors import AssumptionWarning, InputError
    from tqdit.imaging.generate import save_grid, to_pil
    from tqdit.integrations.diffusers import TQDiTConfig
    from tqdit.quality.comparison import Comparison, compare
    from tqdit.recipe import Recipe
    from tqdit.sampling.guidance import Sampling
    from tqdit.sources.export import convert_checkpoint
    from tqdit.workflow import inspect, load, quantize, sample

_HOMES = {
    "AssumptionWarning": "tqdit.errors",
    "Comparison": "tqdit.quality.comparison",
    "InputError": "tqdit.errors",
    "Recipe": "tqdit.recipe",
    "Sampling": "tqdit.sampling.guidance",
    "TQDiTConfig": "tqdit.integrations.diffusers",
    "compare": "tqdit.quality.comparison",
    "convert_checkpoint": "tqdit.sources.export",
    "inspect": "tqdit.workflow",
    "load": "tqdit.workflow",
    "quantize": "tqdit.workflow",
    "sample": "tqdit.workflow",
    "save_grid": "tqdit.imaging.generate",
    "to_pil": "tqdit.imaging.generate",
}
__all__ = [
    "AssumptionWarning",
    "Comparison",
    "InputError",
    "Recipe",
    "Sampling",
    "TQDiTConfig",
    "compare",
    "convert_checkpoint",
    "inspect",
    "load",
    "quantize",
    "sample",
    "save_grid",
    "to_pil",
]


__version__ = VERSION

register_with_diffusers()


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tqdit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
