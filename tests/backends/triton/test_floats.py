"""Layers inside a float model: codes of floats, and products as floats, against `ops.reference`.

On a GPU, on Hopper with the kernel for it, or interpreted. Codes, steps and products are equal bit for bit, results the
reference's fp32 rounded once. Layers on float inputs of 16 bits: bounds are with each test.
"""

import pytest
import torch
from layouts import compiled_for_hopper, read, to, without_gpu
from operands import maker

from poisoned import PoisonedTorch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from test_triton_rows import prepared, row_operand

from tqdit.backends.triton import (
    backend,
    candidates,
    flat,
    float_launch,
    float_operators,
    floats,
    hopper,
    launch,
    tuning,
)
from tqdit.backends.triton.backend import PackedTritonBackend, TritonBackend
from tqdit.backends.triton.layouts import Config, weight_of
from tqdit.backends.triton.relaunch import Plan
from tqdit.errors import InputError
from tqdit.ops.quantizer import quantize
from tqdit.ops.reference import Reference
from tqdit.ops.schema import Float, OperandParams, RowCodes
from tqdit.spec import Grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
REFERENCE = Reference()
DTYPES = torch.bfloat16, torch.float16, torch.float32
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def poisoned_and_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (launch, float_launch, hopper):
        monkeypatch.setattr(module, "torch", PoisonedTorch())
    if DEVICE.type == "cuda":
        monkeypatch.setattr(tuning, "choose_near", lambda keys, device, candidates, run: candidates()[0])


def equal_codes(found, expected, width: int) -> bool:
    if isinstance(expected, RowCodes):
        same = torch.equal(found.scale.cpu(), expected.scale)
        return same and torch.equal(read(found.codes, width), expected.codes.int())
    return torch.equal(read(found, width), expected.int())


# Codes of floats ----------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("grid", [Grid.ROW, Grid.UNIFORM])
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 7, 40), (1, 1, 16), (3, 1, 24), without_gpu(2, 33, 3072)])
def test_channel_factors_and_rows_that_are_apart(batch: int, tokens: int, width: int, grid: Grid, dtype) -> None:
    """The middle of a wider tensor is read where it is; so is a transposed one, through a copy."""
    make = maker(0)
    target = make.params(grid, batch, channels=width)
    wide = make.values(batch, tokens, 3 * width).to(dtype)
    parts = (lambda wide: wide[..., width : 2 * width]), (lambda wide: wide.transpose(0, 1)[..., :width])
    for part in parts:
        x, given = part(wide), target if len(part(wide)) == batch else target._replace(table=target.table[:1])
        found = TritonBackend().quantize(part(to(DEVICE, wide)), to(DEVICE, given))
        assert equal_codes(found, quantize(x, given), width)


def starting_at(place: int, x: torch.Tensor) -> torch.Tensor:
    """A copy of x on the device, `place` numbers after a multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 8, dtype=x.dtype, device=DEVICE)
    found = memory[place : place + x.numel()].view(x.shape).copy_(x)
    assert found.data_ptr() % 16 == place * x.element_size() % 16
    return found


@pytest.fixture
def triton_asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of x, in bytes beyond a multiple of 16, of every launch that takes no kernel of an earlier one."""
    asked: list[int] = []
    launch_known, launch_any = Plan.launch, Plan.launch_any

    def known(self: Plan, tensors, blocks=()) -> None:
        assert tensors[0].data_ptr() % 16 == 0
        launch_known(self, tensors, blocks)

    def anew(self: Plan, tensors, blocks=()):
        asked.append(tensors[0].data_ptr() % 16)
        return launch_any(self, tensors, blocks)

    monkeypatch.setattr(Plan, "launch", known)
    monkeypatch.setattr(Plan, "launch_any", anew)
    return asked


