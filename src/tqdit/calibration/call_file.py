"""Write the calls of a model as one safetensors file, and read it.

Tensors are named by the sha256 of their dtype, shape and values, so equal ones are stored once and damage is found. The
tensor `tqdit.calls` is JSON (uint8) that has the rest. The file's metadata has the sha256 of that JSON, which is of
everything, and the name of the pipeline's component.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tqdit.calibration.call_values import decoded, digest, encoded
from tqdit.errors import InputError
from tqdit.system.files import read_tensors
from tqdit.system.outputs import check_file, reserved
from tqdit.system.reading import parse_json
from tqdit.system.swap import beside, remove, sync

MANIFEST = "tqdit.calls"
VERSION = 1
SEAL = "tqdit.calls"  # the one entry of the metadata, since several have no fixed order
KEYS: Mapping[str, type] = {
    "version": int,
    "kind": str,
    "config": dict,
    "timestep": str,
    "visited": list,
    "calls": list,
}


@dataclass(frozen=True)
class Content:
    """The content of a file of calls: `arguments` of each call, the model that they are for, the times it `visited`."""

    kind: str
    config: Mapping[str, Any]
    timestep: str
    visited: Sequence[float]
    arguments: Sequence[Mapping[str, Any]]
    component: str = ""

    def packed(self) -> tuple[dict[str, torch.Tensor], bytes]:
        """Return the tensors by the sha256 of each, and the JSON of all else."""
        stored: dict[str, torch.Tensor] = {}
        names: dict[int, str] = {}

        def reference(tensor: torch.Tensor) -> str:
            name = names.get(id(tensor)) or names.setdefault(id(tensor), digest(tensor))
            stored.setdefault(name, tensor)
            return name

        calls = [encoded(dict(call), reference)["dict"] for call in self.arguments]
        rest = {"version": VERSION, "kind": self.kind, "config": self.config, "timestep": self.timestep}
        rest |= {"visited": list(self.visited)}
        return stored, json.dumps(rest | {"calls": calls}, sort_keys=True, allow_nan=False).encode()

    @property
    def sha256(self) -> str:
        """The sha256 of all but the name of the component."""
        return hashlib.sha256(self.packed()[1]).hexdigest()


def write(path: Path, content: Content) -> None:
    """Write a file whole or not at all. Raises `InputError` for a path that cannot be a file, `OSError` otherwise."""
    check_file(path)
    tensors, text = content.packed()
    tensors[MANIFEST] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    seal = json.dumps({"sha256": hashlib.sha256(text).hexdigest(), "component": content.component})
    with _replacing(path) as partial:
        try:
            save_file(dict(sorted(tensors.items())), partial, metadata={SEAL: seal})
        except SafetensorError as error:  # the disk may be full
            raise OSError(f"{path} cannot be written: {error}") from None
        partial.chmod(0o644)
        sync(partial)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which becomes `path` on success. It is in a folder beside, which is removed at the end.

    safetensors puts a new file in the place of the one that it writes, so a lock on the file itself would be lost. What
    a killed process leaves is removed by the next one that writes `path`.
    """
    with reserved(path, lambda _: False) as place:
        folder = beside(place.target, "partial")
        if not place.locked:
            folder = Path(mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=place.target.parent))
        try:
            folder.mkdir(exist_ok=True)
            yield folder / path.name
            (folder / path.name).replace(place.target)
            sync(place.target.parent)
        finally:
            remove(folder)


def read(path: Path) -> Content:
    """Return what a file holds; its tensors stay in the mapped file. Raises `InputError` naming the file."""
    tensors = read_tensors(path)
    if MANIFEST not in tensors:
        raise InputError(f"{path} has no recorded calls")
    try:
        return _read(path, tensors)
    except (InputError, SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def is_calls(path: Path) -> bool:
    """Say whether a file is one of calls, judged by its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return SEAL in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _read(path: Path, tensors: dict[str, torch.Tensor]) -> Content:
    with safe_open(path, framework="pt") as file:
        seal = parse_json((file.metadata() or {})[SEAL].encode())
    text = tensors.pop(MANIFEST).numpy().tobytes()
    if hashlib.sha256(text).hexdigest() != seal.get("sha256"):
        raise ValueError(f"'{MANIFEST}' was changed")
    found = parse_json(text)
    if found.get("version") != VERSION:
        raise ValueError(f"calls of version {found.get('version')} cannot be read; this tqdit reads {VERSION}")
    component = seal.get("component")
    of_types = all(isinstance(found.get(key), kind) for key, kind in KEYS.items()) and found.keys() == KEYS.keys()
    of_types = of_types and all(type(t) is float for t in found["visited"])
    if not of_types or not all(isinstance(call, dict) for call in found["calls"]):
        raise ValueError(f"'{MANIFEST}' is malformed")
    if not isinstance(component, str) or (component and not component.isidentifier()):  # it becomes a file's name
        raise ValueError(f"{component!r} is no name of a component")
    if changed := next((name for name, tensor in tensors.items() if digest(tensor) != name), None):
        raise ValueError(f"tensor '{changed}' was changed")
    used: set[str] = set()

    def find(name: str) -> torch.Tensor:
        used.add(name)
        if name not in tensors:
            raise ValueError(f"tensor '{name}' is missing")
        return tensors[name]

    arguments = [decoded({"dict": call}, find) for call in found["calls"]]
    if extra := sorted(tensors.keys() - used):
        raise ValueError(f"it has a tensor '{extra[0]}' that no call uses")
    return Content(found["kind"], found["config"], found["timestep"], found["visited"], arguments, component)
