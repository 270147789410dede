"""Named tensors as one tensor of bytes: to travel between processes, or to be kept as one piece of memory."""

from collections.abc import Mapping
from itertools import accumulate

import torch

Named = Mapping[str, torch.Tensor]
Form = list[tuple[str, torch.Size, torch.dtype]]  # what a `Named` looks like
ALIGNMENT = 64  # bytes, as torch aligns its own tensors
STAGE = 64 << 20  # bytes of pinned memory on the way from a GPU


def form(tensors: Named) -> Form:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def length(form: Form) -> int:
    """Bytes of a parcel."""
    return _offsets(form)[-1]


def pack(flat: torch.Tensor, tensors: Named) -> None:
    """Write tensors into a parcel; what lies between them is left as it is."""
    for place, tensor in zip(unpacked(flat, form(tensors)).values(), tensors.values(), strict=True):
        place.copy_(tensor)


def unpacked(flat: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """The tensors of a parcel, as views of it."""
    found = {}
    for start, (name, shape, dtype) in zip(_offsets(form), form, strict=False):  # the last offset is the end
        found[name] = flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
    return found


def copied(tensors: Named) -> dict[str, torch.Tensor]:
    """Copies on the CPU that share one piece of memory, for what outlives the tensors among which it was made.

    Small tensors that stay where large ones come and go are fences in the C library's heap: it neither fits the next
    large ones between them nor gives those gaps back to the system.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    flat = torch.empty(length(form(tensors)), dtype=torch.uint8, device=device)
    pack(flat, tensors)
    return unpacked(on_host(flat) if device else flat, form(tensors))


def on_host(flat: torch.Tensor) -> torch.Tensor:
    """A copy of a parcel of a GPU in ordinary memory, by way of a little that the GPU can write to itself."""
    found = torch.empty_like(flat, device="cpu")
    stage = torch.empty(min(STAGE, len(flat)), dtype=torch.uint8, pin_memory=flat.is_cuda)
    for part, source in zip(found.split(STAGE), flat.split(STAGE), strict=True):
        part.copy_(stage[: len(part)].copy_(source))
    return found


def _offsets(form: Form) -> list[int]:
    """Where each tensor of a parcel begins, and the end."""
    sizes = [shape.numel() * dtype.itemsize for _, shape, dtype in form]
    return list(accumulate((size + -size % ALIGNMENT for size in sizes), initial=0))
