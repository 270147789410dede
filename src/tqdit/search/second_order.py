"""Round a layer's weights so that the errors of its columns make up for each other (GPTQ).

The error of a layer's output is e H e^T for a row of weights whose rounding error is e, where H is the Hessian of the
layer's inputs (Frantar et al. 2023, "GPTQ", arXiv 2210.17323). Rounding to nearest ignores the products of different
columns in it. GPTQ rounds one column after the other, and moves what each rounding error does to the output into the
columns that are still to be rounded.

With H = R R^T and R upper triangular, e H e^T = |e R|^2, and entry j of e R depends on columns 0..j alone. So column j
is rounded to nearest after sum_{i<j} e_i R_ij / R_jj has been taken from it, where e is codes less values. That is the
paper's rule, but needs one Cholesky factor and neither an inverse nor an update of later columns. It is linear in a
row, so rows are in units of their own scale throughout. The loop runs where the weights are, and a column takes four
operations on vectors of `out` numbers: four launches on a GPU, whatever the number of rows.

All sums are float64: another order of them changes a code only where a value is within about 1e-13 of a border.
"""

from dataclasses import dataclass

import torch

from tqdit.errors import InputError
from tqdit.grids import uniform
from tqdit.grids.formats import IntFormat

ROWS = 8192  # of inputs that are float64 at a time
REVERSED = 2**22  # elements of a matrix that are moved at a time
# Bytes that the rows of a weight may take at once. On a GPU that has room for it, fewer parts wait for fewer launches.
WORKSPACE = 2**30
ROW_BYTES = 2 * 22  # of a column of a row: two proposals, each two float64 matrices, the weights and two of codes


def hessian(
    x: torch.Tensor, row_weight: torch.Tensor | None = None, mix: float = 0.5, *, site: str = "x"
) -> torch.Tensor:
    """Return H = (1 - mix) sum_i x_i x_i^T / tr + mix sum_i w_i x_i x_i^T / tr, (in, in) float64, with trace 1.

    Each part is divided by its own trace. `x` (R, in) are the inputs as the integer layer reads them, dequantized.
    `row_weight` (R,) is w: what a squared error of row i costs, such as its mean Fisher weight times the weight of its
    timestep. None, or zero wherever x is not, means the plain part alone. H is zero if all inputs are. Raises
    `InputError` naming `site` for NaN, Inf, a negative weight, or a mix outside of [0, 1].
    """
    if not 0 <= mix <= 1:
        raise InputError(f"site '{site}': the mix of a Hessian must be from 0 to 1, not {mix:g}")
    if not torch.isfinite(x).all():
        raise InputError(f"site '{site}': the inputs have NaN or Inf values, no weight can be rounded for them")
    parts = x.split(ROWS)
    squares = torch.cat([part.double().square().sum(1) for part in parts])
    each = _per_trace(squares, torch.ones_like(squares))
    if row_weight is not None:
        weight = row_weight.to(x.device).double()
        if not (torch.isfinite(weight) & (weight >= 0)).all():
            raise InputError(f"site '{site}': the weights of rows have NaN, Inf or negative values")
        weighted = _per_trace(squares, weight)
        each = (1 - mix) * each + mix * weighted if bool(weighted.any()) else each
    total = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part, root in zip(parts, each.sqrt()[:, None].split(ROWS), strict=True):
        rows = part.double() * root
        total.addmm_(rows.t(), rows)
    return (total + total.t()).mul_(0.5)  # symmetric to the last bit, whatever the product does


