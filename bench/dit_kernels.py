"""The kernels of DiT models on random operands, which gpu_kernels.py measures and tune.py finds configurations for."""

import concurrent.futures
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from tqdit.architectures.dit_shapes import SIZES
from tqdit.architectures.patches import FEW_TOKENS
from tqdit.backends.triton import candidates, float_launch, hopper, launch, naming
from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.layer import TritonLinear
from tqdit.backends.triton.layouts import KINDS, Config, Projected, Weight, part_sizes, with_steps
from tqdit.ops.schema import Codes, Norm, OperandParams, Residual, RowCodes, WeightParams

LINEARS = {  # epilogue, depth and columns in widths of the model, products
    "qkv": ("heads", 1, 3, 1),
    "out": ("residual bfloat16", 1, 1, 1),
    "fc1": ("gelu", 1, 4, 1),
    "fc2": ("residual bfloat16", 4, 1, 1),
    "fc2, 2 products": ("residual bfloat16", 4, 1, 2),
    "out, fp32 stream": ("residual", 1, 1, 1),
    "fc2, fp32 stream": ("residual", 4, 1, 1),
    "fc2, 2 products, fp32 stream": ("residual", 4, 1, 2),
    "qkv, rows": ("heads", 1, 3, 1),
    "fc1, rows": ("gelu", 1, 4, 1),
    "fc1, channels": ("gelu-channels", 1, 4, 1),
    "fc1, channels, rows": ("gelu-channels", 1, 4, 1),
    "out, rows": ("residual bfloat16", 1, 1, 1),
    "fc2, rows": ("residual bfloat16", 4, 1, 1),
}
NORMS = {
    "norm": torch.bfloat16,
    "norm, fp32 stream": torch.float32,
    "norm, rows": torch.bfloat16,
    "norm, fp32 stream, rows": torch.float32,
}
ROWS = ", rows"  # the end of the names of kernels that read or write the grid of rows
PROBABILITIES = {
    "uniform": rounding.UNIFORM.value,
    "MRQ": rounding.SOFTMAX.value,
    "merged": rounding.SOFTMAX_MERGED.value,
    "softmax rows": rounding.SOFTMAX_ROW.value,
}
SMALL = 2  # samples, for compiling
PROCESSES = 14
COPIES = 256  # of weights
DEVICE = torch.device("cuda")


class Shape(NamedTuple):
    """A size of DiT."""

    name: str
    width: int
    heads: int
    layers: int

    @classmethod
    def named(cls, name: str) -> "Shape":
        layers, heads, head_dim = SIZES[name]
        return cls(name, heads * head_dim, heads, layers)

    @property
    def float_inputs(self) -> dict[str, tuple[bool, int, int]]:
        """Layers on float inputs by name: whether one has a row per token, its columns, its depth."""
        return {
            "adaLN of all blocks": (False, self.layers * 6 * self.width, self.width),
            "final adaLN": (False, 2 * self.width, self.width),
            "timestep, first": (False, self.width, 256),
            "timestep, second": (False, self.width, self.width),
            "final": (True, 32, self.width),
            "patches": (True, self.width, 16),
        }


class Kernel(NamedTuple):
    """`run` launches a kernel with a configuration, with each of `copies` of its weights once."""

    run: Callable[[Config], object]
    copies: int = 1


class Job(NamedTuple):
    """One kernel at one size: samples and tokens of each.

    `key`: of its best configuration, `ordinary_key`: of the best one not for Hopper alone. `candidates`: best first, as
    far as it can be foreseen. `operations` on int8 or bf16 and `bytes`: what it cannot do without.
    """

    shape: Shape
    size: tuple[int, int]
    name: str
    key: str
    ordinary_key: str
    candidates: tuple[Config, ...]
    operations: int
    bytes: int


