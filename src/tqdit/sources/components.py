"""Check the parts of a pipeline beside its transformer and scheduler, then copy them into an artifact.

A pipeline that is quantized stays one that diffusers loads. Its other parts (a VAE, text encoders, code of its own) are
copied as they are. Pickled weights are never copied, since nobody should load them.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdit.errors import InputError
from tqdit.system.files import CONFIG, TRANSFORMER, is_there, read_json
from tqdit.system.reading import check_regular

PIPELINE = "model_index.json"  # the file that makes a folder a diffusers pipeline
SCHEDULER_PART = "scheduler"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
WEIGHTS_NAME = re.compile(r"((?:diffusion_pytorch_)?model)(\.[\w-]+)?\.safetensors")  # a name and maybe a variant


def names(index: Mapping[str, Any]) -> Iterator[str]:
    """Yield the components that a model_index.json names besides transformer and scheduler, but none that is null."""
    for name, value in index.items():
        if (
            isinstance(value, list)
            and name[:1] != "_"
            and name not in (TRANSFORMER, SCHEDULER_PART)
            and value[:1] != [None]
        ):
            yield name


def transformers(index: Mapping[str, Any]) -> Iterator[str]:
    """Yield the transformers that a model_index.json names, such as "transformer" and "transformer_2" of Wan 2.2."""
    for name, value in index.items():
        if isinstance(value, list) and value[:1] == ["diffusers"] and name.startswith(TRANSFORMER):
            yield name


def class_named(index: Mapping[str, Any] | None, component: str) -> Any:
    """Return the class that a model_index.json names for a component as [library, class]; None if it names none."""
    entry = (index or {}).get(component)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def check(root: Path, index: Mapping[str, Any], vae: Path | None = None) -> None:
    """Raise `InputError` for a component that could not be copied.

    `index`: the content of model_index.json. `vae`: as in `copy`.
    """
    for name, folder in _sources(root, index, vae).items():
        if Path(name).name != name:
            raise InputError(f"{root} names the component {name!r}, which is no folder of it")
        if not folder.is_dir():
            raise InputError(f"{root} names the component '{name}', but has no folder of this name")
        for path in sorted(folder.rglob("*")):
            if not path.is_dir():
                check_regular(path)  # copying a named pipe would wait for ever
        _check_weights(folder)
    if (code := own_code(root, index)) is not None and not code.is_file():
        raise InputError(f"{root} names the pipeline class {index['_class_name']}, but has no file {code.name}")


def own_code(root: Path, index: Mapping[str, Any]) -> Path | None:
    """Return the Python file of a pipeline whose class is not diffusers' own; None for a class of diffusers."""
    kind = index.get("_class_name")
    if not isinstance(kind, list):
        return None
    module = kind[0] if len(kind) == 2 and all(isinstance(part, str) for part in kind) else ""
    if not module.isidentifier():
        raise InputError(f"{root} names the pipeline class {kind!r}; a class of one's own is [module, class]")
    return root / f"{module}.py"


def copy(root: Path, index: Mapping[str, Any], vae: Path | None, folder: Path) -> None:
    """Copy the components of the pipeline `root`, and code of its own, into the new pipeline `folder`.

    `vae`: the decoder of the copy, which replaces the pipeline's own.
    """
    for name, source in _sources(root, index, vae).items():
        copy_folder(source, folder / name)
    if (code := own_code(root, index)) is not None:
        shutil.copyfile(code, folder / code.name)


def copy_around(root: Path, index: Mapping[str, Any], without: Collection[str], folder: Path) -> None:
    """Copy the model_index.json of the pipeline `root`, unchanged, and all components but those `without`.

    Weights are hard links where the disk allows it: of them `folder` takes no room.
    """
    shutil.copyfile(root / PIPELINE, folder / PIPELINE)
    scheduler = [SCHEDULER_PART] if (root / SCHEDULER_PART).is_dir() else []
    for name in (*names(index), *scheduler):
        if name not in without:
            copy_folder(root / name, folder / name, _linked)
    if (code := own_code(root, index)) is not None:
        shutil.copyfile(code, folder / code.name)


