"""Read and keep the files of kernels' configurations: the committed one of a GPU, and that of this machine."""

import contextlib
import functools
import json
import os
import tempfile
import warnings
from pathlib import Path

import triton

from tqdit.backends.triton.layouts import Config
from tqdit.system.files import write_text

TUNED = Path(__file__).with_name("tuned")
# GPUs that take the configurations of another one until they have their own: as many multiprocessors of the same kind.
LIKE = {"NVIDIA H100 80GB HBM3": "NVIDIA H200"}
OLDEST = 9  # numbers of a configuration in the oldest files; missing numbers have their defaults


@functools.cache
def table(gpu: str) -> dict[str, Config]:
    """Return the configurations of a GPU by kernel and shape: the committed ones, and those timed here."""
    committed = tuned_file(TUNED, gpu)
    if not committed.exists() and gpu in LIKE:
        committed = tuned_file(TUNED, LIKE[gpu])
    return read(cache_file(gpu)) | read(committed)


def read(path: Path) -> dict[str, Config]:
    """Return the configurations in a file.

    A damaged file is ignored, with a warning, and written anew in time.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        return {str(key): _config(numbers) for key, numbers in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is damaged and ignored: {error}", stacklevel=2)
        return {}


def _config(numbers: object) -> Config:
    if not isinstance(numbers, list) or not OLDEST <= len(numbers) <= len(Config._fields):
        raise ValueError(f"not a configuration: {numbers}")
    limit = Config._fields.index("registers")
    if any(type(n) is not int and not (i == limit and n is None) for i, n in enumerate(numbers)):
        raise ValueError(f"not a configuration: {numbers}")
    return Config(*numbers)


def keep(gpu: str, key: str, config: Config) -> None:
    """Add a configuration to the user's file.

    Where the folder cannot be written to, the next process spends the time again.
    """
    path = cache_file(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = {name: list(found) for name, found in read(path).items()} | {key: list(config)}
    with contextlib.suppress(OSError):
        write_text(path, json.dumps({"configurations": kept}, indent=1) + "\n")


def cache_file(gpu: str) -> Path:
    """Return the file of this machine, which has what was timed here on a GPU: in the user's cache, or TQDIT_CACHE."""
    folder = os.environ.get("TQDIT_CACHE")
    try:
        base = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "tqdit")
    except RuntimeError:  # a user without a home
        base = Path(tempfile.gettempdir()) / "tqdit"
    return base / f"triton-{triton.__version__}-{_slug(gpu)}.json"


def tuned_file(folder: Path, gpu: str) -> Path:
    """Return the file of a GPU's configurations in a folder."""
    return folder / f"{_slug(gpu)}.json"


def _slug(gpu: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in gpu.lower())
