"""Published methods beside this project's artifacts: SQNR, PSNR and FD-fashion on the same states and the same noise.

    python bench/baseline_table.py bench/results/baselines-h200.json --device cuda
    python bench/baseline_table.py build/baselines.json --artifacts w8a8 --bits w8a8 --num 16

The methods are those of `bench/baselines/`: simulated on the float model, calibrated on states of the recipe `plus`.
Beside them are the float model in bf16 and fp16, torchao's int8 and OpenVINO's int8, where these packages are installed
(OpenVINO's on a CPU alone), and artifacts. Layers on float inputs and the final layer stay in float in all rows but
bf16, fp16 and artifacts.

Each row has a limit of time. The result file is rewritten after every row; with `--missing`, rows that an earlier run
with the same settings and environment left there are kept.
"""

import argparse
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from baselines import METHODS, dtypes, openvino_int8
from baselines.observed import Observed, observe
from baselines.simulation import Context, Method, simulated
from tqdit.architectures import registry
from tqdit.calibration import trajectories
from tqdit.calibration.states import CalibrationSet, states_sha256
from tqdit.errors import InputError
from tqdit.imaging import generate
from tqdit.quality import fidelity, metrics
from tqdit.quality.artifacts import load_artifact
from tqdit.quality.comparison import HELD_OUT_SEED, STATE_GROUPS, fd_fashion, held_out
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sources.resolve import load_float, resolve, weights_hash
from tqdit.sources.source import ModelSource
from tqdit.system.environment import environment
from tqdit.system.files import read_json, write_json

BITS = ("w8a8", "w6a6", "w4a8")
OTHERS = ("bf16", "fp16", "torchao int8", "OpenVINO int8")
SCOPE = (
    "Simulated methods, torchao and OpenVINO quantize the linear layers of attention and feed-forward; the simulated "
    "methods also quantize the products of attention, which the two libraries compute in float. Patch embedding, "
    "timestep and class embedding, modulation and the final layer stay in float there. bf16 and fp16 convert the whole "
    "model. Artifacts quantize the weights of all layers."
)
Made = AbstractContextManager[tuple[nn.Module, dict[str, Any]]]


class TimeLimitError(Exception):
    """A row took longer than its limit."""


@dataclass(frozen=True)
class Row:
    """A row of the table: its method and bits, and what makes the model; or why it cannot be made here."""

    method: str
    bits: str
    make: Callable[[], Made]
    missing: str | None = None


def main() -> None:
    args = arguments()
    bench = Bench(args)
    rows = {(row.method, row.bits): row for row in bench.rows()}
    wanted = {*args.methods, *(artifact.name for artifact in bench.artifacts)}
    measured = {(old["method"], old["bits"]): old for old in _kept(args.json, bench.result)} if args.missing else {}
    for key, row in rows.items():
        if row.method not in wanted or (key in measured and "failed" not in measured[key]):
            continue
        measured[key] = bench.measure(row)
        bench.result["rows"] = [measured[name] for name in dict.fromkeys([*rows, *measured]) if name in measured]
        write_json(args.json, bench.result)
        print(_line(measured[key]), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*METHODS, *OTHERS]
    parser.add_argument("json", type=Path, metavar="OUT.json")
    parser.add_argument("--model", default="fashion-dit")
    parser.add_argument("--artifacts", nargs="*", default=[], help="artifact folders of the model, a row each")
    parser.add_argument("--methods", nargs="*", default=names, choices=names, metavar="METHOD", help="; ".join(names))
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--num", type=int, default=256, help="images of each row")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of the images")
    parser.add_argument("--samples", type=int, default=16, help="held-out states in each of ten ranges of timesteps")
    parser.add_argument("--batch", type=int, default=256, help="images at once")
    parser.add_argument("--calibration-samples", type=int, default=32, help="calibration states in each time group")
    parser.add_argument("--calibration-steps", type=int, default=250, help="steps of the calibration's sampling")
    parser.add_argument("--rows", type=int, default=16, help="tokens of each calibration sample that methods tune on")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a row may take")
    parser.add_argument("--missing", action="store_true", help="measure only rows that the result file lacks")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


