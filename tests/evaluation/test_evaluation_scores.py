"""Scores against closed forms and against plain numpy, which shares no code with them."""

import numpy as np
import pytest
import torch

from tqdit.errors import InputError
from tqdit.evaluation import scores
from tqdit.evaluation.moments import Gaussian, Moments, joined
from tqdit.evaluation.scores import InceptionScore, frechet_distance, kernel_distance, precision_recall


def rows(count: int, width: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def gaussian(mean: list[float], covariance: torch.Tensor) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), covariance.double())


# Moments and the Fréchet distance ------------------------------------------------------------------------------------


def test_moments_of_blocks_are_those_of_all_rows() -> None:
    features = rows(103, 5, shift=1000.0)  # a mean far from 0, where sums of squares would lose digits
    found = None
    for block in features.split([1, 50, 2, 50]):
        found = joined(found, Moments.of(block))
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(found.mean.numpy(), features.double().numpy().mean(0), rtol=1e-14)
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        _ = Moments.of(features[:1]).covariance
    pair = Moments.of(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert Gaussian.of(pair).covariance.tolist() == [[2, 4], [4, 8]]


def test_the_distance_of_gaussians_with_a_closed_form() -> None:
    first = gaussian([0, 0, 1], torch.diag(torch.tensor([4.0, 9.0, 1.0])))
    second = gaussian([3, 4, 1], torch.diag(torch.tensor([1.0, 4.0, 1.0])))
    assert frechet_distance(first, second) == pytest.approx(25 + 1 + 1, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)
    turn = torch.linalg.qr(rows(3, 3).double()).Q  # the same turn of both changes nothing
    turned = [Gaussian(turn @ g.mean, turn @ g.covariance @ turn.T) for g in (first, second)]
    assert frechet_distance(*turned) == pytest.approx(27, rel=1e-12)


def test_the_distance_of_singular_gaussians() -> None:
    """Fewer images than features, on both sides: Cholesky's factor does not exist."""
    first = gaussian([0, 0, 0], torch.diag(torch.tensor([4.0, 1.0, 0.0])))
    second = gaussian([1, 0, 0], torch.diag(torch.tensor([1.0, 0.0, 9.0])))
    assert frechet_distance(first, second) == pytest.approx(1 + 1 + 1 + 9, rel=1e-9)
    regular = gaussian([0, 0, 0], torch.eye(3))
    assert frechet_distance(first, regular) == pytest.approx(frechet_distance(regular, first), rel=1e-12)
    assert frechet_distance(first, regular) == pytest.approx(1 + 0 + 1, rel=1e-12)


def test_the_distance_in_numpy() -> None:
    x, y = rows(60, 7), rows(80, 7, seed=1) @ torch.diag(torch.arange(1.0, 8.0))
    c1, c2 = np.cov(x.numpy().astype(float), rowvar=False), np.cov(y.numpy().astype(float), rowvar=False)
    shift = x.double().numpy().mean(0) - y.double().numpy().mean(0)
    expected = shift @ shift + np.trace(c1 + c2) - 2 * np.sqrt(np.linalg.eigvals(c1 @ c2).real).sum()
    found = frechet_distance(Gaussian.of(Moments.of(x)), Gaussian.of(Moments.of(y)))
    assert found == pytest.approx(expected, rel=1e-10)


# The kernel distance -------------------------------------------------------------------------------------------------


def kernel_in_numpy(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    return float(sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y]))


def test_the_kernel_distance_of_one_subset_in_numpy() -> None:
    x, y = rows(12, 4), rows(12, 4, seed=1, shift=0.5)
    found = kernel_distance(x, y)
    assert (found.subsets, found.subset, found.standard_error) == (1, 12, None)
    assert found.mean == pytest.approx(kernel_in_numpy(x.double().numpy(), y.double().numpy()), rel=1e-12)


def test_subsets_are_disjoint_and_follow_from_the_seed() -> None:
    x, y = rows(35, 4), rows(50, 4, seed=1, shift=0.5)
    found = kernel_distance(x, y, subset=10, seed=3)
    assert (found.subsets, found.subset) == (3, 10)
    generator = torch.Generator().manual_seed(3)
    real, drawn = (z[torch.randperm(len(z), generator=generator)].double().numpy() for z in (x, y))
    parts = [kernel_in_numpy(real[i : i + 10], drawn[i : i + 10]) for i in (0, 10, 20)]
    assert found.mean == pytest.approx(np.mean(parts), rel=1e-12)
    assert found.standard_error == pytest.approx(np.std(parts, ddof=1) / 3**0.5, rel=1e-12)
    assert kernel_distance(x, y, subset=15, seed=3).standard_error > 0
    assert kernel_distance(x, y, subset=10, seed=4).mean != found.mean


