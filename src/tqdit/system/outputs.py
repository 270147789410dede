"""Check where outputs may go, and replace folders so that nothing of the user's is lost."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdit.errors import InputError
from tqdit.system import swap
from tqdit.system.files import (
    CONFIG,
    EDITABLE,
    INDEX,
    MANIFEST,
    PIPELINE_FILES,
    TRANSFORMER,
    components_named,
    is_artifact,
    is_debris,
    is_there,
    model_folder,
    read_json,
)
from tqdit.system.swap import Place

WEIGHT_FILE = re.compile(r"diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors")
OVERWRITE = "--overwrite, in Python overwrite=True"  # how a user allows it
Kind = Callable[[Path], bool]  # says whether a folder is of some kind


@contextmanager
def replacing(
    target: Path, overwrite: bool = False, replaceable: Kind = is_artifact, in_pipeline: bool = False
) -> Iterator[Path]:
    """Yield a new folder to fill, which becomes `target` on success.

    On any error or interrupt `target` stays as it was. Raises `InputError` as `check_target` does, and if another
    process is writing `target`. A symbolic link to a folder stays; what it points to is replaced. `replaceable`,
    `in_pipeline`: as in `check_target`.
    """
    with reserved(target, replaceable) as place, filled(place, overwrite, replaceable, in_pipeline) as folder:
        yield folder


@contextmanager
def reserved(target: Path, replaceable: Kind = is_artifact) -> Iterator[Place]:
    """Keep other processes from writing `target` while the block runs.

    What a killed process left of `target` is repaired first. `replaceable`: what a folder must be to be put back as
    `target`. Raises `InputError` if another process is writing it, and if it cannot be made.
    """
    _check_link(target)
    target = _real(target)
    check_parent(target)
    with swap.reserved(target, replaceable) as place:
        yield place


def repair(target: Path, replaceable: Kind = is_artifact) -> None:
    """Repair what a killed run left of `target`, as `reserved` does; called before any work."""
    with reserved(target, replaceable):
        pass


@contextmanager
def filled(
    place: Place, overwrite: bool = False, replaceable: Kind = is_artifact, in_pipeline: bool = False
) -> Iterator[Path]:
    """Do as `replacing` for a target that is reserved already."""

    def check() -> None:  # checked again at the end: hours may have passed
        check_target(place.target, overwrite, replaceable, in_pipeline)

    check()
    with place.filled(check) as folder:
        yield folder


def check_target(target: Path, overwrite: bool, replaceable: Kind = is_artifact, in_pipeline: bool = False) -> None:
    """Raise `InputError` if a folder `target` cannot be written, or would lose something; called before any work.

    `replaceable`: whether a folder that is not empty may be overwritten, if it has a model's own files alone.
    `in_pipeline`: whether `target` may be a transformer of a pipeline.
    """
    _check_link(target)
    target = _real(target)
    if target.exists() and not target.is_dir():
        raise InputError(f"output {target} is a file; an artifact is a folder")
    if target.exists() and not overwrite:
        raise InputError(f"output {target} exists; choose another folder, or overwrite it ({OVERWRITE})")
    if target.is_dir() and any(target.iterdir()):
        if not replaceable(target):
            kind = "an artifact" if replaceable is is_artifact else "of the kind that is written here"
            raise InputError(f"output {target} is not {kind}; refusing to overwrite it")
        if foreign := foreign_file(target):
            raise InputError(f"{target} has '{foreign}', which is no part of the model and would be lost; move it")
    if target.is_mount():
        raise InputError(f"output {target} is a mount point, which cannot be replaced; choose a folder inside it")
    part = in_pipeline and target.name.startswith(TRANSFORMER)  # some pipelines have a transformer_2
    check_outside(target.parent if part else target)
    check_parent(target)


def check_outside(target: Path) -> None:
    """Raise `InputError` if a folder or file `target` would be inside an artifact."""
    if around := next((folder for folder in _real(target).parents if is_artifact(folder)), None):
        raise InputError(f"output {target} is inside the artifact {around}; choose a place outside of it")


def check_file(path: Path) -> None:
    """Raise `InputError` if `path` cannot be written as a file; called before any work."""
    if path.is_dir():
        raise InputError(f"output {path} is a folder; give a file")
    if path.exists() and not path.is_file():
        raise InputError(f"output {path} is not a regular file")
    check_outside(path)
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise `InputError` if the nearest parent that exists is no folder, or takes no small file."""
    parent = _nearest(path)
    if not parent.is_dir():
        raise InputError(f"output {path} cannot be made: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent) as file:  # it has no name where the file system allows that
            file.write(bytes(4096))
    except OSError as error:
        raise InputError(f"output {path} cannot be made: {parent} is not writable ({error.strerror})") from None


def check_space(target: Path, needed: int) -> None:
    """Raise `InputError` if the disk of an output has less than `needed` bytes free; called before any work."""
    parent = _nearest(target)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise InputError(
            f"output {target} takes about {needed / 1e6:.1f} MB, and {parent} has {free / 1e6:.1f} MB free"
        )


def foreign_file(folder: Path) -> str | None:
    """Return the first file in a model's folder that replacing the model would lose: it is not the model's own.

    What people edit in such a folder is kept, see `model_card`.
    """
    model = model_folder(folder)
    own = {folder / name for name in PIPELINE_FILES}
    for root in {folder, model}:
        own |= {root / name for name in (CONFIG, MANIFEST, INDEX, *EDITABLE)}
        own |= {path for path in root.glob("*") if WEIGHT_FILE.fullmatch(path.name)}
        own |= {root / name for name in _sealed(root / MANIFEST)}
    own |= set((folder / "vae").glob("*.safetensors"))
    if not is_there(folder / MANIFEST):  # else the folder's seal lists the components
        for name in components_named(folder):
            own |= {folder / name, *(folder / name).rglob("*")}
    files = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    foreign = (path.relative_to(folder) for path in files if path not in own)
    return next((path.as_posix() for path in foreign if not is_debris(path)), None)


def _sealed(manifest: Path) -> list[str]:
    """Return the names that a seal lists, and none where the seal cannot be read."""
    try:
        names = read_json(manifest).get("files")
    except InputError:
        return []
    return list(names) if isinstance(names, dict) else []


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise InputError(f"output {path} is a symbolic link to nothing; remove it or choose another folder")


def _real(path: Path) -> Path:
    """Return a path without symbolic links, as `Path.resolve` does, but a circle of links is no error."""
    return Path(os.path.realpath(path))


def _nearest(path: Path) -> Path:
    """Return the nearest parent that exists."""
    return next(p for p in path.absolute().parents if p.exists() or p.is_symlink())
