"""The protocol of an evaluation, the rows that were measured under it, and their file.

Rows of different protocols never come together: neither in a file nor in a table.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from tqdit.errors import InputError
from tqdit.system.files import read_json, write_text
from tqdit.system.validation import reason

VERSION = 1  # raised when a score is computed in another way
KIND = "tqdit evaluation"
NEEDED = {"images": ("num",), "network": ("name", "inception"), "reference": ("name", "images")}  # to describe a table
LABELS = ("network.name", "reference.name")  # what hashes decide, and files may be renamed


@dataclass(frozen=True)
class Protocol:
    """All that must be the same for scores to be compared.

    `images`: how many, and how they were drawn: sampler, steps, guidance, seed, classes. `network` and `reference`:
    name and hash. `scores`: the settings of the scores. `version`: that of the scores' definitions.
    """

    images: Mapping[str, Any]
    network: Mapping[str, Any]
    reference: Mapping[str, Any]
    scores: Mapping[str, Any]
    version: int = VERSION

    def check_same(self, other: "Protocol", here: str, there: str) -> None:
        """Raise `InputError` naming every setting in which another protocol differs, by the names of both."""
        own, others = _flat(asdict(self)), _flat(asdict(other))
        differing = [key for key in {**own, **others} if key not in LABELS and own.get(key) != others.get(key)]
        if differing:
            pairs = "; ".join(f"{key} is {own.get(key)!r:.80} and {others.get(key)!r:.80}" for key in differing)
            raise InputError(f"{here} and {there} have different protocols, and go into no common table: {pairs}")


@dataclass(frozen=True)
class Row:
    """The scores of one model or batch of samples.

    `run`: what decided its images, such as the hash of the model, its backend and dtype. `absent`: why a score is
    missing. `seconds` of each stage. `peak_memory_bytes`: of the process so far, imports included;
    `peak_device_memory_bytes`: of a GPU in each stage.
    """

    name: str
    run: Mapping[str, Any]
    scores: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Rows that were measured under one protocol."""

    protocol: Protocol
    rows: tuple[Row, ...] = ()

    def row_of(self, run: Mapping[str, Any]) -> Row | None:
        """Return the row of the same images, if there is one; a model of the same hash may have moved."""
        return next((row for row in self.rows if _identity(row.run) == _identity(run)), None)

    def with_row(self, row: Row) -> "Evaluation":
        """Return the evaluation with one row more."""
        return Evaluation(self.protocol, (*self.rows, row))

    def to_json(self) -> str:
        """Return the text of a result file."""
        value = {"kind": KIND, "protocol": asdict(self.protocol), "rows": [asdict(row) for row in self.rows]}
        return json.dumps(value, indent=1, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the result file, whole or not at all."""
        write_text(path, self.to_json())


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation of a result file. Raises `InputError` that names the file."""
    value = read_json(path, "it is a result file of tqdit evaluate")
    try:
        if value.get("kind") != KIND:
            raise ValueError(f"its kind is {value.get('kind')!r:.80}")
        found = TypeAdapter(Evaluation).validate_python(value)
        _check_names(found.protocol)
    except ValidationError as error:
        raise InputError(f"{path} is no result file of tqdit evaluate: {reason(error)}") from None
    except ValueError as error:
        raise InputError(f"{path} is no result file of tqdit evaluate: {error}") from None
    return found


def _check_names(protocol: Protocol) -> None:
    """Raise `ValueError` for a protocol that lacks what a table says of it."""
    for part, names in NEEDED.items():
        if lacking := [name for name in names if name not in getattr(protocol, part)]:
            raise ValueError(f"protocol.{part} has no '{lacking[0]}'")
    if protocol.version != VERSION:
        raise ValueError(f"its scores are of version {protocol.version}; this tqdit computes version {VERSION}")
    num = protocol.images["num"]
    if type(num) is not int:
        raise ValueError(f"protocol.images.num must be a whole number, got {num!r:.80}")
    if not {"sampler", "batch"} & protocol.images.keys():
        raise ValueError("protocol.images has neither 'sampler' nor 'batch'")


def joined(paths: Sequence[Path]) -> Evaluation:
    """Return the rows of several result files, each set of images once.

    Raises `InputError` where their protocols differ, or the scores of the same images.
    """
    found = [read_evaluation(path) for path in paths]
    result = found[0]
    for path, other in zip(paths[1:], found[1:], strict=True):
        result.protocol.check_same(other.protocol, f"'{paths[0]}'", f"'{path}'")
        for row in other.rows:
            same = result.row_of(row.run)
            if same is None:
                result = result.with_row(row)
            elif same.scores != row.scores:
                raise InputError(f"'{path}' has other scores for the same images of {row.name} than a file before it")
    return result


def _identity(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "model"}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping as one, with dots in its keys; lists as JSON has them."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(inner) if isinstance(inner, tuple | range) else inner
    return found