def _per_trace(squares: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the weights of rows divided by the trace of sum_i w_i x_i x_i^T; zeros if the trace is zero."""
    trace = (squares * weight).sum()
    return torch.where(trace > 0, weight / trace, 0.0)


def round_weights(
    weight: torch.Tensor,
    scale: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
    site: str = "weight",
) -> torch.Tensor:
    """Return int8 codes (out, in) of a weight (out, in) under one scale per row, (out,).

    `act_order`: columns of large inputs come first, while many columns are left to make up for their errors.
    `damping` times the mean of H's diagonal is added to the diagonal, so that inputs that are zero, or fewer rows of
    inputs than columns, leave H invertible. `block` columns at a time are updated by one product; it changes sums in
    their last bits only. A row whose error e H e^T (without damping) is not below that of rounding to nearest keeps the
    nearest codes: no row is ever worse. Raises `InputError` naming `site` for NaN or Inf in the weight, or where H is
    singular.
    """
    _check_finite(weight, site)
    return _Factor.of(hessian, act_order, damping, site).codes(weight, scale, bits, block)[0]


def scaled_codes(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    bits: int,
    factors: torch.Tensor,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    site: str = "weight",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a scale per row (out,), among multiples of the min-max scale max|w| / qmax, and codes as `round_weights`.

    `factors` (K,) are the multiples; the min-max scale competes with them. Two measures of the errors of rounding to
    nearest propose one multiple each: plain squared error, and squared error weighted by the diagonal of H. The
    proposal with the smaller e H e^T after second-order rounding is chosen, for each row. The error e H e^T of the
    nearest codes is not a measure, because it pays for products of columns that second-order rounding removes. A
    choice among all multiples fits the recorded inputs better, but predicts the bundled model's held-out states no
    better. Raises `InputError` as `round_weights`.
    """
    _check_finite(weight, site)
    factor = _Factor.of(hessian, act_order, damping, site)
    parts = -(-weight.numel() * ROW_BYTES // WORKSPACE)  # rows are independent: their division changes no code
    found = [_scaled_codes(part, factor, bits, factors, site) for part in weight.tensor_split(max(1, parts))]
    return torch.cat([scale for scale, _ in found]), torch.cat([codes for _, codes in found])


def _scaled_codes(
    weight: torch.Tensor, factor: "_Factor", bits: int, factors: torch.Tensor, site: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `scaled_codes` of some rows of a weight."""
    base = uniform.minmax_symmetric(weight.abs().amax(1), bits, site)
    tables = torch.stack([base, *(uniform.multiples(base, multiple) for multiple in factors.to(base))])
    diagonal = factor.hessian.diagonal()
    measures = torch.stack([torch.ones_like(diagonal), diagonal], 1)
    errors = [_error(weight, table, _nearest(weight, table, bits)).square_() @ measures for table in tables]
    proposals = tables.gather(0, torch.stack(errors).argmin(0).t())  # (2, out)
    # Both proposals in one pass: the number of steps is that of the columns.
    codes, losses = factor.codes(weight.repeat(len(proposals), 1), proposals.flatten(), bits)
    best = losses.reshape(proposals.shape).argmin(0)
    row = torch.arange(len(weight), device=weight.device)
    return proposals[best, row], codes.reshape(len(proposals), *weight.shape)[best, row]


def _check_finite(weight: torch.Tensor, site: str) -> None:
    if not torch.isfinite(weight).all():
        raise InputError(f"site '{site}': the weight has NaN or Inf values, no code can represent them")


def _nearest(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return uniform.quantize(weight, scale[:, None], 0, bits)


def _error(weight: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the dequantized codes less the weights, (out, in) float64."""
    return codes.double().mul_(scale.double()[:, None]).sub_(weight)


@dataclass(frozen=True)
class _Factor:
    """A Hessian H with its factor R: the damped H, in the order of rounding, is R R^T with R upper triangular.

    order (in,): the columns, first to last. feedback (in, in): R_ij / R_jj for i < j, else 0, in that order.
    """

    hessian: torch.Tensor
    order: torch.Tensor
    feedback: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, act_order: bool, damping: float, site: str) -> "_Factor":
        """Factorize H. Raises `InputError` naming `site` if H is singular.

        The damped H is a copy of H in another order, and becomes its factor in place: of 15,360 columns, each such
        matrix takes 1.9 GB.
        """
        diagonal = hessian.diagonal()
        # Entries that differ by the order of their sums alone are equal in float32, and keep the columns' own order.
        keys = diagonal.float() if act_order else torch.zeros_like(diagonal)
        order = keys.argsort(descending=True, stable=True)
        last_first = order.flip(0)  # the lower factor in reversed order is the upper factor, reversed
        factor = hessian[last_first[:, None], last_first].t()  # H is symmetric; LAPACK has matrices by columns
        mean = diagonal.mean()
        factor.diagonal().add_(torch.where(mean > 0, damping * mean, 1.0))
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if int(failed):
            raise InputError(f"site '{site}': the Hessian of the inputs is singular, damping must exceed {damping:g}")
        _reverse(factor.t().view(-1))  # rows and columns
        return cls(hessian, order, factor.div_(factor.diagonal().clone()).triu_(1))

    def codes(
        self, weight: torch.Tensor, scale: torch.Tensor, bits: int, block: int = 128
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes (out, in) int8, and e H e^T of every row, (out,): the better of second-order and nearest."""
        nearest = _nearest(weight, scale, bits)
        moved = torch.empty_like(nearest)
        moved[:, self.order] = _rounded(self._in_order(weight, scale), self.feedback, IntFormat(bits), block).t()
        after, before = (self.loss(_error(weight, scale, codes)) for codes in (moved, nearest))
        return torch.where((after < before)[:, None], moved, nearest), torch.minimum(after, before)

    def _in_order(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the weights in units of their scales, (in, out) float64, in the order of rounding."""
        return (weight.double() / scale.double()[:, None]).t()[self.order].contiguous()

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """Return e H e^T for every row e of `error` (out, in): (out,)."""
        return (error @ self.hessian).mul_(error).sum(1)


def _reverse(values: torch.Tensor) -> None:
    """Reverse the order of a vector in place, a part at a time."""
    half, count = len(values) // 2, len(values)
    for start in range(0, half, REVERSED):
        end = min(start + REVERSED, half)
        first, last = values[start:end], values[count - end : count - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def _rounded(values: torch.Tensor, feedback: torch.Tensor, fmt: IntFormat, block: int) -> torch.Tensor:
    """Return codes (in, out) int8 of `values` (in, out), which are in units of the scales.

    Row j of both is column j of the layer, in the order of rounding: contiguous, and so is each operand of the loop.
    """
    errors, codes = torch.zeros_like(values), torch.empty_like(values, dtype=torch.int8)  # errors: values less codes
    of_part = torch.empty_like(values[:block])  # the codes of one block, which are rounded as float64
    for start in range(0, len(values), block):
        part = slice(start, start + block)
        # What all earlier blocks add to this one; the loop adds what the block's own columns do to each other.
        targets = torch.addmm(values[part], feedback[:start, part].t(), errors[:start])
        of_block = errors[part].t()  # rows that are still zero add nothing
        columns = feedback[part, part].t().contiguous()
        made = of_part[: len(targets)]
        rows = (tensor.unbind() for tensor in (values[part], targets, columns, made, errors[part]))
        for value, target, column, code, error in zip(*rows, strict=True):
            torch.round(target.addmv_(of_block, column), out=code)
            torch.sub(value, code.clamp_(fmt.qmin, fmt.qmax), out=error)
        codes[part] = made
    return codes
