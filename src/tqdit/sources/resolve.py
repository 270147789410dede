"""Find the model that a user names, and load its float weights.

MODEL is a bundled name, an id on the Hugging Face Hub, a diffusers folder, a checkpoint file or an artifact. Weights
are read from safetensors, or as tensors alone from a checkpoint. Their names must be exactly the model's.
"""

import hashlib
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures.building import empty_model, set_parameter
from tqdit.architectures.dit_checkpoint import DIFFUSION
from tqdit.architectures.registry import CLASS_NAME, FREQUENCY_SHIFT, architecture, check_supported, config_of
from tqdit.architectures.sit_checkpoint import SCHEDULER as FLOW
from tqdit.errors import AssumptionWarning, InputError, suggestion
from tqdit.sources import any_class, checkpoints, float_weights, hub
from tqdit.sources.components import PIPELINE
from tqdit.sources.labels import find_labels
from tqdit.sources.scheduler import SCHEDULER, find_scheduler
from tqdit.sources.source import ModelSource
from tqdit.system.files import CONFIG, INDEX, TRANSFORMER, WEIGHTS, is_there, model_folder, read_json

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLED = {"fashion-dit": DATA / "fashion-dit"}
SAFETENSORS = ".safetensors"


def resolve(model: str | Path, num_heads: int | None = None, objective: str | None = None) -> ModelSource:
    """Find a model by bundled name, folder, checkpoint file, or id on the Hugging Face Hub, which is downloaded.

    The folder of a transformer inside a pipeline means that pipeline with this transformer, whatever the folder is
    called. A file or folder on disk wins over an id on the Hub. Where no scheduler lies beside a model, DiT's own, or a
    converted SiT's, is taken with an `AssumptionWarning`.

    `num_heads`: the number of heads of a checkpoint whose width is not published. `objective`: "flow" for a SiT
    checkpoint without training arguments; the scheduler of a folder says it. Raises `InputError` that says which places
    were searched, which file is not a DiT's, or which scheduler is not supported.
    """
    if not isinstance(model, str | Path):
        raise InputError(f"a model is given by its path or name, got {type(model).__name__}")
    path = Path(model)
    a_folder = path.is_dir() or _means_its_folder(path)
    if str(model) not in BUNDLED and path.suffix in checkpoints.SUFFIXES and not a_folder:
        return _checkpoint(path, num_heads, objective)
    if num_heads is not None:
        raise InputError(
            f"a number of heads is for a checkpoint file ({', '.join(checkpoints.SUFFIXES)}), not '{model}'"
        )
    if objective is not None:
        raise InputError(
            f"an objective is for a checkpoint file ({', '.join(checkpoints.SUFFIXES)}), not '{model}': a folder's "
            "scheduler says how its model was trained"
        )
    given = found_folder(model)
    root = _pipeline_of(given)
    folder = model_folder(root) if given == root else given
    config = read_json(folder / CONFIG, "a diffusers transformer has one")
    index = read_json(root / PIPELINE) if is_there(root / PIPELINE) else None
    if _of_any_class(config):
        traced_name = _name(str(model), root if folder.name == TRANSFORMER else folder)
        return ModelSource(traced_name, folder, config, {}, pipeline=index, root=root)
    try:
        check_supported(config)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    return ModelSource(
        name=_name(str(model), root if folder.name == TRANSFORMER else folder),
        folder=folder,
        config=config,
        scheduler=find_scheduler(root / SCHEDULER, index, config),
        labels=find_labels(root, index),
        pipeline=index,
        vae=root / "vae" if is_there(root / "vae" / CONFIG) else None,
        root=root,
    )


def found_folder(model: str | Path) -> Path:
    """Return the folder of a bundled name, a folder, a file in a model's folder, or an id on the Hub."""
    root = BUNDLED.get(str(model), Path(model))
    if root.is_dir():
        return root
    if (root.is_file() and root.name == PIPELINE) or _means_its_folder(root):
        return root.parent
    if root.exists():
        raise InputError(f"'{model}' is neither a model's folder nor a checkpoint file; give the folder")
    if isinstance(model, str) and hub.is_id(model):
        return hub.fetched(model)
    raise InputError(
        f"unknown model '{model}'; give a folder, a checkpoint file ({', '.join(checkpoints.SUFFIXES)}), owner/name "
        f"of a model on the Hugging Face Hub, or a bundled model: {', '.join(BUNDLED)}"
        f"{suggestion(str(model), BUNDLED)}"
    )


