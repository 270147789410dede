"""The artifacts of a comparison: load them, and check that they were made from the float model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdit.artifact.tensors import decisive
from tqdit.errors import InputError
from tqdit.runtime import fitting
from tqdit.sources.resolve import resolve
from tqdit.sources.sampled import check_sampled
from tqdit.sources.scheduler import check_timesteps
from tqdit.sources.source import ModelSource
from tqdit.spec import Solution


def artifact_paths(quantized: Any) -> list[str | Path]:
    """Return the artifacts that a user gives, a list of paths or one path, as a list.

    Raises `InputError` for anything else, and for an empty list.
    """
    found = [quantized] if isinstance(quantized, str | Path) else quantized
    if not isinstance(found, Sequence) or not all(isinstance(path, str | Path) for path in found):
        raise InputError(f"quantized must be the path of an artifact or a list of them, got {quantized!r:.80}")
    if not found:
        raise InputError("quantized must name at least one artifact, got an empty list")
    return list(found)


@dataclass(frozen=True)
class ComparedArtifact:
    """An artifact that was made from the float model of a comparison."""

    folder: Path
    name: str
    solution: Solution


def load_artifact(path: str | Path, source: ModelSource, digest: str) -> ComparedArtifact:
    """Load an artifact that was made from the float model `source`, whose weights have the hash `digest`.

    Raises `InputError` for a folder that is not quantized, for an artifact of a traced model, and for one of other
    weights, of a model with other settings, or with other timesteps than the scheduler of `source` has.
    """
    other = resolve(path)
    if not other.quantized:
        raise InputError(f"'{path}' is not quantized; compare takes a float model, then artifacts")
    check_sampled(other, "compare")
    solution = fitting.read(other.folder, other.root)
    if solution.provenance.source_sha256 != digest:
        made_from = solution.provenance.source or "an unknown model"
        raise InputError(
            f"'{path}' was not made from '{source.name}' but from other weights ('{made_from}'); compare it with those"
        )
    given, made = decisive(source.config), decisive(solution.model_config)
    for key in given:
        if key in made and given[key] != made[key]:
            raise InputError(f"'{path}' was made of a model with {key} {made[key]}, '{source.name}' has {given[key]}")
    check_timesteps(solution.time_groups, source, f"'{path}'")
    return ComparedArtifact(other.folder, other.name, solution)
