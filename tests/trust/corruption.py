"""Damages to artifacts by name: each one changes a folder, and a reader must refuse it or not be changed by it.

A damage is a function of the folder. `all_damages` lists them in a fixed order for a seed, so that a process is told
numbers. A *forged* damage has every hash recomputed: it may be another legal artifact, with another output.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from artifacts import KINDS
from safetensors.torch import load_file, save_file

from tqdit.artifact import folder as artifact
from tqdit.artifact.tensors import MANIFEST_TENSOR, _describe
from tqdit.system.files import CONFIG, MANIFEST

Change = Callable[[Path], None]

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 64, 10**6, 10**9, 2**63, 10**40, 1.5, 6.0, 1e300, "", "x", "../x", "\ud800",
    "\x1b[31m\n", [], [1], {}, {"a": 1}, float("nan"), float("inf"),
)  # fmt: skip
WHOLE = {
    "empty": b"", "object": b"{}", "array": b"[]", "null": b"null", "zeros": bytes(4096), "text": b"hello world\n" * 9,
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "digits": b'{"a":' + b"9" * 5000 + b"}",
    "not utf-8": b'{"a": "\xff"}', "huge header": (2**40).to_bytes(8, "little") + b"{}",
}  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """`file`: relative to the artifact, where the damage is."""

    family: str
    kind: str  # of the artifact
    file: str
    name: str
    change: Change
    forged: bool = False

    def __str__(self) -> str:
        return f"{self.family}: {self.kind}/{self.file}: {self.name}"


def all_damages(root: Path, count: int, seed: int = 0) -> list[Damage]:
    """About `count` damages to the artifacts under `root`, a tenth for each family, the rest truncations and flips."""
    draw = random.Random(seed)
    families = _by_family(damage for kind in KINDS for damage in _all_structured(kind, root / kind))
    found = [damage for members in families.values() for damage in _spread(members, count // 10)]
    return found + list(islice(_bytewise(root, draw), max(count - len(found), count // 5)))


def some_damages(root: Path, count: int) -> list[Damage]:
    """About `count` of them: of each family as many, spread over it."""
    families = _by_family(all_damages(root, 600))
    return [damage for members in families.values() for damage in _spread(members, count // len(families))]


def _all_structured(kind: str, folder: Path) -> Iterator[Damage]:
    yield from _structured(kind, folder)
    yield from _forged(kind, folder)


def _by_family(damages: Iterable[Damage]) -> dict[str, list[Damage]]:
    found: dict[str, list[Damage]] = {}
    for damage in damages:
        found.setdefault(damage.family, []).append(damage)
    return found


def _spread(members: list[Damage], most: int) -> list[Damage]:
    return [members[i * len(members) // most] for i in range(most)] if len(members) > most else members


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Bytes -------------------------------------------------------------------------------------------------------------


def _bytewise(root: Path, draw: random.Random) -> Iterator[Damage]:
    """Truncations and flipped bits, files in turn; half of the flips in the first bytes, where the structure is."""
    while True:
        for kind in KINDS:
            for file in files_of(root / kind):
                size = (root / kind / file).stat().st_size
                keep = draw.randrange(size)
                yield Damage("truncated", kind, file, f"to {keep} bytes", partial(_truncate, file, keep))
                for near in (size, min(size, 4000)):
                    bit = draw.randrange(8 * near)
                    yield Damage("flipped", kind, file, f"bit {bit}", partial(_flip, file, bit))


def _truncate(file: str, keep: int, folder: Path) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def _flip(file: str, bit: int, folder: Path) -> None:
    data = bytearray((folder / file).read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    (folder / file).write_bytes(data)


# Structure, hashes as they were ------------------------------------------------------------------------------------


def _structured(kind: str, folder: Path) -> Iterator[Damage]:
    files = files_of(folder)
    for file in files:
        for name, change in _file_changes(file, files).items():
            yield Damage("file", kind, file, name, change)
        if file.endswith(".json"):
            value = json.loads((folder / file).read_text())
            for path in _paths(value):
                for name, edit in _edits(path).items():
                    yield Damage("json", kind, file, name, partial(_edit_json, file, edit))
            for name, text in _duplicates(value).items():
                yield Damage("json", kind, file, name, partial(_write, file, text.encode()))
    for file in [file for file in files if file.endswith(".safetensors")]:
        for name, edit in _tensor_edits(load_file(folder / file)).items():
            yield Damage("tensors", kind, file, name, partial(_edit_tensors, file, edit))
    for name in ("model_index.json", "id2label.json", "scheduler/scheduler_config.json", "vae/config.json"):
        if name not in files:
            yield Damage("file", kind, name, "added", partial(_write, name, b"{}"))


def _file_changes(file: str, files: list[str]) -> dict[str, Change]:
    others = [other for other in files if other != file]
    return {
        "missing": lambda folder: (folder / file).unlink(),
        "pipe": lambda folder: _instead(folder / file, os.mkfifo),
        "folder": lambda folder: _instead(folder / file, os.mkdir),
        "link to itself": lambda folder: _instead(folder / file, lambda path: path.symlink_to(path)),
        "link to nothing": lambda folder: _instead(folder / file, lambda path: path.symlink_to("nowhere")),
        "link to zeros": lambda folder: _instead(folder / file, lambda path: path.symlink_to("/dev/zero")),
        "link to its content": lambda folder: _moved_behind_link(folder / file),
        **{f"only {name}": partial(_write, file, data) for name, data in WHOLE.items()},
        **{f"has {other}": partial(_copied, other, file) for other in others},
    }


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _moved_behind_link(path: Path) -> None:
    real = path.rename(path.with_name(f".{path.name}.real"))
    path.symlink_to(real.name)


def _copied(source: str, target: str, folder: Path) -> None:
    shutil.copyfile(folder / source, folder / target)


def _write(file: str, data: bytes, folder: Path) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(data)


def _paths(value: Any, path: tuple[Any, ...] = (), deep: int = 3) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, some of those in long lists and tables."""
    found = [path]
    if isinstance(value, dict | list) and deep:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, inner in items[:: max(1, len(items) // 24)]:
            found += _paths(inner, (*path, key), deep - 1)
    return found


def _edits(path: tuple[Any, ...]) -> dict[str, Callable[[Any], Any]]:
    """Changes at one place: gone, another value (a few, the choice depends on the place), more keys."""
    where = ".".join(map(str, path)) or "all"
    digest = hashlib.sha256(where.encode()).digest()
    values = [HOSTILE[digest[i] % len(HOSTILE)] for i in range(3)]
    edits = {f"{where} = {value!r:.20}": partial(_put, path, value) for value in values}
    if path:
        edits[f"{where} gone"] = partial(_drop, path)
    edits[f"{where} with 'stranger'"] = partial(_put, (*path, "stranger"), 1)
    return edits


def _put(path: tuple[Any, ...], new: Any, value: Any) -> Any:
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        value[key] = _put(tuple(rest), new, value.get(key))
    elif isinstance(value, list) and isinstance(key, int):
        value[key] = _put(tuple(rest), new, value[key])
    return value


def _drop(path: tuple[Any, ...], value: Any) -> Any:
    *front, last = path
    holder = value
    for key in front:
        holder = holder[key]
    del holder[last]
    return value


def _duplicates(value: Any) -> dict[str, str]:
    """Texts that name a key twice, first or last with another value."""
    if not isinstance(value, dict) or not value:
        return {}
    key, text = next(iter(value)), json.dumps(value)
    extra = f"{json.dumps(key)}: 7"
    return {"key twice, first": f"{{{extra}, {text[1:]}", "key twice, last": f"{text[:-1]}, {extra}}}"}


def _edit_json(file: str, edit: Callable[[Any], Any], folder: Path) -> None:
    value = edit(json.loads((folder / file).read_text()))
    (folder / file).write_text(json.dumps(value), encoding="utf-8")


def _tensor_edits(stored: dict[str, torch.Tensor]) -> dict[str, Callable[[dict[str, torch.Tensor]], None]]:
    """Changes of a weight file: to some of its tensors, or by one."""
    names = sorted(stored)
    edits: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
        "a stranger": lambda t: t.update(stranger=torch.zeros(1)),
        "no tensors": lambda t: t.clear(),
    }
    for name in names[:: max(1, len(names) // 8)]:
        edits |= {
            f"{name} gone": partial(_without, name),
            f"{name} renamed": lambda t, name=name: t.update({f"{name}x": t.pop(name)}),
            f"{name} as float16": lambda t, name=name: t.update({name: t[name].to(torch.float16)}),
            f"{name} flat": lambda t, name=name: t.update({name: t[name].reshape(1, -1).clone()}),
            f"{name} empty": lambda t, name=name: t.update({name: t[name].reshape(-1)[:0].clone()}),
            f"{name} longer": lambda t, name=name: t.update({name: torch.cat([t[name].reshape(-1)] * 2)}),
        }
    return edits


def _without(name: str, stored: dict[str, torch.Tensor]) -> None:
    del stored[name]


def _edit_tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], None], folder: Path) -> None:
    stored = load_file(folder / file)
    edit(stored)
    save_file(stored, folder / file, metadata={"format": "pt"})


