"""`ModelSource`: a model that `resolve` has found, with all that lies around it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdit.architectures.dit_checkpoint import DIFFUSION
from tqdit.sampling.schedules import family
from tqdit.sources import checkpoints, components
from tqdit.sources.components import class_named
from tqdit.system.files import QUANT_METHOD


@dataclass(frozen=True)
class ModelSource:
    """A model that `resolve` has found.

    `folder` holds the transformer's config.json and weights. `vae` is the folder of a decoder, if there is one.
    `checkpoint` is a file that holds everything; `weights` says which of its sets is used, empty if it has one.
    `opened` keeps the content of that file, so that it is unpickled only once.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: dict(DIFFUSION))
    labels: Mapping[int, str] = field(default_factory=dict)
    vae: Path | None = None
    pipeline: Mapping[str, Any] | None = None  # model_index.json
    checkpoint: Path | None = None
    weights: str = ""
    root: Path | None = None  # the pipeline's folder, or the model's own
    opened: checkpoints.Checkpoint | None = field(default=None, compare=False, repr=False)

    def check_components(self) -> None:
        """Raise `InputError` for a part of the pipeline that could not be copied into an artifact."""
        components.check(self.root or self.folder, self.pipeline or {}, self.vae)

    def copy_components(self, folder: Path) -> None:
        """Copy the parts of the pipeline besides transformer and scheduler into the new pipeline `folder`."""
        components.copy(self.root or self.folder, self.pipeline or {}, self.vae, folder)

    @property
    def components(self) -> dict[str, list[str]]:
        """Return the entries for scheduler and decoder that the pipeline's model_index.json lacks.

        diffusers loads these two parts only if the model_index.json names them.
        """
        named = {"scheduler": ["diffusers", self.scheduler.get("_class_name", DIFFUSION["_class_name"])]}
        if self.vae is not None:
            named["vae"] = ["diffusers", "AutoencoderKL"]
        index = self.pipeline or {}
        return {name: entry for name, entry in named.items() if class_named(index, name) is None}

    @property
    def num_timesteps(self) -> int:
        """Return T, the number of training timesteps: timesteps are in [0, T), or in [0, T] for flow matching."""
        return int(self.scheduler.get("num_train_timesteps", 1000))

    @property
    def time_range(self) -> tuple[float, float, bool]:
        """Return the least timestep, the bound of all timesteps, and whether the bound is a timestep too."""
        return 0, self.num_timesteps, family(self.scheduler).closed

    @property
    def quantized(self) -> bool:
        """Say whether the model is an artifact of tqdit."""
        found = self.config.get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD
