"""Error measures against closed forms."""

import math

import pytest
import torch

from tqdit.calibration.trajectories import CalibrationSet
from tqdit.quality.fidelity import compare_epsilon, predict_epsilon
from tqdit.quality.metrics import psnr_db, sqnr_db
from tqdit.sampling.guidance import ClassLabels


def test_sqnr() -> None:
    assert sqnr_db(torch.full((4,), 10.0), torch.full((4,), 11.0)) == pytest.approx(20)
    assert sqnr_db(torch.ones(4), torch.ones(4)) == math.inf


def test_psnr_is_a_mean_over_images_with_peak_2() -> None:
    reference = torch.zeros(2, 1, 2, 2)
    actual = reference.clone()
    actual[0] += 0.2  # 10 log10(4 / 0.04) = 20 dB
    actual[1] += 0.02
    assert psnr_db(reference, actual) == pytest.approx(30)


def test_psnr_of_equal_images_is_finite() -> None:
    assert math.isfinite(psnr_db(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)))


def test_fidelity_by_group_and_timestep() -> None:
    t = torch.tensor([10, 20, 900, 800])
    data = CalibrationSet(
        torch.zeros(4, 1, 2, 2), t, t, torch.tensor([0, 0, 1, 1]), torch.ones(4), ClassLabels(1000), groups=2
    )
    reference = torch.full((4, 1, 2, 2), 10.0)
    actual = reference + torch.tensor([1.0, 1.0, 0.1, 0.1])[:, None, None, None]
    found = compare_epsilon(reference, actual, data)
    assert found.by_group == pytest.approx([20, 40], abs=1e-3)
    assert found.overall == pytest.approx(10 * math.log10(100 / 0.505), abs=1e-3)
    assert [t for t, _ in found.by_timestep] == [10, 20, 800, 900]
    assert found.by_timestep[2][1] == pytest.approx(40, abs=1e-3)


def test_predicted_epsilon_is_conditional_and_has_no_v(model, data) -> None:
    with torch.inference_mode():
        expected = model(data.x, timestep=data.t, class_labels=data.labels).sample[:, :1]
    for batch in (3, 16):
        assert torch.allclose(predict_epsilon(model, data, batch), expected, atol=1e-5)
