"""tqdit: Diffusion Transformers in integers, by TQ-DiT post-training quantization.

    import tqdit
    tqdit.quantize("fashion-dit", "w8a8", tqdit.Recipe("plus", "w8a8"))
    images = tqdit.sample("w8a8", ["sneaker", 8], num=16)
    tqdit.save_grid(images, "grid.png")

    transformer = tqdit.quantize(pipe.transformer, tqdit.Recipe(), scheduler=pipe.scheduler)    # nothing on disk

Importing tqdit lets diffusers' `from_pretrained` load artifacts. The names below are the whole public interface; they
load on first use, so `import tqdit` is quick. examples/ has scripts that use them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tqdit.integrations.on_import import register_with_diffusers
from tqdit.version import VERSION

if TYPE_CHECKING:
    from tqdit.calibration.calls import Calls
    from tqdit.calibration.pipeline_calls import Recording
    from tqdit.calibration.recording import record
    from tqdit.calibration.records import Records
    from tqdit.calibration.states import CalibrationSet
    from tqdit.drawing import sample
    from tqdit.errors import AssumptionWarning, InputError
    from tqdit.evaluation.evaluate import evaluate
    from tqdit.imaging.generate import save_grid, to_pil
    from tqdit.integrations.diffusers import TQDiTConfig
    from tqdit.loading import load
    from tqdit.quality.compare import compare
    from tqdit.quality.samples import Comparison
    from tqdit.recipe import Recipe
    from tqdit.runtime.target import Target
    from tqdit.sampling.guidance import ClassLabels, Conditions, Sampling
    from tqdit.sampling.prompts import Prompts
    from tqdit.sources.export import convert_checkpoint
    from tqdit.sources.summary import Summary
    from tqdit.spec import Solution
    from tqdit.stages import calibrate, calibration_states, convert, save, solve
    from tqdit.timegroups import TimeGroups
    from tqdit.workflow import inspect, quantize

_HOMES = {
    "AssumptionWarning": "tqdit.errors",
    "CalibrationSet": "tqdit.calibration.states",
    "Calls": "tqdit.calibration.calls",
    "ClassLabels": "tqdit.sampling.guidance",
    "Comparison": "tqdit.quality.samples",
    "Conditions": "tqdit.sampling.guidance",
    "InputError": "tqdit.errors",
    "Prompts": "tqdit.sampling.prompts",
    "Recipe": "tqdit.recipe",
    "Recording": "tqdit.calibration.pipeline_calls",
    "Records": "tqdit.calibration.records",
    "Sampling": "tqdit.sampling.guidance",
    "Solution": "tqdit.spec",
    "Summary": "tqdit.sources.summary",
    "TQDiTConfig": "tqdit.integrations.diffusers",
    "Target": "tqdit.runtime.target",
    "TimeGroups": "tqdit.timegroups",
    "calibrate": "tqdit.stages",
    "calibration_states": "tqdit.stages",
    "compare": "tqdit.quality.compare",
    "convert": "tqdit.stages",
    "convert_checkpoint": "tqdit.sources.export",
    "evaluate": "tqdit.evaluation.evaluate",
    "inspect": "tqdit.workflow",
    "load": "tqdit.loading",
    "quantize": "tqdit.workflow",
    "record": "tqdit.calibration.recording",
    "sample": "tqdit.drawing",
    "save": "tqdit.stages",
    "save_grid": "tqdit.imaging.generate",
    "solve": "tqdit.stages",
    "to_pil": "tqdit.imaging.generate",
}
__all__ = [
    "AssumptionWarning",
    "CalibrationSet",
    "Calls",
    "ClassLabels",
    "Comparison",
    "Conditions",
    "InputError",
    "Prompts",
    "Recipe",
    "Recording",
    "Records",
    "Sampling",
    "Solution",
    "Summary",
    "TQDiTConfig",
    "Target",
    "TimeGroups",
    "calibrate",
    "calibration_states",
    "compare",
    "convert",
    "convert_checkpoint",
    "evaluate",
    "inspect",
    "load",
    "quantize",
    "record",
    "sample",
    "save",
    "save_grid",
    "solve",
    "to_pil",
]


__version__ = VERSION

register_with_diffusers()


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tqdit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
