"""Refuse artifacts of traced models where a command takes models that tqdit samples itself."""

from typing import Literal

from tqdit.artifact.provenance import is_traced
from tqdit.errors import InputError
from tqdit.sources.source import ModelSource

INSTEAD = {
    "sample": "draw its images by its pipeline in diffusers",
    "compare": "give recorded calls, too, by --calls",
    "bench": "time calls of its pipeline; --random z-image and the like times blocks of published models",
}


def check_sampled(source: ModelSource, command: Literal["sample", "compare", "bench"]) -> None:
    """Raise `InputError` for the artifact of a traced model, which says what serves it instead of the command.

    Its attention is in float, and its timesteps are those of the argument that it is called with, not the scheduler's.
    """
    if source.quantized and is_traced(source.folder, source.config["quantization_config"].get("format_version")):
        raise InputError(
            f"'{source.name}' is the artifact of a traced model (of the preset dynamic or of recorded calls), which "
            f"tqdit {command} does not take: {INSTEAD[command]}. Of a DiT, SiT or PixArt, the presets plus and paper "
            "make artifacts that all commands take"
        )
