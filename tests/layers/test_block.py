"""`IntBlock` against a float DiT block whose operands are quantized one by one; and its conditioning."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tqdit.layers.block import IntBlock
from tqdit.layers.conditioning import Conditioning
from tqdit.layers.linear import IntLinear
from tqdit.ops.dispatch import get_backend
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.spec import Grid, Role

HEADS, WIDTH, TOKENS = 2, 16, 9


INTERPRETED = pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on CPUs"))


class Embedder(nn.Module):
    """Stands for diffusers' timestep and class embedder; counts its calls and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, WIDTH)
        self.rows: list[int] = []

    def forward(self, timestep: torch.Tensor, labels: torch.Tensor, hidden_dtype: torch.dtype) -> torch.Tensor:
        self.rows.append(len(timestep))
        return self.table(timestep.long()).to(hidden_dtype) + self.table(labels + 1000)


def norm1() -> nn.Module:
    module = nn.Module()
    module.emb, module.linear = Embedder(), nn.Linear(WIDTH, 6 * WIDTH)
    return module


@pytest.fixture
def parts(site, weight, clock) -> SimpleNamespace:
    """Everything a block is made of, so that a test can compute the block again."""
    shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH)}
    sources = {name: site(Role.INPUT, groups=4) for name in ("qkv", "out", "fc1")}
    sources["fc2"] = site(Role.GELU, groups=4, grid=Grid.MRQ_GELU)
    operands = {role.value: site(role, 4, groups=4, units=HEADS) for role in (Role.QUERY, Role.KEY, Role.VALUE)}
    operands["softmax"] = site(Role.SOFTMAX, 4, groups=4, grid=Grid.MRQ_SOFTMAX)
    norm, conditioning = norm1(), Conditioning()
    conditioning.add(norm.emb, norm.linear)
    return SimpleNamespace(
        weights={name: weight(*shape) for name, shape in shapes.items()},
        biases={name: torch.randn(shape[0]) for name, shape in shapes.items()},
        sources=sources, operands=operands, norm1=norm, clock=clock, conditioning=conditioning,
    )  # fmt: skip


def build(parts: SimpleNamespace, backend: str) -> IntBlock:
    run = get_backend(backend)
    linears = {
        name: IntLinear(parts.sources[name], run.prepare(parts.weights[name], parts.biases[name]))
        for name in parts.weights
    }
    block = IntBlock(linears, parts.operands, HEADS, (1e-6, 1e-5), run, parts.conditioning)
    block.join(0, 0)
    return block


