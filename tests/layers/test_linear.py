"""Integer and weight-only layers against float layers with the dequantized weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tqdit.grids import uniform
from tqdit.layers.linear import IntFeedForward, IntLinear, WeightOnlyLinear, WeightOnlyPatchEmbed
from tqdit.ops import reference
from tqdit.spec import Grid, Role


def real_weight(weight) -> torch.Tensor:
    return weight.codes.float() * weight.scale[:, None]


def test_int_linear_is_the_linear_layer_of_the_codes(site, quantized_weight) -> None:
    source, weight, bias = site(Role.INPUT), quantized_weight(6, 16), torch.randn(6)
    x = torch.randn(2, 5, 16)
    params = source.select()
    fake = uniform.dequantize(uniform.quantize(x, params.scale, params.zero_point, 8), params.scale, params.zero_point)
    y = IntLinear(weight, bias, source, reference)(x)
    assert torch.allclose(y, F.linear(fake, real_weight(weight), bias), atol=1e-4)


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_GELU])
def test_mixed_timesteps_equal_each_sample_alone(site, clock, quantized_weight, grid: Grid) -> None:
    layer = IntLinear(quantized_weight(6, 16), None, site(Role.GELU, groups=4, grid=grid), reference)
    x, t = torch.randn(4, 5, 16), torch.tensor([999, 0, 260, 510])
    clock.set(t, 4)
    together = layer(x)
    for i in range(4):
        clock.set(t[i], 1)
        assert torch.equal(layer(x[i : i + 1])[0], together[i])
    assert not torch.equal(layer(x)[0], together[0])  # the group matters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(site, quantized_weight, dtype: torch.dtype) -> None:
    layer = IntLinear(quantized_weight(6, 16), torch.randn(6), site(Role.INPUT), reference).to(dtype)
    assert layer(torch.randn(2, 5, 16, dtype=dtype)).dtype is dtype


def test_feed_forward_applies_the_tanh_gelu(site, quantized_weight) -> None:
    fc1 = IntLinear(quantized_weight(32, 16), None, site(Role.INPUT), reference)
    fc2 = IntLinear(quantized_weight(16, 32), None, site(Role.GELU, grid=Grid.MRQ_GELU), reference)
    x = torch.randn(2, 5, 16)
    inner = fc1(x)
    gelu = 0.5 * inner * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3)))
    assert torch.allclose(IntFeedForward(fc1, fc2)(x), fc2(gelu), atol=0.05)
    assert not torch.allclose(IntFeedForward(fc1, fc2)(x), fc2(inner.relu()), atol=0.05)


def test_weight_only_linear(quantized_weight) -> None:
    weight, bias, x = quantized_weight(6, 16), torch.randn(6), torch.randn(2, 16)
    y = WeightOnlyLinear(weight, bias, reference)(x)
    assert torch.allclose(y, F.linear(x, real_weight(weight), bias), atol=1e-5)


def test_patch_embedding_is_the_convolution(quantized_weight) -> None:
    weight, bias, x = quantized_weight(6, 3 * 2 * 2), torch.randn(6), torch.randn(2, 3, 8, 12)
    convolution = nn.Conv2d(3, 6, 2, stride=2)
    convolution.weight.data = real_weight(weight).reshape(6, 3, 2, 2)
    convolution.bias.data = bias
    y = WeightOnlyPatchEmbed(WeightOnlyLinear(weight, bias, reference), 2)(x)
    assert torch.allclose(y, convolution(x), atol=1e-5)
