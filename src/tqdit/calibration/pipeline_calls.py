"""Define a recording: the calls of each transformer of a pipeline, in memory, in a file or in a folder."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn

from tqdit.calibration import call_file
from tqdit.calibration.called import same_module
from tqdit.calibration.calls import Calls
from tqdit.errors import InputError
from tqdit.system import swap
from tqdit.system.outputs import OVERWRITE, check_outside, check_parent

TRANSFORMER = "transformer"  # the name of a model that is no part of a pipeline, and of most pipelines' models
SUFFIX = ".safetensors"  # of the files in a folder


class Recording(Mapping[str, Calls]):
    """The calls of each transformer of a pipeline, by the name of the component; Wan 2.2 has two transformers."""

    def __init__(self, calls: Mapping[str, Calls], modules: Mapping[str, nn.Module] | None = None) -> None:
        self._calls = dict(calls)
        self._modules = {name: weakref.ref(same_module(module)) for name, module in (modules or {}).items()}

    def __getitem__(self, name: str) -> Calls:
        return self._calls[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"Recording({self._calls})"

    def fill(self, calls: Mapping[str, Calls]) -> None:
        """Take in the calls by component, once they are complete."""
        self._calls |= calls

    def of(self, module: nn.Module) -> Calls:
        """Return the calls of a transformer: those recorded of this very object, else the only ones that suit it.

        Raises `InputError` if none suit it, or those of several components do, and for a transformer that was not
        called while it was recorded: calls of another one may suit it, but be of other times.
        """
        for name, recorded in self._modules.items():
            if recorded() is same_module(module):
                if name not in self:
                    raise InputError(f"the pipeline did not call its {name} while it was recorded")
                return self[name]
        refusals = {name: _refusal(calls, module) for name, calls in self.items()}
        suitable = [name for name, refusal in refusals.items() if refusal is None]
        if len(suitable) > 1:
            raise InputError(f"calls of {', '.join(suitable)} suit this model; say which: recording['{suitable[0]}']")
        if not suitable:
            reason = next(iter(refusals.values()), None)
            raise InputError(reason or "nothing was recorded")
        return self[suitable[0]]

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write one file if there is one component, else a folder with one file for each; whole or not at all.

        Raises `InputError` if something is there, unless `overwrite` is set and it is of the same kind.
        """
        path = Path(path)
        check_output(path, overwrite)
        contents = {name: calls.content(name) for name, calls in self.items()}
        if len(contents) == 1:
            call_file.write(path, *contents.values())
            return
        with (
            swap.reserved(path, _is_recording) as place,
            place.filled(partial(check_output, path, overwrite)) as folder,
        ):
            for name, content in contents.items():
                call_file.write(folder / f"{name}{SUFFIX}", content)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the recording of a file or a folder.

        Raises `InputError` as `Calls.load` does, and for a folder without files of calls.
        """
        path = Path(path)
        files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path} has no {SUFFIX} file of recorded calls")
        found = {file: call_file.read(file) for file in files}
        names = {file: content.component or TRANSFORMER for file, content in found.items()}
        if len(set(names.values())) < len(names):
            raise InputError(f"{path} has two files of calls of the same component")
        return cls({names[file]: Calls.of_content(content, file) for file, content in found.items()})


def read_calls(value: "Calls | Recording | str | Path | Iterable[Mapping[str, Any]]", model: nn.Module) -> Calls:
    """Return the calls of a model, of whichever form a user gives.

    `value`: calls, a recording of the model's pipeline, the path that either was saved to, or the keyword arguments of
    each call. Raises `InputError` as `Calls.check` does, and for a value of another type.
    """
    if isinstance(value, str | Path):
        value = Recording.load(value)
    if isinstance(value, Recording):
        value = value.of(model)
    if isinstance(value, Calls):
        value.check(model)
        return value
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        kind = type(value).__name__
        raise InputError(f"calls must be a recording, the path of one, or a list of keyword arguments, got a {kind}")
    return Calls.of(model, value)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise `InputError` if a recording cannot be written to a path; called before any work."""
    if path.exists() and not overwrite:
        raise InputError(f"output {path} exists; choose another path, or overwrite it ({OVERWRITE})")
    if path.exists() and not _is_recording(path):
        raise InputError(f"output {path} is no recording; refusing to overwrite it")
    check_outside(path)
    check_parent(path)


def _is_recording(path: Path) -> bool:
    if path.is_dir():
        return all(file.suffix == SUFFIX and _is_recording(file) for file in path.iterdir())
    return path.is_file() and call_file.is_calls(path)


def _refusal(calls: Calls, module: nn.Module) -> str | None:
    """Return why calls do not suit a model; None if they do."""
    try:
        calls.check(module)
    except InputError as error:
        return str(error)
    return None
