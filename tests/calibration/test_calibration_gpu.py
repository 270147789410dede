"""Calibration on a GPU: the states, records and choices of a CPU but for rounding, and the same ones every time."""

import weakref

import pytest
import torch

from tqdit.calibration import recorder
from tqdit.calibration.recorder import record
from tqdit.calibration.trajectories import collect
from tqdit.provenance import Provenance
from tqdit.search.solver import solve
from tqdit.system import capture
from tqdit.timegroups import TimeGroups

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def on_gpu(tiny_dit):
    return tiny_dit().to(DEVICE)


def test_states_are_of_the_same_draws(on_gpu, data, scheduler_config, tiny_recipe) -> None:
    found = collect(on_gpu, scheduler_config, tiny_recipe())
    assert torch.equal(found.t, data.t)
    assert torch.equal(found.labels, data.labels)
    error = (found.x - data.x).square().mean() / data.x.square().mean()
    assert error < 0.01


def test_states_in_batches_are_the_same_twice(on_gpu, scheduler_config, tiny_recipe) -> None:
    """Of two sizes, each a graph of its own."""
    recipe = tiny_recipe(samples=8, trajectories=5)
    first, again = (collect(on_gpu, scheduler_config, recipe, batch=3) for _ in range(2))
    assert torch.equal(first.x, again.x)


def test_less_memory_than_a_batch_of_states_takes(on_gpu, scheduler_config, tiny_recipe, monkeypatch) -> None:
    """The second batch does not fit; nothing of another graph is left when one is made."""
    original, sizes, made = capture.Captured.__init__, [], []

    def small(self, call, inputs, device) -> None:
        assert not [other for other in made if other()]
        made.append(weakref.ref(self))
        sizes.append(len(inputs[0]))
        if len(sizes) == 2:
            raise torch.OutOfMemoryError
        original(self, call, inputs, device)

    monkeypatch.setattr(capture.Captured, "__init__", small)
    recipe = tiny_recipe(samples=8, trajectories=8)
    found = collect(on_gpu, scheduler_config, recipe, batch=4)
    assert sizes == [8, 8, 4, 4]  # both halves of guidance
    whole = collect(on_gpu, scheduler_config, recipe, batch=8)
    assert (found.x - whole.x).square().mean() < 0.01 * whole.x.square().mean()


def test_records_go_from_pass_to_search_on_the_gpu(on_gpu, data, tiny_recipe) -> None:
    recipe = tiny_recipe()
    found = record(on_gpu, data, recipe)
    parts = [*found.linears.values(), *found.attentions.values()]
    tensors = [tensor for part in parts for tensor in vars(part).values() if tensor is not None]
    assert len(tensors) > len(parts)
    assert all(tensor.is_cuda for tensor in tensors)
    assert solve(on_gpu, found, recipe, TimeGroups.uniform(0, 1000, 4), Provenance()).params


def test_records_are_those_of_a_cpu(on_gpu, data, records, tiny_recipe) -> None:
    found = record(on_gpu, data, tiny_recipe())
    for name, stats in records.ranges.items():
        assert torch.allclose(found.ranges[name].low, stats.low, atol=1e-4), name
        assert torch.allclose(found.ranges[name].high, stats.high, atol=1e-4), name
    for name, linear in records.linears.items():
        assert torch.allclose(found.linears[name].x.cpu(), linear.x, atol=1e-4), name
        assert torch.allclose(found.linears[name].fisher.sum(0).cpu(), linear.fisher.sum(0), rtol=1e-2), name
        assert torch.equal(found.linears[name].group.cpu(), linear.group)
    assert torch.allclose(found.maxima, records.maxima, atol=1e-4)


@pytest.mark.parametrize("preset", ["paper", "plus"])
@pytest.mark.parametrize("bits", ["w8a8", "w6a6"])
def test_choices_are_those_of_a_cpu_and_the_same_twice(
    on_gpu, records, solved, tiny_recipe, preset: str, bits: str
) -> None:
    expected = solved(preset, bits)
    first, again = (
        solve(on_gpu, records, tiny_recipe(preset, bits), TimeGroups.uniform(0, 1000, 4), Provenance())
        for _ in range(2)
    )
    same = []
    for name, params in first.params.items():
        assert params.spec == expected.params[name].spec
        assert torch.equal(params.scale, again.params[name].scale), name
        same.append(torch.isclose(params.scale, expected.params[name].scale, rtol=1e-5).flatten())
    assert torch.cat(same).float().mean() > 0.98
    assert all(torch.equal(codes, again.codes[name]) for name, codes in first.codes.items())


def test_records_of_a_work_folder_are_continued_from(on_gpu, data, tiny_recipe, tmp_path, monkeypatch) -> None:
    from tqdit.calibration.store import WorkFolder

    whole = record(on_gpu, data, tiny_recipe())
    record(on_gpu, data, tiny_recipe(), store=WorkFolder(tmp_path))
    monkeypatch.setattr(recorder._Pass, "run", lambda *_: pytest.fail("made again"))
    found = record(on_gpu, data, tiny_recipe(), store=WorkFolder(tmp_path))
    for name, linear in whole.linears.items():
        assert torch.equal(linear.fisher, found.linears[name].fisher)
