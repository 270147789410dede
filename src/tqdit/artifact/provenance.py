"""Read how an artifact was made, without reading its weights."""

from pathlib import Path

from safetensors import safe_open

from tqdit.artifact.manifest import Manifest
from tqdit.artifact.tensors import MANIFEST_TENSOR
from tqdit.provenance import Provenance


def read_provenance(folder: Path, version: int) -> Provenance:
    """Return the provenance of the model in `folder`, in that format; empty if no weight file has a manifest.

    Nothing else is verified.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if MANIFEST_TENSOR in file.keys():  # noqa: SIM118 - no mapping
                return Manifest.parse(file.get_tensor(MANIFEST_TENSOR).numpy().tobytes(), version).provenance
    return Provenance()
