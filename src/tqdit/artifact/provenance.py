"""Read how an artifact was made, without reading its weights."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from tqdit.artifact.manifest import Manifest
from tqdit.artifact.tensors import MANIFEST_TENSOR, readable
from tqdit.provenance import Provenance


def read_provenance(folder: Path, version: int) -> Provenance:
    """Return the provenance of the model in `folder`, in that format; empty if no weight file has a manifest.

    Nothing else is verified.
    """
    manifest = _manifest(folder, version)
    return Provenance() if manifest is None else manifest.provenance


def is_traced(folder: Path, version: object) -> bool:
    """Say whether the artifact in `folder`, in that format, has the graph of a traced model.

    A damaged one counts as having none: whoever reads its weights says what is wrong.
    """
    if not readable(version):
        return False
    assert isinstance(version, int)
    try:
        manifest = _manifest(folder, version)
    except (OSError, SafetensorError, TypeError, ValueError):
        return False
    return manifest is not None and manifest.graph is not None


def _manifest(folder: Path, version: int) -> Manifest | None:
    """Return the manifest in the weight files of a folder; None if no file has one."""
    for path in sorted(path for path in folder.glob("*.safetensors") if path.is_file()):
        with safe_open(path, framework="pt") as file:
            if MANIFEST_TENSOR in file.keys():  # noqa: SIM118 - no mapping
                return Manifest.parse(file.get_tensor(MANIFEST_TENSOR).numpy().tobytes(), version)
    return None
