"""Fresh memory that is not zero by luck."""

import torch


class PoisonedTorch:
    """torch, but that its fresh memory is rubbish: what a kernel does not write shows."""

    @staticmethod
    def empty(*shape, dtype=torch.float32, device=None):
        size = shape[0] if isinstance(shape[0], tuple) else shape
        return torch.full(size, 77 if dtype is torch.int8 else float("nan"), dtype=dtype, device=device)

    @staticmethod
    def empty_like(x):
        return torch.full_like(x, float("nan"))

    def __getattr__(self, name):
        return getattr(torch, name)
