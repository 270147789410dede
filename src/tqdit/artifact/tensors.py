"""Turn a Solution into named tensors and back: the content of an artifact's weight files, whoever handles the files.

    <weight>.codes                 uint8, packed
    <site>.scale, <site>.zero_point    float32, int32
    <site>.channels                float32, channel factors of an activation
    <parameter>                    float32, parameters that stay in float; of a traced model, in the dtype of its source
    tqdit.manifest                 uint8, JSON: sites, shapes, sha256 of every tensor, aliases, provenance,
                                   largest magnitude of the residual stream

The manifest is a tensor because diffusers, the hub and sharding move tensors and config.json, nothing else; config.json
holds its sha256. Tensors with equal bytes are stored once: diffusers gives every block its own copy of one timestep
embedder. The same Solution gives the same bytes.
"""

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tqdit.artifact import graph_json
from tqdit.artifact.manifest import FORMATS, Manifest, StoredTensor
from tqdit.errors import InputError
from tqdit.grids import packing
from tqdit.spec import GridParams, SiteSpec, Solution
from tqdit.system.files import CONFIG, QUANT_METHOD

FORMAT_VERSION = max(FORMATS)  # the newest format; see `Manifest.version`
SEAL_VERSION = 4  # the format of seals that are written
MANIFEST_TENSOR = "tqdit.manifest"
QUANTIZATION = "quantization_config"
DEFAULTS = "_use_default_values"  # diffusers' list of keys that a config.json lacked
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of a traced model's parameters
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a smaller number lacks some of its digits


def pack(solution: Solution) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors by name, sorted, and the model's config with its `quantization_config`.

    The `quantization_config` is small, since diffusers sends it along with requests.
    """
    tensors, shapes = _tensors_of(solution)
    stored, aliases = _deduplicated(tensors)
    manifest = Manifest(
        decisive(solution.model_config),
        solution.time_groups,
        solution.sites,
        shapes,
        {name: _describe(tensor) for name, tensor in sorted(stored.items())},
        aliases,
        solution.provenance,
        solution.stream_max,
        None if solution.graph is None else graph_json.to_json(solution.graph),
        {name: params.rotation for name, params in solution.params.items() if params.rotation},
        solution.notes,
    )
    text = bytearray(manifest.to_json())
    stored[MANIFEST_TENSOR] = torch.frombuffer(text, dtype=torch.uint8)
    provenance = solution.provenance
    config = {
        **{key: value for key, value in solution.model_config.items() if key != QUANTIZATION},
        QUANTIZATION: {
            "quant_method": QUANT_METHOD,
            "format_version": manifest.version,
            "preset": provenance.preset,
            "weight_bits": provenance.weight_bits,
            "activation_bits": provenance.activation_bits,
            "manifest_sha256": hashlib.sha256(text).hexdigest(),
        },
    }
    return dict(sorted(stored.items())), config


def check_config(config: Mapping[str, Any], where: object) -> Mapping[str, Any]:
    """Return the `quantization_config` of a model's config.

    Raises `InputError` if it is not ours, or of another format.
    """
    quantization = config.get(QUANTIZATION)
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != QUANT_METHOD:
        raise InputError(f"{where} has no {QUANTIZATION} of method '{QUANT_METHOD}'")
    version = quantization.get("format_version")
    if not readable(version):
        known = ", ".join(map(str, FORMATS))
        raise InputError(f"{where}: artifact format {version} is not supported; this tqdit reads {known}")
    return quantization


def readable(version: object) -> bool:
    """Say whether artifacts and seals of a format version can be read."""
    return type(version) is int and version in FORMATS


def unpack(found: Mapping[str, torch.Tensor], config: Mapping[str, Any], where: object) -> Solution:
    """Return the Solution that `pack` packed.

    `where`: the file or folder of the tensors, for messages. Raises `InputError` naming the tensor for anything
    missing, left over, changed, of the wrong dtype or shape, and for scales that are not finite and positive. 8-bit
    codes stay views of what was given, maybe a mapped file.
    """
    try:
        return _unpacked(found, config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _unpacked(found: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Solution:
    manifest = _manifest(found, config)
    tensors = _verified(found, manifest)
    tensors |= {name: tensors[target] for name, target in manifest.aliases.items()}
    params = {spec.name: _take_params(spec, tensors) for spec in manifest.sites}
    for name, rotation in manifest.rotations.items():
        params[name] = replace(params[name], rotation=rotation)
    codes = _take_codes(manifest, tensors)
    legal = (torch.float32,) if manifest.graph is None else FLOATS
    for name, tensor in tensors.items():
        if tensor.dtype not in legal or not torch.isfinite(tensor).all():
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in legal)
            raise InputError(f"tensor '{name}' must be finite {wanted}, it is {tensor.dtype}")
    model_config = {key: value for key, value in config.items() if key != QUANTIZATION}
    shapes = {name: tensor.shape for name, tensor in (codes | tensors).items()}
    graph = None if manifest.graph is None else graph_json.from_json(manifest.graph, shapes)
    return Solution(
        model_config, manifest.time_groups, params, codes, tensors, manifest.provenance, manifest.stream_max, graph,
        manifest.notes,
    )  # fmt: skip


def _tensors_of(solution: Solution) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, ...]]]:
    traced = solution.graph is not None
    tensors = {name: (t if traced else t.float()).contiguous() for name, t in solution.floats.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, params in solution.params.items():
        tensors[f"{name}.scale"] = params.scale.float().contiguous()
        if params.zero_point is not None:
            tensors[f"{name}.zero_point"] = params.zero_point.to(torch.int32).contiguous()
        if params.channels is not None:
            tensors[f"{name}.channels"] = params.channels.float().contiguous()
        if params.spec.is_weight:
            codes = solution.codes[name]
            tensors[f"{name}.codes"] = packing.pack(codes, params.spec.bits)
            shapes[name] = tuple(codes.shape)
    return tensors, shapes


def _deduplicated(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors to store, and name -> stored name for those that repeat one.

    Small tensors are not worth an entry.
    """
    first: dict[tuple[Any, ...], str] = {}
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        description = _describe(tensor)
        key = (description.sha256, description.dtype, tuple(tensor.shape))
        if first.setdefault(key, name) == name:
            stored[name] = tensor
        elif tensor.numel() >= 256:
            aliases[name] = first[key]
        else:
            stored[name] = tensor.clone()  # safetensors refuses two names of one memory
    return stored, aliases


