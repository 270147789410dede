"""Write the graph of a traced model as JSON values, and read it back as strict types.

Shapes are not stored: the tensors of an artifact have them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from tqdit.errors import InputError
from tqdit.graph import Block, Graph, Linear, Operand, Role

MAX_LAYERS = 10**5


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Linear(_Entry):
    site: StrictStr
    role: Literal["input", "gelu"]
    timed: StrictBool
    feed: StrictStr
    modules: Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_LAYERS)]

    def read(self) -> Linear:
        operand = Operand(
            self.site, Role(self.role), timed=self.timed, quantized_by_row=True, apart=True, feed=self.feed
        )
        return Linear(operand, tuple(self.modules))


class _Block(_Entry):
    prefix: StrictStr
    linears: Annotated[list[_Linear], Field(max_length=MAX_LAYERS)]
    float_input: Annotated[list[StrictStr], Field(max_length=MAX_LAYERS)]

    def read(self) -> Block:
        return Block(self.prefix, tuple(linear.read() for linear in self.linears), tuple(self.float_input))


class _Graph(_Entry):
    blocks: Annotated[list[_Block], Field(max_length=MAX_LAYERS)]
    outside: Annotated[list[StrictStr], Field(max_length=MAX_LAYERS)]
    ends: Annotated[list[StrictStr], Field(max_length=MAX_LAYERS)]
    left: dict[StrictStr, StrictStr]
    timestep: Annotated[StrictStr, Field(min_length=1)]


def to_json(graph: Graph) -> dict[str, Any]:
    """Return a traced graph as JSON values, which `from_json` reads."""
    return {
        "blocks": [_block(block) for block in graph.blocks],
        "outside": list(graph.outside),
        "ends": list(graph.ends),
        "left": dict(graph.left),
        "timestep": graph.timestep,
    }


def from_json(value: Any, shapes: Mapping[str, torch.Size]) -> Graph:
    """Return the graph that `to_json` wrote. `shapes`: of all parameters by name.

    Raises `InputError` that names the entry for anything that is not exactly of its type, for a layer that is listed
    twice, and for one without a weight of two axes.
    """
    try:
        found = _Graph.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("graph", *first["loc"])))
        raise InputError(f"'{where}' is wrong: {first['msg']}, got {first['input']!r:.80}") from None
    blocks = tuple(block.read() for block in found.blocks)
    graph = Graph(blocks, tuple(found.outside), shapes, tuple(found.ends), found.left, found.timestep)
    _check_layers(graph)
    return graph


def _block(block: Block) -> dict[str, Any]:
    linears = [
        {
            "site": linear.source.name,
            "role": str(linear.source.role),
            "timed": linear.source.timed,
            "feed": linear.source.feed,
            "modules": list(linear.modules),
        }
        for linear in block.linears
    ]
    return {"prefix": block.prefix, "linears": linears, "float_input": list(block.float_input)}


def _check_layers(graph: Graph) -> None:
    """Check that every layer is there once, and that layers of one input have equal widths."""
    seen: set[str] = set()
    linears = [linear for block in graph.blocks for linear in block.linears]
    groups = [linear.modules for linear in linears]
    singles = [(name,) for block in graph.blocks for name in block.float_input] + [(name,) for name in graph.outside]
    for modules in [*groups, *singles]:
        widths = {_shape(graph, name)[1] for name in modules}
        if len(widths) != 1:
            raise InputError(
                f"the graph's layers {', '.join(modules)} read one input, but have widths {sorted(widths)}"
            )
        for name in modules:
            if name in seen:
                raise InputError(f"the graph lists layer '{name}' twice")
            seen.add(name)
    sites = [linear.source.name for linear in linears]
    if len(set(sites)) != len(sites):
        raise InputError("the graph has two inputs of one name")


def _shape(graph: Graph, name: str) -> torch.Size:
    shape = graph.shapes.get(f"{name}.weight")
    if shape is None or len(shape) != 2:
        raise InputError(f"the graph's layer '{name}' has no weight of two axes")
    return shape
