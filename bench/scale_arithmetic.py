"""Operations and bytes of a calibration, counted from shapes: what a run of a part is scaled up by."""

from collections.abc import Mapping
from typing import Any

import torch

from tqdit.architectures.registry import graph
from tqdit.architectures.shapes import tokens, width
from tqdit.calibration.picker import Picker
from tqdit.calibration.recorder import batch_size, graph_bytes, picked_bytes
from tqdit.grids import regions
from tqdit.plan import grids
from tqdit.recipe import Recipe
from tqdit.spec import Role
from tqdit.speed.random_weights import empty_model

FP32 = 4


def operations(config: Mapping[str, Any], recipe: Recipe) -> dict[str, float]:
    """Floating-point operations of the matmuls of each stage; `recipe.trajectories` must be set.

    The backward pass goes to activations only, so each probe costs one forward pass; a round tries every candidate and
    the current scale of both operands. Rounds that end early are counted: an upper bound of the search.
    """
    assert recipe.trajectories is not None
    sequence = (
        int(config["num_layers"]) * tokens(config) * (24 * width(config) ** 2 + 4 * tokens(config) * width(config))
    )
    halves = _halves(recipe)
    return {
        "trajectories": float(recipe.trajectories * recipe.steps * halves * sequence),
        "statistics": float(recipe.groups * recipe.samples * halves * (1 + recipe.probes) * sequence),
        "search": float(int(config["num_layers"]) * _search_of_a_block(config, recipe)),
    }


def _search_of_a_block(config: Mapping[str, Any], recipe: Recipe) -> int:
    d, rows, (pairs, queries) = width(config), _rows(config, recipe), _queries(config, recipe)
    tries = recipe.rounds * (recipe.candidates + 1)
    of_gelu = tries * (2 if grids(recipe, Role.GELU)[0].two_region else 1)  # one search per region
    linear = 2 * rows * d * (3 * d + d + 4 * d) * 2 * tries + 2 * rows * 4 * d * d * (tries + of_gelu)
    mrq = grids(recipe, Role.SOFTMAX)[0].two_region
    exponents = len(regions.softmax_exponents(recipe.activation_bits, recipe.softmax_products == "one"))
    of_softmax = recipe.rounds * (exponents + 1) if mrq else tries
    product = 2 * pairs * queries * tokens(config) * d
    return linear + product * 2 * tries + product * (tries + of_softmax)


def memory(config: Mapping[str, Any], recipe: Recipe, device: torch.device, processes: int = 1) -> dict[str, int]:
    """Bytes of the large parts, in the first process. `weights` and `codes` stay; the others come one stage at a time.

    `weights`: fp32, with a copy of the embedder in every block, as diffusers loads them. `pass`: the activations and
    picks of one forward and backward pass. `records_of_a_block`: what a search in a work folder holds. `codes`: int8.
    """
    picker = _picker(config, recipe)
    structure = graph(config)
    records = picked_bytes(structure, picker) * recipe.groups * recipe.samples
    of_a_sample = graph_bytes(structure, picker) + picked_bytes(structure, picker)
    blocks = int(config["num_layers"])
    elements = sum(p.numel() for p in empty_model(config).parameters())
    return {
        "weights": FP32 * elements,
        "pass": batch_size(structure, picker, device) * of_a_sample,
        "records": records * -(-blocks // processes) // blocks,  # whole blocks are dealt out
        "records_of_a_block": records // blocks,
        "codes": elements,
    }


def _halves(recipe: Recipe) -> int:
    return 1 if recipe.guidance == 1.0 else 2


def _picker(config: Mapping[str, Any], recipe: Recipe) -> Picker:
    return Picker(recipe, recipe.groups * recipe.samples, _halves(recipe), tokens(config))


def _rows(config: Mapping[str, Any], recipe: Recipe) -> int:
    return _picker(config, recipe).rows.numel()


def _queries(config: Mapping[str, Any], recipe: Recipe) -> tuple[int, int]:
    """Attention calls that are kept, and queries of each."""
    picker = _picker(config, recipe)
    return int(picker.attention.sum()), picker.queries.shape[-1]
