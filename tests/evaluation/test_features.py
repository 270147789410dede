"""FD-fashion against closed forms, and the shipped classifier and statistics."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tqdit.quality import features as under_test
from tqdit.quality.features import (
    CLASSIFIER_FILE,
    FEATURES,
    STATISTICS_FILE,
    FashionClassifier,
    class_agreement,
    fd_fashion,
    feature_statistics,
    frechet_distance,
    load_fashion_classifier,
    load_real_statistics,
)


def random_covariance(size: int, rank: int, seed: int) -> torch.Tensor:
    factor = torch.randn(size, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def noise_images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("rank", [3, 16, 40])
def test_identical_gaussians_have_distance_zero(rank: int) -> None:
    mean, cov = torch.ones(16, dtype=torch.float64), random_covariance(16, rank, seed=rank)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 40])
def test_shifted_mean_costs_its_squared_length(rank: int) -> None:
    mean, cov = torch.zeros(16, dtype=torch.float64), random_covariance(16, rank, seed=1)
    shift = torch.linspace(-1, 1, 16, dtype=torch.float64)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(float(shift.square().sum()), abs=1e-6)


def test_diagonal_covariances_match_the_closed_form() -> None:
    variances1 = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=torch.float64)
    variances2 = torch.tensor([1.0, 0.0, 9.0, 0.25], dtype=torch.float64)
    mean = torch.zeros(4, dtype=torch.float64)
    expected = float((variances1.sqrt() - variances2.sqrt()).square().sum())
    assert frechet_distance(mean, variances1.diag(), mean, variances2.diag()) == pytest.approx(expected)


def test_rotation_leaves_the_distance_alone_and_it_is_symmetric() -> None:
    mean = torch.zeros(8, dtype=torch.float64)
    cov1, cov2 = random_covariance(8, 20, seed=2), random_covariance(8, 4, seed=3)
    rotation = torch.linalg.qr(random_covariance(8, 8, seed=4)).Q
    distance = frechet_distance(mean, cov1, mean, cov2)
    turned = frechet_distance(mean, rotation @ cov1 @ rotation.T, mean, rotation @ cov2 @ rotation.T)
    assert distance > 0.1
    assert turned == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(mean, cov2, mean, cov1) == pytest.approx(distance, rel=1e-6)


def test_statistics_do_not_depend_on_the_batch() -> None:
    classifier, images = FashionClassifier().eval(), noise_images(7)
    mean, cov = feature_statistics(images, classifier, batch=3)
    with torch.no_grad():
        expected = classifier.features(images).double()
    torch.testing.assert_close(mean, expected.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cov, torch.cov(expected.T), rtol=1e-4, atol=1e-5)
    assert mean.dtype == cov.dtype == torch.float64


def test_shipped_classifier_is_small_finite_and_in_float32() -> None:
    assert CLASSIFIER_FILE.stat().st_size <= 1_500_000
    classifier = load_fashion_classifier()
    assert not classifier.training
    assert all(value.dtype == torch.float32 for value in classifier.parameters())
    logits = classifier(noise_images(4))
    assert logits.shape == (4, 10)
    assert logits.isfinite().all()


def test_shipped_statistics_are_a_covariance() -> None:
    assert STATISTICS_FILE.stat().st_size <= 200_000
    mean, cov = load_real_statistics()
    assert mean.shape == (FEATURES,)
    assert mean.dtype == cov.dtype == torch.float64
    torch.testing.assert_close(cov, cov.T)
    assert torch.linalg.eigvalsh(cov).min() > -1e-9
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-5)


def test_noise_is_far_from_the_real_images() -> None:
    near = torch.trace(load_real_statistics()[1])
    assert fd_fashion(noise_images(50)) > 0.1 * near


def test_class_agreement_counts_the_classifier_s_own_answers() -> None:
    images = noise_images(8)
    labels = load_fashion_classifier()(images).argmax(dim=1)
    assert class_agreement(images, labels) == 1.0
    labels[:2] = (labels[:2] + 1) % 10
    assert class_agreement(images, labels) == 0.75


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 3, 32, 32), (4, 1, 28, 28)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must have shape"):
        feature_statistics(torch.zeros(shape), FashionClassifier().eval())


def test_too_few_images_or_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two images"):
        feature_statistics(noise_images(1), FashionClassifier().eval())
    with pytest.raises(ValueError, match="as many labels"):
        class_agreement(noise_images(3), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("loader", ["load_fashion_classifier", "load_real_statistics"])
def test_damaged_files_are_named(tmp_path: Path, loader: str) -> None:
    source = CLASSIFIER_FILE if loader == "load_fashion_classifier" else STATISTICS_FILE
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(source.read_bytes()[:-100])
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    spoiled = tmp_path / "spoiled.safetensors"
    tensors = load_file(source)
    next(value for value in tensors.values() if value.is_floating_point()).fill_(float("nan"))
    save_file(tensors, spoiled)
    for path in (cut, other, spoiled):
        with pytest.raises(ValueError, match=path.name):
            getattr(under_test, loader)(path=path)
    with pytest.raises(FileNotFoundError, match="absent"):
        getattr(under_test, loader)(path=tmp_path / "absent.safetensors")