# Forged: every hash recomputed -------------------------------------------------------------------------------------


def _forged(kind: str, folder: Path) -> Iterator[Damage]:
    model = folder / "transformer" if kind == "pipeline" else folder
    stored = _weights(model)
    manifest = json.loads(bytes(stored[MANIFEST_TENSOR].tolist()))
    file = (model / CONFIG).relative_to(folder).as_posix()
    for path in _paths(manifest, deep=4):
        for name, edit in _edits(path).items():
            yield Damage("forged manifest", kind, file, name, partial(_forge, edit, _unchanged, {}), forged=True)
    for name, edit in _tensor_edits(stored).items():
        if MANIFEST_TENSOR not in name and name != "no tensors":
            yield Damage("forged tensors", kind, file, name, partial(_forge, _same, edit, {}), forged=True)
    for name, edit in _value_edits(stored).items():
        yield Damage("forged values", kind, file, name, partial(_forge, _same, edit, {}), forged=True)
    config = json.loads((model / CONFIG).read_text())
    for key in sorted(set(config) - {"quantization_config"}):
        for value in HOSTILE:
            name, edit = f"{key} = {value!r:.20}", _both(key, value)
            yield Damage(
                "forged config", kind, file, name, partial(_forge, edit, _unchanged, {key: value}), forged=True
            )
    heads = {"num_attention_heads": 8, "attention_head_dim": 4}
    for settings in (heads, {"num_layers": 1}, {"num_layers": 10**5}, {"sample_size": 4096}, {"norm_eps": 0}):
        yield Damage("forged config", kind, file, str(settings),
                     partial(_forge, _all_of(settings), _unchanged, settings), forged=True)  # fmt: skip
    for other in [other for other in files_of(folder) if other.endswith(".json") and "transformer" not in other]:
        if other not in (CONFIG, MANIFEST) and not other.endswith("index.json"):
            value = json.loads((folder / other).read_text())
            for path in _paths(value):
                for name, edit in _edits(path).items():
                    yield Damage("forged beside", kind, other, name, partial(_resealed, other, edit), forged=True)


