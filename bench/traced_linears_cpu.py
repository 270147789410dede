"""Time linear layers of float models in integers on a CPU: the shapes of blocks of FLUX.2-klein-4B and Z-Image.

python bench/traced_linears_cpu.py --json bench/results/traced-linears-cpu.json

Every layer reads bf16 hidden states, codes each row by its own magnitude with channel factors, multiplies codes and
writes bf16: what a quantized layer of a diffusers model does in a call. It runs against `F.linear` in bf16, eager and
compiled, and in fp32, interleaved; the parts `quantize` and `linear` are timed apart as well. A ratio is the median of
the rounds' own ratios. Layers on float inputs read a row a
sample (modulation) or a prompt (embedders).
Rows that the file has and that are not measured again stay. Compare ratios, not milliseconds: the machine may be
shared.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from tqdit.backends import native
from tqdit.ops.dispatch import get_backend
from tqdit.ops.schema import Float, WeightParams
from tqdit.ops.tables import operand
from tqdit.spec import Granularity, Grid, GridParams, Role, SiteSpec
from tqdit.speed.machine import measure_peaks
from tqdit.speed.timing import interleaved
from tqdit.system.environment import environment
from tqdit.system.files import write_text

# Model -> layer -> (in, out) of a block.
LAYERS = {
    "FLUX.2-klein-4B": {
        "joint to_q": (3072, 3072),
        "joint linear_in": (3072, 18432),
        "joint linear_out": (9216, 3072),
        "single to_qkv_mlp_proj": (3072, 27648),
        "single to_out": (12288, 3072),
    },
    "Z-Image": {"to_q": (3840, 3840), "w1": (3840, 10240), "w2": (10240, 3840)},
}
# Layer -> (in, out, rows) of layers on float inputs.
FLOAT_INPUTS = {
    "modulation": (3072, 18432, 1),
    "modulation, 2 samples": (3072, 18432, 2),
    "modulation, 8 samples": (3072, 18432, 8),
    "prompt embedder": (7680, 3072, 512),
}
FEW = 5  # times as many rounds where a call takes little time
OURS = ("ours", "quantize", "linear")
BFLOAT16 = Float(torch.bfloat16)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tokens", default="512", help="numbers of tokens, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(LAYERS), help="empty: layers on float inputs alone")
    parser.add_argument("--against", default="bf16-compiled,fp32", help="and bf16, eager")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    backend, rows = get_backend("cpu"), []
    with torch.inference_mode():
        for tokens in map(int, arguments.tokens.split(",")):
            for model in filter(None, arguments.models.split(",")):
                for layer, (depth, columns) in LAYERS[model].items():
                    row = {"model": model, "layer": layer, "tokens": tokens, "in": depth, "out": columns}
                    rows.append({**row, **measure(calls_of(backend, tokens, depth, columns), arguments)})
                    show(rows[-1])
        for layer, (depth, columns, count) in FLOAT_INPUTS.items():
            row = {"model": "float inputs", "layer": layer, "tokens": count, "in": depth, "out": columns}
            calls, times = float_input_calls(backend, count, depth, columns), FEW if count <= 8 else 1
            rows.append({**row, **measure(calls, arguments, times)})
            show(rows[-1])
    result = {
        "command": "python bench/traced_linears_cpu.py --json bench/results/traced-linears-cpu.json"
        f" --tokens {arguments.tokens} --rounds {arguments.rounds} --against {arguments.against}",
        "environment": {**environment(), "instructions": native.instructions(), **peaks()},
        "rows": [*kept(arguments.json, rows), *rows],
    }
    write_text(arguments.json, json.dumps(result, indent=1) + "\n")


def calls_of(backend: Any, tokens: int, depth: int, columns: int) -> dict[str, Callable[[int], object]]:
    """Return the calls to time for one quantized layer."""
    x, weight, bias = (torch.randn(*shape) for shape in ((1, tokens, depth), (columns, depth), (columns,)))
    x, half, half_bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    spec = SiteSpec("site", Role.INPUT, 8, Grid.ROW, Granularity.PER_TENSOR, 1, 1)
    target = operand(GridParams(spec, torch.full((1, 1), 1 / 127), None))
    target = target._replace(channels=torch.rand(depth) + 0.5)
    layer = backend.prepare(_codes(weight), bias)
    codes = backend.quantize(x, target)
    compiled = torch.compile(lambda x: F.linear(x, half, half_bias))
    compiled(x)
    wide = x.float()
    backend.linear(codes, target, layer, BFLOAT16)
    return {
        "ours": lambda _: backend.linear(backend.quantize(x, target), target, layer, BFLOAT16),
        "quantize": lambda _: backend.quantize(x, target),
        "linear": lambda _: backend.linear(codes, target, layer, BFLOAT16),
        "bf16": lambda _: F.linear(x, half, half_bias),
        "bf16-compiled": lambda _: compiled(x),
        "fp32": lambda _: F.linear(wide, weight, bias),
    }


def float_input_calls(backend: Any, rows: int, depth: int, columns: int) -> dict[str, Callable[[int], object]]:
    """Return the calls to time for one layer on float inputs."""
    x, weight, bias = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth), torch.randn(columns)
    layer, half, half_bias = backend.prepare_float_input(_codes(weight), bias), weight.bfloat16(), bias.bfloat16()
    wide = x.float()
    compiled = torch.compile(lambda x: F.linear(x, half, half_bias))
    compiled(x)
    backend.float_input_linear(x, layer)
    return {
        "ours": lambda _: backend.float_input_linear(x, layer).to(torch.bfloat16),
        "bf16": lambda _: F.linear(x, half, half_bias),
        "bf16-compiled": lambda _: compiled(x),
        "fp32": lambda _: F.linear(wide, weight, bias),
    }


def _codes(weight: torch.Tensor) -> WeightParams:
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    return WeightParams(codes, scale, 8, codes.sum(1, dtype=torch.int32))


def measure(
    calls: dict[str, Callable[[int], object]], arguments: argparse.Namespace, times_rounds: int = 1
) -> dict[str, Any]:
    """Return the median milliseconds of each call, and how many times as long as ours the others take."""
    rounds = times_rounds * arguments.rounds
    others = [name for name in calls if name in arguments.against.split(",")]
    times = interleaved({name: calls[name] for name in (*OURS, *others) if name in calls}, rounds)
    ratios = {
        name: statistics.median(other / ours for other, ours in zip(times[name], times["ours"], strict=True))
        for name in others
    }
    return {"p50_ms": {name: statistics.median(found) for name, found in times.items()}, "speedup_over": ratios}


def peaks() -> dict[str, float]:
    """Return what the machine reaches."""
    found = measure_peaks(torch.device("cpu"))
    return {"torch_int8_gops": found.int8_gops, "read_gb_per_s": found.read_gb_per_s}


def kept(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a file that are not among `rows`."""
    found = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    new = [[row[name] for name in ("model", "layer", "tokens")] for row in rows]
    return [row for row in found if [row[name] for name in ("model", "layer", "tokens")] not in new]


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    times = ", ".join(f"{name} {ms:.2f}" for name, ms in row["p50_ms"].items())
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["speedup_over"].items())
    work = 2 * row["tokens"] * row["in"] * row["out"] / row["p50_ms"].get("linear", row["p50_ms"]["ours"]) / 1e6
    print(f"{row['model']} {row['layer']} x {row['tokens']}: {times} ms; {work:.0f} GOPS; over {ratios}", flush=True)


if __name__ == "__main__":
    main()
