"""Times every kernel of DiT-XL/2 on this GPU with every candidate configuration; writes a roofline and the best ones.

python bench/gpu_kernels.py --json bench/results/h200-kernels.json --tuned src/tqdit/backends/triton/tuned
python bench/gpu_kernels.py --json kernels.json --only qkv fc1 attention norm    # some kernels, those with rows beside

A roofline row: the operations and the bytes a kernel cannot do without (each operand read once, each result written
once), the time they take at the peaks measured in the same run, and the fraction of the measured time that is.

Weights are read from memory, as in a model, whose other layers have left nothing of them in the L2 cache: a kernel
runs with one copy of its weights after another, together twice that cache (at most COPIES: the smallest stay in it).
"""

import argparse
import concurrent.futures
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from tqdit.architectures.patches import FEW_TOKENS
from tqdit.backends.triton import candidates, hopper, launch, naming, tuning
from tqdit.backends.triton.kernels import rounding
from tqdit.backends.triton.layer import TritonLinear
from tqdit.backends.triton.layouts import KINDS, Config, Projected, Weight, part_sizes, with_steps
from tqdit.ops.schema import Codes, Norm, OperandParams, Residual, RowCodes, WeightParams
from tqdit.system.environment import environment
from tqdit.system.files import write_text

WIDTH, HEADS, LAYERS = 1152, 16, 28
HEAD_DIM = WIDTH // HEADS
WORKLOADS = {"256-b64": (64, 256), "256-b2": (2, 256), "512-b16": (16, 1024)}  # samples, tokens
LINEARS = {  # epilogue, depth, columns, products
    "qkv": ("heads", WIDTH, 3 * WIDTH, 1),
    "out": ("residual bfloat16", WIDTH, WIDTH, 1),
    "fc1": ("gelu", WIDTH, 4 * WIDTH, 1),
    "fc2": ("residual bfloat16", 4 * WIDTH, WIDTH, 1),
    "fc2, 2 products": ("residual bfloat16", 4 * WIDTH, WIDTH, 2),
    "out, fp32 stream": ("residual", WIDTH, WIDTH, 1),
    "fc2, fp32 stream": ("residual", 4 * WIDTH, WIDTH, 1),
    "fc2, 2 products, fp32 stream": ("residual", 4 * WIDTH, WIDTH, 2),
    "qkv, rows": ("heads", WIDTH, 3 * WIDTH, 1),
    "fc1, rows": ("gelu", WIDTH, 4 * WIDTH, 1),
    "fc1, channels": ("gelu-channels", WIDTH, 4 * WIDTH, 1),
    "fc1, channels, rows": ("gelu-channels", WIDTH, 4 * WIDTH, 1),
    "out, rows": ("residual bfloat16", WIDTH, WIDTH, 1),
    "fc2, rows": ("residual bfloat16", 4 * WIDTH, WIDTH, 1),
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
FLOAT_INPUTS = {  # whether it has a row per token, columns, depth
    "adaLN of all blocks": (False, LAYERS * 6 * WIDTH, WIDTH),
    "final adaLN": (False, 2 * WIDTH, WIDTH),
    "timestep, first": (False, WIDTH, 256),
    "timestep, second": (False, WIDTH, WIDTH),
    "final": (True, 32, WIDTH),
    "patches": (True, WIDTH, 16),
}
SMALL = 2  # samples, for compiling
PROCESSES = 14
COPIES = 256  # of weights


class Kernel(NamedTuple):
    """`run` launches a kernel with a configuration, with each of `copies` of its weights once."""

    run: Callable[[Config], object]
    copies: int = 1


class Job(NamedTuple):
    """One kernel at one size. `key`: of its best configuration, `ordinary_key`: of the best one not for Hopper alone.

    `operations` on int8 or bf16 and `bytes`: what it cannot do without.
    """

    workload: str
    name: str
    key: str
    ordinary_key: str
    candidates: tuple[Config, ...]
    operations: int
    bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, help="folder of committed configurations")
    parser.add_argument("--only", nargs="+", help="the first words of the names of kernels; not with --tuned")
    arguments = parser.parse_args()
    if arguments.only and arguments.tuned:
        parser.error("--tuned takes the configurations of every kernel")
    only = tuple(arguments.only or ("",))
    found = [job for job in jobs() if job.name.startswith(only)]
    compile_all(found)
    peaks = {
        "copy_tb_per_s": copy_rate(),
        "bf16_tflops": product_rate(torch.bfloat16),
        "int8_tops_torch": product_rate(torch.int8),
    }
    rows, best = [], {}
    for job in found:
        kernel = maker(job)
        times = [(config, ms / kernel.copies) for config, ms in tuning.fastest(job.candidates, kernel.run)]
        best[job.ordinary_key] = list(next(config for config, _ in times if not config.hopper))
        best[job.key] = list(times[0][0])
        rows.append(row(job, times))
    peaks["int8_tops"] = max([peaks["int8_tops_torch"], *(r["tera_per_s"] for r in rows if r["operations"])])
    for r in rows:
        floor = max(r["bytes"] / peaks["copy_tb_per_s"], r["operations"] / peaks["int8_tops"]) / 1e6
        r |= {"floor_us": floor, "fraction": floor / r["us"]}
    result = {
        "environment": environment("cuda") | peaks,
        "weights": "from memory",
        "rows": rows,
        "sdpa_bf16_us": sdpa(),
    }
    write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    if arguments.tuned:
        text = json.dumps({"environment": environment("cuda"), "configurations": best}, indent=1)
        write_text(tuning.tuned_file(arguments.tuned, torch.cuda.get_device_name()), text + "\n")
    for r in result["rows"]:
        print(
            f"{r['workload']:8} {r['name']:24} {r['us']:8.1f} us  {r['tera_per_s'] or 0:6.0f} TOPS  {r['fraction']:.2f}"
            f"  {r['config']}"
        )
    print(json.dumps({"peaks": peaks, "sdpa": result["sdpa_bf16_us"]}))


