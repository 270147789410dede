"""Time and peak memory of calibrating a model of the shape of Z-Image (6.15 B parameters) with random bf16 weights.

python bench/calibration_large.py --json bench/results/calibration-large-h200.json
python bench/calibration_large.py --blocks 1 --width 256 --side 16 --device cpu --json build/tiny.json

The calls are random latents at the timesteps of eight sampling steps, so that nothing has to be downloaded. Values
decide neither time nor memory.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tqdit
from tqdit.calibration.calls import Calls
from tqdit.recorded import solution_of
from tqdit.runtime.convert import convert
from tqdit.system.environment import environment

TIMES = (0.0, 0.09, 0.19, 0.3, 0.42, 0.56, 0.71, 0.87)  # 1 - sigma of eight steps
PROMPT_WIDTH = 2560
LATENTS = 16


def build(blocks: int, width: int, device: str) -> nn.Module:
    """Make the model with random weights of unit gain."""
    from diffusers import ZImageTransformer2DModel

    heads = max(1, width // 128)
    axes = [32, 48, 48] if width >= 128 * heads else [width // 4, width // 4, width // 2]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: nn.Module = ZImageTransformer2DModel(
            dim=width, n_layers=blocks, n_heads=heads, n_kv_heads=heads, axes_dims=axes, cap_feat_dim=PROMPT_WIDTH
        )
    torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_().div_(parameter[0].numel() ** 0.5)
    return model.eval().requires_grad_(False)


def calls_of(model: nn.Module, side: int, tokens: int, each: int) -> Calls:
    """Return `each` calls for every timestep, with latents of `side` squared and prompts of `tokens`."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(tokens, PROMPT_WIDTH, generator=generator).bfloat16() for _ in range(each)]
    given = [
        {
            "x": [torch.randn(LATENTS, 1, side, side, generator=generator).bfloat16()],
            "t": torch.tensor([t]),
            "cap_feats": [prompt],
        }
        for t in TIMES
        for prompt in prompts
    ]
    return Calls.of(model, given)


class Stages:
    """Notes when each stage of a calibration begins."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        self.begun.setdefault(stage, time.perf_counter())

    def seconds(self, end: float) -> dict[str, float]:
        """Return the seconds of each stage, the last of which ended at `end`."""
        starts = list(self.begun.items())
        ends = [*(start for _, start in starts[1:]), end]
        return {stage: round(stop - start, 1) for (stage, start), stop in zip(starts, ends, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--width", type=int, default=3840)
    parser.add_argument("--side", type=int, default=128, help="of the latents: 128 for images of 1024 pixels")
    parser.add_argument("--tokens", type=int, default=256, help="of a prompt")
    parser.add_argument("--each", type=int, default=16, help="calls of each timestep")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--set", nargs="*", default=[], help="other settings of the recipe, such as rows=1024")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    settings: dict[str, Any] = dict(item.split("=", 1) for item in args.set)
    recipe = tqdit.Recipe("plus", args.bits, samples=args.each, **settings)
    model = build(args.blocks, args.width, args.device)
    gpu = args.device.startswith("cuda")
    calls = calls_of(model, args.side, args.tokens, args.each)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    stages, start = Stages(), time.perf_counter()
    solution = solution_of(model, recipe, calls, stages)
    end = time.perf_counter()
    peak = torch.cuda.max_memory_allocated() if gpu else None
    row: dict[str, Any] = {
        "model": f"ZImageTransformer2DModel of {args.blocks} + 4 blocks, width {args.width}, random weights",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "calls": len(calls),
        "tokens": (args.side // 2) ** 2 + args.tokens,
        "recipe": recipe.model_dump(),
        "seconds": round(end - start, 1),
        "stages": stages.seconds(end),
        "weight_bytes": weights,
        "peak_bytes": peak,
        "peak_ratio": None if peak is None else round(peak / weights, 3),
        "notes": dict(solution.notes),
        "environment": environment(args.device),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    arguments = calls[0].to(args.device)
    with torch.no_grad():
        expected = model(**arguments, return_dict=False)[0][0].float()
        model.to("cpu")
        integer = convert(solution, device=args.device)
        given = integer(**arguments, return_dict=False)[0][0].float()
    error = (given - expected).square().mean()
    row["integer_weight_bytes"] = sum(tensor.nbytes for tensor in (*integer.parameters(), *integer.buffers()))
    row["weight_ratio"] = round(row["integer_weight_bytes"] / weights, 4)
    row["sqnr"] = round(float(10 * torch.log10(expected.square().mean() / error)), 2)
    args.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in row.items() if key not in ("recipe", "environment")})


if __name__ == "__main__":
    main()
