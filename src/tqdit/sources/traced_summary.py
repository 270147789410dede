"""Say what quantizing the transformers of a folder made: which layers are integers, sizes, time and memory."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tqdit.spec import Solution


@dataclass(frozen=True)
class TransformerSummary:
    """The layers, notes and sizes of one quantized transformer.

    `integer`, `weight_only`: linear layers in integers, and with integer weights alone. `left`: reason -> layers that
    stay in float. `notes`: site -> why its layers take float inputs after all, or what else is worth saying.
    `bfloat16_bytes`: what the float model takes in bf16; `size_ratio_bfloat16`: `size_bytes` over it. `calls`: how many
    it was calibrated on.
    """

    component: str
    kind: str
    parameters: int
    integer: int
    weight_only: int
    left: Mapping[str, int]
    notes: Mapping[str, str]
    calls: int
    size_bytes: int
    bfloat16_bytes: int

    @property
    def size_ratio_bfloat16(self) -> float:
        """Return the size of the weights over that of bf16."""
        return self.size_bytes / self.bfloat16_bytes

    def figures(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "size_ratio_bfloat16": self.size_ratio_bfloat16}


@dataclass(frozen=True)
class FolderSummary:
    """The transformers of a quantized folder, the `seconds` they took, and peak memory of process and GPU in bytes."""

    name: str
    preset: str
    bits: str
    transformers: tuple[TransformerSummary, ...]
    seconds: float
    peak_memory_bytes: int
    peak_gpu_bytes: int | None
    environment: Mapping[str, Any]

    def figures(self) -> dict[str, Any]:
        """Return the fields as JSON values, which `tqdit quantize --json` writes."""
        held = {key: value for key, value in vars(self).items() if key != "transformers"}
        return {**held, "transformers": [part.figures() for part in self.transformers]}


def summarize(component: str, solution: Solution, size_bytes: int, calls: int) -> TransformerSummary:
    """Return the summary of a solution whose weight files have `size_bytes`."""
    graph = solution.graph
    assert graph is not None
    parameters = sum(shape.numel() for shape in graph.shapes.values())
    integer = sum(len(linear.modules) for block in graph.blocks for linear in block.linears)
    coded = [name for name in graph.float_input if f"{name}.weight" in solution.params]
    left = Counter(graph.left.values())
    if ends := len(graph.float_input) - len(coded):
        left["first or last layer of the model"] = ends
    return TransformerSummary(
        component, str(solution.model_config["_class_name"]), parameters, integer, len(coded), dict(left),
        dict(solution.notes), calls, size_bytes, 2 * parameters,
    )  # fmt: skip