def _linked(source: str, target: str) -> str:
    """Make a hard link to a file of weights, where that is possible; copy any other file."""
    real = os.path.realpath(source)  # the Hub's cache has links to its files
    if real.endswith(".safetensors") or source.endswith(".safetensors"):
        try:
            os.link(real, target)
            return target
        except OSError:  # another disk, or one without links
            pass
    return shutil.copyfile(real, target)


def _sources(root: Path, index: Mapping[str, Any], vae: Path | None) -> dict[str, Path]:
    """Return the folder of every component that is copied, by the component's name."""
    return {name: root / name for name in names(index)} | ({} if vae is None else {"vae": vae})


def copy_folder(source: Path, target: Path, copy_file: Callable[[str, str], Any] = shutil.copy2) -> None:
    """Copy a component's folder without pickled weights, and without hidden files such as a repository's history.

    A single file of weights that exists as a variant only gets the name that diffusers loads. `copy_file` copies one
    file.
    """
    ignored = shutil.ignore_patterns(".*", *(f"*{suffix}" for suffix in PICKLES))
    shutil.copytree(source, target, ignore=ignored, copy_function=copy_file)
    if (alone := _variant_alone(source)) is not None:
        stem = WEIGHTS_NAME.fullmatch(alone.name)
        assert stem is not None
        (target / alone.name).rename(target / f"{stem[1]}.safetensors")


def _check_weights(component: Path) -> None:
    """Raise `InputError` for a model without weights, with pickled ones alone, or only with a variant in several files.

    Pickled weights that are missing may also have been left out by a download.
    """
    tensors = sorted(path.name for path in component.glob("*.safetensors"))
    pickles = sorted(path.name for path in component.iterdir() if path.suffix in PICKLES)
    if pickles and not tensors:
        raise InputError(
            f"{component} has only pickled weights ({pickles[0]}), which are never copied; save it as safetensors first"
        )
    if not any(component.rglob("*.safetensors")) and (kind := _kind_of_model(component)):
        raise InputError(
            f"{component} is of a model ({kind}), but has no .safetensors weights, and pickled ones are never taken; "
            "save it as safetensors first"
        )
    if tensors and not _loads_without_variant(component) and _variant_alone(component) is None:
        raise InputError(f"{component} has weights only as {', '.join(tensors[:3])}; save it without a variant first")


def _kind_of_model(component: Path) -> str:
    """Return the class of the model in a component's config; empty for a component that needs no weights."""
    path = component / CONFIG
    config = read_json(path) if is_there(path) else {}
    kind = config.get("_class_name") or config.get("architectures") or ""  # diffusers, or transformers
    return str(kind[0] if isinstance(kind, list) and kind else kind)[:40]


def _loads_without_variant(component: Path) -> bool:
    stems = ("diffusion_pytorch_model", "model")
    return any((component / f"{stem}.safetensors{end}").is_file() for stem in stems for end in ("", ".index.json"))


def _variant_alone(component: Path) -> Path | None:
    """Return the one file of weights of a component that has weights as a variant only, else None."""
    if _loads_without_variant(component):
        return None
    found = [path for path in component.glob("*.safetensors") if WEIGHTS_NAME.fullmatch(path.name)]
    return found[0] if len(found) == 1 else None


def check_vae(folder: Path, channels: int) -> None:
    """Check that `folder` has a diffusers `AutoencoderKL` for latents of `channels`, in safetensors.

    Raises `InputError` for any other folder.
    """
    config = read_json(folder / CONFIG, "a diffusers autoencoder has one")
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise InputError(f"{folder} has the class {kind}, a decoder is an AutoencoderKL")
    if (latents := config.get("latent_channels", 4)) != channels:
        raise InputError(f"{folder} decodes latents of {latents} channels, the model's have {channels}")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors weights")
    if not _loads_without_variant(folder):
        only = next(folder.glob("*.safetensors")).name
        raise InputError(f"{folder} has weights only as {only}, a variant; save it without a variant first")
