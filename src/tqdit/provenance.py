"""Say how a quantized model was made: the part of recipe, source and versions that its artifact keeps."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Self

from tqdit.errors import InputError

WORDS = ("preset", "source", "source_sha256", "calibration_sha256")
TABLES = ("recipe", "versions", "further")


def _empty() -> Mapping[str, Any]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Provenance:
    """The origin of a quantized model: its recipe, its source and the versions of packages.

    `recipe`: every setting, as JSON values. `versions`: the versions of packages, by name. `further`: entries of an
    artifact of another version of tqdit, which are kept. None or an empty table means that the artifact does not say.
    The tables cannot be changed. Raises `InputError` for a wrong type.
    """

    preset: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=_empty)
    source: str | None = None
    source_sha256: str | None = None
    versions: Mapping[str, str] = field(default_factory=_empty)
    calibration_sha256: str | None = None
    further: Mapping[str, Any] = field(default_factory=_empty)

    def __post_init__(self) -> None:
        for name in WORDS:
            if not isinstance(value := getattr(self, name), str | None):
                raise InputError(f"provenance: {name} must be text, got {value!r:.80}")
        for name in TABLES:
            if not isinstance(value := getattr(self, name), Mapping):
                raise InputError(f"provenance: {name} must be a table, got {value!r:.80}")
            object.__setattr__(self, name, MappingProxyType(copy.deepcopy(dict(value))))
        for package, version in self.versions.items():
            if not isinstance(version, str):
                raise InputError(f"provenance: the version of '{package}' must be text, got {version!r:.80}")

    def __reduce__(self) -> tuple[Any, tuple[dict[str, Any]]]:
        return Provenance.from_json, (self.to_json(),)  # a read-only table cannot be copied or pickled

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read the value that `to_json` returns. Null is as good as absent."""
        known = {entry.name for entry in fields(cls)} - {"further"}
        given = {name: inner for name, inner in value.items() if name in known and inner is not None}
        return cls(**given, further={name: inner for name, inner in value.items() if name not in known})

    def to_json(self) -> dict[str, Any]:
        """Return plain values by name, without those that the artifact does not say."""
        entries = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "further"}
        given = {name: value for name, value in entries.items() if value is not None and value != {}}
        plain = {name: dict(value) if name in TABLES else value for name, value in given.items()}
        return copy.deepcopy({**plain, **self.further})

    @property
    def preset_name(self) -> str | None:
        """Return the preset, or the one that the recipe started from."""
        return self.preset if self.preset is not None else self.recipe.get("preset")

    @property
    def weight_bits(self) -> int | None:
        """Return the bit-width of weights, or None."""
        return self.recipe.get("weight_bits")

    @property
    def activation_bits(self) -> int | None:
        """Return the bit-width of activations, or None."""
        return self.recipe.get("activation_bits")

    @property
    def bits(self) -> str:
        """Return both bit-widths as text, such as "w6a6"."""
        return f"w{self.weight_bits}a{self.activation_bits}"