def jobs(shape: Shape, batch: int, tokens: int) -> Iterator[Job]:
    """Every kernel of a model at a batch size, in every form."""
    size, rows = (batch, tokens), batch * tokens
    for name, (epilogue, depths, widths, products) in LINEARS.items():
        depth, columns = depths * shape.width, widths * shape.width
        two, by_row = products == 2, name.endswith(ROWS)
        ordinary_key = naming.linear_key(epilogue, rows, columns, depth, 8, two, 0, by_row)
        tile = hopper.rows_of_tile(DEVICE, tokens, 8, two)
        key = naming.linear_key(epilogue, rows, columns, depth, 8, two, tile, by_row)
        out = {"heads": 1, "gelu": 1, "gelu-channels": 1, "residual bfloat16": 4, "residual": 8}[epilogue]
        moved = rows * depth + columns * depth + rows * columns * out
        possible = candidates.hopper_linear(epilogue, rows, columns, tile) + candidates.linear(rows, two, 8)
        ranked = candidates.best_first(possible, DEVICE, rows, columns, depth)
        yield Job(shape, size, name, key, ordinary_key, tuple(ranked), 2 * rows * columns * depth * products, moved)
    for name, mode in PROBABILITIES.items():
        head_dim, forms = shape.width // shape.heads, (name == "MRQ", name == "softmax rows")
        ordinary_key = naming.attention_key(batch * shape.heads, tokens, head_dim, mode)
        special = candidates.hopper_attention(DEVICE, tokens, head_dim, *forms)
        key = naming.attention_key(batch * shape.heads, tokens, head_dim, mode, bool(special))
        operations = 2 * rows * tokens * shape.width * (3 if name == "MRQ" else 2)
        ranked = special + candidates.attention(batch * shape.heads, tokens)
        moved = 4 * rows * shape.width
        yield Job(shape, size, f"attention, {name}", key, ordinary_key, tuple(ranked), operations, moved)
    for name, (per_token, columns, depth) in shape.float_inputs.items():
        m = min(rows, FEW_TOKENS) if per_token else batch
        moved = 4 * m * depth + columns * depth + 4 * m * columns
        key = naming.float_key(m, columns, depth, 8)
        yield Job(shape, size, name, key, key, tuple(candidates.float_input(m, columns)), 0, moved)
    for name, stream in NORMS.items():
        key = naming.norm_key(rows, shape.width, stream, name.endswith(ROWS))
        moved = (stream.itemsize + 1) * rows * shape.width
        yield Job(shape, size, name, key, key, tuple(candidates.norm(rows, shape.width)), 0, moved)


def maker(job: Job, small: bool = False) -> Kernel:
    """The kernel on random operands, at the size of the job or at a small one that compiles to the same."""
    (batch, tokens), (_, width, heads, _) = job.size, job.shape
    floats = job.shape.float_inputs
    batch = min(batch, SMALL) if small and not (job.name in floats and not floats[job.name][0]) else batch
    group = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    torch.manual_seed(0)
    if job.name in LINEARS:
        epilogue, depths, widths, products = LINEARS[job.name]
        x, source = codes(batch, tokens, depths * width), source_of(products, group)
        if job.name.endswith(ROWS):
            x, source = RowCodes(x, torch.rand(batch, tokens, device=DEVICE) * 0.03), row_operand(group)
        run = linear(epilogue, x, source, widths * width, group, heads)
        return with_copies(run, weight(widths * width, depths * width), alone=small)
    if job.name in floats:
        per_token, columns, depth = floats[job.name]
        columns = min(columns, 6 * width) if small else columns
        x = torch.randn(min(batch * tokens, FEW_TOKENS) if per_token else batch, depth, device=DEVICE)
        return with_copies(
            lambda config, layer: float_launch.float_input(x, layer, config), weight(columns, depth), small
        )
    if job.name in NORMS:
        x = torch.randn(batch, tokens, width, device=DEVICE).to(NORMS[job.name])
        modulation = torch.randn(batch, 6 * width, device=DEVICE)
        parts = modulation[:, :width], modulation[:, width : 2 * width]
        target = row_operand(group) if job.name.endswith(ROWS) else operand(group)
        return Kernel(lambda config: launch.norm_quantize(x, Norm(*parts, 1e-6), target, config))
    mode, head_dim = PROBABILITIES[job.name.partition(", ")[2]], width // heads
    qkv = Projected(codes(sum(part_sizes(3, batch, tokens, heads, head_dim))), batch, tokens, head_dim)
    parts = [operand(group, heads) for _ in range(3)]
    zero = -128.0 if mode != rounding.SOFTMAX.value else 0.0
    operands = (*parts, operand(group, mode=mode, scale=1 / 255, zero=zero), operand(group))
    return Kernel(lambda config: launch.attend(qkv, None, None, heads, operands, config))