def _describe(tensor: torch.Tensor) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(dtype=dtype, shape=list(tensor.shape), sha256=hashlib.sha256(_bytes(tensor)).hexdigest())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a model config that decides what the model computes.

    diffusers' own notes, whose names start with "_", are left out. Tuples are lists, as in JSON.
    """
    kept = (key for key in sorted(config) if not key.startswith("_") and key != QUANTIZATION)
    return {key: _as_json(config[key]) for key in kept}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(inner) for key, inner in value.items()}
    return [_as_json(inner) for inner in value] if isinstance(value, tuple | list) else value


def _manifest(found: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Manifest:
    quantization = check_config(config, CONFIG)
    expected_hash = quantization.get("manifest_sha256")
    if MANIFEST_TENSOR not in found:
        raise InputError(f"lacks tensor '{MANIFEST_TENSOR}'")
    data = _bytes(found[MANIFEST_TENSOR])
    if (digest := hashlib.sha256(data).hexdigest()) != expected_hash:
        raise InputError(f"tensor '{MANIFEST_TENSOR}' has sha256 {digest}, {CONFIG} says {expected_hash}")
    try:
        manifest = Manifest.parse(data, quantization["format_version"])
    except InputError as error:
        raise InputError(f"{MANIFEST_TENSOR} is malformed: {error}") from None
    public, expected = decisive(config), manifest.model_config
    for key in sorted({*public, *expected} - _newer(config, expected)):
        given, wanted = public.get(key), expected.get(key)
        if type(given) is not type(wanted) or given != wanted:  # 1 is not True
            raise InputError(f"{CONFIG} was changed: {key} is {given!r}, not {wanted!r}")
    return manifest


def _newer(config: Mapping[str, Any], known: Mapping[str, Any]) -> set[str]:
    """Return settings that diffusers added after the artifact was written, if they have diffusers' own defaults.

    diffusers lists them, but the list may be in the file, too: only what diffusers' class has itself is believed.
    """
    listed = config.get(DEFAULTS)
    if not isinstance(listed, list) or not listed:
        return set()
    import diffusers

    kind = getattr(diffusers, str(config.get("_class_name")), None)
    parameters = inspect.signature(kind.__init__).parameters if kind else {}
    unknown = [key for key in listed if isinstance(key, str) and key not in known and key in parameters]
    defaults = {key: parameters[key].default for key in unknown}
    return {key for key, value in defaults.items() if type(config.get(key)) is type(value) and config.get(key) == value}


def _verified(found: Mapping[str, torch.Tensor], manifest: Manifest) -> dict[str, torch.Tensor]:
    for name, expected in manifest.tensors.items():
        if name not in found:
            raise InputError(f"lacks tensor '{name}'")
        description = _describe(found[name])
        for key in ("dtype", "shape", "sha256"):
            if (has := getattr(description, key)) != (needs := getattr(expected, key)):
                raise InputError(f"tensor '{name}' has {key} {has}, expected {needs}")
    if extra := sorted(set(found) - {*manifest.tensors, MANIFEST_TENSOR}):
        raise InputError(f"has an unexpected tensor '{extra[0]}'")
    # Weight codes stay in the mapped file until `convert` packs them. No other tensor may keep the file in memory.
    return {name: found[name] if found[name].dtype is torch.uint8 else found[name].clone() for name in manifest.tensors}


def _take(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise InputError(f"lacks tensor '{name}'")
    return tensors.pop(name)


def _take_params(spec: SiteSpec, tensors: dict[str, torch.Tensor]) -> GridParams:
    """Return scale and zero point of a site, checked for dtype, shape and range."""
    name = f"{spec.name}.scale"
    scale = _take(tensors, name)
    shape = spec.scale_shape
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape:
        raise InputError(f"tensor '{name}' is {scale.dtype} {tuple(scale.shape)}, expected torch.float32 {shape}")
    if not (torch.isfinite(scale).all() and (scale >= SMALLEST_SCALE).all()):
        raise InputError(f"tensor '{name}' has a scale that is not finite and positive, or is subnormal")
    channels = None if spec.is_weight else _take_channels(spec.name, tensors)
    if not spec.has_zero_point:
        return GridParams(spec, scale, channels=channels)
    name = f"{spec.name}.zero_point"
    zero_point = _take(tensors, name)
    if zero_point.dtype != torch.int32 or zero_point.shape != scale.shape:
        raise InputError(f"tensor '{name}' is {zero_point.dtype} {tuple(zero_point.shape)}, expected int32 {shape}")
    fmt = spec.format
    if ((zero_point < fmt.qmin) | (zero_point > fmt.qmax)).any():
        raise InputError(f"tensor '{name}' has a zero point outside the codes of {spec.bits} bits")
    return GridParams(spec, scale, zero_point, channels)


def _take_channels(site: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the channel factors of an activation, or None where the site has none; their number is checked later."""
    name = f"{site}.channels"
    if name not in tensors:
        return None
    channels = tensors.pop(name)
    if channels.dtype != torch.float32 or channels.ndim != 1:
        raise InputError(f"tensor '{name}' is {channels.dtype} {tuple(channels.shape)}, expected torch.float32 (C,)")
    if not (torch.isfinite(channels).all() and (channels >= SMALLEST_SCALE).all()):
        raise InputError(f"tensor '{name}' has a factor that is not finite and positive, or is subnormal")
    return channels


def _take_codes(manifest: Manifest, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weight codes by site.

    Tensors that are stored once stay shared, unless their shape or width differs.
    """
    codes: dict[str, torch.Tensor] = {}
    unpacked: dict[tuple[Any, ...], torch.Tensor] = {}
    for spec in manifest.sites:
        if spec.is_weight:
            packed, shape = _take(tensors, f"{spec.name}.codes"), manifest.shapes.get(spec.name)
            if shape is None:
                raise InputError(f"{MANIFEST_TENSOR} has no shape for '{spec.name}'")
            key = (id(packed), spec.bits, shape)
            if key not in unpacked:
                try:
                    unpacked[key] = packing.unpack(packed, spec.bits, shape)
                except InputError as error:
                    raise InputError(f"tensor '{spec.name}.codes': {error}") from None
            codes[spec.name] = unpacked[key]
    return codes
