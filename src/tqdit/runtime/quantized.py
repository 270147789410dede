"""The members that every quantized model has beside those of diffusers' own class: loading, saving, its identity."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import convert_file_size_to_int
from torch import nn

from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import write_card
from tqdit.errors import InputError
from tqdit.ops.modules import HOOK
from tqdit.spec import Solution
from tqdit.system.isolation import isolated
from tqdit.system.outputs import replacing

LOCK = threading.Lock()  # held while a model is laid out for another kind of device


class SameAsDiffusers(type):
    """A metaclass that makes a class equal to diffusers' own class.

    Pipelines compare the class of a part with the class that they expect.
    """

    original: type

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.original

    def __hash__(cls) -> int:
        return hash(cls.original)


class QuantizedModel:
    """A model that is a diffusers class, holds a solution, and is saved as an artifact."""

    solution: Solution  # with the codes of the layers
    original: type[Any]  # diffusers' class
    site_kernels: Mapping[str, str]  # site -> kernel, whatever has run
    deviating: Callable[[], str] | None  # of the backend: what to add to the names of attention's kernels

    @property
    def quantization_report(self) -> dict[str, str]:
        """Return the kernel of each site, by the site's name.

        Where calls in this process, of any model, had codes of attention that are not the reference's but within a
        bound, the kernels of attention name the sizes.
        """
        added = self.deviating() if self.deviating else ""
        attention = ".scores[", ".values["
        return {
            site: f"{kernel[:-1]}{added}]" if any(part in kernel for part in attention) else kernel
            for site, kernel in self.site_kernels.items()
        }

    def card(self, size_bytes: int) -> str:
        """Return the model card of an artifact of this model, whose weight files have so many bytes."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Call diffusers' own `from_pretrained`: the folder's content decides the class of the model."""
        return cls.original.from_pretrained(*arguments, **options)

    @classmethod
    def from_config(cls, *arguments: Any, **options: Any) -> Any:
        """Call diffusers' own `from_config`, which makes a float model."""
        return cls.original.from_config(*arguments, **options)

    @isolated()
    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write an artifact that `from_pretrained` and tqdit read.

        The artifact is written as a whole or not at all, unlike diffusers' own. A model that the folder has is
        replaced. To push a model, call `push_to_hub`.

        Raises `InputError` for a folder with anything else in it, for options that an artifact does not have (pickled
        weights, variants), and for a model whose scales, zero points or biases are no longer those of its solution.
        """
        refused = {"safe_serialization=False": not safe_serialization, f"variant='{variant}'": variant is not None,
                   "push_to_hub=True": push_to_hub}  # fmt: skip
        for name, given in refused.items():
            if given:
                raise InputError(f"save_pretrained of an integer model does not support {name}")
        if is_main_process:
            cast(Any, self.solution.codes).check_unchanged(self.solution)
            target = Path(save_directory)
            artifact.check_replaceable(target)
            most = None if max_shard_size is None else convert_file_size_to_int(max_shard_size)
            with replacing(target, overwrite=True, in_pipeline=True) as folder:
                artifact.write(self.solution, folder, most)
                write_card(folder, self.card(artifact.size_bytes(folder)), target)
            artifact.unseal_pipeline(target)


def offloading(model: nn.Module) -> AlignDevicesHook | None:
    """Return the first of accelerate's hooks that sends tensors away, or None."""
    for module in model.modules():
        hook = module.__dict__.get(HOOK)
        for part in getattr(hook, "hooks", (hook,)):
            if isinstance(part, AlignDevicesHook) and part.offload:
                return part
    return None
