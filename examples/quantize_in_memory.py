"""Quantize a diffusers transformer that is in memory, run it, save it, and load it with diffusers.

    python examples/quantize_in_memory.py src/tqdit/data/fashion-dit build/w8a8

The first argument is a diffusers pipeline of a DiT: a folder, or owner/name on the Hugging Face Hub. Nothing is written
but the artifact, the second argument, which `tqdit sample` and `tqdit compare` take, too.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

import tqdit

RECIPE = tqdit.Recipe("plus", "w8a8", samples=8, steps=50, rounds=1)  # quick; Recipe() is better
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="diffusers pipeline of a DiT: folder, or owner/name on the Hub")
    parser.add_argument("out", type=Path, help="artifact folder to write")
    args = parser.parse_args()

    transformer = DiTTransformer2DModel.from_pretrained(args.model, subfolder="transformer").to(DEVICE)
    scheduler = DDIMScheduler.from_pretrained(args.model, subfolder="scheduler")

    integer = tqdit.quantize(transformer, RECIPE, scheduler=scheduler)  # `transformer` itself stays as it is

    config = transformer.config
    inputs = {
        "hidden_states": torch.randn(4, config.in_channels, config.sample_size, config.sample_size, device=DEVICE),
        "timestep": torch.tensor([950, 600, 300, 50], device=DEVICE),
        "class_labels": torch.arange(4, device=DEVICE),
    }
    with torch.no_grad():
        exact, found = transformer(**inputs).sample, integer(**inputs).sample
    print(f"relative error of the output: {(found - exact).norm() / exact.norm():.4f}")

    tqdit.save(integer, args.out, scheduler=scheduler)
    loaded = DiTTransformer2DModel.from_pretrained(args.out).to(DEVICE)
    with torch.no_grad():
        same = torch.equal(loaded(**inputs).sample, found)
    print(f"{args.out}: loaded by diffusers, {'the same' if same else 'ANOTHER'} output")


if __name__ == "__main__":
    main()
