"""Time blocks of published transformers with random weights: ours against bf16 and torchao, in the same rounds."""

import functools
import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from tqdit.calibration.pipeline_calls import read_calls
from tqdit.errors import InputError
from tqdit.graph import Graph
from tqdit.recipe import Recipe
from tqdit.recorded import traced_graph
from tqdit.runtime.target import checked_device
from tqdit.speed.baselines import quiet
from tqdit.speed.block_entrants import (
    DEFAULT,
    ENTRANTS,
    FLOATS,
    OURS,
    Entrant,
    Inputs,
    chain,
    entrant,
    inputs_of,
    rivals,
    weights,
)
from tqdit.speed.published import Published, published
from tqdit.speed.shortened import (
    bytes_at_full_depth,
    float_bytes,
    full_depths,
    one_call,
    quantized_bytes,
    random_transformer,
)
from tqdit.speed.timing import Percentiles, interleaved
from tqdit.stages import Report, silent
from tqdit.system.environment import environment
from tqdit.system.isolation import isolated
from tqdit.system.validation import check_counts

WARM_UP = 2
FEW_TOKENS = 64  # of the call that is traced
ALL_BLOCKS = "all blocks"  # the part whose time is computed: every block at the published depth
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockSettings:
    """The settings of a race of blocks.

    `blocks`: repeated blocks of each kind, None for all. `tokens`: at most so many image tokens, None for the published
    number. `against`: entrants beside ours, or families of them. Raises `InputError` for a setting that is not legal.
    """

    blocks: int | None = 2
    tokens: int | None = None
    against: tuple[str, ...] = DEFAULT
    bits: str = "w8a8"
    repeats: int = 20
    device: str = "auto"

    def __post_init__(self) -> None:
        limits = {"blocks": self.blocks, "tokens": self.tokens}
        check_counts(repeats=self.repeats, **{name: value for name, value in limits.items() if value is not None})
        Recipe("dynamic", self.bits)
        rivals(self.against)


@dataclass(frozen=True)
class BlockRow:
    """The figures of an entrant on one part.

    "call" is a call of the model with its few blocks, "linears" the quantized layers of one block of each kind alone;
    the path of a list of blocks is one of these blocks alone. "all blocks" is computed: the time of a block of each
    kind times their number in the published model. Times are percentiles in ms. `speedup_over_bf16`: median ms of the
    fastest float entrant over this one's.
    """

    model: str
    part: str
    entrant: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    speedup_over_bf16: float | None


@dataclass(frozen=True)
class Raced:
    """The figures of one model.

    `bytes_of_bf16`: bytes of our weights over those of bf16, at the model's whole depth.
    """

    model: str
    kind: str
    patches: tuple[int, int, int]
    text_tokens: int
    blocks: Mapping[str, int]  # the blocks of the model that was called: path of their list -> number
    depths: Mapping[str, int]  # the same of the published model
    layers: Mapping[str, int]  # linear layers: quantized, weight-only, in float
    weight_bytes: int | None
    bf16_bytes: int | None
    bytes_of_bf16: float | None
    rows: tuple[BlockRow, ...]
    kernels: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Say whether none of ours has figures."""
        return not any(row.entrant in OURS for row in self.rows)


@isolated()
def race(
    names: Sequence[str],
    settings: BlockSettings = BlockSettings(),
    report: Report = silent,
    finished: Callable[[Sequence[Raced]], None] = lambda _: None,
) -> list[Raced]:
    """Time the blocks of published models; `finished` is called with all results so far after each model.

    Whatever cannot run here is left out and named in `skipped`. Raises `InputError` for an unknown name.
    """
    shapes = [published(name) for name in names]
    settings = replace(settings, device=str(checked_device(settings.device)))
    found: list[Raced] = []
    for shape in shapes:
        try:
            found.append(_Race(shape, settings, report).run())
        except (RuntimeError, InputError, MemoryError) as error:
            found.append(_nothing(shape, settings, error))
        _free()
        finished(found)
    return found


def figures(found: Sequence[Raced], settings: BlockSettings) -> dict[str, Any]:
    """Return the JSON values of results."""
    device = str(checked_device(settings.device))
    where = environment(device) | {"torchao": _version("torchao"), "triton": _version("triton")}
    return {"environment": where, "settings": asdict(settings), "models": [asdict(one) for one in found]}


class _Race:
    """One model's race: its float model, the graph, the call, and who was left out."""

    def __init__(self, shape: Published, settings: BlockSettings, report: Report) -> None:
        self.shape, self.settings, self.report = shape, settings, report
        self.device = torch.device(settings.device)
        self.skipped: dict[str, str] = {}

    def run(self) -> Raced:
        self.report(f"building {self.shape.name}", 0.0)
        model = random_transformer(self.shape, self.settings.blocks, self.device)
        arguments = one_call(self.shape, model, self.settings.tokens, self.device)
        traced = one_call(self.shape, model, FEW_TOKENS, self.device)  # the graph is that of any number of tokens
        given = {key: value for key, value in traced.items() if key != "return_dict"}
        graph = traced_graph(model, read_calls([given], model))
        inputs = inputs_of(model, graph, arguments)
        raced = _described(self.shape, self.settings, graph, float_bytes(model))
        entrants = []
        for name, made, its_graph in self._models(model, graph, traced):
            if name in OURS and raced.weight_bytes is None:
                raced = _with_ours(self.shape, raced, made)
            if (ready := self._warmed(name, made, its_graph, arguments, inputs)) is not None:
                entrants.append(ready)
        return replace(raced, rows=tuple(self._timed(raced.depths, entrants)), skipped=dict(self.skipped))

    def _models(
        self, model: nn.Module, graph: Graph, arguments: Mapping[str, Any]
    ) -> Iterator[tuple[str, nn.Module, Graph]]:
        """Yield entrants with their models; entrants of equal weights have one."""
        made: dict[str, nn.Module] = {}
        for name in (*OURS, *rivals(self.settings.against)):
            kind, _, graphs = ENTRANTS[name]
            if graphs and self.device.type != "cuda":
                continue
            if kind not in made:
                self.report(f"{self.shape.name}: {kind}", 0.0)
                with self._left_out(name):
                    recipe = Recipe("dynamic", bits=self.settings.bits)
                    made[kind] = weights(name, model, graph, recipe, arguments)
            if kind in made:
                yield name, made[kind], graph

    def _warmed(
        self, name: str, model: nn.Module, graph: Graph, arguments: Mapping[str, Any], inputs: Inputs
    ) -> Entrant | None:
        """Return an entrant after its first calls, which compile; None if it fails."""
        self.report(f"{self.shape.name}: first calls of {name}", 0.0)
        with self._left_out(name), quiet():
            made = entrant(name, model, graph, arguments, inputs)
            for run in made.parts.values():
                for _ in range(WARM_UP):
                    run()
            return made
        return None

    @contextmanager
    def _left_out(self, name: str) -> Iterator[None]:
        """Leave out an entrant that fails, and name it."""
        try:
            yield
        except Exception as error:  # compilers and drivers raise anything
            LOG.error("%s: %s failed", self.shape.name, name, exc_info=error)
            self.skipped[name] = _reason(error)
            traceback.clear_frames(error.__traceback__)
            _free()

    def _timed(self, depths: Mapping[str, int], entrants: Sequence[Entrant]) -> list[BlockRow]:
        """Time every part in interleaved rounds of all entrants that have it."""
        samples: dict[str, dict[str, list[float]]] = {}
        for part in dict.fromkeys(part for one in entrants for part in one.parts):
            calls = {one.name: lambda _, run=one.parts[part]: run() for one in entrants if part in one.parts}
            stage = f"timing {self.shape.name}, {part}"
            times = interleaved(calls, self.settings.repeats, functools.partial(self.report, stage))
            runs = 1 if part == "call" else chain(self.device)
            samples[part] = {name: [ms / runs for ms in values] for name, values in times.items()}
        if entrants:
            samples[ALL_BLOCKS] = _at_depth(samples, depths)
        return [row for part, times in samples.items() for row in _rows(self.shape.name, part, times)]


