"""Draw images of a float model and of its quantized forms, from the same noise, as one picture with labels.

    python bench/side_by_side.py fashion-dit docs/images/side-by-side.png --json bench/results/side-by-side.json
    python bench/side_by_side.py build/colour/dit docs/images/colour.png --json bench/results/side-by-side-colour.json

The second model is the one that `examples/train_colour_dit.py` trains. Every row has the same seeds and classes. The
JSON file says how the picture was made, and how far each row is from the first.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import tqdit
from tqdit import workflow
from tqdit.imaging.rows import labelled_rows
from tqdit.quality import metrics
from tqdit.system.environment import environment

BITS = ("w8a8", "w6a6", "w4a8")


def main() -> None:
    """Quantize, draw, and write the picture and its figures."""
    args = arguments()
    sampling = tqdit.Sampling(steps=args.steps, guidance=args.guidance)
    rows: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in quantized(args, Path(folder)):
            classes = args.classes.split(",") if args.classes else None
            rows[name] = tqdit.sample(
                model, classes, num=args.num, sampling=sampling, seed=args.seed, device=args.device
            )
    expected = rows["float32"]
    psnr = {name: metrics.psnr_db(expected, pixels) for name, pixels in rows.items() if name != "float32"}
    labelled_rows(rows, args.zoom).save(args.out)
    said: dict[str, Any] = {
        "environment": environment(args.device),
        "settings": {"model": args.model, "num": args.num, "seed": args.seed, "steps": args.steps,
                     "guidance": args.guidance, "set": args.set},
        "psnr_db": psnr,
    }  # fmt: skip
    args.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {', '.join(f'{name} {value:.1f} dB' for name, value in psnr.items())}")


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a float model, as tqdit takes it")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--bits", nargs="+", default=BITS)
    parser.add_argument("--classes", help="comma-separated; default: all, in order")
    parser.add_argument("--num", type=int, default=10, help="images in a row")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zoom", type=int, default=3, help="times as large as the images are")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the recipe")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def quantized(args: argparse.Namespace, folder: Path) -> Sequence[tuple[str, str | Path]]:
    """Return (label, model) of every row: the float model, then its artifacts, which are made in `folder`."""
    settings = dict(text.split("=", 1) for text in args.set)
    recipes = {bits: tqdit.Recipe("plus", bits, **settings) for bits in args.bits}
    prepared = workflow.prepare(args.model, recipes[args.bits[0]], device=args.device)  # one calibration serves all
    made: list[tuple[str, str | Path]] = [("float32", args.model)]
    for bits, recipe in recipes.items():
        solution, _ = workflow.solve_prepared(prepared, recipe)
        workflow.save(solution, prepared.source, folder / bits)
        made.append((bits.upper(), folder / bits))
    return made


if __name__ == "__main__":
    main()