def enter(parts: SimpleNamespace, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> None:
    """What the model's forward does before its blocks run."""
    parts.clock.set(t)
    parts.conditioning.set(t, labels)


def fake(x: torch.Tensor, site) -> torch.Tensor:
    params = site.select()
    return dequantize(quantize(x, params), params)


def by_hand(parts: SimpleNamespace, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A DiT block in float on quantized operands."""

    def linear(name: str, y: torch.Tensor) -> torch.Tensor:
        w = parts.weights[name]
        return F.linear(fake(y, parts.sources[name]), w.codes.float() * w.scale[:, None], parts.biases[name])

    embedded = F.silu(parts.norm1.emb(t.expand(len(x)), labels, torch.float32))
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts.norm1.linear(embedded)[:, None].chunk(6, dim=-1)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    projected = linear("qkv", normal * (1 + scale_1) + shift_1).reshape(len(x), TOKENS, 3, HEADS, -1)
    roles = ("query", "key", "value")
    q, k, v = (fake(projected[:, :, i].transpose(1, 2), parts.operands[role]) for i, role in enumerate(roles))
    p = fake((torch.einsum("bhqd,bhkd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5).softmax(-1), parts.operands["softmax"])
    attended = torch.einsum("bhqk,bhkd->bqhd", p, v).reshape(len(x), TOKENS, WIDTH)
    x = x + gate_1 * linear("out", attended)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = F.gelu(linear("fc1", normal * (1 + scale_2) + shift_2), approximate="tanh")
    return x + gate_2 * linear("fc2", hidden)


@pytest.mark.parametrize("backend", ["reference", "simulated", "cpu", INTERPRETED])
@pytest.mark.parametrize("t", [[999, 0, 260], [431]])
def test_block_is_the_float_block_of_its_codes(parts, backend: str, t: list[int]) -> None:
    x, labels = torch.randn(3, TOKENS, WIDTH), torch.tensor([4, 7, 7])
    enter(parts, x, torch.tensor(t), labels)
    y, expected = build(parts, backend)(x), by_hand(parts, x, torch.tensor(t), labels)
    # Sums in another order may move single codes by one step.
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    assert ((y - expected).abs() < 1e-4 * expected.abs().max()).float().mean() > 0.8


@pytest.mark.parametrize("backend", ["reference", "cpu", INTERPRETED])
def test_mixed_timesteps_equal_each_sample_alone(parts, backend: str) -> None:
    block = build(parts, backend)
    x, t, labels = torch.randn(4, TOKENS, WIDTH), torch.tensor([999, 0, 260, 510]), torch.tensor([1, 2, 2, 3])
    enter(parts, x, t, labels)
    together = block(x)
    for i in range(4):
        enter(parts, x[i : i + 1], t[i : i + 1], labels[i : i + 1])
        assert torch.allclose(block(x[i : i + 1])[0], together[i], atol=1e-5)


def test_the_input_is_left_as_it_was(parts) -> None:
    x = torch.randn(2, TOKENS, WIDTH)
    before = x.clone()
    enter(parts, x, torch.tensor([5]), torch.tensor([1, 2]))
    build(parts, "cpu")(x)
    assert torch.equal(x, before)


def test_conditioning_is_computed_once_for_equal_rows(parts) -> None:
    """Half of a guided batch is the null class at one timestep; blocks share the embedder."""
    x, labels = torch.randn(6, TOKENS, WIDTH), torch.tensor([1, 2, 3, 9, 9, 9])
    enter(parts, x, torch.tensor([5]), labels)
    for _ in range(3):
        modulation = parts.conditioning.modulation(0, 0)
    assert parts.norm1.emb.rows == [4]
    embedded = F.silu(parts.norm1.emb(torch.full((6,), 5), labels, torch.float32))
    assert torch.allclose(torch.cat(modulation, 1), parts.norm1.linear(embedded), atol=1e-6)


def test_conditioning_of_mixed_timesteps(parts) -> None:
    x, t, labels = torch.randn(4, TOKENS, WIDTH), torch.tensor([700, 3, 700, 3]), torch.tensor([8, 1, 8, 2])
    enter(parts, x, t, labels)
    modulation = parts.conditioning.modulation(0, 0)
    assert parts.norm1.emb.rows == [3]
    embedded = F.silu(parts.norm1.emb(t, labels, torch.float32))
    assert torch.allclose(torch.cat(modulation, 1), parts.norm1.linear(embedded), atol=1e-6)


def test_stacked_layers_of_two_blocks_are_told_apart(parts) -> None:
    x, t, labels = torch.randn(3, TOKENS, WIDTH), torch.tensor([5]), torch.tensor([1, 2, 2])
    stacked = nn.Linear(WIDTH, 12 * WIDTH)
    group = parts.conditioning.add(parts.norm1.emb, stacked)
    enter(parts, x, t, labels)
    embedded = parts.norm1.emb(t.expand(3), labels, torch.float32)
    expected = stacked(F.silu(embedded))
    for place in (1, 0):
        modulation = torch.cat(parts.conditioning.modulation(group, place), 1)
        assert torch.allclose(modulation, expected.chunk(2, 1)[place], atol=1e-6)
    assert torch.equal(parts.conditioning.embedding(group), embedded)


def test_the_next_call_forgets_the_last(parts) -> None:
    x = torch.randn(2, TOKENS, WIDTH)
    enter(parts, x, torch.tensor([5]), torch.tensor([1, 2]))
    first = parts.conditioning.modulation(0, 0)[0]
    enter(parts, x, torch.tensor([6]), torch.tensor([1, 2]))
    assert not torch.equal(first, parts.conditioning.modulation(0, 0)[0])
