"""MODEL on the command line: the bundled name, a diffusers folder or a checkpoint, on disk or the Hub, or an artifact.

Safetensors, and tensors alone from a checkpoint; strict keys.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.files import CONFIG, QUANT_METHOD, TRANSFORMER, model_folder, read_json, read_weights
from tqdit.models import checkpoints, hub
from tqdit.models.building import empty_model, set_parameter
from tqdit.models.published import DIFFUSION
from tqdit.models.sites import FREQUENCY_SHIFT, check_supported, config_of

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLED = {"fashion-dit": DATA / "fashion-dit"}
LABELS = "id2label.json"
PIPELINE = "model_index.json"  # what makes a folder a diffusers pipeline
SCHEDULER = Path("scheduler", "scheduler_config.json")


@dataclass(frozen=True)
class ModelSource:
    """A resolved model. `folder` holds the transformer's config.json and weights; `vae` a decoder folder if any.

    A `checkpoint` is a file with everything; `weights` says which of its sets is used, empty if it has one.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    vae: Path | None = None
    pipeline: Mapping[str, Any] | None = None  # model_index.json
    checkpoint: Path | None = None
    weights: str = ""

    @property
    def quantized(self) -> bool:
        found = self.config.get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def resolve(model: str | Path, num_heads: int | None = None) -> ModelSource:
    """Find a model by bundled name, folder, checkpoint file, or id on the Hugging Face Hub, which is downloaded.

    A pipeline's transformer folder means that pipeline; what exists here wins over the Hub. `num_heads`: of a
    checkpoint whose width is not published. Raises `InputError` saying what was looked for, or which file is not a
    DiT's.
    """
    path = Path(model)
    if str(model) not in BUNDLED and path.suffix in checkpoints.SUFFIXES and not path.is_dir():
        return _checkpoint(path, num_heads)
    if num_heads is not None:
        raise InputError(f"--num-heads is for a checkpoint file ({', '.join(checkpoints.SUFFIXES)}), not '{model}'")
    root = _root(model)
    parent = root.resolve().parent
    if root.resolve().name == TRANSFORMER and (parent / PIPELINE).is_file():
        root = parent
    folder = model_folder(root)
    config = read_json(folder / CONFIG, "a diffusers transformer has one")
    source = ModelSource(
        name=_name(str(model), root),
        folder=folder,
        config=config,
        scheduler=_scheduler(root / SCHEDULER),
        labels=_labels(root),
        pipeline=_optional_json(root / PIPELINE),
        vae=root / "vae" if (root / "vae" / "config.json").is_file() else None,
    )
    try:
        check_supported(config)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    return source


def _root(model: str | Path) -> Path:
    root = BUNDLED.get(str(model), Path(model))
    if root.is_dir():
        return root
    if isinstance(model, str) and hub.is_id(model) and not root.exists():
        return hub.fetched(model)
    raise InputError(
        f"unknown model '{model}'; give a folder, a checkpoint file ({', '.join(checkpoints.SUFFIXES)}), owner/name "
        f"of a model on the Hugging Face Hub, or a bundled model: {', '.join(BUNDLED)}"
    )


def _name(model: str, root: Path) -> str:
    if model in BUNDLED:
        return model
    return root.resolve().name if Path(model).is_dir() else model.rpartition("/")[2]  # a Hub folder's is a hash


def _checkpoint(path: Path, num_heads: int | None) -> ModelSource:
    found = checkpoints.read(path, num_heads)
    return ModelSource(path.stem, path.parent, found.config, DIFFUSION, checkpoint=path, weights=found.weights)


