"""Write a traced `Graph` as JSON, and read one that anyone may have written: strict types, checked against shapes."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints, ValidationError

from tqdit.errors import InputError
from tqdit.graph import Block, Graph, Linear, Operand
from tqdit.spec import Role

MAX_TEXT = 1000  # characters of a name or a reason
MAX_UNITS = 2**16

Name = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=MAX_TEXT)]
Text = Annotated[str, StringConstraints(strict=True, max_length=MAX_TEXT)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Operand(_Entry):
    name: Name
    role: Literal["input", "gelu"]
    units: Annotated[StrictInt, Field(ge=1, le=MAX_UNITS)]
    timed: StrictBool
    quantized_by_row: StrictBool
    apart: StrictBool
    feed: Text

    def read(self) -> Operand:
        return Operand(**{**self.model_dump(), "role": Role(self.role)})


class _Linear(_Entry):
    source: _Operand
    modules: Annotated[list[Name], Field(min_length=1)]


class _Block(_Entry):
    prefix: Name
    matmuls: list[_Linear]
    float_input: list[Name]

    def read(self) -> Block:
        matmuls = tuple(Linear(linear.source.read(), tuple(linear.modules)) for linear in self.matmuls)
        return Block(self.prefix, matmuls, tuple(self.float_input))


class _Graph(_Entry):
    blocks: Annotated[list[_Block], Field(min_length=1)]
    outside: list[Name]
    ends: list[Name]
    left: dict[Name, Text]
    timestep: Name


def to_json(graph: Graph) -> dict[str, Any]:
    """Return a traced graph as plain values, without its shapes.

    Raises `InputError` for a graph that was not traced: its attentions belong to the architecture of a class.
    """
    if not graph.timestep or any(block.attentions for block in graph.blocks):
        raise InputError("only the graph of a traced model can be stored; this one is described by its architecture")
    return {
        "blocks": [_block_to_json(block) for block in graph.blocks],
        "outside": list(graph.outside),
        "ends": list(graph.ends),
        "left": dict(graph.left),
        "timestep": graph.timestep,
    }


def from_json(value: Any, shapes: Mapping[str, torch.Size]) -> Graph:
    """Return the graph that `to_json` wrote, of a model whose parameters have `shapes`.

    Raises `InputError` that names the entry for anything that is not exactly of its type, for a layer that is there
    twice or in a block of another prefix, and for one whose weight the model does not have or has in another shape.
    """
    try:
        read = _Graph.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("graph", *first["loc"])))
        raise InputError(f"'{where}' is wrong: {first['msg']}, got {first['input']!r:.80}") from None
    blocks = tuple(block.read() for block in read.blocks)
    graph = Graph(blocks, tuple(read.outside), dict(shapes), tuple(read.ends), dict(read.left), read.timestep)
    _check_names(graph)
    for block in graph.blocks:
        _check_block(block, graph)
    for name in graph.outside:
        _weight(graph, name)
    for name in graph.ends:
        if name not in graph.outside:
            raise InputError(f"'graph.ends' has '{name}', which is not in 'graph.outside'")
    for name in graph.left:
        if name not in shapes and f"{name}.weight" not in shapes:
            raise InputError(f"'graph.left' has '{name}', which the model does not have")
    return graph


def _block_to_json(block: Block) -> dict[str, Any]:
    linears = [{"source": _operand_to_json(linear.source), "modules": list(linear.modules)} for linear in block.linears]
    return {"prefix": block.prefix, "matmuls": linears, "float_input": list(block.float_input)}


def _operand_to_json(operand: Operand) -> dict[str, Any]:
    return {
        "name": operand.name,
        "role": operand.role.value,
        "units": operand.units,
        "timed": operand.timed,
        "quantized_by_row": operand.quantized_by_row,
        "apart": operand.apart,
        "feed": operand.feed,
    }


def _check_names(graph: Graph) -> None:
    """Refuse a name that is there twice, among blocks, among layers or among sites."""
    prefixes = [block.prefix for block in graph.blocks]
    layers = [*_layers(graph), *graph.outside, *graph.left]
    sites = [*(operand.name for operand in graph.operands), *(f"{name}.weight" for name in layers)]
    for kind, names in {"block": prefixes, "layer": layers, "site": sites, "end": graph.ends}.items():
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise InputError(f"'graph' has the {kind} '{name}' twice")
            seen.add(name)


def _layers(graph: Graph) -> Iterator[str]:
    for block in graph.blocks:
        yield from block.float_input
        for linear in block.linears:
            yield from linear.modules


def _check_block(block: Block, graph: Graph) -> None:
    for name in (*block.float_input, *(name for linear in block.linears for name in linear.modules)):
        if not name.startswith(f"{block.prefix}."):
            raise InputError(f"'graph' has the layer '{name}' in block '{block.prefix}', which it is not a part of")
        _weight(graph, name)
    for linear in block.linears:
        widths = {_weight(graph, name)[1] for name in linear.modules}
        if len(widths) > 1:
            raise InputError(f"'graph' has layers of different inputs on the operand '{linear.source.name}'")


def _weight(graph: Graph, name: str) -> torch.Size:
    """Return the shape of a linear layer's weight."""
    shape = graph.shapes.get(f"{name}.weight")
    if shape is None:
        raise InputError(f"'graph' has the layer '{name}', which the model does not have")
    if len(shape) != 2:
        raise InputError(f"'graph' has the layer '{name}', whose weight has {len(shape)} axes, not 2")
    return torch.Size(shape)
