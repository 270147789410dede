"""Inputs of models with prompts: what fits is passed on, and what does not is an error that names it.

Latents, timesteps and class labels are tested where whole models are called.
"""

from typing import Any

import pytest
import torch

from tqdit.errors import InputError
from tqdit.layers import inputs

X = torch.zeros(2, 4, 8, 8)


def test_a_prompt_that_fits_is_passed_on() -> None:
    """Itself, so that it can be recognised at the next call."""
    states = torch.randn(2, 7, 12, dtype=torch.float16)
    assert inputs.prompt(X, states, 12) is states


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (None, "needs `encoder_hidden_states`, a tensor"),
        (torch.zeros(3, 7, 12), r"shape \(3, 7, 12\), the batch needs \(2, tokens, 12\)"),
        (torch.zeros(2, 7, 11), r"shape \(2, 7, 11\)"),
        (torch.zeros(2, 0, 12), r"shape \(2, 0, 12\)"),
        (torch.zeros(2, 12), r"shape \(2, 12\)"),
        (torch.zeros(2, 7, 12, dtype=torch.int64), "must be floating point, not torch.int64"),
        (torch.zeros(2, 7, 12, device="meta"), "encoder_hidden_states: a tensor on the meta device has no values"),
        (torch.zeros(2, 7, 12, requires_grad=True), "encoder_hidden_states: integers have no gradients"),
    ],
)
def test_a_prompt_that_does_not_fit(states: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs.prompt(X, states, 12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.float32])
def test_a_mask_becomes_a_bias(dtype: torch.dtype) -> None:
    bias = inputs.mask_bias(X, torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype), 3)
    assert bias is not None
    assert bias.dtype is torch.float32
    assert bias.tolist() == [[0, 0, -10000], [0, -10000, -10000]]


def test_a_mask_of_three_axes_is_a_bias_already() -> None:
    given = torch.randn(2, 1, 3, dtype=torch.float16)
    bias = inputs.mask_bias(X, given, 3)
    assert bias is not None
    assert (bias.dtype, bias.is_contiguous()) == (torch.float32, True)
    assert torch.equal(bias, given[:, 0].float())
    assert inputs.mask_bias(X, None, 3) is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 0]] * 2, "must be a tensor, not list"),
        (torch.ones(2, 4), r"shape \(2, 4\), the batch needs \(2, 3\), or \(2, 1, 3\) for a bias"),
        (torch.ones(1, 3), r"shape \(1, 3\)"),
        (torch.ones(2, 3, 1), r"shape \(2, 3, 1\)"),
        (torch.ones(2, 1, 3, dtype=torch.int64), "of 3 axes cannot be torch.int64"),
        (torch.ones(2, 3, dtype=torch.complex64), "of 2 axes cannot be torch.complex64"),
        (torch.ones(2, 3, device="meta"), "encoder_attention_mask: a tensor on the meta device"),
        (torch.ones(2, 3, requires_grad=True), "encoder_attention_mask: integers have no gradients"),
    ],
)
def test_a_mask_that_does_not_fit(mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs.mask_bias(X, mask, 3)


def test_sizes_that_fit_are_passed_on() -> None:
    given = {"resolution": torch.tensor([[512, 512], [256, 512]]), "aspect_ratio": torch.tensor([[1.0], [0.5]])}
    passed = inputs.sizes(X, given)
    assert {name: value.tolist() for name, value in passed.items()} == {
        name: value.tolist() for name, value in given.items()
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "needs `added_cond_kwargs` with resolution and aspect_ratio"),
        ({"aspect_ratio": torch.ones(2, 1)}, r"\['resolution'\] is NoneType, the batch needs \(2, 2\)"),
        ({"resolution": torch.ones(2, 2)}, r"\['aspect_ratio'\] is NoneType, the batch needs \(2, 1\)"),
        ({"resolution": torch.ones(1, 2), "aspect_ratio": torch.ones(2, 1)}, r"\['resolution'\] is \(1, 2\)"),
        (
            {"resolution": torch.ones(2, 2).bool(), "aspect_ratio": torch.ones(2, 1)},
            "must be real numbers, not torch.b",
        ),
        ({"resolution": torch.ones(2, 2, device="meta"), "aspect_ratio": torch.ones(2, 1)}, "resolution: .* meta"),
        ({"resolution": torch.ones(2, 2, requires_grad=True)}, "resolution: integers have no gradients"),
    ],
)
def test_sizes_that_do_not_fit(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inputs.sizes(X, given)


def test_what_a_model_does_not_take_is_refused_unless_it_is_none() -> None:
    inputs.refuse("attention_mask", None)
    with pytest.raises(InputError, match="attention_mask is not supported by an integer model"):
        inputs.refuse("attention_mask", torch.ones(2, 3))
