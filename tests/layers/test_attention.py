"""Integer attention against the float attention of its dequantized operands."""

import pytest
import torch

from tqdit.layers.attention import IntAttention
from tqdit.layers.linear import IntLinear
from tqdit.ops import quantizer, reference
from tqdit.spec import Grid, Role

HEADS, WIDTH = 2, 16


@pytest.fixture
def attention(site, quantized_weight) -> IntAttention:
    source = site(Role.INPUT, groups=4)
    projections = tuple(
        IntLinear(quantized_weight(WIDTH, WIDTH), torch.randn(WIDTH), source, reference) for _ in range(3)
    )
    to_out = IntLinear(quantized_weight(WIDTH, WIDTH), torch.randn(WIDTH), site(Role.INPUT), reference)
    operands = {role.value: site(role, 4, groups=4, units=HEADS) for role in (Role.QUERY, Role.KEY, Role.VALUE)}
    operands["softmax"] = site(Role.SOFTMAX, 4, groups=4, grid=Grid.MRQ_SOFTMAX)
    return IntAttention(projections, to_out, operands, HEADS, reference)


def fake(x: torch.Tensor, site) -> torch.Tensor:
    params = site.select()
    return quantizer.dequantize(quantizer.quantize(x, params), params)


def test_attention_of_the_dequantized_operands(attention: IntAttention, clock) -> None:
    x = torch.randn(3, 9, WIDTH)
    clock.set(torch.tensor([999, 0, 260]), 3)
    operands = []
    for layer, site in (
        (attention.to_q, attention.query),
        (attention.to_k, attention.key),
        (attention.to_v, attention.value),
    ):
        y = layer(x).reshape(3, 9, HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)
        operands.append(fake(y, site))
    q, k, v = operands
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / (WIDTH // HEADS) ** 0.5
    p = fake(scores.exp() / scores.exp().sum(-1, keepdim=True), attention.softmax)
    attended = torch.einsum("bhqk,bhkd->bqhd", p, v).reshape(3, 9, WIDTH)
    difference = attention(x) - attention.to_out(attended)
    # Sums in another order may move single codes of the last two operands by one.
    assert difference.abs().max() < 0.02 * attention(x).abs().max()
    assert (difference == 0).float().mean() > 0.5


def test_mixed_timesteps_equal_each_sample_alone(attention: IntAttention, clock) -> None:
    x, t = torch.randn(4, 9, WIDTH), torch.tensor([999, 0, 260, 510])
    clock.set(t, 4)
    together = attention(x)
    for i in range(4):
        clock.set(t[i], 1)
        assert torch.equal(attention(x[i : i + 1])[0], together[i])


@pytest.mark.parametrize("argument", ["encoder_hidden_states", "attention_mask"])
def test_cross_attention_and_masks_are_refused(attention: IntAttention, argument: str) -> None:
    with pytest.raises(ValueError, match="self-attention"):
        attention(torch.randn(1, 9, WIDTH), **{argument: torch.ones(1)})