def _same(value: Any) -> Any:
    return value


def _unchanged(_: dict[str, torch.Tensor]) -> None:
    pass


def _both(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda manifest: _put(("model_config", key), value, manifest)


def _all_of(settings: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda manifest: {**manifest, "model_config": {**manifest["model_config"], **settings}}


def _value_edits(stored: dict[str, torch.Tensor]) -> dict[str, Callable[[dict[str, torch.Tensor]], None]]:
    edits: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {}
    names = [name for name in sorted(stored) if name != MANIFEST_TENSOR]
    values = (0.0, -1.0, float("nan"), float("inf"), 1e-40, 1e30, 1000.0)
    for name in names[:: max(1, len(names) // 12)]:
        for value in values if stored[name].is_floating_point() else (-2000, 2000, 1):
            edits[f"{name}[0] = {value}"] = lambda t, name=name, value=value: _set_first(t[name], value)
    return edits


def _set_first(tensor: torch.Tensor, value: float) -> None:
    tensor.view(-1)[:1] = value if tensor.dtype is not torch.uint8 else int(value) % 256


def _weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(model.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _forge(
    edit: Callable[[Any], Any],
    edit_tensors: Callable[[dict[str, torch.Tensor]], None],
    settings: dict[str, Any],
    folder: Path,
) -> None:
    """Change manifest, tensors or config, and make the hashes right again, in one weight file."""
    model = folder / "transformer" if (folder / "transformer").is_dir() else folder
    stored = _weights(model)
    manifest = json.loads(bytes(stored.pop(MANIFEST_TENSOR).tolist()))
    edit_tensors(stored)
    manifest["tensors"] = {name: _describe(tensor).model_dump() for name, tensor in sorted(stored.items())}
    data = json.dumps(edit(manifest)).encode()
    stored[MANIFEST_TENSOR] = torch.tensor(list(data), dtype=torch.uint8)
    for path in [*model.glob("*.safetensors"), *model.glob("*.safetensors.index.json")]:
        path.unlink()
    save_file(stored, model / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((model / CONFIG).read_text()), **settings}
    config["quantization_config"]["manifest_sha256"] = hashlib.sha256(data).hexdigest()
    (model / CONFIG).write_text(json.dumps(config))


def _resealed(file: str, edit: Callable[[Any], Any], folder: Path) -> None:
    _edit_json(file, edit, folder)
    artifact.seal(folder)