def source_of(products: int, group: torch.Tensor) -> OperandParams:
    return operand(group, mode=rounding.GELU.value if products == 2 else rounding.UNIFORM.value)


def row_operand(group: torch.Tensor) -> OperandParams:
    return operand(group, mode=rounding.BY_ROW.value, scale=1 / 127, zero=0.0)


def linear(
    epilogue: str, x: Codes, source: OperandParams, columns: int, group: torch.Tensor, heads: int
) -> Callable[[Config, Weight], object]:
    batch, tokens = with_steps(x)[0].shape[:2]
    if epilogue == "heads":
        targets = tuple(operand(group, heads) for _ in range(3))
        return lambda config, layer: launch.project(x, source, layer, config, targets, heads)
    if epilogue.startswith("gelu"):
        channels = torch.rand(columns, device=DEVICE) + 0.5 if epilogue == "gelu-channels" else None
        target = operand(group)._replace(channels=channels)
        return lambda config, layer: launch.activation(x, source, layer, config, target)
    stream, gate = torch.randn(batch, tokens, columns, device=DEVICE), torch.randn(batch, 6 * columns, device=DEVICE)
    stream = stream.to(torch.bfloat16 if epilogue.endswith("bfloat16") else torch.float32)
    then = Residual(stream, gate[:, columns : 2 * columns])
    return lambda config, layer: launch.residual(x, source, layer, config, then)


def with_copies(run: Callable[[Config, Weight], object], layer: Weight, alone: bool) -> Kernel:
    count = 1 if alone else copies_beyond(l2_cache(), layer.codes.nbytes)
    layers = [layer, *(copied(layer) for _ in range(count - 1))]

    def with_each(config: Config) -> None:
        for each in layers:
            run(config, each)

    return Kernel(with_each, count)


def copies_beyond(cache: int, size: int) -> int:
    """How many copies of `size` bytes are twice a cache: it keeps none until its turn comes again."""
    return min(-(-2 * cache // size), COPIES)


def l2_cache() -> int:
    return getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 64 << 20)


def copied(layer: Weight) -> Weight:
    return Weight(*(part.clone() if isinstance(part, torch.Tensor) else part for part in layer))


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).mul_(32).round_().clamp_(-128, 127).to(torch.int8)


@functools.lru_cache(maxsize=8)  # of the few largest, which take a second to make
def weight(columns: int, depth: int) -> Weight:
    scale = torch.full((columns,), 0.03 / depth**0.5, device=DEVICE)
    layer = TritonLinear(WeightParams(codes(columns, depth), scale, 8), torch.zeros(columns, device=DEVICE))
    return Weight(layer.codes, None, layer.scale, layer.bias, layer.sums, depth, 8)


def operand(
    group: torch.Tensor, units: int = 1, mode: int = 0, scale: float = 0.03, zero: float = 3.0
) -> OperandParams:
    table = torch.zeros(10, units, 8, device=DEVICE)
    table[...] = torch.tensor([scale, 1 / 127, zero, 4.0, 1 / scale, 127.0, 0.0, 0.0])
    grid, merged = KINDS[mode]
    return OperandParams(grid, 8, table, merged, group)


def compile_all(found: Sequence[Job]) -> None:
    """Compile every kernel once, in several processes, into Triton's cache."""
    distinct = {
        (job.key.split(" ", 1)[0], job.name, _constants(job), config): (job, config)
        for job in found
        for config in job.candidates
    }
    todo = list(distinct.values())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        list(pool.map(_compile, [todo[start::PROCESSES] for start in range(PROCESSES)]))


def _constants(job: Job) -> tuple[int, ...]:
    """The sizes for which a kernel is compiled anew: a norm holds whole rows, an attention whole heads."""
    if job.name in NORMS:
        return (job.shape.width,)
    if job.name.startswith(("attention", "qkv")):
        return job.shape.heads, job.shape.width, job.size[1]
    return ()


def _compile(todo: list[tuple[Job, Config]]) -> None:
    for job, config in todo:
        try:
            maker(job, small=True).run(config)
        except Exception as error:  # a configuration that does not fit: the timing says so again
            print(job.name, config, str(error)[:100])
