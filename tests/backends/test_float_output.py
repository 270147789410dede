"""Linear layers that read and write bf16, fp16 and fp32, as those of traced models do, in every way the CPU runs.

Codes and steps are those of `ops.reference`. A result in bf16 or fp16 is the fp32 result rounded once, half to even,
which is what `Tensor.to` does.
"""

import platform
from collections.abc import Iterator

import pytest
import torch
from cpu_codes import found_codes
from operands import maker
from together import together
from ways import backend_that, forget

from tqdit.backends import native
from tqdit.errors import InputError
from tqdit.ops.composed import Composed
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Float, OperandParams, WeightParams
from tqdit.spec import Grid

REFERENCE = Reference()
HAS_AVX2 = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX") and platform.machine() == "x86_64"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, tokens, width, columns: one row, widths that fill no vector and no panel, more rows than a task or tile has,
# tiles across samples, more depth than is multiplied at a time
SHAPES = [(1, 1, 64, 128), (2, 1, 30, 33), (2, 7, 100, 70), (3, 50, 36, 15), (1, 203, 20, 65), (2, 5, 1100, 19)]
each_shape = together(("batch", "tokens", "width", "columns"), SHAPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def hidden(batch: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Values of which one channel is a thousand times as large as the others."""
    x = maker(seed).values(batch, tokens, width) * 3
    x[..., width // 3] *= 1000
    return x.to(dtype)


def balanced(width: int, batch: int = 1) -> OperandParams:
    """The grid of rows with factors that make the large channel as small as the others."""
    target = maker(1).params(Grid.ROW, batch, channels=width)
    assert target.channels is not None
    target.channels[width // 3] /= 1000
    return target


# Reading -------------------------------------------------------------------------------------------------------------


@each_shape
@each_dtype
@pytest.mark.parametrize("factored", [True, False])
def test_rows_of_any_float_type(
    run, batch: int, tokens: int, width: int, columns: int, dtype: torch.dtype, factored: bool
) -> None:
    x, target = hidden(batch, tokens, width, dtype), balanced(width, batch)
    target = target if factored else target._replace(channels=None)
    actual, expected = run.quantize(x, target), REFERENCE.quantize(x, target)
    assert torch.equal(actual.scale, expected.scale)
    assert torch.equal(found_codes(run, actual), expected.codes.int())
    small = expected.codes[..., torch.arange(width) != width // 3]
    assert (small.float().abs().mean() > 20) == factored  # else the large channel takes all of the range


@each_dtype
@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_GELU])
def test_static_steps_of_any_float_type(run, dtype: torch.dtype, grid: Grid) -> None:
    target, x = maker(2).params(grid, 2, channels=37), maker(3).values(2, 5, 37).to(dtype) * 3
    assert torch.equal(found_codes(run, run.quantize(x, target), target), REFERENCE.quantize(x, target).int())


@each_dtype
def test_rows_that_are_not_adjacent(run, dtype: torch.dtype) -> None:
    """Parts of a wider tensor, rows in another order, one row for all, and columns that are not adjacent."""
    wide, target = hidden(3, 8, 50, dtype), balanced(21)
    views = [wide[..., 4:25], wide[:, ::2, :21], wide[::2, 3:, 1:22], wide[:, :, :21].transpose(0, 1),
             wide[:1, :1, :21].expand(3, 4, 21), wide[..., :42:2], wide[..., :1].expand(3, 8, 21)]  # fmt: skip
    for x in views:
        actual, expected = run.quantize(x, target), REFERENCE.quantize(x.contiguous(), target)
        assert torch.equal(actual.scale, expected.scale)
        assert torch.equal(found_codes(run, actual), expected.codes.int())


@each_dtype
def test_rows_of_zeros_and_rows_with_nan(run, dtype: torch.dtype) -> None:
    """A row of zeros gives the bias; one with NaN or Inf nothing finite; rows beside them are as if alone."""
    x, target, weight, bias = hidden(1, 9, 40, dtype), balanced(40), maker(4).weight(21, 40), maker(4).values(21)
    x[0, 1], x[0, 3, 7], x[0, 5, 39], x[0, 6, 0] = 0, float("nan"), float("inf"), -float("inf")
    layer = run.prepare(weight, bias)
    for out in DTYPES:
        y = run.linear(run.quantize(x, target), target, layer, Float(out))
        assert torch.equal(y[0, 1], bias.to(out))
        assert not torch.isfinite(y[0, [3, 5, 6]]).any()
        for row in (0, 2, 4, 7, 8):
            alone = run.linear(run.quantize(x[:, row : row + 1], target), target, layer, Float(out))
            assert torch.equal(y[:, row : row + 1], alone)


def test_largest_and_smallest_values(run) -> None:
    """Subnormal fp16 and bf16, and the largest of each."""
    for dtype in DTYPES[1:]:
        info = torch.finfo(dtype)
        row = torch.tensor([info.max, info.smallest_normal, info.smallest_normal / 4, -info.max / 3, 0.0, 1.0]).to(
            dtype
        )
        x = torch.stack([row, row[[1, 2, 2, 1, 4, 2]], row[[2] * 6]])[None]
        target = maker(5).params(Grid.ROW)
        actual, expected = run.quantize(x, target), REFERENCE.quantize(x, target)
        assert torch.equal(actual.scale, expected.scale)
        assert torch.equal(found_codes(run, actual), expected.codes.int())


# Writing -------------------------------------------------------------------------------------------------------------


@each_shape
@pytest.mark.parametrize("by_row", [True, False])
def test_results_are_the_fp32_results_rounded_once(
    run, batch: int, tokens: int, width: int, columns: int, by_row: bool
) -> None:
    make = maker(6)
    source = make.params(Grid.ROW, batch) if by_row else make.params(lead=batch)
    x, weight, bias = make.values(batch, tokens, width), make.weight(columns, width), make.values(columns)
    layer, codes = run.prepare(weight, bias), run.quantize(x, source)
    exact = REFERENCE.linear(REFERENCE.quantize(x, source), source, REFERENCE.prepare(weight, bias))
    for dtype in DTYPES:
        found = run.linear(codes, source, layer, Float(dtype))
        assert found.dtype is dtype
        assert torch.equal(found, exact.to(dtype))


def test_two_regions_are_rounded_once(run) -> None:
    make = maker(7)
    source, x = make.params(Grid.MRQ_GELU, 2), make.values(2, 5, 24)
    weight, bias = make.weight(70, 24), make.values(70)
    layer, exact = run.prepare(weight, bias), REFERENCE.prepare(weight, bias)
    exact = REFERENCE.linear(REFERENCE.quantize(x, source), source, exact)
    for dtype in DTYPES:
        assert torch.equal(run.linear(run.quantize(x, source), source, layer, Float(dtype)), exact.to(dtype))


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> Iterator[Composed]:
    """The backend as processors with AVX2 and without VNNI have it."""
    yield backend_that("avx2", monkeypatch)
    monkeypatch.undo()
    forget()


@pytest.mark.skipif(not HAS_AVX2, reason="no AVX2 here")
def test_products_in_16_bits_are_exact(avx2) -> None:
    """The largest products there are, more depth than is multiplied at a time, and every number of rows of a tile."""
    assert native.instructions() == "avx2"
    make = maker(11)
    for grid in (Grid.ROW, Grid.UNIFORM, Grid.MRQ_GELU):
        for tokens, depth, columns in [(1, 4, 1), (7, 516, 17), (141, 1500, 64), (5, 60, 190)]:
            source, x = make.params(grid, 2), make.values(2, tokens, depth) * 3
            weight, bias = make.weight(columns, depth), make.values(columns)
            weight.codes[::2], x[:, ::3] = -128, 1e4
            weight = weight._replace(colsum=weight.codes.sum(1, dtype=torch.int32))
            layer, codes = avx2.prepare(weight, bias), avx2.quantize(x, source)
            expected = REFERENCE.linear(REFERENCE.quantize(x, source), source, REFERENCE.prepare(weight, bias))
            assert torch.equal(avx2.linear(codes, source, layer), expected)
            assert torch.equal(avx2.linear(codes, source, layer, Float(torch.bfloat16)), expected.bfloat16())
            assert torch.equal(layer.unpacked(), weight.codes)


def given(run, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return values through a layer that writes them: codes of 0, so that the bias is the result."""
    source, count = maker(8).params(Grid.ROW), len(values)
    weight = WeightParams(
        torch.zeros(count, 4, dtype=torch.int8), torch.ones(1), 8, torch.zeros(count, dtype=torch.int32)
    )
    layer = run.prepare(weight, values)
    return run.linear(run.quantize(torch.ones(1, 1, 4), source), source, layer, Float(dtype))[0, 0]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_kind_of_number_is_rounded_as_torch_does(run, dtype: torch.dtype) -> None:
    """Ties both ways, results that overflow or are subnormal, zeros of either sign, Inf and NaN."""
    every = torch.arange(0, 1 << 16, 7, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[torch.isfinite(every)]
    step = (every.view(torch.int32) + (1 << (15 if dtype is torch.bfloat16 else 12))).view(torch.float32)  # halfway
    below, above = (torch.nextafter(step, torch.full_like(step, far)) for far in (-float("inf"), float("inf")))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.9, 65520.0, -65520.0, 3.4e38, 1e-45, 2.0**-25,
                            2.0**-24, 3 * 2.0**-25, 2.0**-14 - 2.0**-25, 1e-8])  # fmt: skip
    values = torch.cat([every, step, below, above, special])
    found, exact = given(run, values, dtype), given(run, values, torch.float32)
    assert torch.equal(exact, values)
    assert torch.equal(found.view(torch.int16), exact.to(dtype).view(torch.int16))
    bad = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32).view(torch.float32)
    assert given(run, bad, dtype).isnan().all()


