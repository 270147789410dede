"""A layer of an embedder in one pass: its input may be rows of a table, its output has more rows added, then SiLU."""

import triton
import triton.language as tl

from tqdit.backends.triton.kernels.float_input import few_sums, tile_sums


@triton.jit(do_not_specialize=["M", "X_ROWS", "ADDED_ROWS"])
def activated_kernel(
    x, index, codes, codes_high, weight_scale, bias, added, added_index, out, M, N, K, X_ROWS, ADDED_ROWS, x_stride,
    index_stride, added_stride, added_index_stride, codes_stride, high_stride, LOOKUP: tl.constexpr,
    ADDED: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr, FEW: tl.constexpr, TURNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute out (M, N) = SiLU((x (M, K) codes (N, K)^T) scale + bias + added), all fp32.

    LOOKUP: row i of the input is row `index[i]` of x. ADDED: what is added to row i is row `added_index[i]` of `added`.
    A row that is not in its table is NaN. FEW, TURNED: as in `few_rows_kernel` and `float_input_kernel`.
    """
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    there, place = rows < M, rows.to(tl.int64)
    if LOOKUP:
        place = tl.load(index + place * index_stride, there, 0).to(tl.int64)
        there &= (place >= 0) & (place < X_ROWS)
    if FEW:
        sums = few_sums(
            x, index, index_stride, X_ROWS, codes, codes_high, columns, M, N, K, x_stride, codes_stride, high_stride,
            LOOKUP, BITS, NATIVE, BM, BN, BK,
        )  # fmt: skip
    else:
        sums = tile_sums(
            x + place * x_stride, there, codes, codes_high, columns, N, K, codes_stride, high_stride, BITS, NATIVE,
            TURNED, BM, BN, BK,
        )  # fmt: skip
    scale = tl.load(weight_scale + columns, columns < N, 0.0)
    addend = tl.load(bias + columns, columns < N, 0.0)
    y = sums * scale[None, :] + addend[None, :]
    if ADDED:
        place = tl.load(added_index + rows.to(tl.int64) * added_index_stride, rows < M, 0).to(tl.int64)
        there &= (place >= 0) & (place < ADDED_ROWS)
        y += tl.load(added + (place * added_stride)[:, None] + columns[None, :],
                     there[:, None] & (columns < N)[None, :], 0.0)  # fmt: skip
    y = tl.where(there[:, None], tl.div_rn(y, 1.0 + tl.exp(-y)), float("nan"))
    write = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(write, y, (rows < M)[:, None] & (columns < N)[None, :])
