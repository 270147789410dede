"""Find and load transformers of any class of diffusers: a model's folder, or all transformers of a pipeline."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tqdit.architectures.registry import CLASS_NAME, architecture
from tqdit.architectures.traced import traced
from tqdit.errors import InputError
from tqdit.sources import components, float_weights
from tqdit.sources.components import PIPELINE
from tqdit.sources.float_weights import FLOATS
from tqdit.system.files import CONFIG, INDEX, TRANSFORMER, is_there, model_folder, read_json

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Transformers:
    """The transformers that a folder holds.

    `folders`: by component, "transformer" for a model alone. `index`: a pipeline's model_index.json, else None.
    """

    name: str
    root: Path
    folders: Mapping[str, Path]
    index: Mapping[str, Any] | None

    def copy_components(self, folder: Path) -> None:
        """Copy all of the pipeline but its transformers into the new pipeline `folder`.

        Weights are hard links where the disk allows it: text encoders then take no room and no time.
        """
        if self.index is not None:
            components.copy_around(self.root, self.index, self.folders, folder)


def find(folder: Path) -> Transformers:
    """Return the transformers of a diffusers folder.

    Raises `InputError` for a folder of neither a pipeline nor a transformer, for a transformer that is quantized
    already, and for a part of the pipeline that cannot be copied.
    """
    root = folder.resolve()
    index = read_json(root / PIPELINE) if is_there(root / PIPELINE) else None
    if index is None:
        found = {TRANSFORMER: root}
    else:
        found = {name: root / name for name in components.transformers(index)}
        if outside := [name for name in found if Path(name).name != name]:
            raise InputError(f"{folder} names the component {outside[0]!r}, which is no folder of it")
        if not found:
            raise InputError(f"{folder} is a pipeline without a transformer; its parts are {', '.join(index)}")
        components.check(root, {key: entry for key, entry in index.items() if key not in found})
    for place in found.values():
        class_of(place)
    name = root.parent.name if index is None and root.name == TRANSFORMER else root.name
    return Transformers(name, root, found, index)


def class_of(folder: Path) -> str:
    """Return the diffusers class of a float model's folder. Raises `InputError` that names the config."""
    config = read_json(folder / CONFIG, "a diffusers transformer has one")
    try:
        name = config.get(CLASS_NAME)
        if not isinstance(name, str):
            raise InputError(f"the config lacks {CLASS_NAME}")
        traced(name)
        if config.get("quantization_config") is not None:
            raise InputError("the model is already quantized; give the float model")
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    return name


def class_here(model: str | Path) -> str | None:
    """Return the class of the transformer in a folder on this machine; None where there is no such folder."""
    root = Path(model)
    if root.name in (PIPELINE, CONFIG):
        root = root.parent
    path = model_folder(root) / CONFIG
    name = read_json(path).get(CLASS_NAME) if is_there(path) else None
    return name if isinstance(name, str) else None


def has_own_samples(kind: str) -> bool:
    """Say whether a class has an architecture, by which it is calibrated on samples of its own."""
    try:
        architecture(kind)
    except InputError:
        return False
    return True


def load_transformer(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the float model of a folder, in eval mode on the CPU, by diffusers' own `from_pretrained`.

    `dtype`: by default that of most stored weights; parameters that the class keeps in fp32 are of fp32 anyway. Only
    safetensors are read. Raises `InputError` that names the folder, for weights that are missing, left over or no
    floats.
    """
    kind, stored = traced(class_of(folder)).model_class(), stored_dtypes(folder)
    variants = list(float_weights.variants_alone(folder))
    options: dict[str, Any] = {"variant": variants[0]} if len(variants) == 1 else {}
    try:
        model, loading = kind.from_pretrained(
            folder, torch_dtype=dtype or stored.most_common(1)[0][0], use_safetensors=True, local_files_only=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError, ImportError) as error:
        raise InputError(f"{folder}: diffusers cannot load it: {str(error).strip().partition(chr(10))[0]}") from None
    for what, why in (("missing_keys", "weights lack"), ("unexpected_keys", "the model has no place for")):
        if names := sorted(loading[what]):
            raise InputError(f"{folder}: {why} tensor '{names[0]}'")
    return model.eval().requires_grad_(False)


def stored_dtypes(folder: Path) -> Counter[torch.dtype]:
    """Return the number of stored elements of each dtype. Raises `InputError` for weights that are no floats."""
    files = float_weights.weight_files(folder)
    if not is_there(folder / INDEX) and not all((folder / name).is_file() for name in files):
        pickled = next(folder.glob("*.bin"), None)
        why = " (pickled ones are never loaded; save it as safetensors first)" if pickled else ""
        raise InputError(f"{folder} has no safetensors weights{why}")
    counts: Counter[torch.dtype] = Counter()
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    part = file.get_slice(key)
                    counts[_dtype(folder / name, key, part.get_dtype())] += torch.Size(part.get_shape()).numel()
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder / name} is missing, truncated or damaged: {error}") from None
    if not counts:
        raise InputError(f"{folder} has no tensors")
    return counts


def _dtype(path: Path, key: str, name: str) -> torch.dtype:
    if STORED.get(name) not in FLOATS:
        raise InputError(f"{path}: tensor '{key}' is stored as {name}; give the model with float weights")
    return STORED[name]
