"""Calibration records the largest magnitude of the residual stream, over blocks, states, batches and guidance."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tqdit.architectures.interface import Block
from tqdit.calibration.recorder import record
from tqdit.calibration.records import STREAM_HIGH, join
from tqdit.calibration.taps import watched_stream
from tqdit.errors import InputError
from tqdit.sampling.guidance import arguments, predict
from tqdit.search.solver import solve


@torch.no_grad()
def largest(model: nn.Module, data) -> list[float]:
    """The largest magnitude before each block and after the last one, seen by hooks of the test's own."""
    seen: list[float] = []
    blocks, handles = list(model.transformer_blocks), []
    for block in blocks:
        handles.append(block.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max().item())))
    handles.append(blocks[-1].register_forward_hook(lambda _, __, out: seen.append(out.abs().max().item())))
    predict(model, data.x, data.t, *arguments(data.conditions, data.labels, 1.5), 1.5)
    for handle in handles:
        handle.remove()
    return seen


def test_it_is_the_largest_of_all_blocks_and_the_solution_has_it(model, data, records, tiny_recipe) -> None:
    seen = largest(model, data)
    assert len(seen) == 3
    assert records.stream_max == pytest.approx(max(seen), rel=1e-5)
    solution = solve(model, replace(records, stream_max=7.5), tiny_recipe(rounds=0), data.time_groups, None)
    assert solution.stream_max == 7.5


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_place_counts(tiny_dit, data, tiny_recipe, place: int) -> None:
    """One channel is large at one place alone: in the embedding, after the first block, or after the last one."""
    model, value = tiny_dit(), 300.0
    if place == 0:
        model.pos_embed.proj.bias[3] += value
    else:
        add_to_channel(model.transformer_blocks[place - 1], value)
    if place < 2:
        add_to_channel(model.transformer_blocks[place], -value)
    seen = largest(model, data)
    assert [abs(x - value) < 0.2 * value for x in seen] == [place == i for i in range(3)]
    assert record(model, data, tiny_recipe(hessian=False)).stream_max == pytest.approx(max(seen), rel=1e-5)


def add_to_channel(block: nn.Module, value: float) -> None:
    """Let a block add `value` to channel 3: its last addition has a gate, which is 1 there for every sample."""
    block.norm1.linear.weight[5 * 32 + 3] = 0.0
    block.norm1.linear.bias[5 * 32 + 3] = 1.0
    block.ff.net[2].bias[3] += value


def test_the_batch_size_and_the_order_of_batches_change_nothing(model, data, records, tiny_recipe) -> None:
    assert record(model, data, tiny_recipe(hessian=False), batch=3).stream_max == pytest.approx(
        records.stream_max, rel=1e-5
    )
    parts = [{STREAM_HIGH: torch.tensor(value)} for value in (1.0, 3.0, 2.0)]
    assert join(STREAM_HIGH, parts).item() == 3.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_after_the_last_block_are_an_error(tiny_dit, data, tiny_recipe, value: float) -> None:
    """No site reads what the last layer of the last block gives."""
    model = tiny_dit()
    model.transformer_blocks[-1].ff.net[2].bias[3] = value
    with pytest.raises(InputError, match="the residual stream: the float model has NaN or Inf values at timestep"):
        record(model, data, tiny_recipe(hessian=False))


def test_a_stream_is_watched_by_any_name_and_left_alone() -> None:
    class Pair(nn.Module):
        def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
            return hidden_states * 2 * scale, None

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Pair(), Pair()

    model, seen = Two(), []
    blocks = [Block(name, ()) for name in ("first", "last")]
    with watched_stream(model, blocks, lambda x: seen.append(x.item())):
        (x, _) = model.first(torch.ones(1))
        model.last(hidden_states=x, scale=3.0)
    model.first(torch.ones(1))
    assert seen == [1.0, 2.0, 12.0]
