"""The integer operations against exact integer and float64 arithmetic on the same codes."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqdit.grids.registry import known
from tqdit.ops import reference
from tqdit.ops.reference import int_matmul
from tqdit.ops.schema import WeightParams
from tqdit.spec import Grid

# The accumulator is exact; what is left are the few roundings of its conversion and of the fp32 epilogue.
EPILOGUE = 8 * 2.0**-24


def exact_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a.long(), b.long())


def random_codes(shape: tuple[int, ...], generator: torch.Generator, extreme: bool) -> torch.Tensor:
    if extreme:
        return torch.where(torch.rand(shape, generator=generator) < 0.9, -128, 127).to(torch.int8)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


@given(
    m=st.sampled_from([1, 2, 7, 33]),
    k=st.sampled_from([1, 3, 16, 33, 255, 1023, 1024, 1025, 1300]),
    n=st.sampled_from([1, 5, 16, 31]),
    batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    matrix=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_int_matmul_is_exact(m, k, n, batch, matrix: bool, extreme: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = random_codes((*batch, m, k), generator, extreme)
    b = random_codes((k, n) if matrix else (*batch, k, n), generator, extreme)
    result = int_matmul(a, b)
    assert result.dtype is torch.int32
    assert torch.equal(result.long(), exact_matmul(a, b))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_int_matmul_takes_transposed_and_strided_operands(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    a = random_codes((*batch, 20, 9), generator, False).transpose(-1, -2)[..., ::2]
    b = random_codes((*batch, 14, 10), generator, False).transpose(-1, -2)[..., ::3]
    assert not a.is_contiguous()
    assert torch.equal(int_matmul(a, b).long(), exact_matmul(a, b))


@pytest.mark.parametrize("k", [1024, 1025, 4096, 5000])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (-128, 127), (127, 127), (127, -128)])
def test_int_matmul_of_extreme_codes_is_exact(k: int, batched: bool, left: int, right: int) -> None:
    a, b = torch.full((2, k), left, dtype=torch.int8), torch.full((k, 3), right, dtype=torch.int8)
    if batched:
        a, b = a[None], b[None]
    assert (int_matmul(a, b) == k * left * right).all()


def test_trap_8_fp32_would_not_be_exact_there() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(120, 128, (4, 5000), generator=generator, dtype=torch.int8)
    b = torch.randint(120, 128, (5000, 4), generator=generator, dtype=torch.int8)
    truth = exact_matmul(a, b)
    assert truth.min() > 2**24
    assert not torch.equal((a.float() @ b.float()).long(), truth)
    assert torch.equal(int_matmul(a, b).long(), truth)
    assert torch.equal(int_matmul(a[None], b[None])[0].long(), truth)


def test_an_accumulator_that_could_overflow_is_refused() -> None:
    with pytest.raises(AssertionError, match="overflows"):
        int_matmul(torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(2**17, 1, dtype=torch.int8))
    a = torch.full((1, 2**17 - 1), -128, dtype=torch.int8)
    assert int_matmul(a, a.t()).item() == 2**31 - 2**14


@pytest.mark.parametrize("dtypes", [(torch.int8, torch.int32), (torch.int32, torch.int8), (torch.int32, torch.int32)])
def test_only_int8_codes_are_multiplied(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    a, b = (torch.ones(4, 4, dtype=dtype) for dtype in dtypes)
    with pytest.raises(AssertionError):
        int_matmul(a, b)


def assert_close_to(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
    """|actual - expected| <= EPILOGUE * magnitude, the sum of absolute terms before cancellation."""
    assert actual.dtype is torch.float32
    assert ((actual.double() - expected).abs() <= EPILOGUE * magnitude + 1e-30).all()


def centred_magnitude(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a.abs(), b.abs())


@pytest.mark.parametrize("grid", [grid for grid in known() if not grid.per_row])
@pytest.mark.parametrize("lead", [1, 3])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(operand, weight, exact, grid: Grid, lead: int, per_channel: bool, with_bias: bool) -> None:
    codes, params = operand((3, 5, 70), grid, lead)
    w = weight(9, 70, per_channel)
    bias = torch.randn(9) if with_bias else None
    x = exact(codes, params)
    real_w = w.codes.double() * w.scale.double()[:, None]
    expected, magnitude = x @ real_w.t(), centred_magnitude(x, real_w.t())
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    assert_close_to(reference.linear(codes, params, w, bias), expected, magnitude)


@pytest.mark.parametrize(("lead", "units"), [(1, 1), (1, 2), (3, 2)])
def test_scores(operand, exact, lead: int, units: int) -> None:
    q, q_params = operand((3, 2, 5, 16), lead=lead, units=units)
    k, k_params = operand((3, 2, 7, 16), lead=lead, units=units)
    real_q, real_k = exact(q, q_params), exact(k, k_params).transpose(-1, -2)
    actual = reference.scores(q, q_params, k, k_params, 0.25)
    assert_close_to(actual, real_q @ real_k * 0.25, centred_magnitude(real_q, real_k) * 0.25)


@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.MRQ_SOFTMAX])
@pytest.mark.parametrize(("lead", "units"), [(1, 1), (1, 2), (3, 2)])
def test_values(operand, exact, grid: Grid, lead: int, units: int) -> None:
    p, p_params = operand((3, 2, 5, 7), grid, lead=lead)
    v, v_params = operand((3, 2, 7, 16), lead=lead, units=units)
    real_p, real_v = exact(p, p_params), exact(v, v_params)
    actual = reference.values(p, p_params, v, v_params)
    assert_close_to(actual, real_p @ real_v, centred_magnitude(real_p, real_v))


@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_only_linear_within_the_fp32_bound(weight, per_channel: bool) -> None:
    x, w, bias = torch.randn(2, 6, 50), weight(11, 50, per_channel), torch.randn(11)
    real_w = w.codes.double() * w.scale.double()[:, None]
    expected = x.double() @ real_w.t() + bias.double()
    bound = (50 + 4) * 2.0**-24 * (x.double().abs() @ real_w.t().abs() + bias.double().abs())
    assert ((reference.weight_only_linear(x, w, bias).double() - expected).abs() <= bound).all()


def test_regions_are_split_into_disjoint_supports() -> None:
    codes = torch.arange(-128, 128).to(torch.int8)
    negative, positive = reference.split_regions(codes)
    assert torch.equal(negative + positive, codes)
    assert not ((negative != 0) & (positive != 0)).any()


@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2"])
def test_int_matmul_is_exact_whatever_the_cpu_can_do(isa: str) -> None:
    """Without VNNI torch's own int8 product saturates; the reference must notice."""
    code = (
        "import torch; from tqdit.ops.reference import int_matmul\n"
        "for k in (64, 192, 1030):\n"
        "    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((33, k), (k, 48)))\n"
        "    assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long()), k\n"
        "    a, b = torch.full_like(a, 127), torch.full_like(b, 127)\n"
        "    assert torch.equal(int_matmul(a, b).long(), a.long() @ b.long()), k\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Without torch's int8 product ----------------------------------------------------------------------------------------


@pytest.fixture
def _no_int8_kernel(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("there is no int8 product")

    monkeypatch.setattr(reference, "_has_int8_kernel", lambda *_: False)
    monkeypatch.setattr(torch, "_int_mm", refuse)


def almost_lowest(rows: int, k: int) -> torch.Tensor:
    """Codes of -128 and one of -127 in each row, so that sums of products are odd and as large as they get."""
    codes = torch.full((rows, k), -128, dtype=torch.int8)
    codes[:, 0] = -127
    return codes


@pytest.mark.parametrize("k", [1, 2, 1023, 1024, 1025, 1032, 1040, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.usefixtures("_no_int8_kernel")
def test_sums_that_fp32_cannot_hold_are_exact(k: int, batched: bool) -> None:
    """From K = 1025 on a sum of products may pass 2^24, above which fp32 has no odd numbers."""
    a, b = almost_lowest(2, k), almost_lowest(3, k).t()
    truth = exact_matmul(a, b)
    assert int(truth[0, 0]) % 2 == 1
    assert int(truth[0, 0]) > 2**24 or k <= 1024
    found = int_matmul(a[None], b[None])[0] if batched else int_matmul(a, b)
    assert found.dtype is torch.int32
    assert torch.equal(found.long(), truth)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("k", [3, 1500])
@pytest.mark.usefixtures("_no_int8_kernel")
def test_int_matmul_without_an_int8_kernel(batch: tuple[int, ...], k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = random_codes((*batch, 4, k), generator, True), random_codes((k, 5), generator, False)
    assert torch.equal(int_matmul(a, b).long(), exact_matmul(a, b))


@pytest.mark.parametrize(
    ("m", "k", "n", "takes"),
    [(17, 8, 8, True), (64, 512, 256, True), (16, 8, 8, False), (17, 12, 8, False), (17, 8, 12, False)],
)
def test_an_nvidia_gpu_multiplies_more_than_16_rows_of_aligned_codes(m: int, k: int, n: int, takes: bool) -> None:
    """What torch documents of `_int_mm` on CUDA; the device is only named here."""
    assert reference._has_int8_kernel(m, k, n, torch.device("cuda")) is takes
    assert not reference._has_int8_kernel(m, k, n, torch.device("meta"))


def test_a_cpu_multiplies_any_codes_but_single_columns(monkeypatch) -> None:
    for exact in (True, False):
        monkeypatch.setattr(reference, "_cpu_kernel_is_exact", lambda exact=exact: exact)
        assert reference._has_int8_kernel(3, 2, 5, torch.device("cpu")) is exact
        assert not reference._has_int8_kernel(3, 1, 5, torch.device("cpu"))


def test_an_int8_product_that_saturates_is_noticed(monkeypatch) -> None:
    """Processors without VNNI add two products in 16 bits, one factor shifted to 0..255."""

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products = (a.long() + 128)[:, :, None] * b.long()[None]
        pairs = (products[:, 0::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - 128 * b.long().sum(0)).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not reference._cpu_kernel_is_exact.__wrapped__()
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).to(torch.int32))
    assert reference._cpu_kernel_is_exact.__wrapped__()


# Sums, merged regions, the backend -----------------------------------------------------------------------------------


def test_column_sums_are_of_each_output_channel() -> None:
    codes = torch.tensor([[1, -2, 3], [-128, -128, -128]], dtype=torch.int8)
    sums = reference.column_sums(codes)
    assert sums.dtype is torch.int32
    assert sums.tolist() == [2, -384]


@pytest.mark.parametrize("grid", [Grid.MRQ_GELU, Grid.MRQ_SOFTMAX])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_one_product_of_merged_regions(operand, weight, exact, grid: Grid, shift: int) -> None:
    """s2 = s1 2^shift: s1 s_w (2^shift C2 W +- C1 W) is the value of the two products, its accumulator an integer."""
    codes, params = operand((3, 5, 70), grid, 3, shift=shift)
    w = weight(9, 70)
    real_w = (w.codes.double() * w.scale.double()[:, None]).t()
    x = exact(codes, params)
    assert_close_to(reference.linear(codes, params, w, None), x @ real_w, centred_magnitude(x, real_w))
    if grid is Grid.MRQ_SOFTMAX:
        p, p_params = operand((3, 2, 5, 7), grid, lead=3, shift=shift)
        v, v_params = operand((3, 2, 7, 16), lead=3, units=2)
        real_p, real_v = exact(p, p_params), exact(v, v_params)
        actual = reference.values(p, p_params, v, v_params)
        assert_close_to(actual, real_p @ real_v, centred_magnitude(real_p, real_v))


def test_prepared_weights_have_the_sums_of_their_codes(operand, exact) -> None:
    """They correct the zero point of an activation, whatever sums came along."""
    codes, params = operand((3, 5, 7), lead=3)
    w = WeightParams(torch.randint(-128, 128, (4, 7), dtype=torch.int8), torch.rand(4) + 0.1, 8)
    backend, bias = reference.Reference(), torch.randn(4)
    layer = backend.prepare(w, bias)
    assert layer.weight.colsum.tolist() == w.codes.long().sum(1).tolist()
    real_w = (w.codes.double() * w.scale.double()[:, None]).t()
    x = exact(codes, params)
    magnitude = centred_magnitude(x, real_w) + bias.double().abs()
    assert_close_to(backend.linear(codes, params, layer), x @ real_w + bias.double(), magnitude)
    floats = torch.randn(3, 7)
    assert torch.equal(backend.float_input_linear(floats, layer), reference.weight_only_linear(floats, w, bias))


def test_weight_only_linear_takes_half_precision_and_needs_no_bias(weight) -> None:
    x, w = torch.randn(6, 50).bfloat16(), weight(11, 50)
    out = reference.weight_only_linear(x, w, None)
    assert out.dtype is torch.float32
    assert torch.equal(out, reference.weight_only_linear(x.float(), w, torch.zeros(11)))


def test_the_reference_says_what_its_operations_multiply() -> None:
    backend = reference.Reference()
    assert backend.INTEGER
    assert backend.kernel("float_input_linear") == "float32 x int8"
    assert {backend.kernel(name) for name in ("quantize", "project", "attend", "linear", "scores", "values")} == {
        "int8"
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 40, 1500, 20), (40, 1500, 20), (1, 5, 1, 7)])
def test_integer_products_are_exact_under_autocast(monkeypatch, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As batches and as matrices, with torch's int8 kernel and in pieces of fp32."""
    *lead, m, k, n = shape
    make = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (*lead, m, k), generator=make).to(torch.int8)
    b = torch.randint(-128, 128, (*lead, k, n), generator=make).to(torch.int8)
    expected = a.long() @ b.long()
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(int_matmul(a, b).long(), expected)
        monkeypatch.setattr(reference, "_has_int8_kernel", lambda *_: False)
        assert torch.equal(int_matmul(a, b).long(), expected)
