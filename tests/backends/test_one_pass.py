"""Attention in one pass: what its model computes, and how far it is from the reference and from the softmax."""

import pytest
import torch
from operands import maker

from tqdit.ops import one_pass, reference
from tqdit.ops.composed import probabilities
from tqdit.ops.quantizer import dequantize, plain_codes
from tqdit.spec import Grid


def drawn(keys: int, spread: float, seed: int = 1):
    make = maker(seed)
    value, softmax = make.params(units=2), make.params(Grid.SOFTMAX_ROW)
    return make.values(3, 2, 7, keys) * spread, softmax, make.codes(3, 2, keys, 5), value


def by_reference(scores, softmax, v, value) -> torch.Tensor:
    p = plain_codes(probabilities(scores, softmax), softmax)
    return reference.values(p, softmax, v, value).double()


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("keys", [1, 16, 128, 130, 1024])
def test_error_is_within_its_bound(keys: int, spread: float) -> None:
    scores, softmax, v, value = drawn(keys, spread)
    found, bound = one_pass.attend(scores, softmax, v, value)
    real = scores.double().softmax(-1) @ dequantize(v, value).double()
    assert ((found - real).abs() <= bound * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("keys", [16, 128])
def test_one_block_is_the_reference(keys: int) -> None:
    drawing = drawn(keys, 2.0)
    assert torch.allclose(one_pass.attend(*drawing)[0], by_reference(*drawing), rtol=1e-6, atol=1e-6)


def test_where_the_first_block_has_the_highest_scores_it_is_the_reference() -> None:
    scores, *others = drawn(512, 2.0)
    scores[..., 0] = 20.0
    found, _ = one_pass.attend(scores, *others)
    assert torch.allclose(found, by_reference(scores, *others), rtol=1e-6, atol=1e-6)


def test_codes_of_earlier_blocks_are_not_coarser() -> None:
    """The bound and the error are smaller for rows whose later blocks have higher scores."""
    scores, *others = drawn(1024, 1.0)
    rising = scores.sort(-1).values
    real = rising.double().softmax(-1) @ dequantize(others[1], others[2]).double()
    found, bound = one_pass.attend(rising, *others)
    _, all_at_once = one_pass.attend(rising, *others, 1024)
    assert (bound < all_at_once).all()
    assert (found - real).norm() < (by_reference(rising, *others) - real).norm()
