"""Every verb of every backend against `ops.reference`, by verbs alone: no layout of codes is known here.

A new backend is one more name in NAMES, and in WITHOUT_ROWS if it has no grids of rows yet. Signed codes become a
backend's own by `quantize` of the values that they mean, and are read back through a linear layer whose weight is 1.
`linear` without and with a residual, and projections, are equal bit for bit. After LayerNorm, GELU and exp, which are
rounded differently, a code may be the next one where the value is within `ties.TIE` steps of a boundary; an attended
code, behind codes of probabilities, may then differ by one step, which few do.
"""

from typing import Any

import pytest
import torch
from operands import Maker, as_operand, maker, meant, signed_codes
from ties import assert_equal_up_to_ties
from torch.nn.functional import gelu

from tqdit.errors import InputError
from tqdit.grids.row import row_scales
from tqdit.ops.dispatch import get_backend
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Activation, AttentionParams, Norm, OperandParams, Residual, RowCodes, WeightParams
from tqdit.ops.tables import parameters
from tqdit.spec import Grid

NAMES = ("reference", "cpu", "triton", "triton-packed")
WITHOUT_ROWS: tuple[str, ...] = ()  # backends without the grids of rows and without channel factors
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REFERENCE = Reference()
BATCH, TOKENS, HEADS, HEAD_DIM = 2, 5, 3, 6
WIDTH = HEADS * HEAD_DIM
GRIDS = [
    (Grid.UNIFORM, 8, False), (Grid.UNIFORM, 4, False), (Grid.MRQ_GELU, 8, False), (Grid.MRQ_GELU, 6, True),
    (Grid.ROW, 8, False), (Grid.ROW, 4, False),
]  # fmt: skip
PROBABILITIES = [
    (Grid.UNIFORM, 8, False), (Grid.UNIFORM, 4, False), (Grid.MRQ_SOFTMAX, 8, False), (Grid.MRQ_SOFTMAX, 6, True),
    (Grid.SOFTMAX_ROW, 8, False), (Grid.SOFTMAX_ROW, 4, False),
]  # fmt: skip
STREAMS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
each_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=list(STREAMS))
each_grid = pytest.mark.parametrize(("grid", "bits", "merged"), GRIDS)
each_probability = pytest.mark.parametrize(("grid", "bits", "merged"), PROBABILITIES)


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or tensors in tuples, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        parts = [moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class Run:
    """A backend on a device, called with tensors of the CPU; codes stay where and as they are."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.backend, self.device = name, get_backend(name, device), device

    def __call__(self, verb: str, *given: Any) -> Any:
        if self.name in WITHOUT_ROWS and any(needs_rows(x) for x in given):
            pytest.skip(f"{self.name} has no grids of rows and no channel factors")
        return getattr(self.backend, verb)(*(moved(x, self.device) for x in given))

    def layer(self, weight: WeightParams, bias: torch.Tensor | None = None, prepare: str = "prepare") -> Any:
        return getattr(self.backend, prepare)(weight, bias).to(self.device)

    def own(self, codes: torch.Tensor, params: OperandParams) -> Any:
        """Signed codes as the backend's."""
        return self("quantize", meant(codes, params), params)

    def values(self, codes: Any, params: OperandParams, width: int) -> torch.Tensor:
        """The values of a backend's codes, fp32: through a layer that is 1."""
        layer = self.layer(WeightParams(torch.eye(width, dtype=torch.int8), torch.ones(1), 8))
        return self("linear", codes, params, layer).cpu()

    def signed(self, codes: Any, params: OperandParams, width: int, coded: torch.Tensor | None = None) -> torch.Tensor:
        """The inverse of `own`, int8. `coded`: on the grid of rows, the values that were coded; steps are theirs."""
        value, p = self.values(codes, params, width), parameters(params, 3)
        if params.grid is Grid.ROW:
            assert coded is not None
            steps = value / row_scales(coded, p.scale)
            assert (steps - torch.round(steps)).abs().max() < 0.01
            return torch.round(steps).to(torch.int8)
        if params.grid is Grid.UNIFORM:
            return (torch.round(value / p.scale) + p.zero_point).to(torch.int8)
        return torch.round(value / torch.where(value < 0, p.scale, p.coarse)).to(torch.int8)

    def projected(self, codes: torch.Tensor, targets: tuple[OperandParams, ...]) -> Any:
        """Signed codes (B, N, parts C) as projected ones: of a layer that makes them of themselves, all scales 1."""
        source = as_operand(Grid.UNIFORM, 8, torch.ones(1, 1), torch.zeros(1, 1))
        plain = [as_operand(Grid.UNIFORM, t.bits, torch.ones(1, HEADS), torch.zeros(1, HEADS)) for t in targets]
        layer = self.layer(WeightParams(torch.eye(codes.shape[-1], dtype=torch.int8), torch.ones(1), 8))
        return self("project", self.own(codes, source), source, layer, tuple(plain), HEADS)


@pytest.fixture(
    params=[
        pytest.param((name, device), id=f"{name}-{device}", marks=pytest.mark.gpu if device == CUDA else ())
        for device in (CPU, CUDA)
        for name in NAMES
    ]
)
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    name, device = request.param
    if device == CUDA and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        found = Run(name, device)
    except InputError as error:
        pytest.skip(str(error))
    if name.startswith("triton") and device == CUDA:  # nothing is timed
        from tqdit.backends.triton import tuning

        monkeypatch.setattr(tuning, "choose", lambda key, device, candidates, run: candidates()[0])
    return found


def needs_rows(value: Any) -> bool:
    """Say whether an argument has an operand with rows or channel factors."""
    if isinstance(value, OperandParams):
        return value.grid.per_row or value.channels is not None
    return isinstance(value, tuple | list) and any(needs_rows(part) for part in value)


def weight_of(make: Maker, out: int, inner: int, bits: int = 8) -> WeightParams:
    weight = make.weight(out, inner)
    return WeightParams(weight.codes >> (8 - bits), weight.scale * 2 ** (8 - bits), bits)


# Codes of floats ----------------------------------------------------------------------------------------------------


@each_grid
@each_stream
def test_quantize(run: Run, grid: Grid, bits: int, merged: bool, stream: torch.dtype) -> None:
    """Without a norm; samples in different time groups, values beyond the grid."""
    make = maker(0, bits)
    x, target = (make.values(BATCH, TOKENS, WIDTH) * 3).to(stream), make.params(grid, BATCH, merged=merged)
    codes = run("quantize", x, target)
    if grid is Grid.ROW:  # codes and steps
        assert torch.equal(run.values(codes, target, WIDTH), dequantize(quantize(x, target), target))
        return
    found = run.signed(codes, target, WIDTH)
    if grid is Grid.UNIFORM:
        assert torch.equal(found, quantize(x.float(), target))
    assert_equal_up_to_ties(found.int(), x.double(), target)


@each_stream
@pytest.mark.parametrize(("batch", "bits"), [(1, 4), (BATCH, 8)])
@pytest.mark.parametrize("grid", [Grid.UNIFORM, Grid.ROW])
def test_quantize_after_a_norm(run: Run, stream: torch.dtype, batch: int, bits: int, grid: Grid) -> None:
    make = maker(1, bits)
    x = (make.values(batch, TOKENS, WIDTH) * 3 + 1).to(stream)
    shift, scale, *_ = make.values(batch, 6 * WIDTH).chunk(6, dim=1)  # rows of a wider tensor
    target = make.params(grid, batch)
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normal = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    value = normal * (1 + scale.double()[:, None]) + shift.double()[:, None]
    codes = run("quantize", x, target, Norm(shift, scale, 1e-6))
    assert_equal_up_to_ties(run.signed(codes, target, WIDTH, value).int(), value, target)


@each_grid
def test_channel_factors(run: Run, grid: Grid, bits: int, merged: bool) -> None:
    """They multiply the values that are coded, with and without GELU before."""
    make, eight = maker(13, bits), maker(14)
    x, target = make.values(BATCH, TOKENS, WIDTH) * 2, make.params(grid, BATCH, merged=merged, channels=WIDTH)
    plain = target._replace(channels=None)
    coded = x * target.channels
    found = run.signed(run("quantize", x, target), plain, WIDTH, coded)
    assert_equal_up_to_ties(found.int(), coded.double(), plain)
    source, codes = eight.params(lead=BATCH), eight.codes(BATCH, TOKENS, WIDTH)
    weight = weight_of(eight, WIDTH, WIDTH, bits)
    hidden = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, None)).double()
    coded = gelu(hidden, approximate="tanh") * target.channels
    given = run("linear", run.own(codes, source), source, run.layer(weight), Activation(target))
    assert_equal_up_to_ties(run.signed(given, plain, WIDTH, coded).int(), coded, plain)