@each_dtype
@pytest.mark.parametrize("grid", [Grid.ROW, Grid.UNIFORM])
def test_floats_that_start_anywhere(grid: Grid, dtype: torch.dtype, triton_asked: list[int]) -> None:
    """Also after a launch for floats that start at a multiple of 16 bytes."""
    make = maker(13)
    target, x = make.params(grid, 2), make.values(2, 7, 40).to(dtype)
    for place in (1, 0, 1, 3):
        found = TritonBackend().quantize(starting_at(place, x), to(DEVICE, target))
        assert equal_codes(found, quantize(x, target), 40)
    assert [start for start in triton_asked if start] == [place * dtype.itemsize for place in (1, 1, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(width, torch.bfloat16) for width in (10, 1536, 2432, 3840, 8960, 13824, 15360, 27648)]
    + [(width, dtype) for width in (10, 3840) for dtype in DTYPES[1:]],
)
def test_rows_of_real_models(width: int, dtype: torch.dtype) -> None:
    x = maker(1).values(2, 37, width).to(dtype)
    for channels in (0, width):
        target = maker(2).params(Grid.ROW, 2, channels=channels)
        assert equal_codes(TritonBackend().quantize(to(DEVICE, x), to(DEVICE, target)), quantize(x, target), width)


# Products as floats -------------------------------------------------------------------------------------------------


def check_product(backend: TritonBackend, source: OperandParams, x: torch.Tensor, columns: int, dtype) -> None:
    """The product of the codes of x, twice: the second launch goes by the first one's key."""
    make, depth = maker(3), x.shape[2]
    weight, bias = make.weight(columns, depth), make.values(columns)
    codes = quantize(x, source)
    expected = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, bias), Float(dtype))
    layer, operand = prepared(backend, weight, bias), to(DEVICE, source)
    given = backend.quantize(to(DEVICE, x), operand)
    for _ in range(2):
        found = backend.linear(given, operand, layer, Float(dtype))
        assert found.dtype is dtype
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*((TritonBackend(), dtype) for dtype in DTYPES), (PackedTritonBackend(), DTYPES[0])],
    ids=lambda value: getattr(value, "NAME", str(value)),
)
@pytest.mark.parametrize(("batch", "tokens", "depth", "columns"), [(1, 1, 16, 16), (3, 11, 130, 35)])
def test_products_are_the_references_rounded_once(backend, batch, tokens, depth, columns, dtype: torch.dtype) -> None:
    """Grids of rows, static ones of one group and of one a sample; for any rows and columns."""
    make = maker(4)
    x = make.values(batch, tokens, depth)
    for source in (row_operand(8, 0.9, batch), make.params(lead=batch), make.params()):
        check_product(backend, source, x, columns, dtype)


@each_dtype
def test_products_of_two_regions(dtype: torch.dtype) -> None:
    for merged in (False, True):
        make = maker(5, 6)
        check_product(TritonBackend(), make.params(Grid.MRQ_GELU, 2, merged=merged), make.values(2, 9, 32), 24, dtype)


