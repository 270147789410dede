"""MODEL on the command line: the bundled name, a diffusers folder, or an artifact. Safetensors only, strict keys."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.files import CONFIG, WEIGHTS, read_json, read_tensors
from tqdit.models.sites import check_supported

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLED = {"fashion-dit": DATA / "fashion-dit"}
INDEX = f"{WEIGHTS}.index.json"
LABELS = "id2label.json"
QUANT_METHOD = "tqdit"


@dataclass(frozen=True)
class ModelSource:
    """A resolved model. `folder` holds the transformer's config.json and weights; `vae` a decoder folder if any."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    vae: Path | None = None

    @property
    def quantized(self) -> bool:
        return self.config.get("quantization_config", {}).get("quant_method") == QUANT_METHOD


def resolve(model: str | Path) -> ModelSource:
    """Find a model by bundled name or folder. Raises `InputError` saying what was looked for."""
    root = BUNDLED.get(str(model), Path(model))
    if not root.is_dir():
        raise InputError(f"unknown model '{model}'; give a folder, or a bundled model: {', '.join(BUNDLED)}")
    folder = root / "transformer" if (root / "transformer").is_dir() else root
    config = read_json(folder / CONFIG, "a diffusers transformer has one")
    source = ModelSource(
        name=str(model) if str(model) in BUNDLED else root.resolve().name,
        folder=folder,
        config=config,
        scheduler=_optional_json(root / "scheduler" / "scheduler_config.json"),
        labels=_labels(root),
        vae=root / "vae" if (root / "vae" / "config.json").is_file() else None,
    )
    check_supported(config)
    return source


def load_float(source: ModelSource) -> nn.Module:
    """The float `DiTTransformer2DModel`, fp32, eval mode, on the CPU.

    Raises `InputError` naming the file or tensor for anything missing, of the wrong shape, left over, or not finite;
    diffusers only warns.
    """
    from diffusers import DiTTransformer2DModel

    if source.quantized:
        raise InputError(f"model '{source.name}' is already quantized; give the float model")
    state = _read_weights(source.folder)
    model = DiTTransformer2DModel.from_config(dict(source.config))
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
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    return model.eval().requires_grad_(False)


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and values of a model's parameters."""
    digest = hashlib.sha256()
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


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, "sharded weights have one")
        shards = sorted(set(index.get("weight_map", {}).values()))
        return {name: tensor for shard in shards for name, tensor in read_tensors(folder / shard).items()}
    if not (folder / WEIGHTS).is_file() and list(folder.glob("*.bin")):
        raise InputError(f"{folder} has only pickled .bin weights; save it as safetensors first")
    return read_tensors(folder / WEIGHTS)


def _optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _labels(root: Path) -> dict[int, str]:
    """Class names: `id2label` of a pipeline's model_index.json, or an artifact's own file."""
    table = (_optional_json(root / "model_index.json") or {}).get("id2label") or _optional_json(root / LABELS) or {}
    if wrong := [number for number in table if not number.isdecimal()]:
        raise InputError(f"{root}: id2label has the key '{wrong[0]}', keys are class numbers")
    return {int(number): str(label) for number, label in table.items()}
