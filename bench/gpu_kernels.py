"""Times every kernel of DiT-XL/2 on this GPU with every candidate configuration; writes a roofline and the best ones.

python bench/gpu_kernels.py --json bench/results/h200-kernels.json --tuned src/tqdit/backends/triton/tuned
python bench/gpu_kernels.py --json kernels.json --only qkv fc1 attention norm    # some kernels, those with rows beside

A roofline row: the operations and the bytes a kernel cannot do without (each operand read once, each result written
once), the time they take at the peaks measured in the same run, and the fraction of the measured time that is.

Weights are read from memory, as in a model, whose other layers have left nothing of them in the L2 cache: a kernel
runs with one copy of its weights after another, together twice that cache (at most COPIES: the smallest stay in it).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import dit_kernels
from tqdit.backends.triton import configurations, timing
from tqdit.backends.triton.layouts import Config
from tqdit.system.environment import environment
from tqdit.system.files import write_text

XL = dit_kernels.Shape.named("XL")
WORKLOADS = {"256-b64": (64, 256), "256-b2": (2, 256), "512-b16": (16, 1024)}  # samples, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tuned", type=Path, help="folder of committed configurations")
    parser.add_argument("--only", nargs="+", help="the first words of the names of kernels; not with --tuned")
    arguments = parser.parse_args()
    if arguments.only and arguments.tuned:
        parser.error("--tuned takes the configurations of every kernel")
    only = tuple(arguments.only or ("",))
    named = [(name, job) for name, size in WORKLOADS.items() for job in dit_kernels.jobs(XL, *size)]
    named = [(name, job) for name, job in named if job.name.startswith(only)]
    dit_kernels.compile_all([job for _, job in named])
    peaks = {
        "copy_tb_per_s": copy_rate(),
        "bf16_tflops": product_rate(torch.bfloat16),
        "int8_tops_torch": product_rate(torch.int8),
    }
    rows, best = [], {}
    for workload, job in named:
        kernel = dit_kernels.maker(job)
        times = [(config, ms / kernel.copies) for config, ms in timing.fastest(job.candidates, kernel.run)]
        best[job.ordinary_key] = list(next(config for config, _ in times if not config.hopper))
        best[job.key] = list(times[0][0])
        rows.append(row(workload, job, times))
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
        file = configurations.tuned_file(arguments.tuned, torch.cuda.get_device_name())
        if file.exists():  # of other models and batch sizes: tune.py
            best = json.loads(file.read_text(encoding="utf-8"))["configurations"] | best
        write_text(file, json.dumps({"environment": environment("cuda"), "configurations": best}, indent=1) + "\n")
    for r in result["rows"]:
        print(
            f"{r['workload']:8} {r['name']:24} {r['us']:8.1f} us  {r['tera_per_s'] or 0:6.0f} TOPS  {r['fraction']:.2f}"
            f"  {r['config']}"
        )
    print(json.dumps({"peaks": peaks, "sdpa": result["sdpa_bf16_us"]}))


def row(workload: str, job: dit_kernels.Job, times: list[tuple[Config, float]]) -> dict[str, Any]:
    config, ms = times[0]
    return {
        "workload": workload, "name": job.name, "us": ms * 1e3, "operations": job.operations, "bytes": job.bytes,
        "tera_per_s": job.operations / ms / 1e9 or None, "config": list(config),
        "others_us": {str(list(c)): t * 1e3 for c, t in times[1:]},
    }  # fmt: skip


def copy_rate() -> float:
    """10^12 bytes per second, read and written, of one pass over a tensor far larger than the caches."""
    a = torch.randn(2**28, device="cuda")
    b = torch.empty_like(a)
    return 8 * a.numel() / timing.milliseconds(lambda: torch.mul(a, 2.0, out=b)) / 1e9


def product_rate(dtype: torch.dtype) -> float:
    """10^12 operations per second of torch's product of square matrices."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").mul_(32).clamp_(-127, 127).to(dtype) for _ in range(2))
    product = (lambda: torch._int_mm(a, b.t())) if dtype is torch.int8 else lambda: a @ b.t()
    return 2 * n**3 / timing.milliseconds(product) / 1e9


def sdpa() -> dict[str, float]:
    found = {}
    for workload, (batch, tokens) in WORKLOADS.items():
        q, k, v = torch.randn(3, batch, XL.heads, tokens, XL.width // XL.heads, device="cuda", dtype=torch.bfloat16)
        found[workload] = timing.milliseconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)) * 1e3
    return found


if __name__ == "__main__":
    main()