def _at_depth(samples: Mapping[str, Mapping[str, list[float]]], depths: Mapping[str, int]) -> dict[str, list[float]]:
    """Return the time of all blocks of the published model, of each entrant in each round."""
    kinds = [(samples[path], depth) for path, depth in depths.items() if path in samples]
    names = [name for name in kinds[0][0] if all(name in times for times, _ in kinds)] if kinds else []

    def total(name: str, round_: int) -> float:
        return sum(times[name][round_] * depth for times, depth in kinds)

    return {name: [total(name, round_) for round_ in range(len(kinds[0][0][name]))] for name in names}


def _rows(model: str, part: str, samples: Mapping[str, list[float]]) -> list[BlockRow]:
    times = {name: Percentiles.from_sample(values) for name, values in samples.items()}
    best = min((times[name].p50 for name in times if name in FLOATS), default=None)
    return [
        BlockRow(model, part, name, took.p20, took.p50, took.p80, None if best is None else best / took.p50)
        for name, took in times.items()
    ]


def _described(shape: Published, settings: BlockSettings, graph: Graph, sizes: Mapping[str, int]) -> Raced:
    """Return the facts about a model that need no timing."""
    size, lists = shape.size.reduced(settings.tokens), [block.prefix.rpartition(".")[0] for block in graph.blocks]
    quantized = sum(len(linear.modules) for block in graph.blocks for linear in block.linears)
    layers = {"quantized": quantized, "weight-only": len(graph.float_input), "float": len(graph.left)}
    blocks = {name: lists.count(name) for name in dict.fromkeys(lists)}
    depths = {name: depth for name, depth in full_depths(shape).items() if name in blocks}
    size_of_bf16 = bytes_at_full_depth(shape, sizes)
    return Raced(
        shape.name, shape.kind, size.patches, size.text, blocks, depths, layers, None, size_of_bf16, None, (), ()
    )


def _with_ours(shape: Published, raced: Raced, model: Any) -> Raced:
    size, kernels = bytes_at_full_depth(shape, quantized_bytes(model.solution)), model.quantization_report.values()
    assert raced.bf16_bytes is not None
    return replace(
        raced, weight_bytes=size, bytes_of_bf16=size / raced.bf16_bytes, kernels=tuple(dict.fromkeys(kernels))
    )


def _nothing(shape: Published, settings: BlockSettings, error: Exception) -> Raced:
    size = shape.size.reduced(settings.tokens)
    LOG.error("%s failed", shape.name, exc_info=error)
    skipped = {shape.name: _reason(error)}
    return Raced(shape.name, shape.kind, size.patches, size.text, {}, {}, {}, None, None, None, (), (), skipped)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}" if lines else type(error).__name__


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
