"""Prompts as their text embeddings, which a text encoder made before: the conditions of a text-to-image model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tqdit.errors import InputError
from tqdit.sampling.guidance import Conditions
from tqdit.system.files import read_tensors

EMBEDS, MASK = "prompt_embeds", "prompt_attention_mask"  # named as the arguments of diffusers' pipelines
NULL_EMBEDS, NULL_MASK = "negative_prompt_embeds", "negative_prompt_attention_mask"
REQUIRED = (EMBEDS, MASK, NULL_EMBEDS, NULL_MASK)
SIZES: Mapping[str, int] = {"resolution": 2, "aspect_ratio": 1}  # columns; of a model that is told the image's size
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WHOLE = (torch.bool, torch.uint8, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Prompts:
    """P prompts of L tokens, and the unconditional prompt of guidance, for diffusers' PixArt transformers.

    embeds (P, L, D) and null_embeds (1, L, D) are of any float dtype; mask (P, L) and null_mask (1, L) are int64, with
    1 at the tokens that count. `sizes` has "resolution" (1, 2) and "aspect_ratio" (1, 1), fp32, or None for a model
    that is told neither.

    Example: `Prompts.read("prompts.safetensors")`.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    null_embeds: torch.Tensor
    null_mask: torch.Tensor
    sizes: Mapping[str, torch.Tensor | None]

    @classmethod
    def read(cls, path: str | Path) -> "Prompts":
        """Return the prompts of a safetensors file whose tensors are named as diffusers' pipeline arguments.

        The names are prompt_embeds (P, L, D), prompt_attention_mask (P, L), negative_prompt_embeds (1 or P, L, D),
        negative_prompt_attention_mask (1 or P, L), and optionally resolution (1 or P, 2) and aspect_ratio (1 or P, 1).
        Where P rows are given for what has one, they must be equal. Raises `InputError` naming the file and the
        tensor that is missing, unknown, of another shape or dtype, or not finite.
        """
        try:
            return cls.checked(read_tensors(Path(path)))
        except InputError as error:
            text = str(error)
            raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from None

    @classmethod
    def checked(cls, tensors: Mapping[str, torch.Tensor]) -> "Prompts":
        """Return the prompts of named tensors. Raises `InputError` as `read` does, without a file."""
        _check_names(tensors)
        embeds = _floats(EMBEDS, tensors[EMBEDS])
        if embeds.ndim != 3 or 0 in embeds.shape:
            raise InputError(f"'{EMBEDS}' has shape {tuple(embeds.shape)}, it needs (prompts, tokens, channels)")
        count, length, width = embeds.shape
        null = _one_row(NULL_EMBEDS, _floats(NULL_EMBEDS, tensors[NULL_EMBEDS]), count, (length, width))
        null_mask = _one_row(NULL_MASK, _mask(NULL_MASK, tensors[NULL_MASK]), count, (length,))
        mask = _mask(MASK, tensors[MASK])
        if mask.shape != (count, length):
            raise InputError(f"'{MASK}' has shape {tuple(mask.shape)}, it needs {(count, length)}")
        for name, given in ((MASK, mask), (NULL_MASK, null_mask)):
            if not bool(given.any(1).all()):
                raise InputError(f"'{name}' leaves no token of prompt {int((given.sum(1) == 0).nonzero()[0])}")
        return cls(embeds, mask, null, null_mask, _sizes(tensors, count))

    @property
    def count(self) -> int:
        return len(self.embeds)

    def rows(self, indices: torch.Tensor) -> dict[str, Any]:
        """Return the keyword arguments of `PixArtTransformer2DModel` for these prompts; embeddings are fp32."""
        chosen = indices.cpu()
        return self._arguments(self.embeds[chosen], self.mask[chosen], indices.device)

    def null(self, count: int, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments for `count` samples of the unconditional prompt."""
        embeds, mask = self.null_embeds, self.null_mask
        return self._arguments(embeds.expand(count, -1, -1), mask.expand(count, -1), device)

    def _arguments(self, embeds: torch.Tensor, mask: torch.Tensor, device: torch.device) -> dict[str, Any]:
        sizes = {
            name: None if size is None else size.expand(len(embeds), -1).to(device) for name, size in self.sizes.items()
        }
        return {
            "encoder_hidden_states": embeds.to(device, torch.float32),
            "encoder_attention_mask": mask.to(device),
            "added_cond_kwargs": sizes,
        }


def read_conditions(given: Any) -> Conditions | None:
    """Return the conditions that a user gives: `Prompts` or the like as they are, a path as the prompts of its file.

    None stays None. Raises `InputError` for anything else, and as `Prompts.read` does.
    """
    if isinstance(given, str | Path):
        return Prompts.read(given)
    methods = all(callable(getattr(given, name, None)) for name in ("rows", "null"))
    if isinstance(given, type) or not (given is None or (methods and type(getattr(given, "count", None)) is int)):
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        raise InputError(f"conditions are Prompts, the path of their file, ClassLabels or like them, got {kind}")
    return given


def _check_names(tensors: Mapping[str, torch.Tensor]) -> None:
    known = (*REQUIRED, *SIZES)
    if unknown := sorted(tensors.keys() - set(known)):
        raise InputError(f"unknown tensor '{unknown[0]}'; legal are {', '.join(known)}")
    if missing := [name for name in REQUIRED if name not in tensors]:
        raise InputError(f"tensor '{missing[0]}' is missing; needed are {', '.join(REQUIRED)}")
    if len(given := [name for name in SIZES if name in tensors]) == 1:
        raise InputError(f"'{given[0]}' is given alone; a model is told {' and '.join(SIZES)}, or neither")


def _floats(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in FLOATS:
        raise InputError(f"'{name}' has dtype {_named(tensor.dtype)}, legal are {_named(*FLOATS)}")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"'{name}' has NaN or Inf values")
    return tensor


def _mask(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in (*WHOLE, *FLOATS):
        raise InputError(f"'{name}' has dtype {_named(tensor.dtype)}, legal are {_named(*WHOLE, *FLOATS)}")
    if not bool(((tensor == 0) | (tensor == 1)).all()):
        raise InputError(f"'{name}' has values other than 0 and 1")
    return tensor.long()


def _one_row(name: str, tensor: torch.Tensor, count: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the row (1, *shape) of what is the same for all prompts."""
    if tensor.shape not in ((1, *shape), (count, *shape)):
        raise InputError(f"'{name}' has shape {tuple(tensor.shape)}, it needs {(1, *shape)} or {(count, *shape)}")
    if not bool((tensor == tensor[:1]).all()):
        raise InputError(f"'{name}' has rows that differ; it is the same for all prompts")
    return tensor[:1]


def _sizes(tensors: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor | None]:
    if not SIZES.keys() <= tensors.keys():
        return dict.fromkeys(SIZES)
    return {
        name: _one_row(name, _floats(name, tensors[name]), count, (columns,)).float() for name, columns in SIZES.items()
    }


def _named(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
