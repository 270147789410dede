r"""The whole way of a model of full size: checkpoint, convert, quantize, DiTPipeline, images, comparison.

python bench/full_size.py bench/results/full-size-h200.json --random DiT-XL/2 --device cuda --batch 32 --images 8
python examples/train_fashion_dit.py --shape DiT-B/2 --minutes 2.5 --out build/dit-b
python bench/full_size.py bench/results/full-size-h200.json --trained build/dit-b --device cuda --batch 16 --images 320
python bench/full_size.py bench/results/full-size-cpu.json --random DiT-XL/2 --device cpu --samples 4 --steps 20 \
    --rounds 1 --candidates 20 --rows 256 --queries 256 --batch 1 --images 2 --repeats 1 \
    --sampling-steps 10 --held-out 1

A run is one model, of random weights or one that the example trained. It is written as a checkpoint with the published
names, and goes on as a user's would. Calibration is done once and every bit-width solved from it. Without settings:
those of the preset. The file is written anew after every stage: a run that is cut keeps what it has; a run of the same
model takes the place of the one before. Where a GPU has no committed configurations of the kernels, the first call of a
shape finds them, which takes minutes at full size: it is in `first_call_seconds` and in the stage `compare`.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline
from torch import nn

from tqdit import workflow
from tqdit.architectures.building import new_model
from tqdit.architectures.dit_checkpoint import AS_PUBLISHED, POSITIONS, published_names
from tqdit.architectures.registry import config_of
from tqdit.architectures.shapes import shape_config, shape_name
from tqdit.artifact import folder as artifact
from tqdit.quality.compare import compare
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import Sampling
from tqdit.sources.export import convert_checkpoint
from tqdit.sources.resolve import load_float, resolve
from tqdit.speed.random_weights import random_float
from tqdit.system.environment import environment, peak_memory_bytes
from tqdit.system.files import read_json, write_json, write_text
from tqdit.system.outputs import check_file

SETTINGS = ("groups", "samples", "steps", "rounds", "candidates", "rows", "queries")  # of the recipe
PIPELINE_NULL_CLASS = 1000  # in the code of DiTPipeline, whatever the model's number of classes
GUIDANCE = 1.5
PIXELS = (1, 3)  # channels of a model that needs no decoder
TRAINING = "training.json"  # what the example writes beside the model
PUBLISHED_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 256,
}


def main() -> None:
    args = arguments()
    check_file(args.out)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        chain(args, Path(scratch))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--random", metavar="SHAPE", help="random weights in a published shape, such as DiT-XL/2")
    model.add_argument("--trained", metavar="FOLDER", help="what examples/train_fashion_dit.py wrote")
    parser.add_argument("--blocks", type=int, help="of a random model only so many blocks; default: all")
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w6a6", "w4a8"])
    parser.add_argument("--preset", default="plus")
    for name in SETTINGS:
        parser.add_argument(f"--{name}", type=int, help="of the recipe; default: as published")
    parser.add_argument("--batch", type=int, default=8, help="images of a call of the pipeline")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of the pipeline; the median counts")
    parser.add_argument("--sampling-steps", type=int, default=50, help="DDIM steps of every image")
    parser.add_argument("--images", type=int, default=16, help="per model that are compared (PSNR, FD-fashion)")
    parser.add_argument("--held-out", type=int, default=8, help="states per time group that are compared (SQNR)")
    parser.add_argument("--no-compare", action="store_true", help="end before the comparison")
    parser.add_argument("--small-vae", action="store_true", help="for latents too a decoder of a few channels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scratch", type=Path, help="where checkpoint and folders are while it runs")
    return parser.parse_args()


def float_model(args: argparse.Namespace) -> tuple[nn.Module, Mapping[int, str]]:
    """The model in fp32 on the CPU, with the published timestep frequencies that a checkpoint implies; class names."""
    if args.random:
        config = shape_config(args.random)
        blocks = args.blocks or config["num_layers"]
        return random_float({**config, **AS_PUBLISHED, "num_layers": blocks}), {}
    source = resolve(args.trained)
    model = new_model({**source.config, **AS_PUBLISHED})
    model.load_state_dict(load_float(source).state_dict())
    return model.eval().requires_grad_(False), source.labels


def training(folder: str | None) -> dict[str, Any] | None:
    """What the example noted of a training, beside the pipeline whose transformer may have been given."""
    places = [Path(folder, TRAINING), Path(folder).parent / TRAINING] if folder else []
    return next((read_json(place) for place in places if place.is_file()), None)


class Run:
    """What is measured of one model, written to the file as it comes."""

    def __init__(self, args: argparse.Namespace, config: Mapping[str, Any]) -> None:
        self.args, self.config, self.device = args, config, torch.device(args.device)
        guided = self.config["num_embeds_ada_norm"] == PIPELINE_NULL_CLASS
        self.sampling = Sampling("ddim", args.sampling_steps, GUIDANCE if guided else 1.0)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rows: dict[str, dict[str, Any]] = {}
        self.result: dict[str, Any] = {
            "model": shape_name(self.config),
            "weights": "random" if args.random else "trained",
            "training": training(args.trained),
            "command": shlex.join(["python", "bench/full_size.py", *sys.argv[1:]]),
            "environment": environment(args.device),
            "recipe": self.recipe(args.bits[0]).model_dump(mode="json", exclude={"weight_bits", "activation_bits"}),
            "sampling": {"steps": args.sampling_steps, "guidance": self.sampling.guidance, "batch": args.batch},
            "stages": {},
            "rows": [],
        }

    def recipe(self, bits: str) -> Recipe:
        return Recipe(self.args.preset, bits, **{name: getattr(self.args, name) for name in SETTINGS})

    def row(self, name: str, **figures: Any) -> None:
        """Add figures of a model; `name` says its bits."""
        self.rows.setdefault(name, {"bits": name}).update(figures)
        self.write()

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure a stage. What it adds to the dict is kept with its seconds and the memory it took at most."""
        free(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        measured: dict[str, Any] = {}
        start = time.perf_counter()
        yield measured
        synchronise(self.device)
        measured |= {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak_memory_bytes()}
        if self.device.type == "cuda":
            measured["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self.device)
        self.result["stages"][name] = measured
        print(f"{self.result['model']}, {name}: {measured['seconds']:.1f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Put this run into the file, in the place of an earlier one of the same model."""
        self.result["rows"] = list(self.rows.values())
        found = read_json(self.args.out)["runs"] if self.args.out.is_file() else []
        others = [run for run in found if not all(run[key] == self.result[key] for key in ("model", "weights"))]
        write_text(self.args.out, json.dumps({"runs": [*others, self.result]}, indent=1, allow_nan=False) + "\n")


def chain(args: argparse.Namespace, scratch: Path) -> None:
    """All stages in order."""
    checkpoint, folder = scratch / "checkpoint.pt", scratch / "float"
    model, labels = float_model(args)
    run = Run(args, dict(config_of(model)))
    with run.stage("checkpoint") as measured:
        expected = epsilon(model.to(run.device))
        run.result["parameters"] = write_checkpoint(model, checkpoint)
        measured["bytes"] = checkpoint.stat().st_size
    del model
    write_json(scratch / "labels.json", {str(number): label for number, label in labels.items()})
    write_vae(run, scratch / "vae")
    with run.stage("convert"):
        convert(run, checkpoint, folder, scratch / "vae")
    quantize(run, folder, expected, scratch)
    draw(run, "float", folder)
    for bits in args.bits:
        draw(run, bits, scratch / bits)
    if not args.no_compare:
        reference = folder
        if run.config["in_channels"] in PIXELS:  # its images, not what a random decoder makes of them
            reference = scratch / "pixels"
            convert(run, checkpoint, reference, None)
        measure_errors(run, reference, [scratch / bits for bits in args.bits])


def write_checkpoint(model: nn.Module, path: Path) -> int:
    """A training checkpoint with the published names, its EMA weights alone. Returns the number of parameters."""
    config = config_of(model)
    tensors = {
        name: torch.cat([model.get_parameter(target).cpu() for target in targets])
        for name, targets in published_names(config)
    }
    positions = {POSITIONS: model.get_buffer("pos_embed.pos_embed").cpu()}
    torch.save({"ema": tensors | positions, "args": argparse.Namespace(model=shape_name(config))}, path)
    return sum(tensor.numel() for tensor in tensors.values())


def write_vae(run: Run, folder: Path) -> None:
    """A decoder with random weights: that of Stable Diffusion and DiT in shape, or a small one."""
    channels = int(run.config["in_channels"])
    small = run.args.small_vae or channels in PIXELS
    shape = {"block_out_channels": (32,)} if small else PUBLISHED_VAE
    torch.manual_seed(0)
    AutoencoderKL(latent_channels=channels, **shape).save_pretrained(folder)


def convert(run: Run, checkpoint: Path, folder: Path, vae: Path | None) -> None:
    """`tqdit convert`."""
    heads = int(run.config["num_attention_heads"])
    labels = checkpoint.with_name("labels.json")
    convert_checkpoint(checkpoint, folder, heads, vae, labels)


def quantize(run: Run, folder: Path, expected: torch.Tensor, scratch: Path) -> None:
    """One calibration; search and saving per bit-width. Sizes are over the checkpoint's weights in fp32: diffusers'
    format has a copy of the embedder for every block, which would flatter the ratio."""
    with run.stage("calibration"):
        prepared = workflow.prepare(folder, run.recipe(run.args.bits[0]), device=run.args.device)
    run.result["eps_difference_of_checkpoint"] = (epsilon(prepared.model) - expected).abs().max().item()
    float32_bytes = 4 * run.result["parameters"]
    run.row("float", size_bytes=artifact.size_bytes(folder))
    for bits in run.args.bits:
        with run.stage(f"search {bits}"):
            solution, seconds = workflow.solve_prepared(prepared, run.recipe(bits))
        with run.stage(f"save {bits}"):
            workflow.save(solution, prepared.source, scratch / bits)
        size = artifact.size_bytes(scratch / bits)
        run.row(bits, search_seconds=seconds, size_bytes=size, size_ratio=size / float32_bytes)
        del solution


def draw(run: Run, name: str, folder: Path) -> None:
    """Images by diffusers: load, a short call that prepares everything, and those that are timed.

    `device_map`: a model in integers is laid out for the device at once, not for the CPU first.
    """
    with run.stage(f"load {name}") as loading:
        pipeline = DiTPipeline.from_pretrained(folder, torch_dtype=run.dtype, device_map=run.args.device)
        if run.device.type == "cuda":
            loading["resident_gpu_bytes"] = torch.cuda.memory_allocated(run.device)
    pipeline.set_progress_bar_config(disable=True)
    with run.stage(f"draw {name}") as drawing:
        first = seconds_of_call(run, pipeline, steps=2)
        calls = [seconds_of_call(run, pipeline, run.args.sampling_steps) for _ in range(run.args.repeats)]
    run.row(
        name,
        dtype=str(run.dtype).removeprefix("torch."),
        load_seconds=loading["seconds"],
        first_call_seconds=first,
        call_seconds=calls,
        images_per_second=run.args.batch / statistics.median(calls),
    )
    if run.device.type == "cuda":
        peak = max(loading["peak_gpu_bytes"], drawing["peak_gpu_bytes"])
        run.row(name, resident_gpu_bytes=loading["resident_gpu_bytes"], peak_gpu_bytes=peak)


def seconds_of_call(run: Run, pipeline: Any, steps: int) -> float:
    classes = [i % int(run.config["num_embeds_ada_norm"]) for i in range(run.args.batch)]
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    pipeline(classes, run.sampling.guidance, generator, steps, output_type="np")  # the images arrive on the host
    return time.perf_counter() - start


def measure_errors(run: Run, reference: Path, artifacts: list[Path]) -> None:
    """`tqdit compare`."""
    args = run.args
    with run.stage("compare"):
        dtype = str(run.dtype).removeprefix("torch.")  # what was timed
        found = compare(
            reference, list(artifacts), args.images, run.sampling, args.held_out, device=args.device, dtype=dtype,
            cost=False,
        )  # fmt: skip
        run.result["comparison"] = found.settings
        for name, row in zip(["float", *args.bits], (found.float_model, *found.models), strict=True):
            figures = row.figures()
            run.row(name, **{key: figures[key] for key in ("eps_sqnr_db", "psnr_db", "fd_fashion")})


@torch.inference_mode()
def epsilon(model: nn.Module) -> torch.Tensor:
    """Of two states, one without a class; what tells whether two float models are the same."""
    config, device = config_of(model), next(model.parameters()).device
    side, channels = int(config["sample_size"]), int(config["in_channels"])
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    t, labels = torch.tensor([10, 990]), torch.tensor([0, int(config["num_embeds_ada_norm"])])
    found = model(x, timestep=t.to(device), class_labels=labels.to(device), return_dict=False)[0]
    return found[:, :channels].cpu()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """What nobody holds any longer; modules are in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
