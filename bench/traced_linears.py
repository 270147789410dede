"""Times linear layers of text-to-image and video transformers on this GPU: integers, bf16, fp8, and torchao's int8.

python bench/traced_linears.py --json bench/results/traced-linears-h200.json
python bench/traced_linears.py --json one.json --models FLUX.1 --no-torchao      # on several GPUs at once, and then:
python bench/traced_linears.py --json bench/results/traced-linears-h200.json --join one.json two.json

Rows are tokens of one sample at the size that each model's authors show: FLUX.1 and Qwen-Image at 1024 x 1024 with
their text tokens, Z-Image, Wan 2.1 1.3B at 480p. Microseconds of the GPU: a way is captured as a CUDA graph of calls on
INPUTS inputs in turn, the ways' graphs are replayed in turns, and each figure is the median of ROUNDS. "int8 apart":
one quantization for one product; "int8 of three": a third of one for each, as query, key and value share it. Weights
come from the L2 cache where they fit it, for every way alike.

Microseconds of the host: plain calls on few rows, which the GPU ends before the host; a compiled chain of LAYERS layers
is one call, divided by them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.backends.triton.backend import TritonBackend
from tqdit.backends.triton.layer import TritonLinear
from tqdit.ops.schema import Float, OperandParams, WeightParams
from tqdit.ops.tables import COLUMNS
from tqdit.spec import Grid
from tqdit.system.capture import recording
from tqdit.system.environment import environment
from tqdit.system.files import write_text

MODELS = {  # rows; depth and columns of each layer
    "FLUX.1": (4608, ((3072, 3072), (3072, 12288), (12288, 3072), (15360, 3072))),
    "FLUX.1, text": (512, ((3072, 3072), (3072, 12288), (12288, 3072))),
    "Qwen-Image": (4352, ((3072, 3072), (3072, 12288), (12288, 3072))),
    "Z-Image": (4352, ((3840, 3840), (3840, 10240), (10240, 3840))),
    "Wan 1.3B": (32760, ((1536, 1536), (1536, 8960), (8960, 1536))),
}
FLOAT_INPUTS = (  # rows, depth, columns: modulations, embeddings of patches and of text, the last layer
    (1, 3072, 18432), (2, 3072, 18432), (8, 3072, 18432), (1, 3072, 9216), (1, 256, 3072), (4608, 64, 3072),
    (512, 4096, 3072), (4608, 3072, 64),
)  # fmt: skip
INPUTS, ROUNDS = 3, 9
LAYERS, FEW = 8, 64
BF16 = torch.bfloat16
RUN = TritonBackend()
Ways = dict[str, Callable[[torch.Tensor], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--no-torchao", action="store_true")
    parser.add_argument("--join", nargs="+", type=Path, help="files of runs of some models each, instead of a run")
    arguments = parser.parse_args()
    if arguments.join:
        parts = [json.loads(path.read_text()) for path in arguments.join]
        joined = {"environment": parts[0]["environment"], "host_us": [part["host_us"] for part in parts]}
        for name in ("rows", "float_inputs"):
            joined[name] = [row for part in parts for row in part[name]]
        write_text(arguments.json, json.dumps(joined, indent=1) + "\n")
        return
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    result: dict[str, Any] = {"environment": environment("cuda"), "rows": [], "float_inputs": []}
    result["host_us"] = host()
    print(result["host_us"], flush=True)
    for model in arguments.models:
        rows, layers = MODELS[model]
        for depth, columns in layers:
            result["rows"].append(measured(model, rows, depth, columns, not arguments.no_torchao))
            print(json.dumps(result["rows"][-1]), flush=True)
            write_text(arguments.json, json.dumps(result, indent=1) + "\n")
    for rows, depth, columns in FLOAT_INPUTS if "FLUX.1" in arguments.models else ():
        result["float_inputs"].append(float_input(rows, depth, columns))
        print(json.dumps(result["float_inputs"][-1]), flush=True)
    write_text(arguments.json, json.dumps(result, indent=1) + "\n")


def measured(model: str, rows: int, depth: int, columns: int, torchao: bool) -> dict[str, Any]:
    """One layer in every way."""
    torch.compiler.reset()
    linear = nn.Linear(depth, columns, device="cuda", dtype=BF16)
    inputs = [torch.randn(1, rows, depth, device="cuda", dtype=BF16) for _ in range(INPUTS)]
    ways: Ways = {"bf16": linear}
    ways |= integer_ways(linear, inputs[0]) | fp8_ways(linear, inputs[0])
    if torchao:
        ways |= torchao_ways(linear)
    us, failed = timed(ways, inputs)
    product = us["int8 product"]
    row: dict[str, Any] = {"model": model, "rows": rows, "depth": depth, "columns": columns, "us": us}
    row["us"]["int8 of three"] = us["int8 quantize"] / 3 + product
    row["int8_tops"] = 2e-6 * rows * depth * columns / product
    row["times_bf16"] = {name: us["bf16"] / value for name, value in us.items()}
    return row | ({"failed": failed} if failed else {})


def row_operand() -> OperandParams:
    """The grid of rows."""
    table = torch.zeros(1, 1, COLUMNS, device="cuda")
    table[..., 0] = 1 / 127
    return OperandParams(Grid.ROW, 8, table)


def integer(linear: nn.Linear) -> TritonLinear:
    """A layer's weight as codes, a scale for each output, rounded to the nearest."""
    weight = linear.weight.float()
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    bias = None if linear.bias is None else linear.bias.float()
    return RUN.prepare(WeightParams(codes, scale, 8), bias).to("cuda")