def test_the_kernel_distance_is_unbiased() -> None:
    """The mean for equal distributions is 0 however small a subset is; a biased estimate would be about 0.4."""
    found = kernel_distance(rows(4000, 4), rows(4000, 4, seed=1), subset=20)
    assert found.subsets == 200
    assert abs(found.mean) < 4 * found.standard_error
    assert found.standard_error < 0.05


# Precision and recall ------------------------------------------------------------------------------------------------


def fraction_inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """By the definition: a point is inside if it is within a centre's distance to its k-th nearest other centre."""
    radii = []
    for i, centre in enumerate(centres):
        others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(centres) if j != i)
        radii.append(others[k - 1])
    inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return float(np.mean(inside))


@pytest.mark.parametrize("block", [7, 1000])
def test_precision_and_recall_in_numpy(monkeypatch, block: int) -> None:
    monkeypatch.setattr(scores, "ROWS", block)
    real, drawn = rows(40, 3, shift=50.0), rows(33, 3, seed=1, shift=50.5)
    found = precision_recall(real, drawn)
    x, y = real.double().numpy(), drawn.double().numpy()
    assert found == (fraction_inside(y, x, 3), fraction_inside(x, y, 3))
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_the_same_images_have_precision_and_recall_of_1() -> None:
    real = rows(30, 2000, shift=3.0)
    assert precision_recall(real, real[torch.randperm(30)]) == (1.0, 1.0)


def test_a_model_that_makes_one_real_image_is_precise_and_recalls_nothing_else() -> None:
    """All distances between its images are 0, which rounding must not hide."""
    real = rows(20, 500, shift=3.0)
    assert precision_recall(real, real[:1].repeat(9, 1)) == (1.0, 1 / 20)


def test_a_mean_far_from_0_costs_no_digits() -> None:
    """Squares of the features have no digits left in fp32 for their distances: the mean has to be taken off first."""
    real, drawn = rows(40, 3), rows(33, 3, seed=1, shift=0.5)
    near = precision_recall(real.double(), drawn.double())
    assert precision_recall(real.double() + 1e5, drawn.double() + 1e5) == near


def test_copies_of_a_point_far_from_the_mean_are_one_point() -> None:
    """Rounding of their distances, which grows with the norms, must not make them differ."""
    far = torch.cat([rows(20, 700, shift=40.0), rows(20, 700, seed=1, shift=-40.0)])
    assert precision_recall(far, far[:1].repeat(9, 1)) == (1.0, 1 / 40)
    a_little_off = far[:1].repeat(9, 1) + 0.1 * rows(9, 700, seed=2)
    assert scores.squared_radii(a_little_off).min() > 1


def test_a_point_is_no_neighbour_of_its_own() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert scores.squared_radii(points, 1).tolist() == [1, 1, 4, 16]
    assert scores.squared_radii(points, 3).tolist() == [49, 36, 16, 49]
    with pytest.raises(InputError, match="more than 3 images, the samples have 3"):
        precision_recall(points, points[:3])


# The Inception score -------------------------------------------------------------------------------------------------


def inception_in_numpy(probabilities: np.ndarray) -> float:
    marginal = probabilities.mean(0)
    return float(np.exp((probabilities * (np.log(probabilities) - np.log(marginal))).sum(1).mean()))


def test_the_inception_score_of_blocks_is_the_mean_of_splits() -> None:
    probabilities = rows(25, 6).double().softmax(1)
    score = InceptionScore(split=10)
    for block in probabilities.split([3, 9, 1, 12]):
        score.add(block)
    parts = [inception_in_numpy(part.numpy()) for part in probabilities.split(10)]
    assert score.value == pytest.approx(np.mean(parts), rel=1e-12)


def test_the_inception_score_at_its_ends() -> None:
    sure, unsure = InceptionScore(), InceptionScore()
    sure.add(torch.eye(8).repeat(4, 1))
    unsure.add(torch.full((16, 8), 1 / 8))
    assert sure.value == pytest.approx(8)
    assert unsure.value == pytest.approx(1)
