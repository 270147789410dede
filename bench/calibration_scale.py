"""Seconds and memory of a calibration at a published shape with random weights, stage by stage.

python bench/calibration_scale.py --device cuda --json bench/results/calibration-scale-h200.json
torchrun --standalone --nproc-per-node 2 bench/calibration_scale.py --device cuda \
    --json bench/results/calibration-scale-h200-x2.json
python bench/calibration_scale.py --blocks 2 --samples 2 --steps 20 --rounds 1 --candidates 10 --work-folder \
    --json bench/results/calibration-scale-cpu.json

Without settings: the published ones. A run of fewer blocks or smaller settings is also scaled up to all blocks and to
the published settings, each stage by its matmuls' operations: an extrapolation, labelled so. Speed does not depend on
the weights' values, but where the search ends early does; operations count every round.

Several processes share the work; a stage lasts from the moment all begin it until all have finished. `solution_sha256`
is of every scale, zero point and code: one value for every number of processes. Memory is the first process's.
"""

import argparse
import hashlib
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scale_arithmetic import memory, operations
from tqdit.architectures.shapes import shape_config
from tqdit.calibration import trajectories
from tqdit.calibration.recorder import record
from tqdit.calibration.store import Store, WorkFolder
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.search.solver import solve
from tqdit.spec import Solution
from tqdit.speed.random_weights import random_float
from tqdit.system import distributed, torchrun
from tqdit.system.environment import environment, peak_memory_bytes
from tqdit.system.files import write_text
from tqdit.system.outputs import check_file
from tqdit.system.world import World
from tqdit.timegroups import TimeGroups

Case = tuple[dict[str, Any], Recipe]  # a model config and a recipe
SETTINGS = ("samples", "steps", "rounds", "candidates", "rows", "queries")


def main() -> None:
    args = arguments()
    check_file(args.json)
    config = shape_config(args.shape)
    part = {**config, "num_layers": args.blocks or config["num_layers"]}
    run = recipe(args, {name: getattr(args, name) for name in SETTINGS})
    with distributed.joined(args.device) as world, tempfile.TemporaryDirectory() as scratch:
        store = WorkFolder(Path(scratch)) if args.work_folder else None
        model = random_float(part).requires_grad_(False).to(world.device)
        solution, stages = measure(model, run, store)
    if not world.first:
        return
    result = {
        "environment": environment(args.device),
        "command": shlex.join([*launcher(world), "bench/calibration_scale.py", *sys.argv[1:]]),
        "processes": world.size,
        "exchange": "none" if world.size == 1 else "nccl" if args.device == "cuda" else "gloo",
        "shape": args.shape,
        "blocks": part["num_layers"],
        "work_folder": args.work_folder,
        "recipe": run.model_dump(mode="json"),
        "operations": operations(part, run),
        "memory_arithmetic": memory(part, run, torch.device(args.device), world.size),
        "stages": stages,
        "solution_sha256": sha256(solution),
        "extrapolated": {
            name: {"blocks": config["num_layers"], "recipe": wanted.model_dump(mode="json")}
            | scaled(stages, (part, run), (config, wanted), torch.device(args.device), args.work_folder, world.size)
            for name, wanted in (("all blocks", run), ("published settings", recipe(args, {})))
        },
    }
    write_text(args.json, json.dumps(result, indent=1) + "\n")


def scaled(
    stages: dict[str, Any], ran: Case, wanted: Case, device: torch.device, work_folder: bool, processes: int
) -> dict[str, Any]:
    """Seconds of another case, in proportion to its operations, and its peak: ours, and what its large parts differ by.

    An extrapolation; the peak takes every part of `memory` as alive at once, which they are not.
    """
    counted, whole = operations(*ran), operations(*wanted)
    held, large = memory(*ran, device, processes), memory(*wanted, device, processes)
    alive = ("weights", "pass", "codes", "records_of_a_block" if work_folder else "records")
    return {
        "operations": whole,
        "memory_arithmetic": large,
        "seconds": {name: row["seconds"] * whole[name] / counted[name] for name, row in stages.items()},
        "peak_rss_bytes": max(row["peak_rss_bytes"] for row in stages.values())
        + sum(large[p] - held[p] for p in alive),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="DiT-XL/2")
    parser.add_argument("--blocks", type=int, help="only so many blocks; default: all")
    for name in SETTINGS:
        parser.add_argument(f"--{name}", type=int, help="default: as published")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--work-folder", action="store_true", help="keep records on disk, as `quantize --resumable` does"
    )
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.work_folder and torchrun.launched()[1] > 1:
        parser.error("--work-folder is a temporary one, of a single process")
    return args


def recipe(args: argparse.Namespace, changed: dict[str, int | None]) -> Recipe:
    """The published settings with some changed; as many trajectories as samples per group, the default of XL/2."""
    built = Recipe(args.preset, args.bits, **changed)
    return built.model_copy(update={"trajectories": built.samples})


def launcher(world: World) -> list[str]:
    """What started this script."""
    return ["python"] if world.size == 1 else ["torchrun", "--standalone", "--nproc-per-node", str(world.size)]


def sha256(solution: Solution) -> str:
    """Of all that the search has chosen."""
    digest = hashlib.sha256()
    for name, params in sorted(solution.params.items()):
        for tensor in (params.scale, params.zero_point, solution.codes.get(name)):
            digest.update(b"" if tensor is None else tensor.contiguous().numpy())
    return digest.hexdigest()


def measure(model: nn.Module, run: Recipe, store: Store | None) -> tuple[Solution, dict[str, dict[str, Any]]]:
    """The solution; seconds of each stage, the process's peak so far, and the stage's peak of GPU memory."""
    stages: dict[str, dict[str, Any]] = {}
    world, device = distributed.current(), next(model.parameters()).device

    def timed(name: str, stage: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        world.wait()
        start = time.perf_counter()
        found = stage()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        world.wait()
        stages[name] = {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak_memory_bytes()}
        if device.type == "cuda":
            stages[name]["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
            stages[name]["peak_gpu_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        if world.first:
            print(name, stages[name], file=sys.stderr, flush=True)
        return found

    data = timed("trajectories", lambda: trajectories.collect(model, None, run, store=store))
    records = timed("statistics", lambda: record(model, data, run, store=store))
    groups = TimeGroups.uniform(0, 1000, run.groups)
    return timed("search", lambda: solve(model, records, run, groups, Provenance(), store=store)), stages


if __name__ == "__main__":
    main()
