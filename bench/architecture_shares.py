"""Compute what linear layers, attention and the rest take of the arithmetic and the parameters of published models.

python bench/architecture_shares.py --json bench/results/architecture-shares.json

Every model of `tqdit.speed.published` is made at its whole depth on the meta device, which holds shapes and no numbers.
One call of its published size is counted: one multiplication and one addition are two operations (FLOPs). A traced call
says which linear layers the preset `plus` quantizes, as for a recorded one. Nothing is timed.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tqdit.architectures.traced import traced
from tqdit.architectures.traced_graph import trace
from tqdit.graph import Graph
from tqdit.speed.published import SHAPES, Published
from tqdit.speed.shortened import one_call
from tqdit.system.environment import environment
from tqdit.system.files import write_text

META = torch.device("meta")
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm}  # what a linear layer becomes
CONVOLUTIONS = {torch.ops.aten.convolution}
# What happens to a linear layer under the preset `plus`.
INTEGER, WEIGHT_ONLY, FLOAT = "integer", "weight_only", "float"
ATTENTION, CONVOLUTION, OTHER = "attention", "convolution", "other"


def main() -> None:
    """Count every published model, and write or print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="names of shapes")
    parser.add_argument("--json", type=Path, help="result file; printed if none is given")
    options = parser.parse_args()
    rows = [shares(SHAPES[name]) for name in options.models]
    text = json.dumps({"environment": environment(), "models": rows}, indent=1) + "\n"
    print(text, end="") if options.json is None else write_text(options.json, text)


def shares(shape: Published) -> dict[str, Any]:
    """Return the FLOPs of one call and the parameters of a model, by what happens to them under `plus`.

    `attention` is the largest of the call as (tokens of the queries, tokens of the keys, width of a head).
    """
    model = nn.Module.to(traced(shape.kind).empty(shape.shortened(None)), META, torch.bfloat16).eval()
    arguments = one_call(shape, model, None, META)
    given = {key: value for key, value in arguments.items() if key != "return_dict"}
    kinds = layer_kinds(trace(model, given, shape.timestep))
    flops, attention = call_flops(model, arguments, kinds)
    return {
        "model": shape.name,
        "class": shape.kind,
        "patches": shape.size.patches,
        "text_tokens": shape.size.text,
        "attention": attention,
        "layers": {kind: list(kinds.values()).count(kind) for kind in (INTEGER, WEIGHT_ONLY, FLOAT)},
        "flops": flops,
        "parameters": parameters(model, kinds),
    }


def layer_kinds(graph: Graph) -> dict[str, str]:
    """Return what happens to each linear layer of a graph under the preset `plus`, by its path."""
    integer = {name: INTEGER for block in graph.blocks for linear in block.linears for name in linear.modules}
    weight_only = {name: FLOAT if name in graph.ends else WEIGHT_ONLY for name in graph.float_input}
    return integer | weight_only | dict.fromkeys(graph.left, FLOAT)


def parameters(model: nn.Module, kinds: Mapping[str, str]) -> dict[str, int]:
    """Return how many parameters the layers of each kind have, biases included; "other" has all that are not linear."""
    found = dict.fromkeys((INTEGER, WEIGHT_ONLY, FLOAT, OTHER), 0)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        linear = isinstance(model.get_submodule(owner), nn.Linear)
        found[kinds.get(owner, FLOAT) if linear else OTHER] += parameter.numel()
    return found


class _Attentions(TorchFunctionMode):
    """Keep the sizes of the largest attention that is computed inside."""

    largest = (0, 0, 0)  # tokens of the queries, of the keys, width of a head

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key = [*args, *(kwargs or {}).values()][:2]
            self.largest = max(self.largest, (query.shape[-2], key.shape[-2], query.shape[-1]))
        return func(*args, **(kwargs or {}))


def call_flops(
    model: nn.Module, arguments: Mapping[str, Any], kinds: Mapping[str, str]
) -> tuple[dict[str, int], tuple[int, int, int]]:
    """Return the FLOPs of a call by kind, and the sizes of its largest attention."""
    found = dict.fromkeys((INTEGER, WEIGHT_ONLY, FLOAT, ATTENTION, CONVOLUTION), 0)

    def count(name: str, layer: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        found[kinds.get(name, FLOAT)] += 2 * inputs[0].shape[:-1].numel() * layer.weight.numel()

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda layer, inputs, name=name: count(name, layer, inputs))
    with FlopCounterMode(display=False) as counter, _Attentions() as attentions, torch.no_grad():
        model(**arguments)
    by_operation: Mapping[Any, int] = counter.get_flop_counts()["Global"]
    for operation, number in by_operation.items():
        if operation not in PRODUCTS:
            found[CONVOLUTION if operation in CONVOLUTIONS else ATTENTION] += number
    if sum(found.values()) != counter.get_total_flops():
        raise RuntimeError(f"{type(model).__name__} multiplies matrices outside of linear layers: {dict(by_operation)}")
    return found, attentions.largest


if __name__ == "__main__":
    main()
