"""Mean and covariance of features, block by block, so that no more than one block has to be in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tqdit.errors import InputError


@dataclass(frozen=True)
class Moments:
    """The number of rows, their mean [D], and the sum of outer products of their deviations [D, D], in float64.

    `merged` joins two of them (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1982). A result depends on the division into blocks by rounding alone, about 1e-15 relative to
    the variances; the same blocks in the same order give the same bits.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Return the moments of a block of features [N, D], on their device."""
        rows = features.double()
        mean = rows.mean(0)
        centred = rows - mean
        return cls(len(rows), mean, centred.T @ centred)

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of the rows of both."""
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance [D, D]. Raises `InputError` for fewer than two rows."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, got {self.count}")
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Gaussian:
    """The mean [D] and the covariance [D, D] that a set of features is summarized by, in float64."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, moments: Moments) -> "Gaussian":
        """Return the Gaussian with the mean and the unbiased covariance of some rows."""
        return cls(moments.mean, moments.covariance)


def joined(first: Moments | None, second: Moments) -> Moments:
    """Return the moments of both, where there may be no first one yet."""
    return second if first is None else first.merged(second)
