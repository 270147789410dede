"""How well a loss over calibration states ranks quantized models, as the PSNR of their images does.

    python bench/objective.py --json bench/results/objective-cpu.json
    python bench/objective.py --images 32 --steps 50 --states 16 --device cuda --artifacts w8a8 w6a6

A variant is the float model with the weights, or the inputs, of its blocks' linear layers rounded to few bits, at the
timesteps of one range. Artifacts are variants, too. Each variant's error is that of its guided output at held-out
states of the float model, and its PSNR that of images with the same seeds. A loss is the mean over the states of the
squared error, times a weight:

    plain    all states alike
    sampler  how far the error moves the sampler's next state
    white    how far white errors of the output at t move the image, by `tqdit.calibration.sensitivity`
    image    the same of errors that arise in the model's layers

Figures: Spearman's rank correlation of each loss, negated, with the PSNR: 1 is the same order. `predicted_psnr_db` is
the PSNR by the loss `image`, for errors that are small and independent from step to step.
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures.registry import conditions, config_of, graph
from tqdit.calibration.sensitivity import Sensitivity, measure
from tqdit.calibration.states import CalibrationSet
from tqdit.imaging import generate
from tqdit.quality import metrics
from tqdit.quality.artifacts import load_artifact
from tqdit.quality.comparison import HELD_OUT_SEED, held_out
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling, arguments, predict
from tqdit.sampling.schedules import resolved
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.sources.source import ModelSource
from tqdit.system import trees
from tqdit.system.environment import environment
from tqdit.system.files import write_text

GROUPS = 10
BATCH = 8
RANGES = ((0.0, 1.0), (0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # of the timesteps, 1 being noise
LOSSES = ("plain", "sampler", "white", "image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 6], help="of weights, and of inputs")
    parser.add_argument("--artifacts", nargs="*", default=[], help="artifacts of the model, to be ranked among them")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="sampler steps of the images and of the sensitivity")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--states", type=int, default=4, help="held-out states in each of ten ranges of timesteps")
    parser.add_argument("--probes", type=int, default=8, help="sampling runs that measure the sensitivity")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = compared(args)
    print(json.dumps({"seconds": result["seconds"], "spearman": result["spearman"]}, indent=1))
    if args.json:
        write_text(args.json, json.dumps(result, indent=1, allow_nan=False) + "\n")


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the sensitivity and every variant, and print each as it is done."""
    source = resolve(args.model)
    model = load_float(source).requires_grad_(False).to(args.device)
    sampling = resolved(Sampling(steps=args.steps, guidance=args.guidance), source.scheduler)
    start = time.perf_counter()
    given: dict[str, Any] = {"samples": args.probes, "seed": HELD_OUT_SEED}
    measured = measure(model, source.scheduler, sampling, **given)
    seconds = {"sensitivity": time.perf_counter() - start}
    white = measure(model, source.scheduler, sampling, white=True, **given)
    data = held_out(source, model, GROUPS, args.states, HELD_OUT_SEED)
    curves = {"white": white, "image": measured}
    bench = Bench(source, model, data, curves, sampling, args.images)
    for name, curve in curves.items():
        print(f"{name}: mean sensitivity by time group:", *(f"{x:.3g}" for x in by_group(curve, data)), flush=True)
    rows: list[dict[str, Any]] = []
    variants = (rounded_variants(source, model, args.bits), artifact_variants(bench, args.artifacts))
    for name, module in itertools.chain(*variants):
        rows.append({"variant": name, **bench.figures(module)})
        print(name, *(f"{key} {value:.4g}" for key, value in rows[-1].items() if key != "variant"), flush=True)
    seconds["all"] = time.perf_counter() - start
    psnr = [row["psnr_db"] for row in rows]
    shown = ("model", "bits", "images", "steps", "guidance", "states", "probes")
    return {
        "environment": environment(args.device),
        "settings": {"sampler": sampling.sampler} | {name: getattr(args, name) for name in shown},
        "seconds": seconds,
        "sensitivity": {
            name: {"t": curve.t.tolist(), "squared": curve.squared.tolist(), "by_group": by_group(curve, data)}
            for name, curve in curves.items()
        },
        "spearman": {loss: spearman([-row[loss] for row in rows], psnr) for loss in LOSSES},
        "variants": rows,
    }  # fmt: skip


