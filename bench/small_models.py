"""Quality of small FLUX and Z-Image models after quantization: outputs by time group, images, distances.

python examples/train_small_models.py flux --data .data/fashion --minutes 3.5 --out build/small-flux
python bench/small_models.py bench/results/small-models-flux-h200.json --model build/small-flux --device cuda

The model's calls are recorded while it draws images of all classes, and each recipe is solved from them. Measured are,
against the model in fp32:

- SQNR of the outputs on calls of other seeds, over all of them and by time group;
- PSNR of the images of the same seeds, whether they are equivalent (`tqdit.quality.equivalence`), their FD-fashion and
  how often the classifier sees their label.

The same of the model in bf16, and of torchao's int8 with dynamic activations where it is installed. The file is written
anew after every model: a run that is cut keeps what it has.
"""

import argparse
import copy
import importlib
import importlib.util
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tqdit
from tqdit.calibration.calls import Calls
from tqdit.layers.quantized import QuantizedLinear
from tqdit.quality import fashion, features
from tqdit.quality.equivalence import BLOCKS, Drawn, Yardstick, verdicts
from tqdit.quality.metrics import psnr_db, sqnr_db
from tqdit.recorded import traced_graph
from tqdit.system.environment import environment
from tqdit.system.files import read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
GROUPS, CLASSES = 10, 10
RECORDED_SEEDS, HELD_OUT_SEED, OTHER_SEED = 1000, 20_000, 40_000  # of noise; images have seeds from 0 on
BITS = ("w8a8", "w6a6", "w4a8")
BFLOAT16, TORCHAO = "bf16", "torchao int8 dynamic"


@dataclass(frozen=True)
class Settings:
    """How many images are drawn, in batches of how many, and by which sampling."""

    images: int
    batch: int
    steps: int
    guidance: float


class Trial:
    """The float model and what is compared with it: outputs of held-out calls, and images.

    `pipe` is a `SmallPipeline` of `examples/small_models.py`. `recorded` batches of one image of each class are drawn
    for calibration, and as many for the held-out calls.
    """

    def __init__(self, pipe: Any, settings: Settings, recorded: int, per_group: int) -> None:
        self.pipe, self.settings = pipe, settings
        self.device = pipe.prompts.device
        self.calls = self.record(RECORDED_SEEDS, recorded, per_group)
        self.held_out = self.record(HELD_OUT_SEED, recorded, per_group)
        self.groups = self.held_out.time_groups(GROUPS).index(self.held_out.times)
        self.outputs = self.predict(pipe.transformer)
        self.labels = torch.arange(settings.images) % CLASSES
        self.classifier = features.load_fashion_classifier(self.device)
        self.images = self.draw(pipe) if settings.images else None

    def record(self, seed: int, batches: int, per_group: int) -> Calls:
        """Return the calls that the pipeline makes to draw batches of one image of each class."""
        with tqdit.record(self.pipe.transformer, per_group=per_group, groups=GROUPS) as recording:
            for number in range(batches):
                self.pipe(torch.arange(CLASSES), self.settings.steps, self.settings.guidance, seed + number)
        return recording.of(self.pipe.transformer)

    @torch.no_grad()
    def predict(self, model: nn.Module) -> list[Tensor]:
        """Return the outputs of the held-out calls, fp32 on the CPU."""
        found = []
        for call in self.held_out:
            made = model(**call.to(self.device, model.dtype))[0]
            parts = made if isinstance(made, list | tuple) else [made]
            found.append(torch.cat([part.float().flatten() for part in parts]).cpu())
        return found

    def draw(self, pipe: Any, seed: int = 0) -> Tensor:
        """Return the images [N, 1, 32, 32] of a pipeline."""
        size, settings = self.settings.batch, self.settings
        parts = enumerate(self.labels.split(size), seed)
        return torch.cat([pipe(labels, settings.steps, settings.guidance, number) for number, labels in parts])

    def fidelity(self, model: nn.Module) -> dict[str, Any]:
        """Return the SQNR of a model's outputs in dB, over all held-out calls and by time group."""
        outputs = self.predict(model)

        def decibels(members: list[int]) -> float:
            chosen = [torch.cat([found[i] for i in members]) for found in (self.outputs, outputs)]
            return round(sqnr_db(*chosen), 2)

        groups = [(self.groups == group).nonzero()[:, 0].tolist() for group in range(GROUPS)]
        return {
            "sqnr_db": decibels(list(range(len(outputs)))),
            "sqnr_db_by_group": [decibels(members) if members else None for members in groups],
        }

    def quality(self, images: Tensor) -> dict[str, float]:
        """Return the FD-fashion of images, and how often the classifier sees their label."""
        return {
            "fd_fashion": round(features.fd_fashion(images), 4),
            "class_agreement": features.class_agreement(images, self.labels, self.classifier),
        }

    def drawn(self, images: Tensor) -> Drawn:
        """Return images with their features, as the equivalence test takes them."""
        return Drawn(images.cpu(), features.image_features(images, self.classifier))

    def verdicts(self, images: dict[str, Tensor]) -> dict[str, Any]:
        """Return the verdict of each quantized model; bf16 is a yardstick."""
        real = fashion.load_real_features().to(self.device)
        others = self.drawn(self.draw(self.pipe, OTHER_SEED)).features
        yardstick = Yardstick(self.drawn(self.images), images[BFLOAT16].cpu(), others, real)
        models = {name: self.drawn(found) for name, found in images.items() if name != BFLOAT16}
        return {name: verdict.figures() for name, verdict in verdicts(models, yardstick).items()}


