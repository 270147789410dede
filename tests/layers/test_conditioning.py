"""The modulation of all blocks: computed for the distinct inputs of a batch, told apart by block."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tqdit.layers.conditioning import FEW, Conditioning, Modulation, TimestepTable

WIDTH = 16


class Embedder(nn.Module):
    """Stands for diffusers' timestep and class embedder; counts the rows of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, WIDTH)
        self.rows: list[int] = []

    def forward(self, timestep: torch.Tensor, labels: torch.Tensor, hidden_dtype: torch.dtype) -> torch.Tensor:
        self.rows.append(len(timestep))
        return self.table(timestep.long()).to(hidden_dtype) + self.table(labels + 1000)


@pytest.fixture
def norm() -> SimpleNamespace:
    """A conditioning with one group of one block, and the modules that it has."""
    embedder, linear, conditioning = Embedder(), nn.Linear(WIDTH, 6 * WIDTH), Conditioning()
    conditioning.add(embedder, linear)
    return SimpleNamespace(embedder=embedder, linear=linear, conditioning=conditioning)


def expected(norm: SimpleNamespace, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return norm.linear(F.silu(norm.embedder(t.expand(len(labels)), labels, torch.float32)))


def test_conditioning_is_computed_once_for_equal_rows(norm) -> None:
    """Half of a guided batch is the null class at one timestep; blocks share the embedder."""
    t, labels = torch.tensor([5]), torch.tensor([1, 2, 3, 9, 9, 9])
    modulation = norm.conditioning(t, labels)
    for _ in range(3):
        parts = modulation.block(0, 0)
    assert norm.embedder.rows == [4]
    assert [part.shape for part in parts] == [(6, WIDTH)] * 6
    assert torch.allclose(torch.cat(parts, 1), expected(norm, t, labels), atol=1e-6)


def test_conditioning_of_mixed_timesteps(norm) -> None:
    t, labels = torch.tensor([700, 3, 700, 3]), torch.tensor([8, 1, 8, 2])
    modulation = norm.conditioning(t, labels)
    assert norm.embedder.rows == [3]
    assert torch.allclose(torch.cat(modulation.block(0, 0), 1), expected(norm, t, labels), atol=1e-6)
    assert torch.allclose(modulation.activated(), F.silu(norm.embedder(t, labels, torch.float32)), atol=1e-6)


@pytest.mark.parametrize("samples", [7, 8, 9, 33])
def test_modulation_of_many_samples_is_copied_by_one_thread(samples: int) -> None:
    """torch begins threads for operations on more numbers than 4 rows have. The last piece has 1, 3 or 4 rows."""
    make, sizes = torch.Generator().manual_seed(1), []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **kwargs or {})
            if func.overloadpacket.__name__ in ("index_select", "copy_"):
                sizes.append(out.numel())
            return out

    rows = torch.randint(5, (samples,), generator=make)
    stacked = torch.randn(5, 2 * 7200, generator=make)
    modulation = Modulation(rows, (torch.zeros(5, 1200),), (stacked,))
    with Noted():
        found = torch.cat(modulation.block(0, 1), dim=1)
    assert torch.equal(found, stacked[rows, 7200:])
    assert 7200 <= max(sizes) <= FEW
    assert sum(sizes) == 2 * samples * 7200


def test_stacked_layers_of_two_blocks_are_told_apart(norm) -> None:
    """Two blocks of one group, in a conditioning with another group before it that has another embedder."""
    t, labels = torch.tensor([5]), torch.tensor([1, 2, 2])
    embedder, stacked = Embedder(), nn.Linear(WIDTH, 12 * WIDTH)
    group = norm.conditioning.add(embedder, stacked)
    modulation = norm.conditioning(t, labels)
    embedded = embedder(t.expand(3), labels, torch.float32)
    whole = stacked(F.silu(embedded))
    for place in (1, 0):
        assert torch.allclose(torch.cat(modulation.block(group, place), 1), whole.chunk(2, 1)[place], atol=1e-6)
    assert torch.allclose(torch.cat(modulation.block(0, 0), 1), expected(norm, t, labels), atol=1e-6)
    assert torch.equal(modulation.activated(), F.silu(norm.embedder(t.expand(3), labels, torch.float32))), "first group"


def test_calls_do_not_share_anything(norm) -> None:
    """The modulation of a call stays what it was when another call begins."""
    labels = torch.tensor([1, 2])
    first = norm.conditioning(torch.tensor([5]), labels)
    before = first.block(0, 0)[0].clone()
    second = norm.conditioning(torch.tensor([6]), labels)
    assert torch.equal(first.block(0, 0)[0], before)
    assert not torch.equal(second.block(0, 0)[0], before)


def test_compiled_conditioning_keeps_every_row(norm) -> None:
    """No value is read there, so equal rows are not sought."""
    t, labels = torch.tensor([5, 5, 7]), torch.tensor([1, 1, 3])
    compiled = torch.compile(norm.conditioning, fullgraph=True, backend="eager")
    modulation = compiled(t, labels)
    assert modulation.rows is None
    assert len(modulation.embedded[0]) == 3
    assert torch.allclose(torch.cat(modulation.block(0, 0), 1), expected(norm, t, labels), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_whole_timesteps_are_looked_up_and_others_computed(dtype: torch.dtype) -> None:
    class Sinusoids(nn.Module):
        calls = 0

        def forward(self, timestep: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.sin(timestep.float())[:, None] * torch.ones(4)

    projection = Sinusoids()
    table = TimestepTable(projection, 10)
    t = torch.tensor([0, 9, 4]).to(dtype)
    assert torch.equal(table(t), torch.sin(t.float())[:, None].expand(3, 4))
    assert projection.calls == (2 if dtype.is_floating_point else 1)
    assert not table.state_dict()