def test_a_result_in_large_pages(fast) -> None:
    """A result of 33 MiB, whose memory the kernel asks for in other pages."""
    make = maker(12)
    source, x, weight = make.params(Grid.ROW), make.values(1, 2941, 4), make.weight(2942, 4)
    found = fast.linear(fast.quantize(x, source), source, fast.prepare(weight, None))
    exact = REFERENCE.linear(REFERENCE.quantize(x, source), source, REFERENCE.prepare(weight, None))
    assert found.nbytes > 1 << 25
    assert torch.equal(found, exact)


def test_other_types_are_refused(fast) -> None:
    source = maker(9).params(Grid.ROW)
    layer, codes = fast.prepare(maker(9).weight(5, 8), None), fast.quantize(torch.ones(1, 2, 8), source)
    with pytest.raises(InputError, match="float64"):
        fast.linear(codes, source, layer, Float(torch.float64))


# Layers on float inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 40])
@pytest.mark.parametrize(("columns", "depth"), [(33, 70), (5, 64), (70, 1100), (129, 528)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only_layers_of_any_number_of_rows(
    fast, rows: int, columns: int, depth: int, dtype: torch.dtype
) -> None:
    """Within the bound of fp32 sums; and a row's result does not depend on the rows beside it."""
    make = maker(10)
    x, weight, bias = make.values(rows, depth).to(dtype), make.weight(columns, depth), make.values(columns)
    layer = fast.prepare_float_input(weight, bias)
    found = fast.float_input_linear(x, layer)
    w = weight.codes.double() * weight.scale.double()[:, None]
    exact = x.double() @ w.t() + bias.double()
    bound = (depth + 4) * 2.0**-24 * (x.double().abs() @ w.abs().t() + bias.double().abs())
    assert ((found.double() - exact).abs() <= bound).all()
    assert torch.equal(found, torch.cat([fast.float_input_linear(row[None], layer) for row in x]))
