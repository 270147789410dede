"""Write a Solution as a folder in diffusers' style, and read it back; diffusers' `from_pretrained` reads it too.

    config.json                              the model's config with `quantization_config`
    diffusion_pytorch_model.safetensors      the tensors of `tqdit.artifact.tensors`; or shards of it and their index
    tqdit.json                               the seal: sha256 of scheduler, class names, VAE and whatever else is there
    README.md                                a model card

The seal does not list config and weights, which vouch for themselves, nor README.md and .gitattributes, which may be
edited, nor what is in a pipeline's folder `transformer`.

A pipeline has config and weights, with a tqdit.json of their own, in its folder `transformer`.
"""

import hashlib
import os
from pathlib import Path

import torch

from tqdit.artifact import tensors
from tqdit.artifact.manifest import FORMATS
from tqdit.errors import InputError
from tqdit.spec import Solution
from tqdit.system.files import (
    CONFIG,
    EDITABLE,
    INDEX,
    MANIFEST,
    TRANSFORMER,
    WEIGHTS,
    hidden,
    is_debris,
    is_there,
    model_folder,
    read_json,
    read_weights,
    write_json,
    write_tensors,
)
from tqdit.system.reading import check_regular

# The files that are read with a model: these, and in these folders the files with these suffixes.
BESIDE = ("model_index.json", "id2label.json")
FOLDERS_BESIDE = ("scheduler", "vae")
READ_SUFFIXES = (".json", ".safetensors", ".bin")
SHARD = "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors"


def write(solution: Solution, folder: Path, shard_bytes: int | None = None) -> None:
    """Write a Solution into an existing folder, and seal the folder; see `outputs.replacing` for doing it atomically.

    `shard_bytes`: the most a weight file has, if a tensor is not larger; by default there is one file.
    """
    stored, config = tensors.pack(solution)
    shards = _shards(stored, shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [SHARD.format(i, len(shards)) for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        write_json(folder / INDEX, index, sort_keys=True)
    write_json(folder / CONFIG, config, sort_keys=True)
    seal(folder)


def seal(folder: Path) -> None:
    """Write tqdit.json: from now on the files beside config and weights may not change.

    Config and weights vouch for themselves.
    """
    beside = sorted(path for path in folder.rglob("*") if path.is_file() and not _vouched(path.relative_to(folder)))
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in beside}
    write_json(folder / MANIFEST, {"format_version": tensors.SEAL_VERSION, "files": files}, sort_keys=True)


def read(folder: Path, root: Path | None = None) -> Solution:
    """Load and verify an artifact: a folder of a model, a pipeline, or the folder `transformer` of a pipeline.

    `root`: the pipeline that the model is read with, if its folder has another name than `transformer`.
    Raises `InputError` naming the file or tensor for anything missing or changed, as `check_seal` and `tensors.unpack`
    do. Whether the sites are those of the model is another question: see `runtime.fitting`.
    """
    model = model_folder(folder)
    config = read_json(model / CONFIG)
    tensors.check_config(config, model / CONFIG)
    check_seal(folder, root)
    return tensors.unpack(read_weights(model), config, model)


def check_seal(folder: Path, root: Path | None = None) -> None:
    """Verify the files beside config and weights: scheduler, class names, VAE. Config and weights vouch for themselves.

    `folder` and `root` are as in `read`; of a pipeline both seals are checked. Raises `InputError` that names the file
    for one that is missing or changed, and for one that was added and would be read with the model. A folder without
    tqdit.json is taken: diffusers downloads a model, and writes a pipeline, without it.
    """
    around = _pipeline_of(folder)
    for sealed in dict.fromkeys((around, model_folder(around), root or around)):
        if is_there(sealed / MANIFEST):
            _check_seal(sealed)


def check_replaceable(folder: Path) -> None:
    """Raise `InputError` if a folder has files that are not a model's: saving a model over them would lose them."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if not (is_debris(Path(path.name)) or (path.is_file() and _vouched(Path(path.name)))):
                raise InputError(f"{folder} has '{path.name}', which saving would remove; choose another folder")


def unseal_pipeline(folder: Path) -> None:
    """Remove the seal of the pipeline around a re-saved model: the pipeline's own files have changed.

    diffusers changes these files when it saves the model, and writes no seal.
    """
    if folder.name.startswith(TRANSFORMER):  # some pipelines have a transformer_2
        (folder.parent / MANIFEST).unlink(missing_ok=True)


def size_bytes(folder: Path) -> int:
    """Return the bytes of the weight files, which an artifact takes on disk for the model itself."""
    return sum(path.stat().st_size for path in model_folder(folder).glob("*.safetensors"))


def _shards(stored: dict[str, torch.Tensor], most: int | None) -> list[dict[str, torch.Tensor]]:
    """Divide the tensors, in their order, where a shard would have more than `most` bytes."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in stored.items():
        if most is not None and shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _vouched(path: Path) -> bool:
    """Say whether the seal leaves out a file, given relative to its folder."""
    if path.parts[0] == TRANSFORMER and len(path.parts) > 1:
        return True
    return len(path.parts) == 1 and (path.name in (CONFIG, MANIFEST, INDEX, *EDITABLE) or path.suffix == ".safetensors")


def _pipeline_of(folder: Path) -> Path:
    """Return the pipeline whose transformer `folder` is; else the folder itself."""
    real = Path(os.path.realpath(folder))
    return real.parent if real.name == TRANSFORMER and is_there(real.parent / MANIFEST) else folder


def _check_seal(folder: Path) -> None:
    seal = read_json(folder / MANIFEST)
    files = seal.get("files")
    if not isinstance(files, dict):
        raise InputError(f"{folder / MANIFEST} has no table of files")
    if seal.keys() != {"format_version", "files"} or not tensors.readable(seal["format_version"]):
        known = " or ".join(map(str, FORMATS))
        raise InputError(f"{folder / MANIFEST} is not a seal of format {known}")
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{folder / MANIFEST} names '{name}', which is not in the folder")
        if _sha256(folder / name, f"{MANIFEST} lists it") != expected:
            raise InputError(f"{folder / name} was changed: its sha256 is not the one in {MANIFEST}")
    for path in _read_with_model(folder):
        if path.relative_to(folder).as_posix() not in files:
            raise InputError(f"{path} was added: {MANIFEST} does not have it; remove the file")


def _read_with_model(folder: Path) -> list[Path]:
    """Return the files beside config and weights that are read with a model, if they are there.

    A README is not, nor is anything under a name with a leading dot: editors and file managers leave such files.
    """
    inside = [path for name in FOLDERS_BESIDE for path in sorted((folder / name).rglob("*"))]
    beside = [folder / name for name in BESIDE if is_there(folder / name)]
    inside = [path for path in inside if not hidden(path.relative_to(folder))]
    return [*beside, *(path for path in inside if path.suffix in READ_SUFFIXES)]


def _sha256(path: Path, why: str = "") -> str:
    check_regular(path, why)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
