"""A small synthetic run: no model is run."""

from typing import Any

import torch

from tqdit.quality.run import Boxes, Histogram, Judged, Part, Region, Row, Run, Site, Steps
from tqdit.recipe import Recipe
from tqdit.report.sections import Saved

BLOCKS = 3
GROUPS = 5
BOUNDS = [0.0, 200.0, 400.0, 600.0, 800.0, 1000.0]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return (255 * noise(*shape, seed=seed)).to(torch.uint8)


def histogram(**changes: Any) -> Histogram:
    ends = [0.5 + 0.1 * group for group in range(GROUPS)]
    values: dict[str, Any] = {
        "unit": "value", "log": False, "edges": [-1.0, -0.5, 0.0, 0.5, 1.0], "counts": [1, 20, 30, 2],
        "regions": [Region(label="codes", low=[-x for x in ends], high=ends)], "clipped": 0.021, "zeroed": 0.3,
        "values": 53,
    }  # fmt: skip
    return Histogram(**(values | changes))


def site(name: str = "transformer_blocks.0.ff.fc2_input", **changes: Any) -> Site:
    values: dict[str, Any] = {
        "name": name, "role": "gelu", "bits": 8, "grid": "uniform", "granularity": "per_tensor", "groups": GROUPS,
        "units": 1, "channels": False, "rotation": 0, "sqnr_db": 41.23, "share": 0.4, "histogram": histogram(),
    }  # fmt: skip
    return Site(**(values | changes))


def verdict(**changes: Any) -> Judged:
    values: dict[str, Any] = {
        "n": 40, "blocks": 20, "difference": 0.001, "lower": -0.002, "upper": 0.004, "margin": 0.02, "p": 0.003,
        "equivalent": True, "p_closer": 0.7, "closer_than_bf16": False,
    }  # fmt: skip
    return Judged(**(values | changes))


def recipe(preset: str = "paper", bits: str = "w8a8", **changes: Any) -> dict[str, Any]:
    return Recipe(preset, bits, **changes).model_dump(mode="json")


def model_row(name: str, sqnr: float = 33.04, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "preset": "paper",
        "bits": "w8a8",
        "recipe": recipe(),
        "size_bytes": 8_300_000,
        "fd_fashion": 12.345,
        "sqnr_db": sqnr,
        "groups": BOUNDS,
        "sqnr_by_group": [sqnr - g for g in range(GROUPS)],
        "by_timestep": [[float(t), sqnr - t / 250] for t in range(0, 1000, 40)],
        "psnr_db": 28.76,
        "calibration_seconds": 74.2,
        "ms_per_call": 12.5,
        "speedup": 4.0,
        "peak_bytes": 51_000_000,
        "sites": [site(), site("proj.weight", role="weight", bits=6, granularity="per_channel", groups=1, units=4,
                               share=0.01, sqnr_db=60.0, histogram=None)],
        "sites_in_all": 2,
        "softmax_steps": [Steps(grid="mrq_softmax", log2=[-7.0 - g % 4 - block for g in range(GROUPS)])
                          for block in range(BLOCKS)],
    }  # fmt: skip
    return Row(name=name, **(values | changes))


def boxes(block: int = 0) -> Boxes:
    found: list[list[float] | None] = [[x * 10.0**-4 * (g + 1) for x in (1, 2, 3, 4, 5)] for g in range(GROUPS - 1)]
    return Boxes(block=block, bounds=BOUNDS, boxes=[*found, None])


PROTOCOL: dict[str, Any] = {
    "num": 6, "samples_per_group": 5, "groups": 5, "states": 25, "seed": 0, "sampler": "ddim", "steps": 50,
    "guidance": 1.5, "dtype": "float32", "call_batch": 8, "conditions_sha256": None,
}  # fmt: skip


def reference(**changes: Any) -> Row:
    values: dict[str, Any] = {
        "bits": "float32", "size_bytes": 16_200_000, "float32_bytes": 32_400_000, "file_dtype": "float16",
        "fd_fashion": 11.2,
    }  # fmt: skip
    return Row(name="float-model", **(values | changes))


def saved(
    *models: Row, protocol: dict[str, Any] | None = None, sha256: str = "a" * 64, images: bool = True,
    kind: str = "samples", **changes: Any,
) -> Saved:  # fmt: skip
    """Return a run of these models, and images of each."""
    rows = [reference(**changes), *models]
    if images:
        rows = [row.model_copy(update={"images": number}) for number, row in enumerate(rows)]
    part = Part(
        component="transformer", reference_sha256=sha256, protocol=PROTOCOL | (protocol or {}), low=0.0, high=1000.0,
        reference=rows[0], models=rows[1:], boxes=[boxes(block) for block in range(BLOCKS)] if images else [],
        captions=[f"class {i}" for i in range(6)] if images else [],
    )  # fmt: skip
    run = Run(
        kind=kind, command="tqdit compare float-model q -o run.safetensors", created="2026-01-02 03:04 UTC",
        environment={"tqdit": "0.1.0", "cpu": "A <fast> CPU", "threads": 2}, parts=[part],
    )  # fmt: skip
    return run, {number: pixels(6, 1, 8, 8, seed=number) for number in range(len(rows))} if images else {}
