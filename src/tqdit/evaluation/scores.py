"""Scores as pure functions of features [N, D]: Fréchet distance, kernel distance, precision, recall, Inception score.

Under the Inception network the first two are the FID and the KID of papers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tqdit.errors import InputError
from tqdit.evaluation.moments import Gaussian
from tqdit.quality import features
from tqdit.quality.kid import kid

NEIGHBOURS = 3  # k of precision and recall
SUBSET = 1000  # images of a subset of the kernel distance
SUBSET_SEED = 0
SPLIT = 5000  # images of a split of the Inception score
ROWS = 2000  # rows of a block of distances
SAME = 1e-6  # squared distances below this share of the squared norms are rounding: the points are the same


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in squared feature units.

    The eigenvalues of C1 C2 are those of the symmetric L^T C2 L with C1 = L L^T, so no root of a general matrix is
    taken and nothing is complex. Where both covariances are singular (fewer images than features, or a feature that is
    always 0), L is the symmetric root instead of Cholesky's factor. Source: Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017.
    """
    for one, other in ((first, second), (second, first)):
        factor, failed = torch.linalg.cholesky_ex(one.covariance)
        if not failed:
            product = factor.T @ other.covariance @ factor
            cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
            traces = one.covariance.trace() + other.covariance.trace()
            return max(0.0, float((one.mean - other.mean).square().sum() + traces - 2 * cross))
    return features.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


@dataclass(frozen=True)
class KernelDistance:
    """The mean over disjoint subsets, and its standard error; None for a single subset."""

    mean: float
    standard_error: float | None
    subsets: int
    subset: int


def kernel_distance(real: Tensor, drawn: Tensor, subset: int = SUBSET, seed: int = SUBSET_SEED) -> KernelDistance:
    """Return the unbiased squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, in float64.

    Both sets are shuffled by `seed` and divided into subsets of `subset` rows, as many as both sets have. Subsets
    share no row, so their spread gives an honest standard error. Sets with fewer rows are one subset. Source: Binkowski
    et al., "Demystifying MMD GANs", 2018; the estimate may be negative.
    """
    size = min(subset, len(real), len(drawn))
    if size < 2:
        raise InputError(f"the kernel distance needs at least 2 images of each set, got {size}")
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(rows), generator=generator) for rows in (real, drawn)]
    count = min(len(real), len(drawn)) // size
    values = []
    for start in range(0, count * size, size):
        x, y = (rows[order[start : start + size]] for rows, order in zip((real, drawn), orders, strict=True))
        values.append(kid(x, y))
    found = torch.tensor(values, dtype=torch.float64)
    error = float(found.std() / count**0.5) if count > 1 else None
    return KernelDistance(float(found.mean()), error, count, size)


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Return the fraction of drawn images within the manifold of real ones, and of real ones within that of drawn ones.

    A manifold is the union of balls around its points, each as wide as the distance to the point's k-th nearest
    neighbour in its own set. Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
    Generative Models", 2019. Distances are fp32 of features whose common mean is taken off; two blocks are in memory at
    a time. Raises `InputError` for sets with no more than `neighbours` images.
    """
    for name, rows in (("reference", real), ("samples", drawn)):
        if len(rows) <= neighbours:
            raise InputError(f"precision and recall need more than {neighbours} images, the {name} have {len(rows)}")
    centre = real.double().mean(0)
    real, drawn = ((rows.double() - centre).float() for rows in (real, drawn))
    real_radii, drawn_radii = squared_radii(real, neighbours), squared_radii(drawn, neighbours)
    precise = torch.zeros(len(drawn), dtype=torch.bool, device=drawn.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for some in _blocks(len(drawn)):
        for others in _blocks(len(real)):
            distances = squared_distances(drawn[some], real[others])
            precise[some] |= (distances <= real_radii[others]).any(1)
            recalled[others] |= (distances <= drawn_radii[some, None]).any(0)
    return float(precise.double().mean()), float(recalled.double().mean())


def squared_radii(points: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Return the squared distance [N] of each point to its k-th nearest other point.

    Distances are symmetric, so a block above the diagonal serves its rows and its columns.
    """
    nearest = torch.full((len(points), neighbours), torch.inf, dtype=points.dtype, device=points.device)

    def add(rows: slice, distances: Tensor) -> None:
        found = distances.topk(min(neighbours, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], found], 1).topk(neighbours, largest=False).values

    for rows in _blocks(len(points)):
        for columns in _blocks(len(points)):
            if columns.start < rows.start:
                continue
            distances = squared_distances(points[rows], points[columns])
            if rows == columns:
                distances.fill_diagonal_(torch.inf)  # a point is no neighbour of its own
            else:
                add(columns, distances.T)
            add(rows, distances)
    return nearest.amax(1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x_i - y_j|^2 of rows [M, D] and [N, D], as [M, N]; 0 where rounding cannot tell two points apart."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.where(distances > SAME * norms, 0.0)


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]


class InceptionScore:
    """The Inception score of probabilities that come block by block: exp of the mean of KL(p(y | x), p(y)).

    Images are divided into consecutive splits of 5,000, as ADM's evaluator does; the score is the mean over splits, the
    last of which may be smaller. Source: Salimans et al., "Improved Techniques for Training GANs", 2016.
    """

    def __init__(self, split: int = SPLIT) -> None:
        self.split = split
        self._scores: list[float] = []
        self._count, self._negentropy, self._total = 0, 0.0, torch.zeros(0, dtype=torch.float64)

    def add(self, probabilities: Tensor) -> None:
        """Add the probabilities [N, classes] of the next images."""
        left = probabilities.double()
        while len(left):
            part, left = left.tensor_split([self.split - self._count])
            self._total = part.sum(0) if self._count == 0 else self._total + part.sum(0)
            self._negentropy += float(torch.special.xlogy(part, part).sum())
            self._count += len(part)
            if self._count == self.split:
                self._scores.append(self._of_split())
                self._count, self._negentropy = 0, 0.0

    def _of_split(self) -> float:
        marginal = self._total / self._count
        return float((self._negentropy / self._count - torch.special.xlogy(marginal, marginal).sum()).exp())

    @property
    def value(self) -> float:
        """Return the score of all images that were added."""
        scores = [*self._scores, self._of_split()] if self._count else self._scores
        return sum(scores) / len(scores)
