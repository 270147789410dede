"""Read official DiT and SiT checkpoints, and make of a file with the published names a diffusers model.

The model runs as published. Only tensors and the arguments of the training are read from a `.pt` file; other Python
objects in the file are never unpickled.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tqdit.architectures import dit_training as training
from tqdit.architectures.building import empty_model, set_parameter, share_embedder
from tqdit.architectures.dit_checkpoint import CLASS_TABLE, POSITIONS, implied_config, published_names
from tqdit.architectures.sit_checkpoint import flow_config, flow_tensor
from tqdit.errors import InputError
from tqdit.sources.float_weights import FLOATS, checked, unwrapped
from tqdit.system.files import read_tensors
from tqdit.system.reading import check_regular

SUFFIXES = (".pt", ".pth", ".safetensors")
TRAINING_KEYS = ("ema", "model")  # keys of a training checkpoint's weights, the better first
POSITION_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file: its weights by published name, still in the file, and the config that they imply.

    `weights`: which weights of a training checkpoint these are, "ema" or "model"; empty for a file with one set.
    `assumed`: a sentence that says which defaults were taken because the file does not say; empty if none were.
    `objective`: "diffusion", or "flow" for a SiT, whose config is that of the model in diffusers' conventions.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    weights: str
    assumed: str = ""
    objective: str = "diffusion"


def read(path: Path, num_heads: int | None = None, objective: str | None = None) -> Checkpoint:
    """Read the names, shapes and config of a checkpoint.

    `num_heads`: overrides the number that is published for the width. `objective`: how the model was trained,
    "diffusion" (the default) or "flow", for a file without training arguments that say so. The arguments of the
    training are compared with the tensors.

    Raises `InputError` that names the file, and the tensor, size or argument that is not a DiT's or SiT's, or that
    another contradicts.
    """
    size = check_regular(path).st_size
    if path.suffix == ".safetensors":
        weights, tensors, arguments = "", read_tensors(path), {}
    else:
        loaded = _unpickled(path)
        weights, tensors = _tensors(path, loaded)
        arguments = training.arguments_of(loaded)
    tensors = unwrapped(tensors)
    try:
        _check_views(tensors)
        objective = training.objective_of(arguments, path.stem, objective)
        training.check_process(arguments, objective)
        table = tensors.get(CLASS_TABLE, torch.empty(0))
        assumed = training.check_classes(arguments, len(table), objective) if table.ndim else ""
        config = implied_config(tensors, num_heads)
        training.check_sizes(arguments, config)
        if missing := next((name for name, _ in published_names(config) if name not in tensors), None):
            raise InputError(f"weights lack tensor '{missing}'")
        _check_memory(tensors, size)
        config = flow_config(config) if objective == "flow" else config
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return Checkpoint(path, config, tensors, weights, assumed, objective)


def _check_views(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` for a tensor that repeats a few values: a copy of it could fill any memory."""
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(f"tensor '{name}' repeats fewer values than its shape {tuple(tensor.shape)} has")


def _check_memory(tensors: Mapping[str, torch.Tensor], size: int) -> None:
    """Raise `InputError` for tensors that are views of the same values: copies of them could fill any memory."""
    if (claimed := sum(tensor.nbytes for tensor in tensors.values())) > size:
        raise InputError(f"its tensors claim {claimed} bytes, the file has {size}: some are the same memory")


def load(checkpoint: Checkpoint) -> nn.Module:
    """Return the float model in fp32 and eval mode, on the CPU; all blocks share one embedder.

    The model of a SiT follows diffusers' conventions of flow matching: it returns the negated velocity of the SiT at
    time 1 - timestep / 1000.

    Raises `InputError` that names the file and the tensor, for anything missing, of the wrong shape, left over or not
    finite, and for a position table that is not the published one.
    """
    try:
        model = empty_model(checkpoint.config)
        share_embedder(model)
        left = dict(checkpoint.tensors)
        _check_positions(_taken(left, POSITIONS), cast(torch.Tensor, model.get_buffer("pos_embed.pos_embed")))
        for name, targets in published_names(checkpoint.config):
            tensor = _taken(left, name)
            tensor = flow_tensor(name, tensor, checkpoint.config) if checkpoint.objective == "flow" else tensor
            _fill(model, name, tensor, targets)
        if left:
            raise InputError(f"unexpected tensor '{min(left)}'")
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
    return model.eval()


def _unpickled(path: Path) -> Any:
    """Return the content of a file; its tensors are mapped from the file where the format allows."""
    try:
        with path.open("rb") as file:
            zipped = zipfile.is_zipfile(file)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the training's command line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can fail in any way
        if refused := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):
            raise InputError(f"{path} holds a Python object, {refused[1]}, which is never unpickled") from None
        raise InputError(f"{path} is truncated, damaged or no file of torch.save") from None


def _tensors(path: Path, loaded: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the name of the weights that are used, and their tensors by name."""
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
    """Copy the rows of a published tensor into the parameters that they belong to."""
    shapes = [model.get_parameter(target).shape for target in targets]
    expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if tuple(tensor.shape) != expected:
        raise InputError(f"tensor '{name}' has shape {tuple(tensor.shape)}, the other tensors need {expected}")
    for target, rows in zip(targets, tensor.split([shape[0] for shape in shapes]), strict=True):
        value = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        set_parameter(model, target, value)


def _check_positions(stored: torch.Tensor, computed: torch.Tensor) -> None:
    """Compare the stored position table with the one that diffusers computes; both are (1, N, C).

    A checkpoint stores the table in a dtype of its own, so a difference of that dtype's rounding is allowed.
    """
    if stored.shape != computed.shape:
        raise InputError(f"tensor '{POSITIONS}' has shape {tuple(stored.shape)}, expected {tuple(computed.shape)}")
    tolerance = max(POSITION_TOLERANCE, torch.finfo(stored.dtype).eps if stored.dtype.itemsize < 4 else 0.0)
    difference = (stored.float() - computed).abs().max().item()
    if difference > tolerance:
        raise InputError(
            f"tensor '{POSITIONS}' is not the sine-cosine table of DiT: it differs by {difference:.2g}, and no other "
            "table is supported"
        )