def jobs() -> Iterator[Job]:
    for workload, (batch, tokens) in WORKLOADS.items():
        rows = batch * tokens
        for name, (epilogue, depth, columns, products) in LINEARS.items():
            two = products == 2
            by_row = name.endswith(ROWS)
            ordinary_key = naming.linear_key(epilogue, rows, columns, depth, 8, two, 0, by_row)
            tile = hopper.rows_of_tile(torch.device("cuda"), tokens, 8, two)
            key = naming.linear_key(epilogue, rows, columns, depth, 8, two, tile, by_row)
            out = {"heads": 1, "gelu": 1, "gelu-channels": 1, "residual bfloat16": 4, "residual": 8}[epilogue]
            moved = rows * depth + columns * depth + rows * columns * out
            special = candidates.hopper_linear(epilogue, rows, columns, tile)
            possible = (*special, *candidates.linear(rows, two, 8))
            operations = 2 * rows * columns * depth * products
            yield Job(workload, name, key, ordinary_key, possible, operations, moved)
        for name, mode in PROBABILITIES.items():
            ordinary_key = naming.attention_key(batch * HEADS, tokens, HEAD_DIM, mode)
            forms = name == "MRQ", name == "softmax rows"
            special = candidates.hopper_attention(torch.device("cuda"), tokens, HEAD_DIM, *forms)
            key = naming.attention_key(batch * HEADS, tokens, HEAD_DIM, mode, bool(special))
            operations = 2 * rows * tokens * WIDTH * (3 if name == "MRQ" else 2)
            possible = (*special, *candidates.attention(batch * HEADS, tokens))
            yield Job(workload, f"attention, {name}", key, ordinary_key, possible, operations, 4 * rows * WIDTH)
        for name, (per_token, columns, depth) in FLOAT_INPUTS.items():
            m = min(rows, FEW_TOKENS) if per_token else batch
            moved = 4 * m * depth + columns * depth + 4 * m * columns
            key = naming.float_key(m, columns, depth, 8)
            yield Job(workload, name, key, key, tuple(candidates.float_input(m, columns)), 0, moved)
        for name, stream in NORMS.items():
            key = naming.norm_key(rows, WIDTH, stream, name.endswith(ROWS))
            moved = (stream.itemsize + 1) * rows * WIDTH
            yield Job(workload, name, key, key, tuple(candidates.norm(rows, WIDTH)), 0, moved)


def maker(job: Job, small: bool = False) -> Kernel:
    """The kernel on random operands, at the size of the job or at a small one that compiles to the same."""
    batch, tokens = WORKLOADS[job.workload]
    batch = SMALL if small and not (job.name in FLOAT_INPUTS and not FLOAT_INPUTS[job.name][0]) else batch
    group = torch.zeros(1, dtype=torch.int64, device="cuda")
    torch.manual_seed(0)
    if job.name in LINEARS:
        epilogue, depth, columns, products = LINEARS[job.name]
        x, source = codes(batch, tokens, depth), source_of(products, group)
        if job.name.endswith(ROWS):
            x, source = RowCodes(x, torch.rand(batch, tokens, device="cuda") * 0.03), row_operand(group)
        run = linear(epilogue, x, source, columns, group)
        return with_copies(run, weight(columns, depth), alone=small)
    if job.name in FLOAT_INPUTS:
        per_token, columns, depth = FLOAT_INPUTS[job.name]
        columns = min(columns, 6 * WIDTH) if small else columns
        x = torch.randn(min(batch * tokens, FEW_TOKENS) if per_token else batch, depth, device="cuda")
        return with_copies(lambda config, layer: launch.float_input(x, layer, config), weight(columns, depth), small)
    if job.name in NORMS:
        x = torch.randn(batch, tokens, WIDTH, device="cuda").to(NORMS[job.name])
        modulation = torch.randn(batch, 6 * WIDTH, device="cuda")
        parts = modulation[:, :WIDTH], modulation[:, WIDTH : 2 * WIDTH]
        target = row_operand(group) if job.name.endswith(ROWS) else operand(group)
        return Kernel(lambda config: launch.norm_quantize(x, Norm(*parts, 1e-6), target, config))
    mode = PROBABILITIES[job.name.partition(", ")[2]]
    qkv = Projected(codes(sum(part_sizes(3, batch, tokens, HEADS, HEAD_DIM))), batch, tokens, HEAD_DIM)
    parts = [operand(group, HEADS) for _ in range(3)]
    zero = -128.0 if mode != rounding.SOFTMAX.value else 0.0
    operands = (*parts, operand(group, mode=mode, scale=1 / 255, zero=zero), operand(group))
    return Kernel(lambda config: launch.attend(qkv, None, None, HEADS, operands, config))


