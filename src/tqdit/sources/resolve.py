"""MODEL on the command line: the bundled name, a diffusers folder or a checkpoint, on disk or the Hub, or an artifact.

Safetensors, and tensors alone from a checkpoint; strict keys.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures.building import empty_model, set_parameter
from tqdit.architectures.dit_checkpoint import DIFFUSION
from tqdit.architectures.registry import FREQUENCY_SHIFT, architecture, check_supported, conditions, config_of
from tqdit.architectures.sit_checkpoint import SCHEDULER as FLOW
from tqdit.architectures.sit_checkpoint import TIME
from tqdit.architectures.timestep import changed
from tqdit.errors import AssumptionWarning, InputError, suggestion
from tqdit.sampling.schedules import check_scheduler, family
from tqdit.sources import checkpoints, components, float_weights, hub
from tqdit.system.files import CONFIG, INDEX, QUANT_METHOD, TRANSFORMER, WEIGHTS, is_there, model_folder, read_json

DATA = Path(__file__).resolve().parent.parent / "data"
BUNDLED = {"fashion-dit": DATA / "fashion-dit"}
MOST_DIGITS = 9  # of a class number
LABELS = "id2label.json"
SAFETENSORS = ".safetensors"
PIPELINE = "model_index.json"  # what makes a folder a diffusers pipeline
SCHEDULER = Path("scheduler", "scheduler_config.json")


@dataclass(frozen=True)
class ModelSource:
    """A resolved model. `folder` holds the transformer's config.json and weights; `vae` a decoder folder if any.

    A `checkpoint` is a file with everything; `weights` says which of its sets is used, empty if it has one. What was
    read of the file is kept in `opened`, so that it is unpickled once.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: dict(DIFFUSION))
    labels: Mapping[int, str] = field(default_factory=dict)
    vae: Path | None = None
    pipeline: Mapping[str, Any] | None = None  # model_index.json
    checkpoint: Path | None = None
    weights: str = ""
    root: Path | None = None  # the pipeline's folder, or the model's own
    opened: checkpoints.Checkpoint | None = field(default=None, compare=False, repr=False)

    def check_components(self) -> None:
        """Raise `InputError` for a part of the pipeline that could not be copied into an artifact of it."""
        components.check(self.root or self.folder, self.pipeline or {}, self.vae)

    def copy_components(self, folder: Path) -> None:
        """Put the parts of the pipeline besides transformer and scheduler into the new pipeline `folder`."""
        components.copy(self.root or self.folder, self.pipeline or {}, self.vae, folder)

    @property
    def components(self) -> dict[str, list[str]]:
        """What a model_index.json must name so that diffusers loads scheduler and decoder, if the pipeline does not."""
        named = {"scheduler": ["diffusers", self.scheduler.get("_class_name", DIFFUSION["_class_name"])]}
        if self.vae is not None:
            named["vae"] = ["diffusers", "AutoencoderKL"]
        index = self.pipeline or {}
        return {name: entry for name, entry in named.items() if _class_named(index, name) is None}

    @property
    def num_timesteps(self) -> int:
        """Training timesteps T of the schedule: the model's are in [0, T), or in [0, T] of flow matching."""
        return int(self.scheduler.get("num_train_timesteps", 1000))

    @property
    def time_range(self) -> tuple[float, float, bool]:
        """The least timestep, the bound of all, and whether the bound is a timestep too."""
        return 0, self.num_timesteps, family(self.scheduler).closed

    @property
    def quantized(self) -> bool:
        found = self.config.get("quantization_config")
        return isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD


def resolve(model: str | Path, num_heads: int | None = None, objective: str | None = None) -> ModelSource:
    """Find a model by bundled name, folder, checkpoint file, or id on the Hugging Face Hub, which is downloaded.

    A transformer's folder inside a pipeline means that pipeline with this transformer, whatever the folder is called;
    what exists here wins over the Hub. `num_heads`: of a checkpoint whose width is not published. `objective`:
    "flow" for a SiT checkpoint that has no training arguments; a folder's scheduler says it. Where no scheduler lies
    beside a model, DiT's own, or a converted SiT's, is taken with an `AssumptionWarning`. Raises `InputError` saying
    what was looked for, which file is not a DiT's, or which scheduler is not supported.
    """
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
    given = _folder(model)
    root = _pipeline_of(given)
    folder = model_folder(root) if given == root else given
    config = read_json(folder / CONFIG, "a diffusers transformer has one")
    try:
        check_supported(config)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from None
    index = _optional_json(root / PIPELINE)
    return ModelSource(
        name=_name(str(model), root if folder.name == TRANSFORMER else folder),
        folder=folder,
        config=config,
        scheduler=_scheduler(root / SCHEDULER, index, config),
        labels=_labels(root),
        pipeline=index,
        vae=root / "vae" if is_there(root / "vae" / CONFIG) else None,
        root=root,
    )


def _folder(model: str | Path) -> Path:
    """The folder that MODEL means: of a bundled name, a folder, a file in a model's folder, or an id on the Hub."""
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
    )


def _means_its_folder(path: Path) -> bool:
    """Whether a path means the diffusers model that it is a file of: its config, or weights that are read with it.

    Raises `InputError` for weights by diffusers' name that are not read: others of the same folder come before them.
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
    """The pipeline that a transformer's folder is in, or the folder itself.

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
    return root.resolve().name if Path(model).is_dir() else model.rpartition("/")[2]  # a Hub folder's is a hash