HOPPER_SIZES = [
    (2, 77, 2432, 2304), (1, 200, 100, 40), (1, 4608, 3072, 64), (2, 333, 64, 3072), (1, 1, 3072, 1536),
    (1, 16500, 256, 192), (3, 300, 1536, 8960), (1, 130, 16, 16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "tokens", "depth", "columns", "dtype"),
    [
        pytest.param(*sizes, dtype, marks=on_hopper)
        for number, sizes in enumerate(HOPPER_SIZES)
        for dtype in (DTYPES if number < 2 else DTYPES[:1])  # a dtype is a kernel of its own for every tile
    ],
)
def test_products_on_hopper(batch: int, tokens: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    """Tiles that hang over rows, columns and depth, by the kernel in Gluon."""
    make = maker(6)
    assert hopper.takes_floats(torch.device("cuda:0"), columns, 8, False, dtype)
    x = make.values(batch, tokens, depth)
    for source in (row_operand(8, 0.9, batch), make.params(lead=batch)):
        check_product(TritonBackend(), source, x, columns, dtype)


@pytest.mark.parametrize("tile", [pytest.param(t, marks=on_hopper) for t in candidates.TILE_TIMES])
def test_every_tile_on_hopper(tile: tuple[int, int]) -> None:
    make, (bm, bn) = maker(7), tile
    weight, source = make.weight(328, 3000), row_operand(8, 1.0)
    codes = quantize(make.values(1, 1000, 3000), source)
    expected = REFERENCE.linear(codes, source, REFERENCE.prepare(weight, None), Float(torch.bfloat16))
    config = Config(bm, bn, 128, stages=hopper.float_stages(bm, bn, True), hopper=2)
    given = TritonBackend().quantize(to(DEVICE, make.values(1, 1, 3000)), to(DEVICE, source))
    given = RowCodes(torch.nn.functional.pad(codes.codes, (0, given.codes.shape[2] - 3000)).cuda(), codes.scale.cuda())
    layer = weight_of(prepared(TritonBackend(), weight, None))
    found = launch.plain(given, to(DEVICE, source), layer, config, torch.bfloat16)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_codes_and_weights_are_on_one_device() -> None:
    """Kernels get addresses: those of another device would end the process."""
    run, source = TritonBackend(), to(DEVICE, row_operand())
    layer = run.prepare(maker(0).weight(16, 32), None)
    with pytest.raises(InputError, match="cannot take"):
        run.linear(run.quantize(torch.ones(1, 1, 32, device=DEVICE), source), source, layer, Float(torch.float32))
    with pytest.raises(InputError, match="cannot take"):
        run.float_input_linear(torch.ones(1, 32, device=DEVICE), layer, torch.float32)
    many = torch.ones(64, 256, device=DEVICE, dtype=torch.bfloat16)
    with pytest.raises(InputError, match="cannot take"):  # a weight that becomes floats for torch's product
        run.float_input_linear(many, run.prepare(maker(0).weight(16, 256), None), torch.bfloat16)


# Configurations -----------------------------------------------------------------------------------------------------


def test_tiles_follow_from_rounds() -> None:
    """One round of large tiles for many rows; smaller ones where rows would be idle; all fit shared memory."""
    for rows, columns, tile in ((4608, 3072, (128, 128)), (512, 3072, (128, 128)), (4608, 64, (64, 64))):
        assert candidates.hopper_float(rows, columns, 132, True)[:2] == tile
    assert candidates.hopper_float(64, 3072, 132, True).block_m == 64
    for bm, bn in candidates.TILE_TIMES:
        for by_row in (False, True):
            assert hopper.float_stages(bm, bn, by_row) >= 5


@pytest.mark.long
def test_kernels_for_hopper_compile_without_spills(tmp_path) -> None:
    asked = [
        (dtype, rows, bm, bn, hopper.float_stages(bm, bn, rows), even)
        for bm, bn in candidates.TILE_TIMES
        for dtype, rows, even in (("bf16", True, True), ("fp32", False, False))
    ]
    for kernel in compiled_for_hopper("floats", asked, tmp_path):
        assert not kernel["spilled"], kernel
        assert not kernel["warnings"], kernel
        assert kernel["shared"] <= hopper.SHARED_MEMORY, kernel


# Layers on float inputs ---------------------------------------------------------------------------------------------


def float_case(rows: int, depth: int, columns: int, dtype: torch.dtype):
    make = maker(8)
    x, weight, bias = make.values(rows, depth).to(dtype), make.weight(columns, depth), make.values(columns)
    w = weight.codes.double() * weight.scale.double()[:, None]
    exact, size = x.double() @ w.t() + bias.double(), x.double().abs() @ w.abs().t() + bias.double().abs()
    return x, weight, bias, exact, size


@each_dtype
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 64, 40), (3, 300, 70), (9, 64, 33), (40, 64, 24)])
def test_float_inputs_of_any_dtype(rows: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    """Within (K + 4) 2^-24 of the sum of absolute products, as fp32, and the rounding of the result."""
    x, weight, bias, exact, size = float_case(rows, depth, columns, dtype)
    layer = prepared(TritonBackend(), weight, bias)
    for out in (dtype, torch.float32):
        found = TritonBackend().float_input_linear(to(DEVICE, x), layer, out)
        assert found.dtype is out
        bound = (depth + 4) * 2.0**-24 * size + exact.abs() * torch.finfo(out).eps
        assert ((found.cpu().double() - exact).abs() <= bound).all()


@each_dtype
def test_float_inputs_that_start_anywhere(dtype: torch.dtype, triton_asked: list[int]) -> None:
    x, weight, bias, exact, size = float_case(3, 64, 40, dtype)
    layer = prepared(TritonBackend(), weight, bias)
    bound = (64 + 4) * 2.0**-24 * size + exact.abs() * torch.finfo(dtype).eps
    for place in (1, 0, 1):
        found = TritonBackend().float_input_linear(starting_at(place, x), layer, dtype)
        assert ((found.cpu().double() - exact).abs() <= bound).all()
    assert [start for start in triton_asked if start] == [dtype.itemsize] * 2


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_rows_are_multiplied_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight, bias and result are rounded to the dtype, each within half its eps: together 2 eps of all products."""
    x, weight, bias, exact, size = float_case(floats.MANY_ROWS + 1, floats.DEEP, 40, dtype)
    layer = prepared(TritonBackend(), weight, bias)
    monkeypatch.setattr(float_launch, "float_input", None)
    found = TritonBackend().float_input_linear(to(DEVICE, x), layer, dtype).cpu()
    assert found.dtype is dtype
    assert ((found.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * size).all()


# Graphs of torch ----------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """A layer of a float model: its input becomes codes, its result floats."""

    def __init__(self, target: OperandParams) -> None:
        super().__init__()
        self.target, self.run = target, TritonBackend()
        self.layer = prepared(self.run, maker(9).weight(24, 40), None)
        self.also = prepared(self.run, maker(9).weight(24, 40), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.run.linear(self.run.quantize(x, self.target), self.target, self.layer, Float(x.dtype))
        return y + self.run.float_input_linear(x, self.also, x.dtype)


@pytest.mark.parametrize(
    ("grid", "factors"), [(Grid.ROW, True), (Grid.UNIFORM, False), without_gpu(Grid.MRQ_GELU, True)]
)
def test_graphs_are_whole_and_serve_all_numbers_of_tokens(grid: Grid, factors: bool) -> None:
    """Without a break, and without compiling again for another number of tokens; equal to plain calls."""
    layer = Layer(to(DEVICE, maker(10).params(grid, channels=40 if factors else 0)))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    first, later = (to(DEVICE, maker(11).values(2, tokens, 40).bfloat16()) for tokens in (9, 5))
    with torch.inference_mode():
        assert torch.equal(compiled(first), layer(first))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(compiled(later), layer(later))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("grid", [Grid.ROW, Grid.UNIFORM])
def test_graphs_that_are_compiled(grid: Grid) -> None:
    """On the grid of rows the same numbers; on a uniform one codes differ by one at most, at rounding boundaries."""
    layer = Layer(to(DEVICE, maker(10).params(grid)))
    torch.compiler.reset()
    x = to(DEVICE, maker(11).values(2, 300, 40).bfloat16())
    with torch.inference_mode():
        expected, found = layer(x), torch.compile(layer, fullgraph=True)(x)
        if grid is Grid.ROW:
            assert torch.equal(found, expected)
            return
        codes = torch.compile(lambda x: layer.run.quantize(x, layer.target), fullgraph=True)(x)
    difference = (codes.int() - layer.run.quantize(x, layer.target).int())[..., :40].abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3


def test_operators_have_true_fake_implementations() -> None:
    make, run = maker(12), TritonBackend()
    source = to(DEVICE, make.params(Grid.ROW, 2))
    x = to(DEVICE, make.values(2, 5, 20))
    layer = prepared(run, make.weight(24, 20), None)
    codes = run.quantize(x, source)
    weight = [layer.codes, layer.scale, layer.bias, layer.sums], [20, 8]
    given = flat.flatten(source)
    for operator, args in (
        (float_operators.quantize_floats, (x, None, *given)),
        (float_operators.quantize_floats, (x, to(DEVICE, torch.ones(20)), *given)),
        (float_operators.linear_to_floats, (list(codes), *weight, *given, torch.bfloat16)),
        (float_operators.linear_from_floats, (x[0], *weight, torch.float16)),
    ):
        found = torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}


def test_an_exported_program_has_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export records operators: a kernel that is launched while it traces would be lost."""

    class Quantize(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            codes = TritonBackend().quantize(x, row_operand())
            return codes.codes, codes.scale

    monkeypatch.setattr(backend, "NATIVE", True)  # as on a GPU
    monkeypatch.setattr(floats, "quantize_rows_kernel", None)
    for strict in (False, True):
        program = torch.export.export(Quantize(), (torch.ones(1, 5, 64),), strict=strict)
        names = [str(node.target) for node in program.graph.nodes]
        assert names.count("tqdit.quantize_floats.default") == 1