def source_of(products: int, group: torch.Tensor) -> OperandParams:
    return operand(group, mode=rounding.GELU.value if products == 2 else rounding.UNIFORM.value)


def row_operand(group: torch.Tensor) -> OperandParams:
    return operand(group, mode=rounding.BY_ROW.value, scale=1 / 127, zero=0.0)


def linear(
    epilogue: str, x: Codes, source: OperandParams, columns: int, group: torch.Tensor
) -> Callable[[Config, Weight], object]:
    batch, tokens = with_steps(x)[0].shape[:2]
    if epilogue == "heads":
        targets = tuple(operand(group, HEADS) for _ in range(3))
        return lambda config, layer: launch.project(x, source, layer, config, targets, HEADS)
    if epilogue.startswith("gelu"):
        channels = torch.rand(columns, device="cuda") + 0.5 if epilogue == "gelu-channels" else None
        target = operand(group)._replace(channels=channels)
        return lambda config, layer: launch.activation(x, source, layer, config, target)
    stream, gate = torch.randn(batch, tokens, columns, device="cuda"), torch.randn(batch, 6 * columns, device="cuda")
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
    return getattr(torch.cuda.get_device_properties("cuda"), "L2_cache_size", 64 << 20)


def copied(layer: Weight) -> Weight:
    return Weight(*(part.clone() if isinstance(part, torch.Tensor) else part for part in layer))


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda").mul_(32).round_().clamp_(-128, 127).to(torch.int8)


def weight(columns: int, depth: int) -> Weight:
    params = WeightParams(codes(columns, depth).cpu(), torch.full((columns,), 0.03 / depth**0.5), 8)
    layer = TritonLinear(params, torch.zeros(columns)).cuda()
    return Weight(layer.codes, None, layer.scale, layer.bias, layer.sums, depth, 8)


def operand(
    group: torch.Tensor, units: int = 1, mode: int = 0, scale: float = 0.03, zero: float = 3.0
) -> OperandParams:
    table = torch.zeros(10, units, 8, device="cuda")
    table[...] = torch.tensor([scale, 1 / 127, zero, 4.0, 1 / scale, 127.0, 0.0, 0.0])
    grid, merged = KINDS[mode]
    return OperandParams(grid, 8, table, merged, group)


def compile_all(found: list[Job]) -> None:
    """Compile every kernel once, in several processes, into Triton's cache."""
    distinct = {
        (job.key.split(" ", 1)[0], job.name, config): (job, config) for job in found for config in job.candidates
    }
    todo = list(distinct.values())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        list(pool.map(_compile, [todo[start::PROCESSES] for start in range(PROCESSES)]))


def _compile(todo: list[tuple[Job, Config]]) -> None:
    for job, config in todo:
        try:
            maker(job, small=True).run(config)
        except Exception as error:  # a configuration that does not fit: the timing says so again
            print(job.name, config, str(error)[:100])


def row(job: Job, times: list[tuple[Config, float]]) -> dict[str, Any]:
    config, ms = times[0]
    return {
        "workload": job.workload, "name": job.name, "us": ms * 1e3, "operations": job.operations, "bytes": job.bytes,
        "tera_per_s": job.operations / ms / 1e9 or None, "config": list(config),
        "others_us": {str(list(c)): t * 1e3 for c, t in times[1:]},
    }  # fmt: skip


def copy_rate() -> float:
    """10^12 bytes per second, read and written, of one pass over a tensor far larger than the caches."""
    a = torch.randn(2**28, device="cuda")
    b = torch.empty_like(a)
    return 8 * a.numel() / tuning.milliseconds(lambda: torch.mul(a, 2.0, out=b)) / 1e9


def product_rate(dtype: torch.dtype) -> float:
    """10^12 operations per second of torch's product of square matrices."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").mul_(32).clamp_(-127, 127).to(dtype) for _ in range(2))
    product = (lambda: torch._int_mm(a, b.t())) if dtype is torch.int8 else lambda: a @ b.t()
    return 2 * n**3 / tuning.milliseconds(product) / 1e9


def sdpa() -> dict[str, float]:
    found = {}
    for workload, (batch, tokens) in WORKLOADS.items():
        q, k, v = torch.randn(3, batch, HEADS, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        found[workload] = tuning.milliseconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)) * 1e3
    return found


if __name__ == "__main__":
    main()
