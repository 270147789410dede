"""Hold equal tensors once, in memory or in a folder."""

import weakref
from pathlib import Path

import torch
from safetensors.torch import load_file

from tqdit.calibration.call_values import digest, on_cpu
from tqdit.system.files import write_tensors

NAME = "tensor"  # of the one tensor in each file of a folder


class Held:
    """Copies of tensors on the CPU; tensors of equal dtype, shape and values share one.

    With a `folder`, each copy is a safetensors file there, named by its sha256, and mapped: what is not in use takes no
    memory. A copy that nobody refers to any more is forgotten.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: weakref.WeakValueDictionary[str, torch.Tensor] = weakref.WeakValueDictionary()
        self._written: set[str] = set()
        self._new: set[str] = set()  # of those, the files that were not there before
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the copy of a tensor, made now unless there is an equal one."""
        copy = on_cpu(tensor)
        key = digest(copy)
        found = self._held.get(key)
        if found is None:
            found = self._held[key] = self._on_disk(key, copy)
        return found

    def sweep(self, everything: bool = False) -> None:
        """Remove the files that were made here of copies that nobody refers to any more, or all of them.

        A file that was there before may be of another recording, and stays.
        """
        for key in self._new - (set() if everything else set(self._held.keys())):
            self._path(key).unlink(missing_ok=True)
            self._new.discard(key)
            self._written.discard(key)

    def _on_disk(self, key: str, copy: torch.Tensor) -> torch.Tensor:
        if self._folder is None or not copy.numel():
            return copy
        if key not in self._written:
            if not self._path(key).exists():
                self._new.add(key)
            write_tensors(self._path(key), {NAME: copy})
            self._written.add(key)
        return load_file(self._path(key))[NAME]

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.safetensors"
