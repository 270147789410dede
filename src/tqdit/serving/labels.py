"""Name a model for the page."""

from pathlib import Path

from tqdit.artifact.provenance import read_provenance
from tqdit.sources.source import ModelSource


def label(source: ModelSource, dtype: str) -> str:
    """Return a model's name with its bits and preset, or with the dtype of a float model."""
    if not source.quantized:
        return f"{source.name} · {dtype}"
    made = read_provenance(Path(source.folder), source.config["quantization_config"]["format_version"])
    return f"{source.name} · {' '.join(filter(None, (made.bits.upper(), made.preset_name)))}"
