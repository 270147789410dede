"""Official DiT checkpoints: a file with the published names becomes a diffusers model that runs as published.

Of a `.pt` file tensors and the training's own arguments are read; other Python objects in it are never unpickled.
"""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tqdit.errors import AssumptionWarning, InputError
from tqdit.files import read_tensors
from tqdit.models.building import empty_model, set_parameter, share_embedder
from tqdit.models.float_weights import FLOATS, checked, unwrapped
from tqdit.models.published import CLASS_TABLE, POSITIONS, implied_config, published_names
from tqdit.reading import check_regular

SUFFIXES = (".pt", ".pth", ".safetensors")
TRAINING_KEYS = ("ema", "model")  # of a training checkpoint, the better weights first; it also has "opt" and "args"
POSITION_TOLERANCE = 1e-5
FLOW = ("path_type", "prediction", "interpolant", "loss_weight")  # arguments of a training by flow matching
CLASSES = 1000  # of the published checkpoints, which say nothing of their training


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: its weights by published name, still in the file, and the config they imply.

    `weights` says which of a training checkpoint's they are, "ema" or "model"; empty for a file with one set.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    weights: str


def read(path: Path, num_heads: int | None = None) -> Checkpoint:
    """Names, shapes and config of a checkpoint. `num_heads` overrides the published number for the width.

    What its training's own arguments say decides. Where they are silent and the sizes are not the published ones, the
    last row of the label table is taken for the null class, with an `AssumptionWarning`. Raises `InputError` naming the
    file, and the tensor, size or argument that is not a DiT's.
    """
    check_regular(path)
    if path.suffix == ".safetensors":
        weights, tensors, arguments = "", read_tensors(path), {}
    else:
        loaded = _unpickled(path)
        weights, tensors = _tensors(path, loaded)
        arguments = _arguments(loaded)
    tensors = unwrapped(tensors)
    try:
        _check_values(tensors)
        _check_arguments(tensors, arguments)
        config = implied_config(tensors, num_heads)
        if missing := next((name for name, _ in published_names(config) if name not in tensors), None):
            raise InputError(f"weights lack tensor '{missing}'")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Checkpoint(path, config, tensors, weights)


def _arguments(loaded: Any) -> dict[str, Any]:
    """The arguments of the training that a checkpoint is of; none in a file of weights alone."""
    found = loaded.get("args") if isinstance(loaded, dict) else None
    return vars(found) if isinstance(found, argparse.Namespace) else found if isinstance(found, dict) else {}


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` for a tensor that claims more values than it has: copies of it could fill any memory."""
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f"tensor '{name}' repeats fewer values than its shape {tuple(tensor.shape)} has")


def _check_arguments(tensors: Mapping[str, torch.Tensor], arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` for a training that was no DiT's, or had no null class; warn where nothing says so."""
    kind = str(arguments.get("model", ""))
    flow = [f"{name} {arguments[name]}" for name in FLOW if arguments.get(name) is not None]
    if kind.startswith("SiT") or flow:
        said = ", ".join([*([f"model {kind}"] if kind else []), *flow])
        raise InputError(
            f"it was trained by flow matching, as a SiT is ({said}); supported are DiTs, trained by diffusion"
        )
    if CLASS_TABLE not in tensors or not tensors[CLASS_TABLE].ndim:
        return  # which the config's sizes need: they name it
    rows, classes = len(tensors[CLASS_TABLE]), arguments.get("num_classes")
    if classes is None:
        if rows != CLASSES + 1:
            message = (
                f"nothing says how many classes there are: the last of the {rows} rows is taken for the null class"
            )
            warnings.warn(message, AssumptionWarning, stacklevel=5)
    elif rows == classes:
        raise InputError(
            f"it was trained without a null class (num_classes {classes}, and as many rows of '{CLASS_TABLE}'); "
            "guidance needs one, and diffusers' model has one"
        )
    elif rows != classes + 1:
        raise InputError(
            f"'{CLASS_TABLE}' has {rows} rows, its arguments say num_classes {classes} and one more is null"
        )


def load(checkpoint: Checkpoint) -> nn.Module:
    """The float `DiTTransformer2DModel`, fp32, eval mode, on the CPU; all blocks share one embedder.

    Raises `InputError` naming the file and the tensor for anything missing, of the wrong shape, left over or not
    finite, and for a position table that is not the published one.
    """
    try:
        model = empty_model(checkpoint.config)
        share_embedder(model)
        left = dict(checkpoint.tensors)
        _check_positions(_taken(left, POSITIONS), cast(torch.Tensor, model.get_buffer("pos_embed.pos_embed")))
        for name, targets in published_names(checkpoint.config):
            _fill(model, name, _taken(left, name), targets)
        if left:
            raise InputError(f"unexpected tensor '{min(left)}'")
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
    return model.eval()


def _unpickled(path: Path) -> Any:
    """What a file holds, tensors mapped from it where its format allows."""
    try:
        with path.open("rb") as file:
            zipped = zipfile.is_zipfile(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training command line; never used
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can fail in any way
        if refused := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise InputError(f"{path} holds a Python object, {refused[1]}, which is never unpickled") from None
        raise InputError(f"{path} is truncated, damaged or no file of torch.save") from None


def _tensors(path: Path, loaded: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Which weights of the file are used, and these."""
    if not isinstance(loaded, dict):
        raise InputError(f"{path} holds no table of tensors but a {type(loaded).__name__}")
    weights = next((key for key in TRAINING_KEYS if isinstance(loaded.get(key), dict) and loaded[key]), "")
    tensors = loaded[weights] if weights else loaded
    for name, value in tensors.items():
        usable = isinstance(value, torch.Tensor) and value.dtype in FLOATS and value.layout is torch.strided
        if not (isinstance(name, str) and usable and not value.is_meta):
            raise InputError(f"{path}: '{name}' is no tensor of floats; a DiT checkpoint has nothing else")
    return weights, dict(tensors)


def _taken(left: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in left:
        raise InputError(f"weights lack tensor '{name}'")
    tensor = left.pop(name)
    checked(name, tensor)
    return tensor


def _fill(model: nn.Module, name: str, tensor: torch.Tensor, targets: tuple[str, ...]) -> None:
    """Rows of a published tensor into the parameters they belong to, in memory of their own."""
    shapes = [model.get_parameter(target).shape for target in targets]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if tuple(tensor.shape) != expected:
        raise InputError(f"tensor '{name}' has shape {tuple(tensor.shape)}, the other tensors need {expected}")
    for target, rows in zip(targets, tensor.split([shape[0] for shape in shapes]), strict=True):
        value = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        set_parameter(model, target, value)


def _check_positions(stored: torch.Tensor, computed: torch.Tensor) -> None:
    """diffusers computes the table; a checkpoint stores it, in its own dtype. They must be the same, (1, N, C)."""
    if stored.shape != computed.shape:
        raise InputError(f"tensor '{POSITIONS}' has shape {tuple(stored.shape)}, expected {tuple(computed.shape)}")
    tolerance = max(POSITION_TOLERANCE, torch.finfo(stored.dtype).eps if stored.dtype.itemsize < 4 else 0.0)
    difference = (stored.float() - computed).abs().max().item()
    if difference > tolerance:
        raise InputError(
            f"tensor '{POSITIONS}' is not the sine-cosine table of DiT: it differs by {difference:.2g}, and no other "
            "table is supported"
        )