# Linear layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_accumulators_are_exact(run: Run, bits: int) -> None:
    """With scales of 1; an odd depth, and codes at the ends of their range."""
    make, depth, out = maker(2), 133, 19
    codes, weight = make.codes(BATCH, TOKENS, depth), weight_of(make, out, depth, bits)
    codes[0], weight.codes[:3] = 127, -(1 << (bits - 1))
    source = as_operand(Grid.UNIFORM, 8, torch.ones(1, 1), torch.full((1, 1), -128.0))
    layer = run.layer(weight._replace(scale=torch.ones(1)))
    assert torch.equal(layer.unpacked().cpu(), weight.codes)
    expected = (codes.long() + 128) @ weight.codes.long().t()
    assert torch.equal(run("linear", run.own(codes, source), source, layer).cpu(), expected.float())


@each_grid
def test_linear_is_equal(run: Run, grid: Grid, bits: int, merged: bool) -> None:
    """Alone; with a residual in fp32 and bf16, with a gate and without.

    On a GPU each is a kernel to compile: one grid has all of them.
    """
    make, depth = maker(3, bits), 2 * WIDTH + 1
    codes, source = make.codes(BATCH, TOKENS, depth), make.params(grid, BATCH, merged=merged)
    weight, bias = weight_of(make, WIDTH, depth, bits), make.values(WIDTH)
    x, gate = make.values(BATCH, TOKENS, WIDTH), make.values(BATCH, 6 * WIDTH).chunk(6, dim=1)[2]
    short = x.bfloat16()
    given, layer, known = run.own(codes, source), run.layer(weight, bias), signed_codes(codes, source)
    every = (None, Residual(short, gate), Residual(x, gate), Residual(x, None), Residual(short, None))
    for then in every if run.device == CPU or (grid, bits) == GRIDS[0][:2] else every[:2]:
        expected = REFERENCE.linear(known, source, REFERENCE.prepare(weight, bias), then)
        found = run("linear", given, source, layer, then)
        assert found.dtype is expected.dtype
        assert torch.equal(found.cpu(), expected)


