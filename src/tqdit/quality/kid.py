"""Measure how much farther one set of features is from the real one than another set, block by block.

Features are tensors [N, D] of any classifier, on one device; images with the same index have the same seed and label.
"""

import torch
from torch import Tensor

from tqdit.errors import InputError
from tqdit.quality.features import frechet_distance


def check_features(blocks: int, **sets: Tensor) -> None:
    """Raise `InputError` naming the first set that is not finite features [N, D], or whose N does not suit `blocks`.

    N must be a multiple of the blocks, with at least two rows a block; D must be the same for every set.
    """
    if blocks < 2:
        raise InputError(f"a standard error needs at least 2 blocks, got {blocks}")
    widths = {tuple(features.shape[1:]) for features in sets.values()}
    for name, features in sets.items():
        if features.ndim != 2 or not features.is_floating_point():
            raise InputError(f"{name} must be features of shape [N, D], got {features.dtype} {list(features.shape)}")
        if len(features) % blocks or len(features) < 2 * blocks:
            raise InputError(
                f"{name} has {len(features)} rows; {blocks} blocks need a multiple of {blocks}, at least {2 * blocks}"
            )
        if not features.isfinite().all():
            raise InputError(f"{name} has features that are NaN or Inf")
    if len(widths) > 1:
        raise InputError(f"features of {', '.join(sets)} have different widths: {sorted(w for (w,) in widths)}")


def kid(x: Tensor, y: Tensor) -> float:
    """Return the kernel inception distance of two sets of features, [M, D] and [N, D]: 0 in the mean for equal laws.

    This is the unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, in float64 (Binkowski et
    al., "Demystifying MMD GANs", 2018). It may be negative.
    """
    x, y = x.double(), y.double()
    within = _mean_of_pairs(x) + _mean_of_pairs(y)
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(x: Tensor) -> Tensor:
    """Return the mean of the kernel over all pairs of different rows."""
    values = _kernel(x, x)
    return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))


def kid_differences(candidate: Tensor, reference: Tensor, real: Tensor, blocks: int) -> Tensor:
    """Return KID(candidate_k, real_k) - KID(reference_k, real_k) of every block k, float64 [blocks], on the CPU.

    Blocks are equal runs of consecutive rows and share no row. A block of `real` may have another number of rows.
    """
    check_features(blocks, candidate=candidate, reference=reference, real=real)
    parts = zip(*(features.chunk(blocks) for features in (candidate, reference, real)), strict=True)
    return torch.tensor([kid(x, r) - kid(y, r) for x, y, r in parts], dtype=torch.float64)


def frechet_replicates(candidate: Tensor, reference: Tensor, real: Tensor, blocks: int) -> tuple[float, Tensor]:
    """Return the difference of Frechet distances over all rows, and without each block, float64 [blocks].

    The difference is FD(candidate, real) - FD(reference, real). A block is left out of all three sets at a time.
    """
    check_features(blocks, candidate=candidate, reference=reference, real=real)
    centre = real.double().mean(0)
    sets = [_Moments(features.double() - centre, blocks) for features in (candidate, reference, real)]

    def difference(without: int | None) -> float:
        ours, other, target = (moments.gaussian(without) for moments in sets)
        return frechet_distance(*target, *ours) - frechet_distance(*target, *other)

    return difference(None), torch.tensor([difference(k) for k in range(blocks)], dtype=torch.float64)


class _Moments:
    """Sums and sums of products of every block: a set without one block has the sums without that block's."""

    def __init__(self, features: Tensor, blocks: int) -> None:
        parts = features.chunk(blocks)
        self.count, self.block = len(features), len(parts[0])
        self.sums = torch.stack([part.sum(0) for part in parts])
        self.products = torch.stack([part.T @ part for part in parts])

    def gaussian(self, without: int | None) -> tuple[Tensor, Tensor]:
        """Return the mean and the unbiased covariance of all rows but those of a block, if one is given."""
        total, products, count = self.sums.sum(0), self.products.sum(0), self.count
        if without is not None:
            total, products = total - self.sums[without], products - self.products[without]
            count -= self.block
        mean = total / count
        return mean, (products - count * torch.outer(mean, mean)) / (count - 1)
