"""A small synthetic comparison: no model is run."""

from dataclasses import replace
from typing import Any

import torch

from tqdit.provenance import Provenance
from tqdit.quality.comparison import Comparison, ModelRow
from tqdit.quality.fidelity import EpsilonFidelity
from tqdit.spec import Granularity, Grid, GridParams, Role, SiteSpec, Solution
from tqdit.speed.cost import Cost
from tqdit.timegroups import TimeGroups

BLOCKS = 3


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def softmax_site(block: int, grid: Grid, groups: int) -> GridParams:
    spec = SiteSpec(f"transformer_blocks.{block}.attn1.softmax", Role.SOFTMAX, 8, grid, groups=groups)
    s1 = 2.0 ** -(7 + torch.arange(groups) % 4 + block).float().reshape(groups, 1)
    if grid is Grid.SOFTMAX_ROW:
        return GridParams(replace(spec, groups=1), torch.full((1, 1), 1 / 255))
    if grid is Grid.UNIFORM:
        return GridParams(spec, s1, torch.zeros(groups, 1, dtype=torch.int32))
    return GridParams(spec, torch.stack([s1, torch.full_like(s1, 1 / 127)], -1))


def solution(grids: tuple[Grid, ...] = (Grid.MRQ_SOFTMAX,) * BLOCKS, groups: int = 5) -> Solution:
    weight = SiteSpec("proj.weight", Role.WEIGHT, 6, Grid.UNIFORM, Granularity.PER_CHANNEL, units=4)
    params = [softmax_site(block, grid, groups) for block, grid in enumerate(grids)]
    params.append(GridParams(weight, torch.ones(1, 4)))
    return Solution({}, TimeGroups.uniform(0, 1000, groups), {p.spec.name: p for p in params}, {}, {}, Provenance())


def model_row(name: str, sqnr: float = 33.04, **changes: Any) -> ModelRow:
    values: dict[str, Any] = {
        "preset": "paper",
        "bits": "w8a8",
        "size_bytes": 8_300_000,
        "size_ratio": 0.2562,
        "images": noise(6, 1, 8, 8, seed=len(name)) * 2 - 1,
        "fd_fashion": 12.345,
        "eps": EpsilonFidelity(sqnr, [sqnr - g for g in range(5)], [(t, sqnr - t / 250) for t in range(0, 1000, 40)]),
        "psnr_db": 28.76,
        "solution": solution(),
        "calibration_seconds": 74.2,
        "cost": Cost(12.5, 50.0, 51_000_000, 9_000_000),
    }
    return ModelRow(name, **(values | changes))


def comparison(*models: ModelRow, **changes: Any) -> Comparison:
    size = {"size_bytes": 32_400_000, "size_ratio": 1.0, "file_bytes": 16_200_000, "file_dtype": "float16"}
    absent = dict.fromkeys(("preset", "eps", "psnr_db", "solution", "calibration_seconds", "cost"))
    reference = model_row("float-model", bits="float32", **size, **absent, **changes)
    settings = {"num": 6, "samples_per_group": 5, "groups": 5, "states": 25, "seed": 0, "sampler": "ddim", "steps": 50}
    return Comparison(reference, models, settings, {"tqdit": "0.1.0", "cpu": "A <fast> CPU", "threads": 2})


def attention_maxima() -> tuple[torch.Tensor, torch.Tensor]:
    """maxima (S, blocks, C) that grow with t, and t (S,)."""
    t = torch.arange(0, 1000, 25)
    return noise(len(t), BLOCKS, 8) * (0.01 + t[:, None, None] / 1000), t
