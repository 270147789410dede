"""Images per second of one process and of several, on one machine: a GPU each with NCCL, or the CPU's cores with gloo.

python bench/distributed.py bench/results/distributed.json --device cuda                   # random DiT-XL/2, W8A8
python bench/distributed.py build/scaling.json --model fashion-dit --images 32 --steps 10  # on the CPU

Every process draws as many images as the only one does; `scaling` is images per second over those of as many processes
that do not hinder each other. `sha256` is of the images that all runs have in common: it must be one value. Timed is
sampling with the exchange of the images, from the moment all have warmed up until all have all images.
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tqdit import workflow
from tqdit.architectures import registry
from tqdit.architectures.shapes import shape_config
from tqdit.artifact import folder as artifact
from tqdit.imaging.generate import sample_batches
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import Sampling
from tqdit.sources.resolve import resolve
from tqdit.speed.random_solution import random_solution
from tqdit.system import distributed
from tqdit.system.environment import environment
from tqdit.system.files import write_text
from tqdit.system.world import World

GUIDANCE = 1.5
SEED = 0


def main() -> None:
    arguments = parse()
    if arguments.worker:
        measure(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model
        if model is None:
            model = Path(scratch, "artifact")
            model.mkdir()
            recipe = Recipe(arguments.preset, arguments.bits)
            artifact.write(random_solution(shape_config(arguments.random), recipe), model)
        rows = [launch(arguments, str(model), size, Path(scratch, "row.json")) for size in arguments.processes]
    alone = rows[0]["images_per_second"] / rows[0]["processes"]
    for row in rows:
        row["scaling"] = row["images_per_second"] / (row["processes"] * alone)
    result = {
        "command": shlex.join(["python", "bench/distributed.py", *sys.argv[1:]]),
        "environment": rows[0].pop("environment"),
        "model": arguments.model or f"random {arguments.random} {arguments.preset} {arguments.bits}",
        "settings": {"steps": arguments.steps, "guidance": GUIDANCE, "batch": arguments.batch},
        "rows": [{key: value for key, value in row.items() if key != "environment"} for row in rows],
    }
    write_text(arguments.out, json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in result["rows"]:
        print(f"{row['processes']} processes: {row['images_per_second']:.3g} images/s, scaling {row['scaling']:.3f}")
    if len({row["sha256"] for row in rows}) > 1:
        sys.exit("the images depend on the number of processes")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--model", help="instead of a random one: a bundled name, a folder or an artifact")
    parser.add_argument("--random", default="DiT-XL/2", help="shape of the random model")
    parser.add_argument("--preset", default="plus")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=128, help="of each process, a multiple of the batch")
    parser.add_argument("--batch", type=int, default=32, help="images drawn at a time")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.images < 1 or arguments.images % arguments.batch:
        parser.error(f"--images {arguments.images} is no multiple of --batch {arguments.batch}")
    return arguments


def launch(arguments: argparse.Namespace, model: str, size: int, row: Path) -> dict[str, Any]:
    """The row of a run in `size` processes, which share the cores as those of the largest run do."""
    passed = ("images", "batch", "steps", "repeats", "device")
    options = [part for name in passed for part in (f"--{name}", str(getattr(arguments, name)))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--"]
    threads = max(1, (os.cpu_count() or 1) // max(arguments.processes))
    subprocess.run(
        [*launcher, __file__, str(row), "--worker", "--model", model, *options],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
    )
    return json.loads(row.read_text(encoding="utf-8"))


def measure(arguments: argparse.Namespace) -> None:
    """One process of a run; the first writes the row."""
    with distributed.joined(arguments.device) as world:
        model = workflow.load(arguments.model, device=world.device)
        draw(world, arguments, model, arguments.batch, steps=2)
        runs = [draw(world, arguments, model, arguments.images, arguments.steps) for _ in range(arguments.repeats)]
    if not world.first:
        return
    seconds = statistics.median(run[0] for run in runs)
    common = runs[0][1][: arguments.images].contiguous().numpy().tobytes()
    row = {
        "processes": world.size,
        "exchange": "none" if world.size == 1 else "nccl" if arguments.device == "cuda" else "gloo",
        "images": arguments.images * world.size,
        "seconds": [run[0] for run in runs],
        "images_per_second": arguments.images * world.size / seconds,
        "sha256": hashlib.sha256(common).hexdigest(),
        "environment": environment(world.device),
    }
    write_text(arguments.out, json.dumps(row))


def draw(
    world: World, arguments: argparse.Namespace, model: torch.nn.Module, images: int, steps: int
) -> tuple[float, torch.Tensor]:
    """Seconds that `images` per process take, and all of them."""
    batches = distributed.batches(images * world.size, arguments.batch)
    classes = registry.conditions(registry.config_of(model)).count
    labels = [i % classes for i in range(images * world.size)]
    scheduler = resolve(arguments.model).scheduler
    world.wait()  # all start together
    start = time.perf_counter()
    sampling = Sampling("ddim", steps, GUIDANCE)
    parts = list(sample_batches(model, scheduler, labels, sampling, SEED, world.share(batches)))
    whole = torch.cat(world.gather(parts, len(batches)))
    world.wait()
    return time.perf_counter() - start, whole


if __name__ == "__main__":
    main()