def integer_ways(linear: nn.Linear, x: torch.Tensor) -> Ways:
    layer, operand, then = integer(linear), row_operand(), Float(BF16)
    codes = RUN.quantize(x, operand)

    def both(x: torch.Tensor) -> torch.Tensor:
        return RUN.linear(RUN.quantize(x, operand), operand, layer, then)

    return {
        "int8 quantize": lambda x: RUN.quantize(x, operand),
        "int8 product": lambda _: RUN.linear(codes, operand, layer, then),
        "int8 apart": both,
        "int8 apart, compiled": torch.compile(both, fullgraph=True, dynamic=False),
    }


def fp8_ways(linear: nn.Linear, x: torch.Tensor) -> Ways:
    """torch's own product of fp8 with a scale for each row of both operands."""
    top = torch.finfo(torch.float8_e4m3fn).max

    def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
        return (x.float() / scale).clamp(-top, top).to(torch.float8_e4m3fn), scale

    weight, by_weight = quantized(linear.weight)
    bias = linear.bias

    def product(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(codes, weight.t(), scale, by_weight.t(), bias=bias, out_dtype=BF16, use_fast_accum=True)

    given = quantized(x[0])
    return {
        "fp8 product": lambda _: product(*given),
        "fp8 apart, compiled": torch.compile(lambda x: product(*quantized(x[0])), dynamic=False),
    }


def torchao_ways(linear: nn.Linear) -> Ways:
    """torchao's dynamic int8 and fp8 layers with scales of rows, compiled as its pages say."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    configs = {
        "torchao int8": Int8DynamicActivationInt8WeightConfig(),
        "torchao fp8": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }
    ways: Ways = {}
    for name, config in configs.items():
        model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, device="cuda", dtype=BF16))
        model[0].weight.copy_(linear.weight)
        quantize_(model, config)
        ways[name] = torch.compile(model, dynamic=False)
    return ways


def timed(ways: Ways, inputs: list[torch.Tensor]) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of each way, and why others failed."""
    graphs, failed = {}, {}
    for name, way in ways.items():
        try:
            for _ in range(2):
                for x in inputs:
                    way(x)
            torch.cuda.synchronize()
            with recording() as graphs[name]:
                for x in inputs:
                    way(x)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            graphs.pop(name, None)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS + 1):  # the first is not counted
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) * 1e3 / len(inputs))
    return {name: median(each[1:]) for name, each in found.items()}, failed


def float_input(rows: int, depth: int, columns: int) -> dict[str, Any]:
    """A layer whose weight alone is in integers; weights are COPIES, so that the L2 cache has none of the next."""
    copies = max(1, min(8, 120_000_000 // (depth * columns)))
    linears = [nn.Linear(depth, columns, device="cuda", dtype=BF16) for _ in range(copies)]
    layers = [integer(linear) for linear in linears]
    ways: Ways = {
        "bf16": lambda x: [linear(x) for linear in linears],
        "int8 weights": lambda x: [RUN.float_input_linear(x, layer, BF16) for layer in layers],
    }
    us, failed = timed(ways, [torch.randn(rows, depth, device="cuda", dtype=BF16) for _ in range(INPUTS)])
    assert not failed, failed
    return {"rows": rows, "depth": depth, "columns": columns, "us": {name: t / copies for name, t in us.items()}}


class Chain(nn.Module):
    """Layers one after another, in integers or in bf16."""

    def __init__(self, linears: list[nn.Linear], integers: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(integer(linear) for linear in linears) if integers else nn.ModuleList(linears)
        self.operand = row_operand() if integers else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if self.operand is None:
                x = F.relu(layer(x))
            else:
                x = F.relu(RUN.linear(RUN.quantize(x, self.operand), self.operand, layer, Float(BF16)))
        return x


def host() -> dict[str, float]:
    """Microseconds of the host for one layer."""
    linears = [nn.Linear(3072, 3072, device="cuda", dtype=BF16) for _ in range(LAYERS)]
    x = torch.randn(1, FEW, 3072, device="cuda", dtype=BF16)
    layer, operand, then = integer(linears[0]), row_operand(), Float(BF16)
    codes, one = RUN.quantize(x, operand), x[0, :1]
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "bf16": (lambda: linears[0](x), 1),
        "int8 quantize": (lambda: RUN.quantize(x, operand), 1),
        "int8 product": (lambda: RUN.linear(codes, operand, layer, then), 1),
        "int8 apart": (lambda: RUN.linear(RUN.quantize(x, operand), operand, layer, then), 1),
        "float input, one row": (lambda: RUN.float_input_linear(one, layer, BF16), 1),
    }
    for integers in (False, True):
        chain = torch.compile(Chain(linears, integers), fullgraph=True, dynamic=False)
        calls[f"{'int8 apart' if integers else 'bf16'}, compiled, with an activation"] = (lambda c=chain: c(x), LAYERS)
    return {name: host_time(call) / layers for name, (call, layers) in calls.items()}


def host_time(call: Callable[[], Any], count: int = 40) -> float:
    for _ in range(10):
        call()
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        found.append((time.perf_counter() - start) / count * 1e6)
    return median(found)


if __name__ == "__main__":
    main()
