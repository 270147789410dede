"""Solution <-> a folder in diffusers' style: config.json, safetensors with packed codes, a manifest with hashes.

    config.json                              the model's config with `quantization_config` (small: names the manifest)
    tqdit.json                               manifest: format version, sites, tensors with sha256, aliases, provenance
    diffusion_pytorch_model.safetensors      packed codes (uint8), scales (fp32), zero points (int32), float parameters

Tensors with equal bytes are stored once: diffusers gives every block its own copy of one timestep embedder. The same
Solution gives the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tqdit.errors import InputError
from tqdit.files import CONFIG, MANIFEST, QUANT_METHOD, WEIGHTS, read_json, read_tensors
from tqdit.grids import packing
from tqdit.spec import MAX_BITS, MIN_BITS, Granularity, Grid, GridParams, Role, SiteSpec, Solution
from tqdit.timegroups import TimeGroups

FORMAT_VERSION = 1
MANIFEST_KEYS = ("model_config", "time_groups", "sites", "shapes", "tensors", "aliases", "files", "provenance")


def write(solution: Solution, folder: Path) -> None:
    """Write the files of a Solution into an existing folder; see `files.replacing` for doing it atomically.

    Files that are already in the folder (scheduler, class names, VAE) become part of the artifact: they are hashed.
    """
    beside = sorted(path for path in folder.rglob("*") if path.is_file())
    tensors, shapes = _tensors_of(solution)
    stored, aliases = _deduplicated(tensors)
    manifest = {
        "format_version": FORMAT_VERSION,
        "model_config": _public(solution.model_config),
        "time_groups": asdict(solution.time_groups),
        "sites": [asdict(spec) for spec in solution.sites],
        "shapes": shapes,
        "tensors": {name: _describe(tensor) for name, tensor in sorted(stored.items())},
        "aliases": aliases,
        "files": {path.relative_to(folder).as_posix(): _sha256(path) for path in beside},
        "provenance": dict(solution.provenance),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    recipe = solution.provenance.get("recipe", {})
    config = {
        **solution.model_config,
        "quantization_config": {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "preset": solution.provenance.get("preset"),
            "weight_bits": recipe.get("weight_bits"),
            "activation_bits": recipe.get("activation_bits"),
            "manifest": MANIFEST,
            "manifest_sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
    }
    try:
        save_file(dict(sorted(stored.items())), folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from None
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(folder: Path) -> Solution:
    """Load and verify an artifact.

    Raises `InputError` naming the file or tensor for anything missing, left over, changed, of the wrong dtype or
    shape, and for scales that are not finite and positive.
    """
    config, manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing")
        if _sha256(folder / name) != expected:
            raise InputError(f"{folder / name} was changed: its sha256 is not the one in {MANIFEST}")
    tensors = _read_verified(folder / WEIGHTS, manifest)
    for name, target in manifest["aliases"].items():
        if target not in tensors:
            raise InputError(f"{folder / MANIFEST}: tensor '{name}' refers to '{target}', which is missing")
        tensors[name] = tensors[target]
    try:
        groups = TimeGroups(**manifest["time_groups"])
        specs = [_spec(entry, groups) for entry in manifest["sites"]]
        shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / MANIFEST}: {error}") from None
    params = {spec.name: _take_params(spec, tensors) for spec in specs}
    codes = _take_codes(specs, shapes, tensors)
    model_config = {key: value for key, value in config.items() if key != "quantization_config"}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: tensor '{name}' must be finite float32, it is {tensor.dtype}")
    return Solution(model_config, groups, params, codes, tensors, manifest["provenance"])


def size_bytes(folder: Path) -> int:
    """Bytes of the weight files and the manifest, what an artifact takes on disk for the model itself."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == MANIFEST)


def _tensors_of(solution: Solution) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    tensors = {name: tensor.float().contiguous() for name, tensor in solution.floats.items()}
    shapes: dict[str, list[int]] = {}
    for name, params in solution.params.items():
        tensors[f"{name}.scale"] = params.scale.float().contiguous()
        if params.zero_point is not None:
            tensors[f"{name}.zero_point"] = params.zero_point.to(torch.int32).contiguous()
        if params.spec.is_weight:
            tensors[f"{name}.codes"] = packing.pack(solution.codes[name], params.spec.bits)
            shapes[name] = list(solution.codes[name].shape)
    return tensors, shapes


