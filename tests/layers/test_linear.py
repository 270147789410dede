"""Weight-only layers against float layers with the dequantized weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tqdit.layers.linear import FloatLinear, WeightOnlyLinear, WeightOnlyPatchEmbed
from tqdit.ops.dispatch import get_backend
from tqdit.ops.float_linear import _operator


def real_weight(weight) -> torch.Tensor:
    return weight.codes.float() * weight.scale[:, None]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_weight_only_linear(weight, backend: str) -> None:
    run, w, bias, x = get_backend(backend), weight(6, 16), torch.randn(6), torch.randn(2, 3, 16)
    y = WeightOnlyLinear(run.prepare_float_input(w, bias), run)(x)
    assert torch.allclose(y, F.linear(x, real_weight(w), bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(weight, dtype: torch.dtype) -> None:
    run = get_backend()
    layer = WeightOnlyLinear(run.prepare_float_input(weight(6, 16), torch.randn(6)), run).to(dtype)
    assert layer(torch.randn(2, 5, 16, dtype=dtype)).dtype is dtype
    assert all(buffer.dtype in (torch.int8, torch.float32) for buffer in layer.state_dict().values())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_patch_embedding_is_the_convolution(weight, backend: str) -> None:
    run, w, bias, x = get_backend(backend), weight(6, 3 * 2 * 2), torch.randn(6), torch.randn(2, 3, 8, 12)
    convolution = nn.Conv2d(3, 6, 2, stride=2)
    convolution.weight.data = real_weight(w).reshape(6, 3, 2, 2)
    convolution.bias.data = bias
    y = WeightOnlyPatchEmbed(WeightOnlyLinear(run.prepare_float_input(w, bias), run), 2)(x)
    assert torch.allclose(y, convolution(x), atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_in_float_stays_so_under_autocast(compiled: bool) -> None:
    layer, x = FloatLinear(16, 6).requires_grad_(False), torch.randn(2, 3, 16)
    expected = layer(x)
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(x), expected)


@pytest.mark.parametrize("bias", [torch.ones(6), None])
def test_the_operator_of_layers_in_float_is_one_of_torch(bias: torch.Tensor | None) -> None:
    x = torch.randn(2, 8, 4, 4).permute(0, 2, 3, 1)
    checks = torch.library.opcheck(_operator, (x, torch.randn(6, 8), bias))
    assert set(checks.values()) == {"SUCCESS"}
