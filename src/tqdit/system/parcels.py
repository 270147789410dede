"""Named tensors as one tensor of bytes: to travel between processes, or to be kept as one piece of memory."""

from collections.abc import Mapping
from itertools import accumulate

import torch

Named = Mapping[str, torch.Tensor]
Form = list[tuple[str, torch.Size, torch.dtype]]  # name, shape and dtype of each tensor of a `Named`
ALIGNMENT = 64  # bytes, as torch aligns its own tensors
STAGE = 64 << 20  # bytes of pinned memory on the way from a GPU


def form(tensors: Named) -> Form:
    """Return the name, shape and dtype of each tensor, which `unpacked` needs."""
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def length(form: Form) -> int:
    """Return the bytes of a parcel."""
    return _offsets(form)[-1]


def pack(flat: torch.Tensor, tensors: Named) -> None:
    """Write tensors into a parcel; the bytes between the tensors stay as they are."""
    for place, tensor in zip(unpacked(flat, form(tensors)).values(), tensors.values(), strict=True):
        place.copy_(tensor)


def unpacked(flat: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """Return the tensors of a parcel, as views of it."""
    found = {}
    for start, (name, shape, dtype) in zip(_offsets(form), form, strict=False):  # the last offset is the end
        found[name] = flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
    return found


def copied(tensors: Named) -> dict[str, torch.Tensor]:
    """Copy tensors to the CPU into one piece of memory, to outlive the tensors among which they were made.

    Small tensors that stay where large ones come and go are fences in the C library's heap: it neither fits the next
    large ones between them nor gives those gaps back to the system.
    """
    flat = torch.empty(length(form(tensors)), dtype=torch.uint8, device=home(tensors))
    pack(flat, tensors)
    return unpacked(on_host(flat) if flat.is_cuda else flat, form(tensors))


def on_cpu(tensors: Named) -> Named:
    """Return tensors on the CPU: copied as `copied` does if any is on a GPU, else as they are."""
    return copied(tensors) if home(tensors).type == "cuda" else tensors


def home(*parcels: Named) -> torch.device:
    """Return the GPU that any of the tensors is on, else the CPU."""
    found = (tensor.device for tensors in parcels for tensor in tensors.values() if tensor.is_cuda)
    return next(found, torch.device("cpu"))


def on_host(flat: torch.Tensor) -> torch.Tensor:
    """Copy a parcel of a GPU into ordinary memory, by way of a small buffer that the GPU can write to."""
    found = torch.empty_like(flat, device="cpu")
    stage = torch.empty(min(STAGE, len(flat)), dtype=torch.uint8, pin_memory=flat.is_cuda)
    for part, source in zip(found.split(STAGE), flat.split(STAGE), strict=True):
        part.copy_(stage[: len(part)].copy_(source))
    return found


def _offsets(form: Form) -> list[int]:
    """Return where each tensor of a parcel begins, and the end of the parcel."""
    sizes = [shape.numel() * dtype.itemsize for _, shape, dtype in form]
    return list(accumulate((size + -size % ALIGNMENT for size in sizes), initial=0))