def test_a_residual_in_fp16_is_equal(run: Run) -> None:
    make = maker(11)
    codes, source = make.codes(BATCH, TOKENS, 2 * WIDTH + 1), make.params(lead=BATCH)
    weight, bias = weight_of(make, WIDTH, 2 * WIDTH + 1), make.values(WIDTH)
    x, gate = make.values(BATCH, TOKENS, WIDTH).half(), make.values(BATCH, 6 * WIDTH).chunk(6, dim=1)[2]
    for then in (Residual(x, gate), Residual(x, None)):
        found = run("linear", run.own(codes, source), source, run.layer(weight, bias), then)
        assert found.dtype is torch.float16
        assert torch.equal(found.cpu(), REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias), then))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's, in Triton's interpreter
def test_a_sum_beyond_fp16_is_inf(run: Run) -> None:
    """The largest number of fp16 is 65504; from 65520 on the nearest is Inf, of the sum's sign."""
    source = as_operand(Grid.UNIFORM, 8, torch.ones(1, 1), torch.zeros(1, 1))
    layer = run.layer(WeightParams(torch.eye(WIDTH, dtype=torch.int8), torch.ones(1), 8))
    added = torch.tensor([0, 15, 16, 17, 127, -15, -16, -128]).repeat(BATCH, TOKENS, 3)[..., :WIDTH].to(torch.int8)
    x = torch.where(added < 0, -65504.0, 65504.0).half()
    expected = torch.where(added.int().abs() < 16, x.float(), x.float() * float("inf"))
    for gate in (torch.ones(BATCH, WIDTH), None):
        found = run("linear", run.own(added, source), source, layer, Residual(x, gate))
        assert found.dtype is torch.float16
        assert torch.equal(found.cpu().float(), expected)


