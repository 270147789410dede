"""Units without a range, and weights that are no numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import dit, folder, load, normal, output, quantized, recipe, refused

import tqdit


def _row_of_fc1(model: Any) -> None:
    model.transformer_blocks[0].ff.net[0].proj.weight[3].zero_()


def _row_of_last_layer(model: Any) -> None:
    model.proj_out_2.weight[5].zero_()


def _denormal_row(model: Any) -> None:
    model.transformer_blocks[0].ff.net[0].proj.weight[3].fill_(1e-42)


def _head_of_query(model: Any) -> None:
    query = model.transformer_blocks[1].attn1.to_q
    query.weight[:32].zero_()
    query.bias[:32].zero_()


def _whole_layer(model: Any) -> None:
    out = model.transformer_blocks[0].attn1.to_out[0]
    out.weight.zero_()
    out.bias.zero_()


def _constant_inputs(model: Any) -> None:
    """A block as before training: its modulation is 0, so that its matmuls see zeros."""
    modulation = model.transformer_blocks[1].norm1.linear
    modulation.weight.zero_()
    modulation.bias.zero_()


DEAD: dict[str, Callable[[Any], None]] = {
    "a zero row of fc1": _row_of_fc1,
    "a zero row of the last layer": _row_of_last_layer,
    "a denormal row of fc1": _denormal_row,
    "a zero head of the queries": _head_of_query,
    "a zero layer": _whole_layer,
    "a block as before training": _constant_inputs,
}


def dead(name: str, preset: str) -> Callable[[Path], str]:
    """A model with a unit that has no range is quantized as well as one without such a unit."""

    def run(work: Path) -> str:
        model = dit()
        with torch.no_grad():
            DEAD[name](model)
        path = quantized(work / "q", folder(work / "float", model), preset)
        return normal(output(model), output(load(path)), 30.0 if preset == "plus" else 25.0)

    return run


def not_a_number(value: float) -> Callable[[Path], str]:
    """Found at load, before any work, with the tensor and the index."""

    def run(work: Path) -> str:
        model = dit()
        with torch.no_grad():
            model.transformer_blocks[1].ff.net[2].weight[7, 11] = value
        source, stages = folder(work / "float", model), []
        quantize = lambda: tqdit.quantize(source, work / "q", recipe(), report=lambda s, _: stages.append(s))  # noqa: E731
        return refused(quantize, "transformer_blocks.1.ff.net.2.weight", "7, 11", stages=stages)

    return run


CASES: dict[str, Callable[[Path], str]] = {
    **{f"{name}, {preset}": dead(name, preset) for name in DEAD for preset in ("plus", "paper")},
    "a NaN weight": not_a_number(float("nan")),
    "an infinite weight": not_a_number(float("inf")),
}