def models(trial: Trial, bits: list[str]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the models that are measured by name, each with what makes it."""
    transformer = trial.pipe.transformer
    yield BFLOAT16, lambda: copy.deepcopy(transformer).bfloat16()
    for preset in ("plus", "dynamic"):
        for widths in bits:
            recipe = tqdit.Recipe(preset, widths)
            yield f"{preset} {widths}", lambda recipe=recipe: tqdit.quantize(transformer, recipe, calls=trial.calls)
    if importlib.util.find_spec("torchao") is not None:
        yield TORCHAO, lambda: by_torchao(transformer, trial.calls)


def by_torchao(transformer: nn.Module, calls: Calls) -> nn.Module:
    """Return the model with torchao's int8 weights and a scale for each row of activations, in fp32 around them.

    It takes the layers that a recipe quantizes with their inputs.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    graph = traced_graph(transformer, calls)
    chosen = {name for block in graph.blocks for linear in block.linears for name in linear.modules}
    model, config = copy.deepcopy(transformer), Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda _, name: name in chosen)
    return model


def layers(model: nn.Module) -> dict[str, Any]:
    """Return the number of layers on codes, on float inputs, and in float with the reasons."""
    found = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    if not found:
        return {}
    grids = Counter(str(layer.source.params.spec.grid) for layer in found if layer.source is not None)
    return {"quantized": dict(grids), "weight_only": sum(layer.source is None for layer in found)}


def measure(trial: Trial, name: str, make: Callable[[], nn.Module]) -> tuple[dict[str, Any], Tensor | None]:
    """Return the figures of a model, and its images if any are drawn."""
    started = time.perf_counter()
    model = make()
    seconds = round(time.perf_counter() - started, 1)
    row: dict[str, Any] = {"quantization_seconds": seconds, "layers": layers(model), **trial.fidelity(model)}
    images = None
    if trial.images is not None:
        images = trial.draw(trial.pipe.with_transformer(model))
        row |= {"psnr_db": round(psnr_db(trial.images, images), 2), **trial.quality(images)}
    row["seconds"] = round(time.perf_counter() - started, 1)
    print(name, row, flush=True)
    return row, images


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--model", type=Path, required=True, help="folder that examples/train_small_models.py wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bits", nargs="+", default=list(BITS))
    parser.add_argument("--images", type=int, default=1000, help=f"a multiple of {BLOCKS}; 0: outputs alone")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--recorded", type=int, default=16, help="batches of 10 images that are recorded")
    parser.add_argument("--skip", nargs="*", default=[], help="models that are left out, such as bf16 where it is slow")
    parser.add_argument("--per-group", type=int, default=16, help="calls of a time group that are kept")
    args = parser.parse_args()
    if args.images % BLOCKS or 0 < args.images < 2 * BLOCKS:
        parser.error(f"--images must be 0 or a multiple of {BLOCKS}, at least {2 * BLOCKS}")
    return args


def main() -> None:
    """Run the command line."""
    args = arguments()
    sys.path.insert(0, str(ROOT / "examples"))
    small = importlib.import_module("small_models")
    settings = Settings(args.images, args.batch, args.steps, args.guidance)
    pipe = small.SmallPipeline.from_pretrained(args.model, args.device)
    training = args.model / "training.json"
    trial = Trial(pipe, settings, args.recorded, args.per_group)
    result: dict[str, Any] = {
        "environment": environment(args.device),
        "training": read_json(training) if training.is_file() else None,
        "settings": {**vars(settings), "recorded_calls": len(trial.calls), "held_out_calls": len(trial.held_out)},
        "float": None if trial.images is None else trial.quality(trial.images),
        "models": {},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    images: dict[str, Any] = {}
    for name, make in models(trial, args.bits):
        if name in args.skip:
            continue
        result["models"][name], images[name] = measure(trial, name, make)
        write_json(args.out, result)
    if images.get(BFLOAT16) is not None:  # the yardstick
        result["verdicts"] = trial.verdicts(images)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
