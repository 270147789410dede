"""PixArt at its published shape, from random float weights to integers: quantize, save, load, compare, time.

    python bench/pixart.py bench/results/pixart-h200.json --shape PixArt-XL/2@512
    python bench/pixart.py bench/results/pixart-cpu.json --shape PixArt-XL/2 --blocks 2 --device cpu

Weights and prompts are random, so the figures say that the way works and how fast a call is, nothing of images.
`--blocks` leaves out all but some blocks. The integer model's error is that of its output against the float model's,
at held-out states of the float model's own sampling; the time is that of a call of two samples, against bfloat16.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

import tqdit
from tqdit.architectures.registry import architecture
from tqdit.architectures.shapes import shape_config
from tqdit.quality.metrics import sqnr_db
from tqdit.speed.random_weights import random_float
from tqdit.system.environment import environment
from tqdit.system.files import write_text

PROMPTS, TOKENS = 4, 120  # tokens of a prompt of PixArt-alpha
SETTINGS = {"groups": 4, "samples": 2, "steps": 20, "guidance": 4.5, "rounds": 1, "candidates": 20, "rows": 512,
            "queries": 512}  # fmt: skip
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": True}
CALLS = 20


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--shape", default="PixArt-XL/2@512")
    parser.add_argument("--blocks", type=int, help="only so many of the shape's blocks")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    config = shape_config(args.shape)
    config["num_layers"] = args.blocks or config["num_layers"]
    transformer, prompts, start = random_float(config), random_prompts(config), time.perf_counter()
    recipe = tqdit.Recipe("plus", "w8a8", **SETTINGS)
    with tempfile.TemporaryDirectory() as work:
        options: dict[str, Any] = {"scheduler": SCHEDULER, "conditions": prompts, "device": args.device}
        tqdit.quantize(transformer, recipe, out=Path(work) / "w8a8", **options)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in (Path(work) / "w8a8").glob("*.safetensors"))
        stream = torch.bfloat16 if args.device == "cuda" else torch.float32
        kind = getattr(diffusers, config["_class_name"])
        integer = kind.from_pretrained(Path(work) / "w8a8", torch_dtype=stream).to(args.device)
        held_out = tqdit.Recipe("plus", "w8a8", **SETTINGS | {"seed": 1, "samples": 1})
        states = tqdit.calibration_states(transformer, held_out, **options)
        transformer = transformer.to(args.device)
        result = {
            "shape": args.shape,
            "blocks": config["num_layers"],
            "quantize_seconds": round(seconds, 1),
            "weight_bytes": size,
            "float32_bytes": 4 * sum(parameter.numel() for parameter in transformer.parameters()),
            "sqnr_db": errors(transformer, integer, states, args.device, stream),
            "call_ms": times(config, transformer, integer, args.device, stream),
            "settings": SETTINGS,
            "environment": environment(args.device),
        }
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print({key: result[key] for key in ("quantize_seconds", "weight_bytes", "sqnr_db", "call_ms")})


def random_prompts(config: dict[str, Any]) -> tqdit.Prompts:
    """Prompts of 5 to all tokens, and an unconditional one."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(5, TOKENS, PROMPTS).long()
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    embeds = torch.randn(PROMPTS + 1, TOKENS, config["caption_channels"], generator=generator)
    return tqdit.Prompts.checked({
        "prompt_embeds": embeds[1:], "prompt_attention_mask": mask, "negative_prompt_embeds": embeds[:1],
        "negative_prompt_attention_mask": mask[:1],
    })  # fmt: skip


@torch.no_grad()
def errors(transformer: Any, integer: Any, states: Any, device: str, stream: torch.dtype) -> dict[str, float]:
    """SQNR in dB of the integer model's output, and of the float model's in the dtype of the stream."""
    assert states.conditions is not None
    x, t = states.x.to(device), states.t.to(device)
    inputs = states.conditions.rows(states.labels.to(device))
    expected = transformer(x, timestep=t, **inputs).sample
    actual = integer(x.to(stream), timestep=t, **inputs).sample
    return {"integer": round(sqnr_db(expected.float().cpu(), actual.float().cpu()), 2)}


def times(config: dict[str, Any], transformer: Any, integer: Any, device: str, stream: torch.dtype) -> dict[str, float]:
    """Median ms of a call of two samples: in integers, and of the float model in bfloat16, as it is (not compiled)."""
    made = architecture(config)
    x = torch.randn(2, *made.input_shape(config), generator=torch.Generator().manual_seed(0)).to(device, stream)
    inputs = {name: value.to(device) for name, value in made.example(config, 2).items()}
    timestep = torch.tensor([500, 500], device=device)
    found = {"integer": timed(lambda: integer(x, timestep=timestep, **inputs), device)}
    baseline = transformer.to(torch.bfloat16)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    found["bfloat16 eager"] = timed(lambda: baseline(x.bfloat16(), timestep=timestep, **half), device)
    return found


@torch.no_grad()
def timed(call: Callable[[], Any], device: str) -> float:
    """Median ms of a call after three to warm up."""
    spent = []
    for number in range(CALLS + 3):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append((time.perf_counter() - start) * 1e3 if number >= 3 else 0.0)
    return round(statistics.median(spent[3:]), 3)


if __name__ == "__main__":
    main()