def _of_any_class(config: Mapping[str, Any]) -> bool:
    """Say whether a config is of a transformer of diffusers that has no architecture of its own."""
    name = config.get(CLASS_NAME)
    if not isinstance(name, str) or not ("Transformer" in name or "DiT" in name):
        return False
    return not any_class.has_own_samples(name) and hasattr(importlib.import_module("diffusers"), name)


def _means_its_folder(path: Path) -> bool:
    """Say whether a path is a file of a diffusers model, its config or weights that are read with it.

    Such a path means the model's folder. Raises `InputError` for weights with diffusers' name that are not read, since
    other weights of the same folder come before them.
    """
    if not (path.is_file() and is_there(path.parent / CONFIG)):
        return False
    read = float_weights.weight_files(path.parent)
    if path.name in (CONFIG, INDEX, *read):
        return True
    if path.suffix == SAFETENSORS and path.name.startswith(Path(WEIGHTS).stem):
        raise InputError(
            f"{path} is not read with the {CONFIG} beside it: {', '.join(read[:3])} comes first; to use the file, "
            f"put it and a copy of {CONFIG} into another folder"
        )
    return False


def _pipeline_of(folder: Path) -> Path:
    """Return the pipeline that a transformer's folder is in, or the folder itself.

    A trainer writes `checkpoint-500/transformer` into the folder whose scheduler it trains with.
    """
    real = folder.resolve()
    if is_there(real / PIPELINE) or is_there(real / SCHEDULER) or not is_there(real / CONFIG):
        return folder
    around = [real.parent, *([real.parent.parent] if real.parent.name.startswith("checkpoint-") else [])]
    return next((place for place in around if is_there(place / PIPELINE) or is_there(place / SCHEDULER)), folder)


def _name(model: str, root: Path) -> str:
    if model in BUNDLED:
        return model
    if Path(model).is_dir():
        return root.resolve().name
    return model.rpartition("/")[2]  # the folder of a model of the Hub is named by a hash


def _checkpoint(path: Path, num_heads: int | None, objective: str | None) -> ModelSource:
    found = checkpoints.read(path, num_heads, objective)
    if found.assumed:
        warnings.warn(f"{path}: {found.assumed}", AssumptionWarning, stacklevel=3)
    scheduler = FLOW if found.objective == "flow" else DIFFUSION
    return ModelSource(
        path.stem, path.parent, found.config, scheduler, checkpoint=path, weights=found.weights, opened=found
    )


def load_float(source: ModelSource) -> nn.Module:
    """Return the float model in fp32 and eval mode, on the CPU.

    Raises `InputError` that names the file or tensor, for a config that diffusers refuses or whose size is not that of
    the weights, and for any tensor that is missing, of the wrong shape, left over, stored as no float, or not finite.
    diffusers only warns of these.
    """
    if source.quantized:
        raise InputError(f"model '{source.name}' is already quantized; give the float model")
    if source.opened is not None:
        return checkpoints.load(source.opened)
    if _of_any_class(source.config):
        return any_class.load_transformer(source.folder, torch.float32)
    state = float_weights.read(source.folder)
    try:
        float_weights.check_sizes(state, source.config)
    except InputError as error:
        raise InputError(f"{source.folder}: {error}") from None
    model = _empty_model(source)
    try:
        float_weights.check_shapes(state, model.state_dict())
        values = {name: float_weights.checked(name, tensor) for name, tensor in state.items()}
    except InputError as error:
        raise InputError(f"{source.folder}: {error}") from None
    for name, tensor in values.items():
        set_parameter(model, name, tensor.to(torch.float32, copy=True))  # the tensor may be part of a mapped file
    return model.eval().requires_grad_(False)


def _empty_model(source: ModelSource) -> nn.Module:
    try:
        return empty_model(source.config)
    except InputError as error:
        raise InputError(f"{source.folder / CONFIG}: {error}") from None


def weights_hash(model: nn.Module) -> str:
    """Return the sha256 over a model's parameters, by name and value, and over settings unknown to diffusers."""
    digest, config = hashlib.sha256(), config_of(model)
    for key, value in architecture(config).own_settings(config).items():
        # Artifacts keep this hash, so it cannot change. A frequency shift that diffusers lacks is always 0, so the key
        # alone says it.
        digest.update((key if key == FREQUENCY_SHIFT else f"{key}={float(value)!r}").encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