def _checkpoint(path: Path, num_heads: int | None, objective: str | None) -> ModelSource:
    found = checkpoints.read(path, num_heads, objective)
    if found.assumed:
        warnings.warn(f"{path}: {found.assumed}", AssumptionWarning, stacklevel=3)
    scheduler = FLOW if found.objective == "flow" else DIFFUSION
    return ModelSource(
        path.stem, path.parent, found.config, scheduler, checkpoint=path, weights=found.weights, opened=found
    )


def load_float(source: ModelSource) -> nn.Module:
    """The float `DiTTransformer2DModel`, fp32, eval mode, on the CPU.

    Raises `InputError` naming the file or tensor for a config that diffusers refuses or that is of another size than
    the weights, and for any tensor that is missing, of the wrong shape, left over, stored as no float, or not finite;
    diffusers only warns.
    """
    if source.quantized:
        raise InputError(f"model '{source.name}' is already quantized; give the float model")
    if source.opened is not None:
        return checkpoints.load(source.opened)
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
        set_parameter(model, name, tensor.to(torch.float32, copy=True))  # it may be part of a mapped file
    return model.eval().requires_grad_(False)


def _empty_model(source: ModelSource) -> nn.Module:
    try:
        return empty_model(source.config)
    except InputError as error:
        raise InputError(f"{source.folder / CONFIG}: {error}") from None


def weights_hash(model: nn.Module) -> str:
    """sha256 over names and values of a model's parameters, and the settings that diffusers has no key for."""
    digest, config = hashlib.sha256(), config_of(model)
    for key, value in architecture(config).own_settings(config).items():
        # Artifacts keep this hash. A frequency shift that diffusers does not have is 0, so its key says it all.
        digest.update((key if key == FREQUENCY_SHIFT else f"{key}={float(value)!r}").encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def class_indices(source: ModelSource, classes: Sequence[str | int], count: int | None = None) -> list[int]:
    """Class numbers of names or numbers below `count`, by default that of the model's own classes.

    Raises `InputError` naming the unknown one.
    """
    by_name = {label.strip().lower(): i for i, text in source.labels.items() for label in text.split(",")}
    count = conditions(source.config).count if count is None else count
    found = []
    for given in classes:
        key = str(given).strip().lower()
        index = given if isinstance(given, int) else by_name.get(key, _number(key))
        if isinstance(given, bool) or not 0 <= index < count:
            known = ", ".join(list(by_name)[:20]) or "none named"
            meant = suggestion(key[:40], by_name)
            raise InputError(
                f"unknown class '{str(given)[:40]}'; known: {known}, or a number from 0 to {count - 1}{meant}"
            )
        found.append(index)
    return found


def _number(text: str) -> int:
    """A class number, or -1: of more digits it is none, and Python reads at most 4300."""
    return int(text) if text.isdecimal() and len(text) <= MOST_DIGITS else -1


def _optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if is_there(path) else None


def _scheduler(path: Path, index: Mapping[str, Any] | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler config that is supported; with an `AssumptionWarning` DiT's or SiT's where there is none.

    `index`: a pipeline's model_index.json, whose class counts where the config says none. `model`: the transformer's
    config; a converted SiT embeds another time than a DiT. Raises `InputError` naming the file for a scheduler that no
    sampler serves, and for a missing config of a flow-matching pipeline.
    """
    config = _optional_json(path)
    named = _class_named(index, "scheduler")
    if named is not None and "_class_name" not in (config or {}):
        try:
            process = family({"_class_name": named})
        except InputError as error:
            raise InputError(f"{path.parent.parent / PIPELINE}: {error}") from None
        if process is not family(None):  # what a config without a class means is another process
            if config is None:
                raise InputError(f"{path} is missing; {PIPELINE} names a {named}, whose shift nothing else says")
            config = {"_class_name": named, **config}
    if config is None:
        taken, said = DIFFUSION, "DiT's is taken: DDIM, 1000 linear betas from 1e-4 to 0.02, epsilon"
        if changed(model) == TIME:
            taken, said = FLOW, "SiT's is taken: flow matching on the linear path"
        warnings.warn(f"{path.parent.parent} has no scheduler; {said}", AssumptionWarning, stacklevel=3)
        return dict(taken)
    try:
        check_scheduler(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def _class_named(index: Mapping[str, Any] | None, component: str) -> Any:
    """The class that a model_index.json names for a component, as [library, class]; None for one it does not name."""
    entry = (index or {}).get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _labels(root: Path) -> dict[int, str]:
    """Class names: `id2label` of a pipeline's model_index.json, or an artifact's own file."""
    table = (_optional_json(root / PIPELINE) or {}).get("id2label") or _optional_json(root / LABELS) or {}
    return class_names(table, f"{root}: id2label")


def class_names(table: Any, where: str, count: int | None = None) -> dict[int, str]:
    """Class names by number, out of JSON; `where` it is from is named in the `InputError` for anything else, and for a
    number that is not below `count`.
    """
    if not isinstance(table, dict):
        raise InputError(f"{where} is not a table of class numbers to names")
    if wrong := [number for number in table if _number(number) < 0]:
        raise InputError(f"{where} has the key '{wrong[0]}', keys are class numbers")
    if odd := [number for number, label in table.items() if not isinstance(label, str)]:
        raise InputError(f"{where} has a {type(table[odd[0]]).__name__} for class {odd[0]}, names are strings")
    names = {int(number): label for number, label in table.items()}
    if len(names) != len(table):
        raise InputError(f"{where} has a class number twice, with and without leading zeros")
    if count is not None and (beyond := [number for number in names if number >= count]):
        raise InputError(f"{where} names class {beyond[0]}, the model has classes 0 to {count - 1}")
    return names