def _deduplicated(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to store, and name -> stored name for those that repeat one. Small ones are not worth an entry."""
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        description = _describe(tensor)
        key = (description["sha256"], description["dtype"], tuple(description["shape"]))
        if first.setdefault(key, name) == name:
            stored[name] = tensor
        elif tensor.numel() >= 256:
            aliases[name] = first[key]
        else:
            stored[name] = tensor.clone()  # safetensors refuses two names of one memory
    return stored, aliases


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "sha256": hashlib.sha256(data).hexdigest()}


def _read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = read_json(folder / CONFIG)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{folder / CONFIG} has no quantization_config of method '{QUANT_METHOD}'")
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(f"{folder}: artifact format {version} is not supported; this tqdit reads {FORMAT_VERSION}")
    path = folder / MANIFEST
    manifest = read_json(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != quantization.get("manifest_sha256"):
        raise InputError(f"{path} was changed: its sha256 is not the one in {CONFIG}")
    missing = {"model_config", "sites", "shapes", "tensors", "aliases", "files", "time_groups", "provenance"} - set(
        manifest
    )
    if missing:
        raise InputError(f"{path} lacks '{sorted(missing)[0]}'")
    found, expected = _public(config), manifest["model_config"]
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise InputError(f"{folder / CONFIG} was changed: {key} is {found.get(key)!r}, not {expected.get(key)!r}")
    return config, manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a model config that decides what the model computes; diffusers' own notes start with "_"."""
    return {key: config[key] for key in sorted(config) if key[0] != "_" and key != "quantization_config"}


def _read_verified(path: Path, manifest: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = read_tensors(path)
    for name, expected in manifest["tensors"].items():
        if name not in tensors:
            raise InputError(f"{path} lacks tensor '{name}'")
        found = _describe(tensors[name])
        for key in ("dtype", "shape", "sha256"):
            if found[key] != expected[key]:
                raise InputError(f"{path}: tensor '{name}' has {key} {found[key]}, expected {expected[key]}")
    if extra := sorted(set(tensors) - set(manifest["tensors"])):
        raise InputError(f"{path} has an unexpected tensor '{extra[0]}'")
    # Weight codes stay in the mapped file until `convert` packs them; no other tensor may keep all of it in memory.
    return {name: tensor if tensor.dtype is torch.uint8 else tensor.clone() for name, tensor in tensors.items()}


def _take(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise InputError(f"the artifact lacks tensor '{name}'")
    return tensors.pop(name)


def _take_params(spec: SiteSpec, tensors: dict[str, torch.Tensor]) -> GridParams:
    """Scale and zero point of a site, checked for dtype, shape and range."""
    name = f"{spec.name}.scale"
    scale = _take(tensors, name)
    shape = (spec.groups, spec.units, 2) if spec.grid.two_region else (spec.groups, spec.units)
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape:
        raise InputError(f"tensor '{name}' is {scale.dtype} {tuple(scale.shape)}, expected torch.float32 {shape}")
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        raise InputError(f"tensor '{name}' has a scale that is not finite and positive")
    if spec.grid.two_region or spec.is_weight:
        return GridParams(spec, scale)
    name = f"{spec.name}.zero_point"
    zero_point = _take(tensors, name)
    if zero_point.dtype != torch.int32 or zero_point.shape != scale.shape:
        raise InputError(f"tensor '{name}' is {zero_point.dtype} {tuple(zero_point.shape)}, expected int32 {shape}")
    fmt = spec.format
    if ((zero_point < fmt.qmin) | (zero_point > fmt.qmax)).any():
        raise InputError(f"tensor '{name}' has a zero point outside the codes of {spec.bits} bits")
    return GridParams(spec, scale, zero_point)


def _take_codes(
    specs: list[SiteSpec], shapes: Mapping[str, tuple[int, ...]], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weight codes by site. Tensors that are stored once stay shared, unless their shape or width differs."""
    codes: dict[str, torch.Tensor] = {}
    unpacked: dict[tuple[Any, ...], torch.Tensor] = {}
    for spec in specs:
        if spec.is_weight:
            packed = _take(tensors, f"{spec.name}.codes")
            key = (id(packed), spec.bits, shapes.get(spec.name))
            if key not in unpacked:
                try:
                    unpacked[key] = packing.unpack(packed, spec.bits, shapes[spec.name])
                except (InputError, KeyError) as error:
                    raise InputError(f"tensor '{spec.name}.codes': {error}") from None
            codes[spec.name] = unpacked[key]
    return codes


def _spec(entry: Mapping[str, Any], time_groups: TimeGroups) -> SiteSpec:
    values = dict(entry)
    values["role"], values["grid"] = Role(values["role"]), Grid(values["grid"])
    values["granularity"] = Granularity(values["granularity"])
    spec = SiteSpec(**values)
    if not MIN_BITS <= spec.bits <= MAX_BITS:
        raise InputError(f"site '{spec.name}' has {spec.bits} bits, legal are {MIN_BITS} to {MAX_BITS}")
    if spec.groups not in (1, time_groups.num_groups):
        raise InputError(f"site '{spec.name}' has {spec.groups} groups, legal are 1 and {time_groups.num_groups}")
    return spec
