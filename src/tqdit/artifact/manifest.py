"""Read and write the manifest of an artifact, which lists its tensors.

Bytes that anyone may have written become strict types here.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    StringConstraints,
    ValidationError,
)

from tqdit.errors import InputError, printable
from tqdit.provenance import Provenance
from tqdit.spec import MAX_BITS, MIN_BITS, Granularity, Grid, Role, SiteSpec
from tqdit.system.reading import parse_json
from tqdit.timegroups import MAX_EDGES, MAX_TIMESTEPS, TimeGroups

ROTATIONS = (0, 128, 256)  # sizes of Hadamard blocks; 0 is none
MAX_AXES = 4  # axes of a weight
MAX_SIZE = 2**40  # the limit of an axis: no file holds a larger one

Size = Annotated[StrictInt, Field(ge=1, le=MAX_SIZE)]
Sha256 = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _grid(name: Any) -> Grid:
    """Return the grid of a name; pydantic reports the `ValueError` of another value."""
    if not isinstance(name, str):
        raise ValueError("a grid is given by its name")
    return Grid(name)


class _Site(_Entry):
    name: StrictStr
    role: Role
    bits: StrictInt
    grid: Annotated[Grid, PlainValidator(_grid)]
    granularity: Granularity
    groups: Size
    units: Size
    rotation: StrictInt = 0  # since format 5


class _UniformGroups(_Entry):
    """Time groups in the form of format 2."""

    num_timesteps: Annotated[StrictInt, Field(ge=1, le=MAX_TIMESTEPS)]
    num_groups: Annotated[StrictInt, Field(ge=1, le=MAX_EDGES + 1)]

    def read(self) -> TimeGroups:
        """Return the time groups."""
        return TimeGroups.uniform(0, self.num_timesteps, self.num_groups)


class _TimeGroups(_Entry):
    edges: Annotated[list[StrictFloat], Field(max_length=MAX_EDGES)]
    low: StrictFloat
    high: StrictFloat
    closed: StrictBool

    def read(self) -> TimeGroups:
        return TimeGroups(tuple(self.edges), self.low, self.high, self.closed)


class StoredTensor(_Entry):
    """The dtype, shape and hash that a tensor of the weight files must have."""

    dtype: StrictStr
    shape: list[Annotated[StrictInt, Field(ge=0, le=MAX_SIZE)]]
    sha256: Sha256


class _Manifest(BaseModel):
    """The entries of a manifest. Keys that a later version may add beside them mean nothing to this version."""

    settings: dict[StrictStr, Any] = Field(alias="model_config")  # pydantic has another use for that name
    sites: list[_Site]
    shapes: dict[StrictStr, Annotated[list[Size], Field(min_length=1, max_length=MAX_AXES)]]
    tensors: dict[StrictStr, StoredTensor]
    aliases: dict[StrictStr, StrictStr]
    provenance: dict[StrictStr, Any]


class _Manifest2(_Manifest):
    time_groups: _UniformGroups


class _Manifest3(_Manifest):
    time_groups: _TimeGroups


class _Manifest4(_Manifest3):
    stream_max: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] | None = None


class _Manifest5(_Manifest4):
    graph: dict[StrictStr, Any] | None = None
    notes: dict[StrictStr, StrictStr] = Field(default_factory=dict)


# Format 4 is format 3 with the grids of rows, channel factors, layers outside of blocks that stay in float, and the
# largest magnitude of the residual stream. Format 5 is format 4 with the graph of a traced model, rotations, and notes;
# an artifact that has none of these is written in format 4.
FORMATS: dict[int, type[_Manifest2] | type[_Manifest3]] = {
    2: _Manifest2, 3: _Manifest3, 4: _Manifest4, 5: _Manifest5,
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    `shapes`: of weights, whose codes are packed. `aliases`: a tensor's name -> the equal one that is stored.
    `stream_max`: as in `Solution`; formats before 4 do not have it. `graph`: of a traced model, as JSON; `rotations`:
    of the sites that have one; `notes`: as in `Solution`. Formats before 5 do not have them.
    """

    model_config: Mapping[str, Any]
    time_groups: TimeGroups
    sites: tuple[SiteSpec, ...]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, StoredTensor]
    aliases: Mapping[str, str]
    provenance: Provenance
    stream_max: float | None = None
    graph: Mapping[str, Any] | None = None
    rotations: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Return the format that the manifest is written in."""
        return 5 if self.graph is not None or self.rotations or self.notes else 4

    @classmethod
    def parse(cls, data: bytes, version: int) -> Self:
        """Read the manifest of an artifact of format `version`, a key of `FORMATS`.

        Raises `InputError` that names the entry for anything that is not exactly of its type or range.
        Whether the sites are those of a model is another question: `runtime.fitting` answers it.
        """
        try:
            value = FORMATS[version].model_validate(parse_json(data, infinite=False))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"'{where}' is wrong: {first['msg']}, got {first['input']!r:.80}") from None
        groups = value.time_groups.read()
        return cls(
            value.settings,
            groups,
            _sites(value.sites, groups),
            {name: tuple(shape) for name, shape in value.shapes.items()},
            value.tensors,
            _checked_aliases(value),
            Provenance.from_json(_printable(value.provenance)),
            value.stream_max if isinstance(value, _Manifest4) else None,
            **_since_5(value),
        )

    def to_json(self) -> bytes:
        """Return the bytes that `parse` reads, in the format `version`; the same for the same content."""
        value: dict[str, Any] = {
            "model_config": dict(self.model_config),
            "time_groups": asdict(self.time_groups),
            "sites": [self._site(spec) for spec in self.sites],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "tensors": {name: tensor.model_dump() for name, tensor in self.tensors.items()},
            "aliases": dict(self.aliases),
            "provenance": self.provenance.to_json(),
            "stream_max": self.stream_max,
        }
        if self.version == 5:
            value |= {"graph": self.graph, "notes": dict(self.notes)}
        return json.dumps(value, separators=(",", ":")).encode()

    def _site(self, spec: SiteSpec) -> dict[str, Any]:
        turned = self.rotations.get(spec.name, 0)
        return asdict(spec) | ({"rotation": turned} if turned else {})


def _since_5(value: _Manifest) -> dict[str, Any]:
    """Return the fields that formats before 5 do not have. Their texts are shown to people."""
    rotations = {site.name: site.rotation for site in value.sites if site.rotation}
    if not isinstance(value, _Manifest5):
        if rotations:
            raise InputError(f"site '{next(iter(rotations))}' has a rotation, which formats before 5 do not have")
        return {}
    return {"graph": _printable(value.graph), "rotations": rotations, "notes": _printable(value.notes)}


def _sites(entries: list[_Site], time_groups: TimeGroups) -> tuple[SiteSpec, ...]:
    found: dict[str, SiteSpec] = {}
    for entry in entries:
        spec = SiteSpec(**{name: getattr(entry, name) for name in _Site.model_fields if name != "rotation"})
        if spec.name in found:
            raise InputError(f"site '{spec.name}' is listed twice")
        if not MIN_BITS <= spec.bits <= MAX_BITS:
            raise InputError(f"site '{spec.name}' has {spec.bits} bits, legal are {MIN_BITS} to {MAX_BITS}")
        if spec.groups not in (1, time_groups.num_groups):
            raise InputError(f"site '{spec.name}' has {spec.groups} groups, legal are 1 and {time_groups.num_groups}")
        if entry.rotation not in ROTATIONS:
            raise InputError(f"site '{spec.name}' has rotation {entry.rotation}, legal are {ROTATIONS}")
        found[spec.name] = spec
    return tuple(found.values())


def _checked_aliases(value: _Manifest) -> Mapping[str, str]:
    for name, target in value.aliases.items():
        if name in value.tensors:
            raise InputError(f"tensor '{name}' is stored, and refers to '{target}' as well")
        if target not in value.tensors:
            raise InputError(f"tensor '{name}' refers to '{target}', which is missing")
    return value.aliases


def _printable(value: Any) -> Any:
    """Return JSON values in a form that tables and pages may show."""
    if isinstance(value, dict):
        return {printable(name): _printable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_printable(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value
