"""`Grid`: how values become integer codes and codes become values. There is one object for each kind of grid."""

from typing import Any, ClassVar, NamedTuple, Self

import torch

from tqdit.errors import InputError

_KINDS: dict[str, "Grid"] = {}


class Columns(NamedTuple):
    """The parameters of a site as kernels read them, each (groups, units).

    `scale` (s1) and `coarse` (s2, ones for one region) are fp32. `zero_point` is fp32. `factor` is s2 / s1, an int32
    power of two, where both regions of a two-region grid fit one 8-bit operand; else None.
    """

    scale: torch.Tensor
    coarse: torch.Tensor
    zero_point: torch.Tensor
    factor: torch.Tensor | None


class Grid(str):
    """A kind of grid, known by its name: `Grid("uniform")` is `Grid.UNIFORM`, and so are its copies and pickles.

    A subclass with the methods below is one kind; `register` makes its object known. Its codes are decoded as
    scale (q - zero_point), or with `two_region` as sign s1 min(q, 0) + s2 max(q, 0), so that products are integer.

    Parameters of a site: `scale` fp32 (groups, units), or (groups, units, 2) with two regions; zero points int32
    (groups, units). In `quantize`, `dequantize` and `fake_quantize` the scales s1 (`scale`) and s2 (`coarse`, ignored
    by one region) and the zero point broadcast to x.
    """

    UNIFORM: ClassVar["Grid"]
    ROW: ClassVar["Grid"]
    SOFTMAX_ROW: ClassVar["Grid"]
    MRQ_SOFTMAX: ClassVar["Grid"]
    MRQ_GELU: ClassVar["Grid"]

    label: ClassVar[str]  # the name in reports
    per_row: ClassVar[bool] = False  # True: the scale of each row follows from its values, at run time
    zero_points: ClassVar[bool] = True  # whether a site of activations has zero points to choose
    two_region: ClassVar[bool] = False  # True: the sign of a code is its region, and there are no zero points
    sign: ClassVar[int] = 1  # the sign of the values of negative codes, with two regions
    independent_regions: ClassVar[bool] = False  # whether a search chooses s1 and s2 one by one, unless they merge

    def __new__(cls, name: str) -> Self:
        if cls is not Grid:
            return super().__new__(cls, name)
        if name not in _KINDS:
            raise ValueError(f"unknown grid '{name}'; known: {', '.join(_KINDS)}")
        return _KINDS[name]  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type["Grid"], tuple[str]]:
        return Grid, (str(self),)

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def scale_shape(self, groups: int, units: int) -> tuple[int, ...]:
        """Return the shape of a site's scales."""
        return (groups, units, 2) if self.two_region else (groups, units)

    def by_region(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return s1 and s2 of a site's scales, (groups, units) each; twice the same for one region."""
        return (scale[..., 0], scale[..., 1]) if self.two_region else (scale, scale)

    def initial(
        self, low: torch.Tensor, high: torch.Tensor, bits: int, site: str, merging: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point for values from `low` to `high`, each (groups, units).

        `merging`: two regions shall fit one integer product. Raises `InputError` naming `site` for NaN or Inf.
        """
        raise NotImplementedError

    def candidates(
        self, base: torch.Tensor, current: torch.Tensor, steps: torch.Tensor, bits: int, merging: bool = False
    ) -> list[torch.Tensor]:
        """Return scales that a search tries: stacks (K, groups, units[, 2]), one for each region it searches apart.

        `base`: the initial scale; `current`: the one chosen so far; `steps`: multiples (K, 1, 1) of `base` to try.
        """
        raise NotImplementedError

    def quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        """Return the codes of x, int8."""
        raise NotImplementedError

    def dequantize(
        self, codes: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor
    ) -> torch.Tensor:
        """Return the values of codes, fp32."""
        raise NotImplementedError

    def fake_quantize(
        self, x: torch.Tensor, scale: torch.Tensor, coarse: torch.Tensor, zero_point: torch.Tensor, bits: int
    ) -> torch.Tensor:
        """Return the values of the codes of x, fp32."""
        return self.dequantize(self.quantize(x, scale, coarse, zero_point, bits), scale, coarse, zero_point)

    def merge_shift(self, scale: torch.Tensor, bits: int) -> torch.Tensor | None:
        """Return i of s2 = s1 2^i, int32 (groups, units), if both regions fit one 8-bit operand everywhere."""
        return None

    def columns(self, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int) -> Columns:
        """Return a site's parameters for the table that kernels read."""
        s1, s2 = self.by_region(scale)
        coarse = s2 if self.two_region else torch.ones_like(s1)
        zero = torch.zeros_like(s1) if zero_point is None else zero_point.to(s1.dtype)
        shift = self.merge_shift(scale, bits)
        return Columns(s1, coarse, zero, None if shift is None else 1 << shift)


def register(grid: Grid) -> Grid:
    """Make a grid known by its name, and return it. Raise `InputError` for a name that is taken."""
    if grid in _KINDS:
        raise InputError(f"there is a grid '{grid}' already")
    _KINDS[str(grid)] = grid
    return grid


def known() -> tuple[Grid, ...]:
    """Return every registered grid."""
    return tuple(_KINDS.values())