@each_grid
def test_linear_with_an_activation(run: Run, grid: Grid, bits: int, merged: bool) -> None:
    """Codes up to ties; the next layer reads exactly these."""
    make, eight = maker(4, bits), maker(5)
    source, target = eight.params(lead=BATCH), make.params(grid, BATCH, merged=merged)
    codes = eight.codes(BATCH, TOKENS, WIDTH)
    first, second = weight_of(eight, 2 * WIDTH, WIDTH, bits), weight_of(eight, WIDTH, 2 * WIDTH, bits)
    bias = eight.values(2 * WIDTH)
    hidden = REFERENCE.linear(codes, source, REFERENCE.prepare(first, bias)).double()
    given = run("linear", run.own(codes, source), source, run.layer(first, bias), Activation(target))
    activated = gelu(hidden, approximate="tanh")
    found = run.signed(given, target, 2 * WIDTH, activated)
    assert_equal_up_to_ties(found.int(), activated, target)
    after = run("linear", given, target, run.layer(second)).cpu()
    if grid is Grid.ROW:
        steps = row_scales(activated.float(), parameters(target, 3).scale).squeeze(-1)
        expected = REFERENCE.linear(RowCodes(found, steps), target, REFERENCE.prepare(second, None))
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
        return
    assert torch.equal(after, REFERENCE.linear(found, target, REFERENCE.prepare(second, None)))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("rows", [1, 9])
def test_float_input_linear(run: Run, rows: int, bits: int) -> None:
    """Within (K + 4) 2^-24 of the sum of absolute products, as fp32."""
    make, depth, out = maker(6), 37, 11
    x, weight, bias = make.values(rows, depth), weight_of(make, out, depth, bits), make.values(out)
    found = run("float_input_linear", x, run.layer(weight, bias, "prepare_float_input")).cpu()
    w = weight.codes.double() * weight.scale.double()[:, None]
    exact, size = x.double() @ w.t() + bias.double(), x.double().abs() @ w.abs().t() + bias.abs()
    assert ((found - exact).abs() <= (depth + 4) * 2.0**-24 * size).all()


