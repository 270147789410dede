"""Times attention on this GPU by all kernels of ours, and by SDPA in bf16; writes one JSON file.

python bench/gpu_attention.py --json bench/results/attention-h200.json
python bench/gpu_attention.py --json attention.json --only 512-b16 256-b64     # some shapes

Of ours: in one pass; "before", the others of integers; "bf16", which dequantizes, runs SDPA and quantizes. The file is
written after each shape; after SECONDS no other shape begins, and the file names those that were left out.

All take turns, ROUNDS times; a time is the median of the rounds, of one call in a CUDA graph of many. Codes are those
of normal numbers, scores have a deviation of 1. Every result in one pass is compared with a softmax in fp64 first.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqdit.backends.triton import candidates, flash, launch, timing
from tqdit.backends.triton.layouts import BF16, Config, Projected
from tqdit.ops import one_pass
from tqdit.ops.schema import OperandParams
from tqdit.ops.tables import operand
from tqdit.spec import Granularity, Grid, GridParams, Role, SiteSpec
from tqdit.system.environment import environment
from tqdit.system.files import write_text

SHAPES = {  # samples, heads, tokens, head_dim; the most important first
    "256-b64": (64, 16, 256, 72), "512-b16": (16, 16, 1024, 72), "1024-b4": (4, 16, 4096, 72),
    "512-b8, 128": (8, 24, 1024, 128), "1024-b2, 128": (2, 24, 4096, 128), "2048-b1, 64": (1, 16, 16384, 64),
}  # fmt: skip
ROUNDS = 5
SECONDS = 65
STEP = 1 / 40  # of codes of normal numbers
KINDS = {
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.CUDNN_ATTENTION: "cudnn",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
}
CHECKED = 2, 64  # heads and rows that are compared


class Inputs(NamedTuple):
    """Codes (B, N, 3 C), the same as kernels take them, and the operands."""

    codes: torch.Tensor
    projected: Projected
    operands: tuple[OperandParams, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    start, about, gpu = time.monotonic(), environment("cuda"), torch.cuda.get_device_properties(0)
    about |= {"multiprocessors": gpu.multi_processor_count, "highest_clock_khz": getattr(gpu, "clock_rate", None)}
    for name in arguments.only:
        if time.monotonic() - start > SECONDS:
            break
        rows.append(measured(name, *SHAPES[name]))
        print(json.dumps(rows[-1]), f"{time.monotonic() - start:.0f} s", flush=True)
        found = {"environment": about, "left_out": arguments.only[len(rows) :], "rows": rows}
        write_text(arguments.json, json.dumps(found, indent=1) + "\n")


def measured(name: str, batch: int, heads: int, tokens: int, head_dim: int) -> dict[str, Any]:
    """Return the times of one shape in microseconds."""
    inputs = drawn(batch, heads, tokens, head_dim)
    entrants: dict[str, Callable[[], object]] = {}
    device = inputs.codes.device
    in_one = [candidates.flash_config(half) for half in (False, True)]
    found = {"one pass": [config for config in in_one if flash.supports(config, device, tokens, head_dim)]}
    found["bf16"] = [Config(4, 256, 0, warps=4, hopper=BF16)]
    found["before"] = candidates.hopper_attention(device, tokens, head_dim, False, True)
    found["before"] += candidates.attention(batch * heads, tokens)[:3]
    for kind, configs in found.items():
        for config in configs:
            label = f"{kind} {list(config)}"
            entrants[label] = functools.partial(
                launch.attend, inputs.projected, None, None, heads, inputs.operands, config
            )
    q, k, v = torch.randn(3, batch, heads, tokens, head_dim, device=device, dtype=torch.bfloat16)
    for backend, kind in KINDS.items():
        entrants[f"sdpa {kind}"] = functools.partial(floats, backend, q, k, v)
    times, failed = raced(entrants)
    best = {kind: min((t for n, t in times.items() if n.startswith(kind)), default=None) for kind in (*found, "sdpa")}
    exact = [(kind, c) for kind in ("one pass", "bf16") for c in found[kind] if f"{kind} {list(c)}" in times]
    errors = {f"{kind} {list(c)}": error(inputs, heads, c) for kind, c in exact}
    return {
        "shape": name, "sizes": [batch, heads, tokens, head_dim], "best_us": best,
        "over_sdpa": {kind: best["sdpa"] / t for kind, t in best.items() if t and best["sdpa"]},
        "error_of_bound": errors, "us": times, "failed": failed,
    }  # fmt: skip


def drawn(batch: int, heads: int, tokens: int, head_dim: int) -> Inputs:
    generator = torch.Generator(device="cuda").manual_seed(1)
    values = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator, device="cuda")
    codes = (values / STEP).round_().clamp_(-128, 127).to(torch.int8)
    q, k, v = codes.unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
    sixteen = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15], device="cuda")
    order = (torch.arange(0, tokens, 16, device="cuda")[:, None] + sixteen).flatten()  # of `attention._permuted`
    pitch = -(-head_dim // 16) * 16
    parts = [F.pad(q, (0, pitch - head_dim)), F.pad(k, (0, pitch - head_dim)), v.transpose(2, 3)[..., order]]
    projected = Projected(torch.cat([part.reshape(-1) for part in parts]), batch, tokens, head_dim)
    return Inputs(codes, projected, operands(heads))


def operands(heads: int) -> tuple[OperandParams, ...]:
    """Return operands of query, key, value, softmax and target, with zero points."""
    zero = torch.tensor([[3]], dtype=torch.int32)
    per_head = torch.full((1, heads), STEP), zero.expand(1, heads).contiguous()
    head, tensor = Granularity.PER_HEAD, Granularity.PER_TENSOR
    specs = [(Role.INPUT, Grid.UNIFORM, head, heads, per_head)] * 3
    specs += [
        (Role.SOFTMAX, Grid.SOFTMAX_ROW, tensor, 1, (torch.full((1, 1), 1 / 255), None)),
        (Role.INPUT, Grid.UNIFORM, tensor, 1, (torch.full((1, 1), 1 / 64), zero)),
    ]
    made = []
    for role, grid, granularity, units, parameters in specs:
        params = operand(GridParams(SiteSpec("site", role, 8, grid, granularity, 1, units), *parameters))
        made.append(params._replace(table=params.table.cuda()))
    return tuple(made)


def floats(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def raced(entrants: dict[str, Callable[[], object]]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the median times of those that run, and why others do not."""
    failed: dict[str, str] = {}
    ours = [call for name, call in entrants.items() if not name.startswith(("sdpa", "bf16"))]  # SDPA's kind is global
    timing.compile_all([(lambda _, call=call: call(), Config(0, 0, 0)) for call in ours])
    for name, call in entrants.items():
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:  # any of them is a result
            failed[name] = repr(error)[:200]
    times: dict[str, list[float]] = {name: [] for name in entrants if name not in failed}
    for _ in range(ROUNDS):
        for name, found in times.items():
            found.append(timing.milliseconds(entrants[name]) * 1e3)
    return {name: round(median(found), 2) for name, found in times.items()}, failed


def error(inputs: Inputs, heads: int, config: Config) -> float:
    """Return the largest error of some rows over the bound that the model of one pass has for them."""
    query, key, value, softmax, _ = inputs.operands
    out = launch.attend(inputs.projected, None, None, heads, inputs.operands[:4], config)
    few, rows = CHECKED
    found = out.unflatten(-1, (heads, -1)).transpose(1, 2)[:1, :few, :rows].double()
    q, k, v = inputs.codes[:1].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)[:, :, :few]
    q, k = ((x.double() - p.table[0, 0, 2]) * p.table[0, 0, 0] for x, p in ((q[:, :, :rows], query), (k, key)))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    of_few = value._replace(table=value.table[:, :few])
    _, bound = one_pass.attend(scores, softmax, v, of_few)
    real = scores.softmax(-1) @ ((v.double() - value.table[0, 0, 2]) * value.table[0, 0, 0])
    return float(((found - real).abs() / bound).max())


if __name__ == "__main__":
    main()
