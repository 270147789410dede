"""Finds the configurations of the kernels of DiT-S, B, L and XL on this GPU, at 256 and 512 pixels and 1 to 64 samples.

python bench/tune.py --seconds 280                  # adds to src/tqdit/backends/triton/tuned/<the GPU>.json
python bench/tune.py --models B --batches 8 --stream float32

The first candidates of every kernel are timed (`--candidates`), with weights from memory as in bench/gpu_kernels.py.
The file is written after each workload, and what it has is not timed again: a run that was stopped, or whose time is
over, goes on where it was. `--anew` times again what the file has. Streams in bf16 come first, then those in fp32.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import dit_kernels
from tqdit.architectures.dit_shapes import SIZES
from tqdit.backends.triton import configurations, timing
from tqdit.backends.triton.layouts import Config
from tqdit.system.environment import environment
from tqdit.system.files import write_text

MODELS = ("XL", "B", "L", "S")  # in the order in which they are timed
BATCHES = (64, 2, 16, 8, 32, 4, 1)
TOKENS = (256, 1024)  # of images of 256 and of 512 pixels
# The kernels that the presets `plus` and `paper` launch at 8 bits. Other forms take the configurations of these.
ANY_STREAM = (
    "qkv, rows", "fc1, channels, rows", "qkv", "fc1", "attention, softmax rows", "attention, MRQ",
    *dit_kernels.Shape.named("XL").float_inputs,
)  # fmt: skip
STREAMS = {
    "bfloat16": ("out", "fc2", "fc2, 2 products", "norm, rows", "norm"),
    "float32": (
        "out, fp32 stream", "fc2, fp32 stream", "fc2, 2 products, fp32 stream", "norm, fp32 stream, rows",
        "norm, fp32 stream",
    ),
}  # fmt: skip
ROUNDS, ROUND_MS = 3, 2  # of each candidate: half of what a first call takes, for thousands of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=configurations.TUNED, help="folder of configurations")
    parser.add_argument("--seconds", type=float, default=280.0, help="begin no workload after this time")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--stream", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--candidates", type=int, default=4, help="of each kernel that are timed")
    parser.add_argument("--anew", action="store_true", help="time again what the file has")
    arguments = parser.parse_args()
    gpu = torch.cuda.get_device_name()
    file = configurations.tuned_file(arguments.out, gpu)
    found = Found(file, environment("cuda"))
    loads = workloads(arguments.models, arguments.batches, arguments.stream, () if arguments.anew else found.best)
    left = run(loads, found, arguments.candidates, time.monotonic() + arguments.seconds)
    print(f"{file}: {len(found.best)} configurations; {left} kernels left")
    if left:
        sys.exit(f"the time is over: run again for the {left} kernels that are left")


class Found:
    """The configurations of a file, with those that are found now."""

    def __init__(self, file: Path, where: dict[str, Any]) -> None:
        self.file, self.where = file, where
        self.best: dict[str, list[Any]] = {}
        if file.exists():
            self.best = json.loads(file.read_text(encoding="utf-8"))["configurations"]

    def write(self) -> None:
        """Write the file, whole or not at all: a line for each configuration."""
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(config)}" for key, config in self.best.items())
        where = json.dumps(self.where)
        write_text(self.file, f'{{\n "environment": {where},\n "configurations": {{\n{lines}\n }}\n}}\n')


def workloads(
    models: Sequence[str], batches: Sequence[int], streams: Sequence[str], known: Sequence[str] | dict[str, Any]
) -> dict[str, list[dit_kernels.Job]]:
    """The kernels to time by workload, each once, without those that are `known`."""
    seen, found = set(known), {}
    for number, stream in enumerate(streams):
        wanted = STREAMS[stream] + (ANY_STREAM if number == 0 else ())
        for tokens, model, batch in itertools.product(TOKENS, models, batches):
            shape = dit_kernels.Shape.named(model)
            jobs = [job for job in dit_kernels.jobs(shape, batch, tokens) if job.name in wanted]
            new = {job.key: job for job in jobs if job.key not in seen}
            seen.update(new)
            if new:
                found[f"DiT-{model}, {tokens} tokens, {batch} samples, {stream}"] = list(new.values())
    return found


def run(loads: dict[str, list[dit_kernels.Job]], found: Found, candidates: int, until: float) -> int:
    """Time workloads until the time is over; the number of kernels that are left."""
    first = {
        name: [job._replace(candidates=job.candidates[:candidates]) for job in jobs] for name, jobs in loads.items()
    }
    if first:
        dit_kernels.compile_all([job for jobs in first.values() for job in jobs])
    timing.ROUNDS, timing.ROUND_MS = ROUNDS, ROUND_MS
    left = sum(map(len, first.values()))
    for name, jobs in first.items():
        if time.monotonic() > until:
            break
        start = time.monotonic()
        for job, config in timed(jobs):
            found.best[job.key] = list(config)
            left -= 1
        found.write()
        print(f"{name}: {len(jobs)} kernels, {time.monotonic() - start:.1f} s", flush=True)
    return left


def timed(jobs: Sequence[dit_kernels.Job]) -> Iterator[tuple[dit_kernels.Job, Config]]:
    for job in jobs:
        times = timing.fastest(job.candidates, dit_kernels.maker(job).run)
        yield job, times[0][0]


if __name__ == "__main__":
    main()