# Projections and attention ------------------------------------------------------------------------------------------


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 0.02) -> None:
    """Check attended codes: none is more than a step from the reference's, and at most a `share` is one step away."""
    apart = (found.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() <= share


def attention_of(make: Maker, grid: Grid, merged: bool, lead: int = BATCH) -> tuple[AttentionParams, OperandParams]:
    return make.attention(HEADS, grid, lead, merged), make.params(lead=lead, reach=2.0)


def both(
    run: Run,
    make: Maker,
    tokens: int,
    targets: tuple[OperandParams, ...],
    lead: int = BATCH,
    grid: Grid = Grid.UNIFORM,
) -> tuple:
    """Codes of random inputs projected by the backend and by the reference. `grid`: of the inputs."""
    codes, source = make.codes(BATCH, tokens, 20), make.params(grid, lead)
    weight, bias = weight_of(make, len(targets) * WIDTH, 20, 6), make.values(len(targets) * WIDTH)
    found = run("project", run.own(codes, source), source, run.layer(weight, bias), targets, HEADS)
    known = signed_codes(codes, source)
    return found, REFERENCE.project(known, source, REFERENCE.prepare(weight, bias), targets, HEADS)


@each_probability
def test_self_attention(run: Run, grid: Grid, bits: int, merged: bool) -> None:
    """Without a bias and with one."""
    make = maker(7, bits)
    attention, target = attention_of(make, grid, merged)
    projected, expected = both(run, make, TOKENS, attention.projections)
    for bias in (None, make.values(BATCH, TOKENS)):
        found = run("attend", projected, attention, target, None, bias)
        close(run.signed(found, target, WIDTH), REFERENCE.attend(expected, attention, target, None, bias))


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_among_rows(run: Run, bits: int) -> None:
    """The input and the result are rows, whose steps follow from values that differ where codes do."""
    make = maker(15, bits)
    attention, target = attention_of(make, Grid.SOFTMAX_ROW, False)
    target = make.params(Grid.ROW, BATCH)
    projected, expected = both(run, make, TOKENS, attention.projections, grid=Grid.ROW)
    known = REFERENCE.attend(expected, attention, target)
    value = run.values(run("attend", projected, attention, target), target, WIDTH)
    close(torch.round(value / known.scale[..., None]), known.codes)


@pytest.mark.parametrize(
    ("grid", "bits", "merged", "keys", "biased"),
    [
        (*PROBABILITIES[0], 3, False), (*PROBABILITIES[0], 70, True), (*PROBABILITIES[1], 3, True),
        (*PROBABILITIES[2], 3, True), (*PROBABILITIES[2], 16, False), (*PROBABILITIES[3], 70, True),
        (*PROBABILITIES[4], 3, True), (*PROBABILITIES[4], 70, True), (*PROBABILITIES[5], 16, False),
    ],
)  # fmt: skip
def test_attention_to_a_context(run: Run, grid: Grid, bits: int, merged: bool, keys: int, biased: bool) -> None:
    """The context has one time group, is kept, copied as a CUDA graph's input is, and serves two calls."""
    make = maker(8, bits)
    attention, target = attention_of(make, grid, merged)
    one, _ = attention_of(make, grid, merged, lead=1)
    attention = attention._replace(key=one.key, value=one.value)
    bias = torch.where(torch.arange(keys) % 3 == 2, -10000.0, make.values(BATCH, keys)) if biased else None
    context, expected_context = both(run, make, keys, (attention.key, attention.value), lead=1)
    context = kept(context)
    for tokens in (TOKENS, 1):
        query, expected = both(run, make, tokens, (attention.query,))
        found = run("attend", query, attention, target, context, bias)
        expected = REFERENCE.attend(expected, attention, target, expected_context, bias)
        close(run.signed(found, target, WIDTH), expected)


def kept(projected: Any) -> Any:
    """A copy of a tensor, or of a named tuple of tensors and ints: nothing else is allowed."""
    if isinstance(projected, torch.Tensor):
        return projected.clone()
    assert all(isinstance(part, torch.Tensor | int) for part in projected)
    return type(projected)(*(part.clone() if isinstance(part, torch.Tensor) else part for part in projected))


@each_probability
def test_values_of_a_single_key_are_equal(run: Run, grid: Grid, bits: int, merged: bool) -> None:
    """Its probability is 1 whatever the scores, so that the projected values themselves are seen."""
    make = maker(9, bits)
    attention, target = attention_of(make, grid, merged)
    context, expected_context = both(run, make, 1, (attention.key, attention.value))
    query, expected = both(run, make, TOKENS, (attention.query,))
    found = run.signed(run("attend", query, attention, target, context), target, WIDTH)
    assert torch.equal(found, REFERENCE.attend(expected, attention, target, expected_context))


def test_hidden_keys_do_not_matter(run: Run) -> None:
    make, keys, seen = maker(10), 7, 4
    attention, target = attention_of(make, Grid.MRQ_SOFTMAX, False)
    query = run.projected(make.codes(BATCH, TOKENS, WIDTH), (attention.query,))
    first, other = make.codes(BATCH, keys, 2 * WIDTH), make.codes(BATCH, keys, 2 * WIDTH)
    other[:, :seen] = first[:, :seen]
    bias = torch.zeros(BATCH, keys).index_fill(1, torch.arange(seen, keys), -10000.0)
    contexts = (run.projected(codes, (attention.key, attention.value)) for codes in (first, other))
    found = [run.signed(run("attend", query, attention, target, c, bias), target, WIDTH) for c in contexts]
    assert torch.equal(*found)
    unhidden = run("attend", query, attention, target, run.projected(other, (attention.key, attention.value)))
    assert not torch.equal(run.signed(unhidden, target, WIDTH), found[0])


def test_a_sample_whose_keys_are_all_hidden(run: Run) -> None:
    """Its scores have a precision of 2^-10, so that more codes are a step apart; the other sample is as ever."""
    make, keys = maker(11), 7
    attention, target = attention_of(make, Grid.UNIFORM, False)
    bias = torch.tensor([-10000.0, 0.0])[:, None].expand(BATCH, keys)
    context, expected_context = both(run, make, keys, (attention.key, attention.value))
    query, expected = both(run, make, TOKENS, (attention.query,))
    found = run.signed(run("attend", query, attention, target, context, bias), target, WIDTH)
    expected = REFERENCE.attend(expected, attention, target, expected_context, bias)
    close(found[:1], expected[:1], 0.25)
    close(found[1:], expected[1:])


@pytest.mark.parametrize("group", [torch.tensor([2]), torch.tensor([2, 2])], ids=["one", "each"])
def test_a_group_of_the_whole_batch(run: Run, group: torch.Tensor) -> None:
    """The rows are the same, whether one number stands for all samples or each has its own."""
    make = maker(12)
    codes, weight, source = make.codes(BATCH, TOKENS, WIDTH), weight_of(make, WIDTH, WIDTH), make.params(lead=BATCH)
    source = source._replace(group=group)
    alone = source._replace(table=source.table[2:], group=None)
    expected = REFERENCE.linear(codes, alone, REFERENCE.prepare(weight, None))
    assert torch.equal(run("linear", run.own(codes, source), source, run.layer(weight)).cpu(), expected)


@pytest.mark.parametrize("operation", ["linear", "scores", "values", "float_input_linear"])
def test_kernels_have_names(run: Run, operation: str) -> None:
    assert run.backend.kernel(operation)
