"""Estimate what a configuration costs, so that only a few have to be compiled and timed.

A product takes the time of one tile, which nothing hides, and the time that tiles share, by how many there are for
each multiprocessor. Both were measured on an H200 for tiles of depth 1152; elsewhere they order the candidates, and the
first few are timed.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import triton

from tqdit.backends.triton.layouts import Config

DEEP = 2048  # columns of a product's operands from which blocks of 256 pay


class Tile(NamedTuple):
    """Microseconds of one tile: `alone` where there is no other, `shared` for each more on a multiprocessor."""

    alone: float
    shared: float


TILES = {
    (64, 32): Tile(6.5, 1.0), (64, 64): Tile(6.0, 1.7), (128, 64): Tile(6.8, 3.0), (64, 128): Tile(7.5, 3.2),
    (128, 128): Tile(8.5, 5.8),
}  # fmt: skip
HOPPER_TILES = {
    (64, 64): Tile(4.9, 1.4), (64, 128): Tile(4.55, 2.66), (128, 64): Tile(4.55, 2.66), (128, 128): Tile(5.7, 4.24),
}  # fmt: skip


def linear(config: Config, rows: int, columns: int, depth: int, processors: int) -> float:
    """Return an estimate of what a product costs, in units that hold for the same sizes alone."""
    tile = (HOPPER_TILES if config.hopper else TILES)[config.block_m, config.block_n]
    alone, shared = tile
    if not config.hopper and config.block_k == 256:  # fewer steps, but fewer programs fit a multiprocessor
        alone, shared = (alone * 0.8, shared * 1.1) if depth >= DEEP else (alone * 0.95, shared * 1.6)
    if not config.hopper and config.registers == 128:  # more programs fit
        shared *= 0.7
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    return alone + shared * tiles / processors


def by_cost(configs: Sequence[Config], cost: Callable[[Config], float]) -> list[Config]:
    """Return configurations, those with the least cost first, but one of every tile before the second of any.

    Configurations for Hopper come before all others. How two of one tile differ is hard to foresee, and so is the cost
    of a tile: a few of the list are more different, and one of them better, in this order.
    """
    seen: Counter[tuple[int, int, int]] = Counter()
    ranked = []
    for config in sorted(configs, key=cost):  # stable: equals stay in their order
        tile = config.hopper, config.block_m, config.block_n
        ranked.append((not config.hopper, seen[tile], cost(config), config))
        seen[tile] += 1
    return [config for *_, config in sorted(ranked, key=lambda entry: entry[:3])]
