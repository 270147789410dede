"""List the configurations that are worth timing, by kernel and shape: those that promise most first.

Their tiles fill a GPU, and their warps and stages may help. The order is that of an H200, where all were timed.
"""

import functools

import torch
import triton

from tqdit.backends.triton import costs, flash, hopper
from tqdit.backends.triton.float_launch import FEW_ROWS
from tqdit.backends.triton.layouts import FLASH, FLOATS, HEADS_OF, Config
from tqdit.ops.one_pass import BLOCK

PARTS = {name: parts for parts, name in HEADS_OF.items()}
TILE_TIMES = {(128, 128): 1.0, (64, 128): 0.57, (128, 64): 0.74, (64, 64): 0.5}  # of `kernels.hopper_float`, measured
LARGE_WEIGHT = 40_000_000  # codes
FLAT_ROWS = 64  # rows of a float input up to which reading the weight is the cost
FEW_TILES = 4096  # rows; with fewer, large tiles leave multiprocessors without work
MANY_COLUMNS = 16384  # of a layer on float inputs; with as many, small tiles cost more than they fill


def norm(rows: int, width: int) -> list[Config]:
    """Return configurations of `norm_quantize_kernel`.

    Where there are many rows, a program takes many of one sample, whose shift and scale its registers hold: a row or
    two at a time, by as few warps as can hold them. Or it takes few and holds nothing, so that more programs run.
    """
    one = Config(1, 0, 0, warps=triton.next_power_of_2(triton.cdiv(width, 1536)))
    two, four = Config(2, 0, 0, warps=2), Config(4, 0, 0, warps=4)
    if rows <= FEW_TILES:
        held, unheld = [one, two, four], [two, four, one, one._replace(warps=4)]
    else:
        most = one._replace(block_m=max(1, min(16, 4096 // triton.next_power_of_2(width))))
        held = [one._replace(blocks=8), one._replace(blocks=4), most._replace(blocks=8), one._replace(blocks=16)]
        held += [one._replace(blocks=8, stages=4), most._replace(blocks=8, stages=2)]
        held += [most._replace(blocks=4), two._replace(blocks=8), four._replace(blocks=4)]
        unheld = [one, most, one._replace(blocks=4), two]
    return list(dict.fromkeys(held + [config._replace(stages=1) for config in unheld]))


@functools.cache
def quantize_rows(width: int) -> Config:
    """Return the configuration of `quantize_rows_kernel`: as few warps as hold a row, so that more rows are read."""
    return Config(1, 0, 0, warps=min(8, triton.next_power_of_2(triton.cdiv(width, 4096))))


@functools.cache
def hopper_float(rows: int, columns: int, processors: int, by_row: bool) -> Config:
    """Return the configuration of `kernels.hopper_float`: the tile with the least rounds of tiles times their time."""

    def cost(tile: tuple[int, int]) -> float:
        tiles = triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1])
        return triton.cdiv(tiles, processors) * TILE_TIMES[tile]

    bm, bn = min(TILE_TIMES, key=cost)
    return Config(bm, bn, 128, stages=hopper.float_stages(bm, bn, by_row), hopper=FLOATS)


def best_first(configs: list[Config], device: torch.device, rows: int, columns: int, depth: int) -> list[Config]:
    """Return configurations of a product in the order of `costs`."""
    here = _multiprocessors(device)
    return costs.by_cost(configs, lambda config: costs.linear(config, rows, columns, depth, here))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def quantize() -> list[Config]:
    """Return configurations of `quantize_kernel`: small tiles, since a program does nothing but read and write."""
    return [Config(4, 256, 0, warps=4), Config(8, 256, 0, warps=8), Config(1, 1024, 0, warps=4)]


def linear(rows: int, two: bool, bits: int) -> list[Config]:
    """Return configurations of `linear_kernel`.

    Their tiles fill a GPU: large ones where there are many rows, small ones where there are few.
    """
    if two:
        found = [
            Config(64, 128, 128, 8, 4, 3, 64), Config(64, 128, 128, 8, 4, 4, 64), Config(128, 128, 128, 8, 8, 3, 64),
            Config(128, 128, 128, 8, 8, 4, 32),
        ]  # fmt: skip
    else:
        found = [
            Config(128, 128, 128, 8, 4, 3, 64), Config(128, 128, 128, 8, 4, 3, 32),
            Config(128, 128, 128, 8, 4, 2, 32, 168), Config(128, 128, 64, 8, 4, 4, 32, 168),
        ]  # fmt: skip
    if rows <= FEW_TILES:
        small = [
            Config(64, 64, 128, 8, 4, 4, 32), Config(64, 64, 128, 8, 4, 3, 64, 128), Config(64, 128, 128, 8, 4, 4, 32),
            Config(128, 64, 128, 8, 4, 4, 32), Config(64, 128, 256, 8, 4, 3, 32), Config(64, 64, 256, 8, 4, 3, 32),
            Config(64, 32, 256, 8, 4, 4, 32), Config(64, 64, 256, 8, 4, 4, 32),
        ]  # fmt: skip
        found = small + found[:2]
    return found if bits == 8 else [c for c in found if c.block_k == 128]


def hopper_linear(epilogue: str, rows: int, columns: int, tile: int) -> list[Config]:
    """Return configurations of `kernels.hopper` for a product.

    `tile`: of `hopper.rows_of_tile`; there are none if it is 0. A configuration has as many stages as fit beside the
    buffers of the stores or the blocks of the residual stream: up to five blocks beside four stages, three beside five.
    """
    residual = epilogue.startswith("residual")
    large = [(4, 32), (5, 32)] if residual else [(6, 64), (6, 32)]
    found = [Config(128, 128, 128, stages=stages, piece=piece, hopper=1) for stages, piece in large]
    if rows <= FEW_TILES or tile < 128:
        small = [(64, 128, 8), (128, 64, 8), (64, 64, 8), (64, 64, 12)]
        found += [Config(m, n, 128, stages=stages, piece=32 if residual else 64, hopper=1) for m, n, stages in small]
    return [config for config in found if hopper.supports_product(config, tile, columns // PARTS.get(epilogue, 1))]


def attention(sequences: int, keys: int) -> list[Config]:
    """Return configurations of `attention_kernel`.

    All keys are taken at once up to 256, by several blocks of rows where there are many sequences; else there are tiles
    of keys.
    """
    tiles = [
        Config(64, 0, 128, warps=4, stages=3), Config(64, 0, 64, warps=4, stages=3),
        Config(64, 0, 128, warps=4, stages=2, registers=128), Config(64, 0, 64, warps=4, stages=2, registers=128),
    ]  # fmt: skip
    if keys > 256:
        return [*tiles, Config(128, 0, 128, warps=8, stages=3)]
    whole = max(32, triton.next_power_of_2(keys))
    found = [Config(64, 0, whole, warps=4, stages=stages) for stages in (2, 1)]
    found.append(Config(128, 0, whole, warps=8, stages=2))
    if sequences >= 256 and keys > 64:
        several = [c._replace(blocks=4) for c in found[:2]]
        found = several + [several[0]._replace(registers=limit) for limit in (168, 200)] + found + [tiles[0], tiles[2]]
    return found


@functools.cache
def hopper_attention(device: torch.device, tokens: int, head_dim: int, two: bool, by_row: bool = False) -> list[Config]:
    """Return configurations of `kernels.hopper_attention`.

    A head's rows are taken together, or in parts where there are few heads. `two`: products of the probabilities, which
    take the registers of scores. Keys that fill two slots are multiplied once; for more, sixteen warps hide each
    other's waiting and have few registers. `by_row`: softmax rows, whose first of two passes has no powers, so that
    sixteen warps may be worth a second product for few keys as well.
    """
    if tokens <= 256:
        found = [Config(64, rows, bk, stages=4, hopper=1) for bk in (128, 64) for rows in (0, 64)]
        found.append(Config(128, 0, 128, stages=8, hopper=1))
        if by_row:
            found += [Config(256, 0, 64, stages=16, hopper=1), Config(128, 0, 64, stages=16, hopper=1)]
    else:
        found = [Config(128, rows, 128, stages=8, blocks=2 - two, hopper=1) for rows in (0, 128)]
        if not two:
            found[:0] = [Config(256, rows, 64, stages=16, hopper=1) for rows in (0, 256)]
        found += [c._replace(blocks=1) for c in found if c.blocks == 2 and tokens // c.block_k % 2]
    return [config for config in found if hopper.supports_attention(config, device, tokens, head_dim)]


def hopper_flash(device: torch.device, keys: int, head_dim: int) -> list[Config]:
    """Return configurations of `kernels.hopper_flash`, for softmax rows, where it runs and is offered."""
    found = [flash_config()]
    return [config for config in found if flash.offered(keys) and flash.supports(config, device, keys, head_dim)]


def flash_config(half: bool = False) -> Config:
    """Return the configuration of `kernels.hopper_flash`; `half`: powers are rounded to fp16 before they are codes."""
    return Config(flash.ROWS, 0, BLOCK, stages=8, piece=int(half), blocks=flash.PARTS, hopper=FLASH)


@functools.cache
def float_rows(rows: int, columns: int, depth: int) -> Config:
    """Return the configuration of the kernels for float inputs of 16 bits, which one product of them takes.

    One row of a weight that is not large is multiplied faster without tensor cores.
    """
    if rows == 1 and columns * depth < LARGE_WEIGHT:
        return Config(0, 4, 1024, warps=2)
    if rows <= 8:
        return Config(8, 32, 256, warps=2, stages=3)
    if rows <= FLAT_ROWS:
        return Config(16, 32, 256, warps=2, stages=3)
    return Config(64, 128, 64, warps=4, stages=1)


def float_input(rows: int, columns: int) -> list[Config]:
    """Return configurations of the kernels for float inputs.

    Where there are few rows, tiles of rows are as narrow as tensor cores take them, so that reading the weight is the
    only cost. For the fewest rows there are also configurations without tensor cores. Where rows or columns are few,
    tiles of both are small, for more programs.
    """
    if rows <= 16:
        return _few_float_rows(rows, columns)
    if rows > FEW_TILES:
        if columns <= 32:
            return [
                Config(64, 32, 64, warps=4, stages=3), Config(64, 32, 64, warps=4, stages=4),
                Config(64, 32, 128, warps=4, stages=2), Config(128, 32, 64, warps=8, stages=3),
                Config(32, 32, 128, warps=4, stages=3),
            ]  # fmt: skip
        return [
            Config(64, 128, 32, warps=4, stages=3), Config(64, 128, 64, warps=4, stages=3),
            Config(64, 64, 64, warps=4, stages=3), Config(64, 128, 64, warps=8, stages=3),
            Config(64, 256, 32, warps=4, stages=3),
        ]  # fmt: skip
    small = [
        Config(8, 32, 128, warps=2, stages=4), Config(16, 32, 128, warps=2, stages=4),
        Config(16, 32, 128, warps=4, stages=4),
    ]  # fmt: skip
    if columns <= 32:
        return [*small, Config(8, 32, 256, warps=2, stages=3), Config(64, 32, 64, warps=4, stages=3)]
    large = [
        Config(64, 256, 32, warps=4, stages=3), Config(64, 256, 64, warps=4, stages=2),
        Config(64, 128, 64, warps=4, stages=3), Config(64, 64, 64, warps=4, stages=3),
        Config(32, 64, 64, warps=2, stages=4),
    ]  # fmt: skip
    if columns < MANY_COLUMNS:
        large = [*large[2:], *large[:2]]
    return [*small, *reversed(large)] if columns < MANY_COLUMNS and rows <= FLAT_ROWS else [*large, *small]


def _few_float_rows(rows: int, columns: int) -> list[Config]:
    """Return configurations for at most 16 rows."""
    many = columns >= MANY_COLUMNS
    if rows > 8:
        found = [
            Config(16, 64, 64, warps=2, stages=4), Config(16, 128, 64, warps=2, stages=4),
            Config(16, 128, 64, warps=4, stages=4), Config(16, 128, 64, warps=2, stages=6),
            Config(16, 32, 128, warps=2, stages=4), Config(8, 32, 128, warps=2, stages=4),
        ]  # fmt: skip
        return found if many else found[::-1]
    tiles = [
        Config(8, 32, 128, warps=2, stages=4), Config(8, 128, 64, warps=4, stages=4),
        Config(8, 128, 64, warps=2, stages=4), Config(8, 256, 64, warps=4, stages=4),
    ]  # fmt: skip
    if rows > FEW_ROWS:
        return tiles
    flat = [Config(0, bn, bk, warps=4) for bn, bk in ((4, 1024), (8, 512), (32, 128))]
    return tiles + flat if many else flat + tiles
