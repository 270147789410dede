"""Operation counts against torch's own counter on the float model."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from tqdit.architectures.shapes import shape_config
from tqdit.recipe import Recipe
from tqdit.spec import Role
from tqdit.speed.operations import Operations, count_operations
from tqdit.speed.random_solution import random_solution

SHAPE = {"num_layers": 2, "num_attention_heads": 3, "attention_head_dim": 16, "sample_size": 16, "patch_size": 2}


@pytest.fixture
def config(tiny_dit) -> dict:
    return {"_class_name": "DiTTransformer2DModel", **tiny_dit(**SHAPE).config}


@pytest.mark.parametrize("batch", [1, 4])
def test_operations_are_those_torch_counts(tiny_dit, config, batch: int) -> None:
    model = tiny_dit(**SHAPE)
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())  # matmuls that the counter sees
    x = torch.randn(batch, 1, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(x, timestep=torch.zeros(batch), class_labels=torch.zeros(batch, dtype=torch.long))
    flops = counter.get_flop_counts()
    quantized = [name for name in flops if name.endswith((".attn1", ".ff"))]
    assert len(quantized) == 4
    expected = sum(sum(flops[name].values()) for name in quantized)
    assert count_operations(random_solution(config, Recipe("plus")), batch).integer == expected


def test_two_region_operands_are_executed_twice(config) -> None:
    def executed(**grids: str) -> Operations:
        return count_operations(random_solution(config, Recipe("paper", **grids)), 4)

    none = executed(softmax_grid="uniform", gelu_grid="uniform")
    softmax, gelu, both = executed(gelu_grid="uniform"), executed(softmax_grid="uniform"), executed()
    n, c, layers = 64, 48, 2
    assert none.executed == none.integer == softmax.integer == both.integer
    assert softmax.executed - none.executed == layers * 2 * 4 * n * n * c
    assert gelu.executed - none.executed == layers * 2 * 4 * n * 4 * c * c
    assert both.executed - both.integer == softmax.executed + gelu.executed - 2 * none.executed


def test_weights_on_float_inputs_are_read_once(config) -> None:
    solution = random_solution(config, Recipe("plus", ends="codes"))
    c, patch, out = 48, 4, 2 * 4
    shared = 256 * c + c * c
    expected = patch * c + shared + 2 * 6 * c * c + 2 * c * c + out * c
    assert count_operations(solution, 4).weight_only_bytes == expected
    copies = {name: codes.clone() for name, codes in solution.codes.items()}
    assert count_operations(replace(solution, codes=copies), 4).weight_only_bytes == expected + shared
    assert all(spec.role is not Role.WEIGHT_ONLY or spec.name in copies for spec in solution.sites)


def test_published_cost_of_xl() -> None:
    """DiT-XL/2 has 118.6 Gflops (multiply-adds) per image in the paper."""
    solution = random_solution({**shape_config("DiT-XL/2"), "num_layers": 1}, Recipe("plus"))
    assert 28 * count_operations(solution, 1).integer / 2e9 == pytest.approx(118.6, rel=0.01)


def test_floor() -> None:
    """10^12 operations at 500 Gop/s are 2 s; 10^9 bytes at 10 GB/s are 0.1 s."""
    assert Operations(10**12, 2 * 10**12, 10**9).floor_ms(500.0, 10.0) == pytest.approx(2100)