class Bench:
    """The float model, its calibration, and what every row is compared with."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.source: ModelSource = resolve(args.model)
        self.model = load_float(self.source).to(args.device)
        digest = weights_hash(self.model)
        self.artifacts = [load_artifact(path, self.source, digest) for path in args.artifacts]
        recipe = Recipe("plus", samples=args.calibration_samples, steps=args.calibration_steps)
        start = time.perf_counter()
        self.states = trajectories.collect(self.model, self.source.scheduler, recipe)
        self.observed: Observed = observe(self.model, self.states, recipe.guidance, args.rows)
        calibration = time.perf_counter() - start
        self.data: CalibrationSet = held_out(self.source, self.model, STATE_GROUPS, args.samples, HELD_OUT_SEED)
        self.sampling = Sampling("auto", args.steps, 1.5)
        self.epsilon, self.images = self._epsilon(self.model), self._images(self.model)
        self.result: dict[str, Any] = {
            "environment": environment(args.device),
            "settings": {
                "model": self.source.name, "images": args.num, "steps": args.steps, "guidance": 1.5,
                "held_out_per_group": args.samples, "rows_per_sample": args.rows,
                "calibration": recipe.model_dump(mode="json"), "calibration_sha256": states_sha256(self.states),
                "scope": SCOPE,
            },
            "calibration_seconds": calibration,
            "float_fd_fashion": fd_fashion(self.source, self.images),
            "rows": [],
        }  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """All rows, in the order of the table."""
        for name in dtypes.DTYPES:
            yield Row(name, name, lambda name=name: _ready(dtypes.in_dtype(self.model, name)))
        for bits in self.args.bits:
            for name, method in METHODS.items():
                yield Row(name, bits, lambda method=method, bits=bits: self._simulated(method, bits))
            if bits == "w8a8":
                yield Row("torchao int8", bits, self._torchao, dtypes.torchao_missing())
                on_cpu = None if self.args.device == "cpu" else "it runs on a CPU"
                yield Row("OpenVINO int8", bits, self._openvino, on_cpu or openvino_int8.missing())
        for artifact in self.artifacts:
            made, bits = artifact.solution, artifact.solution.provenance.bits
            yield Row(artifact.name, bits, lambda made=made: _ready(convert(made, device=self.args.device)))

    def measure(self, row: Row) -> dict[str, Any]:
        """Return the figures of a row, or under "failed" why there are none."""
        result: dict[str, Any] = {"method": row.method, "bits": row.bits}
        if row.missing:
            return {**result, "failed": row.missing}
        start = time.perf_counter()
        try:
            with limited(self.args.limit), row.make() as (module, notes):
                made = time.perf_counter() - start
                eps = fidelity.compare_epsilon(self.epsilon, self._epsilon(module), self.data)
                pixels = self._images(module)
        except TimeLimitError:
            return {**result, "failed": f"it took longer than its limit of {self.args.limit:g} s"}
        except InputError as error:  # images that are NaN, as fp16 may give
            return {**result, "failed": str(error)}
        return {
            **result,
            "eps_sqnr_db": eps.overall,
            "eps_sqnr_db_by_group": eps.by_group,
            "psnr_db": metrics.psnr_db(self.images, pixels),
            "fd_fashion": fd_fashion(self.source, pixels),
            "quantization_seconds": made,
            "seconds": time.perf_counter() - start,
            **({"notes": notes} if notes else {}),
        }

    @contextmanager
    def _simulated(self, method: Method, bits: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        graph = registry.graph(registry.config_of(self.model))
        with torch.no_grad():
            plan = method(Context(self.model, graph, self.observed, int(bits[1]), int(bits[3])))
        with simulated(self.model, plan) as module:
            yield module, plan.notes

    def _torchao(self) -> Made:
        return _ready(dtypes.torchao_int8(self.model), {"torchao": dtypes.torchao_version()})

    def _openvino(self) -> Made:
        return _ready(openvino_int8.int8(self.model, self.states), openvino_int8.versions())

    def _epsilon(self, module: nn.Module) -> torch.Tensor:
        return fidelity.predict_epsilon(module, self.data, batch=self.args.batch)

    def _images(self, module: nn.Module) -> torch.Tensor:
        classes = registry.conditions(registry.config_of(self.model)).count
        labels = [index % classes for index in range(self.args.num)]
        scheduler, batch = self.source.scheduler, self.args.batch
        latents = generate.sample_latents(module, scheduler, labels, self.sampling, 0, batch=batch)
        return generate.to_pixels(latents, self.source.vae)


@contextmanager
def _ready(module: nn.Module, notes: dict[str, Any] | None = None) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    yield module, notes or {}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TimeLimitError` in a block that takes longer than `seconds`; in the main thread, on POSIX."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # whoever had set a limit keeps it


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['bits']} {row['method']}: {row['failed']}"
    fd = "–" if row["fd_fashion"] is None else f"{row['fd_fashion']:.3f}"
    figures = f"SQNR {row['eps_sqnr_db']:.2f} PSNR {row['psnr_db']:.2f} FD {fd}"
    return f"{row['bits']} {row['method']}: {figures} ({row['quantization_seconds']:.1f} of {row['seconds']:.1f} s)"


def _kept(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that an earlier run with the same settings and environment left."""
    if not path.is_file():
        return []
    earlier = read_json(path)
    same = all(earlier.get(key) == json.loads(json.dumps(result[key])) for key in ("environment", "settings"))
    return list(earlier["rows"]) if same else []


if __name__ == "__main__":
    main()