class Bench:
    """A float model, its outputs and images, and what its variants are measured with."""

    def __init__(
        self,
        source: ModelSource,
        model: nn.Module,
        data: CalibrationSet,
        curves: dict[str, Sensitivity],
        sampling: Sampling,
        num: int,
    ) -> None:
        """`num`: images of each model; `curves`: sensitivities for the steps of `sampling`, by the name of a loss."""
        self.source, self.model, self.data, self.sampling = source, model, data, sampling
        self.conditions, self.num = conditions(config_of(model)), num
        measured = {name: curve.contributions(data.t, data.time_groups) for name, curve in curves.items()}
        self.weights = {"plain": torch.ones(len(data)), "sampler": data.step_weight, **measured}
        self.output, self.pixels = self._output(model), self._pixels(model)

    def figures(self, module: nn.Module) -> dict[str, float]:
        """Return the PSNR of a variant, what the sensitivity predicts of it, and each loss."""
        error = (self._output(module) - self.output).double().square().flatten(1).mean(1)
        losses = {name: float((error * weight).mean()) for name, weight in self.weights.items()}
        predicted = max(losses["image"] * len(error), 1e-20)
        psnr = metrics.psnr_db(self.pixels, self._pixels(module))
        return {"psnr_db": psnr, "predicted_psnr_db": 10 * math.log10(4 / predicted), **losses}

    def _output(self, module: nn.Module) -> torch.Tensor:
        """Return the guided output at every state, (S, C, H, W) on the CPU."""
        device, guidance, data, parts = _device(self.model), self.sampling.guidance, self.data, []
        for members in torch.arange(len(data)).split(BATCH):
            x, t, labels = (part[members].to(device) for part in (data.x, data.t, data.labels))
            with torch.inference_mode():
                output = predict(module, x, t, *arguments(self.conditions, labels, guidance), guidance)
            parts.append(output[:, : x.shape[1]].float().cpu())
        return torch.cat(parts)

    def _pixels(self, module: nn.Module) -> torch.Tensor:
        classes = [i % self.conditions.count for i in range(self.num)]
        latents = generate.sample_latents(module, self.source.scheduler, classes, self.sampling, 0, batch=BATCH)
        return generate.to_pixels(latents, self.source.vae)


class Within(nn.Module):
    """A model whose calls at timesteps from `low` to below `high` are another's."""

    def __init__(self, outside: nn.Module, inside: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.outside, self.inside, self.low, self.high = outside, inside, low, high

    @property
    def config(self) -> Any:
        return self.outside.config

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False, **condition: Any
    ) -> tuple[torch.Tensor]:
        chosen = (timestep >= self.low) & (timestep < self.high)
        parts = []
        for module, rows in ((self.inside, chosen.nonzero()[:, 0]), (self.outside, (~chosen).nonzero()[:, 0])):
            if len(rows):
                given = trees.mapped(lambda tensor, rows=rows: tensor[rows], condition)
                parts.append((rows, module(x[rows], timestep=timestep[rows], **given, return_dict=False)[0]))
        output = parts[0][1].new_empty(len(x), *parts[0][1].shape[1:])
        for rows, part in parts:
            output[rows] = part
        return (output,)


def rounded_variants(source: ModelSource, model: nn.Module, bits: list[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield every variant that is rounded to `bits` in one of `RANGES`, by name."""
    low, high, _ = source.time_range
    for kind, width in itertools.product((rounded_weights, rounded_inputs), bits):
        rounded = kind(model, width)
        for first, last in RANGES:
            ends = [low + share * (high - low) for share in (first, last)]
            last_end = math.inf if last == 1.0 else ends[1]  # flow matching visits the end of the range
            yield f"{kind.__name__} {width} bits t {ends[0]:g}-{ends[1]:g}", Within(model, rounded, ends[0], last_end)


def rounded_weights(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy whose linear layers in blocks have weights rounded to nearest, symmetric, a scale per channel."""
    rounded = copy.deepcopy(model)
    most = 2 ** (bits - 1) - 1
    for layer in _block_layers(rounded):
        scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / most
        layer.weight.copy_((layer.weight / scale).round() * scale)
    return rounded


def rounded_inputs(model: nn.Module, bits: int) -> nn.Module:
    """Return a copy whose linear layers in blocks round their inputs to nearest, between a sample's extremes."""
    rounded = copy.deepcopy(model)

    def round_input(_: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
        low, high = (end(given[0].flatten(1), 1)[:, None, None] for end in (torch.amin, torch.amax))
        scale = (high - low).clamp(min=1e-12) / (2**bits - 1)
        return ((given[0] - low) / scale).round() * scale + low

    for layer in _block_layers(rounded):
        layer.register_forward_pre_hook(round_input)
    return rounded


def artifact_variants(bench: Bench, artifacts: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield every artifact as the integer model that it is, by name. Raises `InputError` for those of other models."""
    digest = weights_hash(bench.model)
    for path in artifacts:
        entry = load_artifact(path, bench.source, digest)
        yield entry.name, convert(entry.solution, device=_device(bench.model))


def by_group(curve: Sensitivity, data: CalibrationSet) -> list[float]:
    """Return the mean squared sensitivity of the steps in each time group that the sampler visits."""
    group = data.time_groups.index(curve.t)
    return [float(curve.squared[group == g].mean()) for g in sorted(set(group.tolist()))]


def spearman(first: list[float], second: list[float]) -> float | None:
    """Return Spearman's rank correlation; equal values share their mean rank. None where all values are equal."""
    ranks = torch.stack([_ranks(torch.tensor(values, dtype=torch.float64)) for values in (first, second)])
    value = float(torch.corrcoef(ranks)[0, 1])
    return None if math.isnan(value) else value


def _ranks(values: torch.Tensor) -> torch.Tensor:
    below, equal = ((compare(values[:, None], values)).sum(1) for compare in (torch.gt, torch.eq))
    return below + (equal - 1) / 2


def _block_layers(model: nn.Module) -> list[nn.Linear]:
    names = [name for block in graph(config_of(model)).blocks for linear in block.linears for name in linear.modules]
    return [layer for name in names if isinstance(layer := model.get_submodule(name), nn.Linear)]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


if __name__ == "__main__":
    main()
