"""Batches that fit the device's memory."""

import pytest
import torch

from tqdit.calibration.batches import Batches
from tqdit.errors import InputError


def limited(limit: int, seen: list[int]):
    """A model that has memory for `limit` samples."""

    def run(members: range) -> list[int]:
        seen.append(len(members))
        if len(members) > limit:
            raise torch.OutOfMemoryError
        return [i * i for i in members]

    return run


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_any_limit_gives_the_same_results_in_order(limit: int) -> None:
    found = Batches(8).over(range(3, 22), limited(limit, []))
    assert [x for part in found for x in part] == [i * i for i in range(3, 22)]


def test_the_size_that_fitted_is_kept() -> None:
    seen: list[int] = []
    batches = Batches(8)
    for start in (0, 8):
        batches.over(range(start, start + 8), limited(2, seen))
    assert seen == [8, 4, *[2] * 8]


def test_one_sample_that_does_not_fit_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="too little memory to calibrate with a single sample"):
        Batches(4).over(range(4), limited(0, []))


def test_other_errors_pass() -> None:
    def broken(_: range) -> None:
        raise ValueError("not about memory")

    with pytest.raises(ValueError, match="not about memory"):
        Batches(4).over(range(4), broken)
