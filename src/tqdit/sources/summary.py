"""`Summary` says which artifact `quantize` made, and how much time and memory that took."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tqdit.artifact import folder as artifact
from tqdit.recipe import Recipe
from tqdit.sources.sizes import FloatSizes
from tqdit.system import distributed
from tqdit.system.environment import environment, peak_memory_bytes


@dataclass(frozen=True)
class Summary:
    """The artifact that `quantize` wrote, and the time and memory that it took.

    `calibration_seconds` are those of this run, including the search. `size_ratio` is over fp32, `size_ratio_bfloat16`
    over bf16, and `size_ratio_file` over the file that was quantized, whose tensors are of `file_dtype`. A field can
    also be read by its name, as `summary["bits"]`.
    """

    name: str
    preset: str
    bits: str
    calibration_seconds: float
    peak_memory_bytes: int
    size_bytes: int
    file_bytes: int
    file_dtype: str
    float32_bytes: int
    bfloat16_bytes: int
    size_ratio: float
    size_ratio_bfloat16: float
    size_ratio_file: float
    processes: int
    environment: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Return a field by its name."""
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def figures(self) -> dict[str, Any]:
        """Return the fields as JSON values, which `tqdit quantize --json` writes."""
        return asdict(self)


def summarize(name: str, recipe: Recipe, sizes: FloatSizes, seconds: float, out: Path, device: str) -> Summary:
    """Measure the artifact `out`, which was made of the float model `name`. Every process must call this."""
    world = distributed.current()
    size = int(world.add(torch.tensor(artifact.size_bytes(out) if world.first else 0)))  # the first process wrote it
    return Summary(
        name=name,
        preset=recipe.label,
        bits=recipe.bits,
        calibration_seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        size_bytes=size,
        **asdict(sizes),
        size_ratio=size / sizes.float32_bytes,
        size_ratio_bfloat16=size / sizes.bfloat16_bytes,
        size_ratio_file=size / sizes.file_bytes,
        processes=world.size,
        environment=environment(device),
    )
