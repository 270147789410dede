"""Layers on many float rows, whose int8 weight becomes floats once for all of them, in every way the CPU runs.

Products of codes with bf16 are exact and all sums are in fp32, so the bound is that of fp32 for every dtype.
"""

import pytest
import torch
from operands import maker
from together import together

from tqdit.backends import fused, native
from tqdit.errors import InputError
from tqdit.ops.schema import WeightParams

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST = fused.MANY_ROWS
# rows, columns, depth: tiles and panels that are not full, pieces of the depth of either kind, two tasks of rows, a
# depth that is no multiple of four, a narrow one
SHAPES = [(LEAST, 70, 68), (17, 64, 132), (29, 129, 2116), (13, 65, 1028), (541, 20, 72), (19, 5, 70), (30, 33, 64)]
each_shape = together(("rows", "columns", "depth"), SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sums(x: torch.Tensor, weight: WeightParams, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x W^T + bias in fp64, and the bound of an error in fp32."""
    w = weight.codes.double() * weight.scale.double().reshape(-1, 1)
    size = x.double().abs() @ w.abs().t() + bias.double().abs()
    return x.double() @ w.t() + bias.double(), (x.shape[-1] + 4) * 2.0**-24 * size


@each_shape
@each_dtype
def test_the_error_is_that_of_fp32_sums(run, rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    make = maker(1)
    x, weight, bias = make.values(rows, depth).to(dtype), make.weight(columns, depth), make.values(columns)
    layer = run.prepare_float_input(weight, bias)
    exact, bound = sums(x, weight, bias)
    found = run.float_input_linear(x, layer, torch.float32)
    assert ((found.double() - exact).abs() <= bound).all()
    for other in DTYPES[1:]:
        assert torch.equal(run.float_input_linear(x, layer, other), found.to(other))  # rounded once


@each_dtype
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_codes_of_any_number_of_bits(fast, dtype: torch.dtype, bits: int) -> None:
    make = maker(2, bits)
    x, weight, bias = make.values(3, 40, 76).to(dtype), make.weight(50, 76), make.values(50)
    weight.codes[0], weight.codes[1] = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    found = fast.float_input_linear(x, fast.prepare_float_input(weight, bias), torch.float32)
    exact, bound = sums(x, weight, bias)
    assert found.shape == (3, 40, 50)
    assert ((found.double() - exact).abs() <= bound).all()


@each_dtype
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_threads(fast, dtype: torch.dtype) -> None:
    make = maker(3)
    x, weight = make.values(700, 72).to(dtype), make.weight(130, 72)
    layer, threads = fast.prepare_float_input(weight, None), torch.get_num_threads()
    whole = fast.float_input_linear(x, layer, dtype)
    assert torch.equal(fast.float_input_linear(x[600:623], layer, dtype), whole[600:623])
    torch.set_num_threads(3)
    try:
        assert torch.equal(fast.float_input_linear(x, layer, dtype), whole)
    finally:
        torch.set_num_threads(threads)


def test_columns_that_are_not_adjacent(fast) -> None:
    make = maker(4)
    weight, bias = make.weight(9, 68), make.values(9)
    layer = fast.prepare_float_input(weight, bias)
    for dtype in DTYPES:
        x = make.values(2, 68, 30).to(dtype).transpose(1, 2)
        found = fast.float_input_linear(x, layer, torch.float32)
        assert torch.equal(found, fast.float_input_linear(x.contiguous(), layer, torch.float32))


@each_dtype
def test_nan_and_inf_stay_in_their_rows(fast, dtype: torch.dtype) -> None:
    make = maker(5)
    x, weight = make.values(20, 68).to(dtype), make.weight(30, 68)
    weight.codes[:] = weight.codes.abs() + 1
    clean = fast.float_input_linear(x, fast.prepare_float_input(weight, None), dtype)
    x[3, 5], x[7, 0], x[9, 67] = float("nan"), float("inf"), -float("inf")
    found = fast.float_input_linear(x, fast.prepare_float_input(weight, None), dtype)
    assert found[3].isnan().all()
    assert (found[7] == float("inf")).all()
    assert (found[9] == -float("inf")).all()
    others = [row for row in range(20) if row not in (3, 7, 9)]
    assert torch.equal(found[others], clean[others])


def test_without_a_dtype_the_number_of_rows_changes_nothing(fast) -> None:
    make = maker(6)
    x, weight = make.values(LEAST + 3, 500), make.weight(33, 500)
    layer = fast.prepare_float_input(weight, None)
    found = fast.float_input_linear(x, layer)
    assert torch.equal(found, torch.cat([fast.float_input_linear(row[None], layer) for row in x]))


def test_what_the_kernel_does_not_take_is_refused(fast) -> None:
    weight = maker(7).weight(4, 72)
    layer = fast.prepare_float_input(weight, None)
    with pytest.raises(InputError, match="width 68 for a layer of width 72"):
        fast.float_input_linear(torch.ones(20, 68), layer, torch.float32)
    with pytest.raises(InputError, match="float64"):
        fast.float_input_linear(torch.ones(20, 72), layer, torch.float64)


def test_products_of_bf16_are_those_of_the_processor(fast) -> None:
    """The kernels multiply bf16 as it is where, by torch, the processor does."""
    assert native.has_bfloat16() == torch.cpu._is_avx512_bf16_supported()


def test_bf16_in_fp32_is_as_near(fast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bf16 products multiplies the same values in fp32."""
    monkeypatch.setattr(native, "has_bfloat16", lambda: False)
    make = maker(8)
    x, weight, bias = make.values(40, 1100).bfloat16(), make.weight(70, 1100), make.values(70)
    layer = fast.prepare_float_input(weight, bias)
    found = fast.float_input_linear(x, layer, torch.float32)
    exact, bound = sums(x, weight, bias)
    assert ((found.double() - exact).abs() <= bound).all()
    assert torch.equal(found, fast.float_input_linear(x.float(), layer, torch.float32))