def load_float(source: ModelSource) -> nn.Module:
    """The float `DiTTransformer2DModel`, fp32, eval mode, on the CPU.

    Raises `InputError` naming the file or tensor for a config that diffusers refuses and for anything missing, of the
    wrong shape, left over, or not finite; diffusers only warns.
    """
    if source.quantized:
        raise InputError(f"model '{source.name}' is already quantized; give the float model")
    if source.checkpoint is not None:
        heads = int(source.config["num_attention_heads"])
        return checkpoints.load(checkpoints.read(source.checkpoint, heads))
    state = read_weights(source.folder)
    model = _empty_model(source)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise InputError(f"{source.folder}: weights lack tensor '{name}'")
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{source.folder}: tensor '{name}' has shape {tuple(state[name].shape)}, "
                f"the config needs {tuple(tensor.shape)}"
            )
        if not torch.isfinite(state[name]).all():
            raise InputError(f"{source.folder}: tensor '{name}' has NaN or Inf values")
    if extra := sorted(set(state) - set(expected)):
        raise InputError(f"{source.folder}: unexpected tensor '{extra[0]}'")
    for name, tensor in state.items():
        set_parameter(model, name, tensor.to(torch.float32, copy=True))  # it may be part of a mapped file
    return model.eval().requires_grad_(False)


def _empty_model(source: ModelSource) -> nn.Module:
    try:
        return empty_model(source.config)
    except InputError as error:
        raise InputError(f"{source.folder / CONFIG}: {error}") from None


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and values of a model's parameters, and its frequency shift if that is not diffusers' own."""
    digest = hashlib.sha256()
    if config_of(model).get(FREQUENCY_SHIFT, 1) != 1:
        digest.update(FREQUENCY_SHIFT.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def class_indices(source: ModelSource, names: list[str]) -> list[int]:
    """Class numbers of names or numbers. Raises `InputError` naming the unknown one."""
    by_name = {label.strip().lower(): i for i, text in source.labels.items() for label in text.split(",")}
    count = int(source.config["num_embeds_ada_norm"])
    found = []
    for name in names:
        key = name.strip().lower()
        index = by_name.get(key, int(key) if key.isdecimal() else -1)
        if not 0 <= index < count:
            known = ", ".join(list(by_name)[:20]) or "none named"
            raise InputError(f"unknown class '{name}'; known: {known}, or a number from 0 to {count - 1}")
        found.append(index)
    return found


def _optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _scheduler(path: Path) -> dict[str, Any] | None:
    """A scheduler config whose number of training timesteps is usable."""
    config = _optional_json(path)
    total = (config or {}).get("num_train_timesteps", 1000)
    if type(total) is not int or total < 1:
        raise InputError(f"{path}: num_train_timesteps is {total!r}; it must be a whole number from 1")
    return config


def _labels(root: Path) -> dict[int, str]:
    """Class names: `id2label` of a pipeline's model_index.json, or an artifact's own file."""
    table = (_optional_json(root / PIPELINE) or {}).get("id2label") or _optional_json(root / LABELS) or {}
    return class_names(table, f"{root}: id2label")


def check_vae(folder: Path, channels: int) -> None:
    """`InputError` unless `folder` has a diffusers `AutoencoderKL` for latents of `channels`, in safetensors."""
    config = read_json(folder / CONFIG, "a diffusers autoencoder has one")
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise InputError(f"{folder} has the class {kind}, a decoder is an AutoencoderKL")
    if (latents := config.get("latent_channels", 4)) != channels:
        raise InputError(f"{folder} decodes latents of {latents} channels, the model's have {channels}")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors weights")


def copy_vae(vae: Path, folder: Path) -> None:
    """Put a decoder into the new pipeline `folder`, without the pickled weights that may be beside it."""
    shutil.copytree(vae, folder / "vae", ignore=shutil.ignore_patterns("*.bin"))


def class_names(table: Any, where: str, count: int | None = None) -> dict[int, str]:
    """Class names by number, out of JSON; `where` it is from is named in the `InputError` for anything else, and for a
    number that is not below `count`.
    """
    if not isinstance(table, dict):
        raise InputError(f"{where} is not a table of class numbers to names")
    if wrong := [number for number in table if not number.isdecimal()]:
        raise InputError(f"{where} has the key '{wrong[0]}', keys are class numbers")
    names = {int(number): str(label) for number, label in table.items()}
    if count is not None and (beyond := [number for number in names if number >= count]):
        raise InputError(f"{where} names class {beyond[0]}, the model has classes 0 to {count - 1}")
    return names
