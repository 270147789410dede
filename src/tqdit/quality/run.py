"""Define a run: what `tqdit compare` saves and `tqdit report` shows. The classes are the format of its file.

A number that is not finite, such as the SQNR of equal outputs, is None. Lists that belong together have one length.
"""

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

VERSION = 1
SQNR_OF = {"samples": "ε SQNR", "calls": "output SQNR"}  # what `sqnr_db` of the rows is of, by kind of run


class Strict(BaseModel):
    """A part of the format: frozen, with no other keys, and with no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Region(Strict):
    """A range of values that a grid codes in one way: `low` and `high` of each time group, in units of a histogram."""

    label: str
    low: list[float]
    high: list[float]

    @model_validator(mode="after")
    def _paired(self) -> "Region":
        return _same_length(self, "low", "high")


class Histogram(Strict):
    """The values of one site: `counts` between `edges`, one more than those.

    `unit` says in words what the axis is, and `log` that it is logarithmic. `clipped` and `zeroed` are the shares of
    all values that lie beyond the largest codes, and that are not 0 but have the code of 0. `values`: their number.
    """

    unit: str
    log: bool
    edges: list[float] = Field(min_length=2)
    counts: list[int]
    regions: list[Region]
    clipped: float = Field(ge=0, le=1)
    zeroed: float = Field(ge=0, le=1)
    values: int = Field(ge=0)

    @model_validator(mode="after")
    def _one_more(self) -> "Histogram":
        if len(self.edges) != len(self.counts) + 1 or any(a >= b for a, b in pairwise(self.edges)):
            raise ValueError("edges must increase, and be one more than counts")
        return self


class Site(Strict):
    """One quantized operand. `sqnr_db`: of the model's outputs with this site alone quantized, in a simulation.

    `share`: its error power over the sum of those of all sites that were measured. `feed`: what makes the operand.
    `by_row`: whether it is quantized with its row at hand. `end`: of the first or the last layer.
    """

    name: str
    role: str
    bits: int
    grid: str
    granularity: str
    groups: int
    units: int
    channels: bool
    rotation: int
    feed: str = ""
    by_row: bool = False
    end: bool = False
    sqnr_db: float | None = None
    share: float | None = Field(None, ge=0, le=1)
    histogram: Histogram | None = None


class Steps(Strict):
    """log2 of the finest step of one post-softmax site, by time group."""

    grid: str
    log2: list[float]


class Boxes(Strict):
    """The largest post-softmax values of a block in the float model, over ranges of timesteps.

    `bounds`: one more than there are boxes. A box is the quantiles (5, 25, 50, 75, 95 %); None: no state was there.
    """

    block: int
    bounds: list[float]
    boxes: list[list[float] | None]

    @model_validator(mode="after")
    def _quantiles(self) -> "Boxes":
        if len(self.bounds) != len(self.boxes) + 1 or any(box is not None and len(box) != 5 for box in self.boxes):
            raise ValueError("bounds must be one more than boxes, and a box has 5 quantiles")
        return self


class Judged(Strict):
    """The outcome of the equivalence test for one model; see `equivalence.Verdict`."""

    n: int = Field(ge=1)
    blocks: int = Field(ge=2)
    difference: float
    lower: float
    upper: float
    margin: float = Field(gt=0)
    p: float = Field(ge=0, le=1)
    equivalent: bool
    p_closer: float | None = Field(None, ge=0, le=1)
    closer_than_bf16: bool | None = None


class Row(Strict):
    """The figures of one model. The float model has no SQNR, PSNR or sites.

    `groups`: the bounds of the time groups of `sqnr_by_group`, one more than those. `by_timestep`: (t, dB) of each
    state. `size_bytes`: on disk. `recipe`: every setting. `images`: the number of the tensor of its images, or None.
    """

    name: str
    preset: str | None = None
    bits: str
    recipe: dict[str, str | int | float | bool | None] = {}
    size_bytes: int | None = None
    float32_bytes: int | None = None
    file_dtype: str | None = None
    sqnr_db: float | None = None
    exact: bool = False
    worst_db: float | None = None
    groups: list[float] = []
    sqnr_by_group: list[float | None] = []
    by_timestep: list[list[float | None]] = []
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    fd_fashion: float | None = None
    ms_per_call: float | None = None
    speedup: float | None = None
    peak_bytes: int | None = None
    calibration_seconds: float | None = None
    verdict: Judged | None = None
    sites: list[Site] = []
    sites_in_all: int = 0
    softmax_rows: bool = False
    softmax_steps: list[Steps] = []
    notes: dict[str, str] = {}
    images: int | None = None

    @model_validator(mode="after")
    def _grouped(self) -> "Row":
        if self.sqnr_by_group and len(self.groups) != len(self.sqnr_by_group) + 1:
            raise ValueError("groups must be one more than sqnr_by_group")
        if any(len(pair) != 2 for pair in self.by_timestep):
            raise ValueError("by_timestep must be pairs")
        return self


class Part(Strict):
    """The comparison of one transformer. Rows of equal `reference_sha256` and `protocol` belong into one table.

    `protocol`: how images, states or calls were drawn. `low`, `high`: the range of timesteps. `captions`: of the
    images, such as their classes.
    """

    component: str
    reference_sha256: str
    protocol: dict[str, str | int | float | bool | None]
    low: float
    high: float
    reference: Row
    models: list[Row]
    boxes: list[Boxes] = []
    captions: list[str] = []


class Run(Strict):
    """All that one call of `tqdit compare` measured."""

    version: Literal[1] = 1
    kind: Literal["samples", "calls"]
    command: str
    created: str
    environment: dict[str, str | int | float | bool | None]
    parts: list[Part] = Field(min_length=1)


def _same_length(value: Any, *names: str) -> Any:
    lengths = {len(getattr(value, name)) for name in names}
    if len(lengths) > 1:
        raise ValueError(f"{' and '.join(names)} must be of one length")
    return value
