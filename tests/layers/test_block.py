"""The steps of `IntBlock` against a float block whose operands are quantized one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tqdit.layers.block import IntBlock
from tqdit.layers.call import Call
from tqdit.layers.linear import IntLinear
from tqdit.ops.dispatch import get_backend
from tqdit.ops.quantizer import dequantize, quantize
from tqdit.ops.schema import Norm, OperandParams
from tqdit.spec import Grid, Role

HEADS, WIDTH, TOKENS, CONTEXT, DEPTH = 2, 16, 9, 7, 12
SHAPES = {
    "qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "cross_q": (WIDTH, WIDTH), "cross_kv": (2 * WIDTH, DEPTH),
    "cross_out": (WIDTH, WIDTH), "fc1": (4 * WIDTH, WIDTH), "fc2": (WIDTH, 4 * WIDTH),
}  # fmt: skip
UNTIMED = ("cross_kv", "cross_key", "cross_value")  # what depends on a prompt alone has one time group
EPS = (1e-6, 1e-5)

INTERPRETED = pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on CPUs"))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1, 0]])


@dataclass(frozen=True)
class BlockCall(Call):
    """`modulation`: shift, scale, gate twice, each (B, C); `context` and `bias`: of the cross-attention, if any."""

    modulation: tuple[torch.Tensor, ...]
    context: Any = None
    bias: torch.Tensor | None = None


class Block(IntBlock):
    """A block of all steps; without a context it is DiT's."""

    def run(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = call.modulation
        x = self.self_attention(x, Norm(shift_1, scale_1, EPS[0]), gate_1, call)
        if call.context is not None:
            x = self.cross_attention(x, call.context, call.bias, call)
        return self.feed_forward(x, Norm(shift_2, scale_2, EPS[1]), gate_2, call)


@pytest.fixture
def parts(site, weight) -> SimpleNamespace:
    """Everything a block is made of, so that a test can compute the block again."""
    sources = {name: site(Role.INPUT, groups=1 if name in UNTIMED else 4) for name in SHAPES}
    sources["fc2"] = site(Role.GELU, groups=4, grid=Grid.MRQ_GELU)
    operands = {}
    for prefix in ("", "cross_"):
        for role in (Role.QUERY, Role.KEY, Role.VALUE):
            name = prefix + role.value
            operands[name] = site(role, groups=1 if name in UNTIMED else 4, units=HEADS)
        operands[f"{prefix}softmax"] = site(Role.SOFTMAX, groups=4, grid=Grid.MRQ_SOFTMAX)
    return SimpleNamespace(
        weights={name: weight(*shape) for name, shape in SHAPES.items()},
        biases={name: torch.randn(shape[0]) for name, shape in SHAPES.items()},
        sources=sources,
        operands=operands,
    )


def build(parts: SimpleNamespace, backend: str) -> Block:
    run = get_backend(backend)
    linears = {
        name: IntLinear(parts.sources[name], run.prepare(parts.weights[name], parts.biases[name])) for name in SHAPES
    }
    return Block(linears, parts.operands, HEADS, run)


@pytest.fixture
def begin(call) -> Callable[..., BlockCall]:
    """The call of a block: its modulation depends on the timestep and on the sample's label."""

    def make(t: list[int], labels: list[int], context: Any = None, bias: torch.Tensor | None = None) -> BlockCall:
        rows = torch.randn(2000, 6 * WIDTH, generator=torch.Generator().manual_seed(7))
        modulation = rows[torch.tensor(t).expand(len(labels))] + rows[torch.tensor(labels) + 1000]
        shared = call(t)
        return BlockCall(shared.group, shared.shared, modulation.chunk(6, dim=1), context, bias)

    return make


def fake(x: torch.Tensor, params: OperandParams) -> torch.Tensor:
    return dequantize(quantize(x, params), params)


class ByHand:
    """The block in float on quantized operands. `added`: what adapters add to a layer, by its name."""

    def __init__(self, parts: SimpleNamespace, call: BlockCall, added: dict[str, Any] | None = None) -> None:
        self.parts, self.call, self.added = parts, call, added or {}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        w, x = self.parts.weights[name], fake(x, self.parts.sources[name].operand(self.call))
        y = F.linear(x, w.codes.float() * w.scale[:, None], self.parts.biases[name])
        return y + self.added[name](x) if name in self.added else y

    def heads(self, x: torch.Tensor, *names: str) -> list[torch.Tensor]:
        split = x.reshape(len(x), -1, len(names), HEADS, WIDTH // HEADS)
        operands = (self.parts.operands[name].operand(self.call) for name in names)
        return [fake(split[:, :, i].transpose(1, 2), operand) for i, operand in enumerate(operands)]

    def attended(self, q, k, v, softmax: str, bias: torch.Tensor | None = None) -> torch.Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
        if bias is not None:
            scores = scores + bias[:, None, None]
        p = fake(scores.softmax(-1), self.parts.operands[softmax].operand(self.call))
        return torch.einsum("bhqk,bhkd->bqhd", p, v).flatten(2)

    def __call__(self, x: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (part[:, None] for part in self.call.modulation)
        normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS[0]).sqrt()
        q, k, v = self.heads(self.linear("qkv", normal * (1 + scale_1) + shift_1), "query", "key", "value")
        x = x + gate_1 * self.linear("out", self.attended(q, k, v, "softmax"))
        if states is not None:
            (q,) = self.heads(self.linear("cross_q", x), "cross_query")
            k, v = self.heads(self.linear("cross_kv", states), "cross_key", "cross_value")
            x = x + self.linear("cross_out", self.attended(q, k, v, "cross_softmax", self.call.bias))
        normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS[1]).sqrt()
        hidden = F.gelu(self.linear("fc1", normal * (1 + scale_2) + shift_2), approximate="tanh")
        return x + gate_2 * self.linear("fc2", hidden)


def assert_equal_but_for_codes(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order may move single codes by one step."""
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    assert ((y - expected).abs() < 1e-4 * expected.abs().max()).float().mean() > 0.8


@pytest.mark.parametrize("backend", ["reference", "simulated", "cpu", INTERPRETED])
@pytest.mark.parametrize("t", [[999, 0, 260], [431]])
def test_block_is_the_float_block_of_its_codes(parts, begin, backend: str, t: list[int]) -> None:
    x, call = torch.randn(3, TOKENS, WIDTH), begin(t, [4, 7, 7])
    assert_equal_but_for_codes(build(parts, backend)(x, call), ByHand(parts, call)(x))


@pytest.mark.parametrize("backend", ["reference", "simulated", "cpu", INTERPRETED])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("t", [[999, 0, 260], [431]])
def test_block_with_a_cross_attention(parts, begin, backend: str, masked: bool, t: list[int]) -> None:
    block, x, states = build(parts, backend), torch.randn(3, TOKENS, WIDTH), torch.randn(3, CONTEXT, DEPTH)
    bias = (1 - MASK.float()) * -10000 if masked else None
    call = begin(t, [4, 7, 7], block.context(states, begin(t, [4, 7, 7])), bias)
    expected = ByHand(parts, call)(x, states)
    assert_equal_but_for_codes(block(x, call), expected)
    without = ByHand(parts, call)(x)
    assert (without - expected).abs().max() > 0.1 * expected.abs().max(), "the context would not show an error"


@pytest.mark.parametrize("backend", ["reference", "cpu", INTERPRETED])
@pytest.mark.parametrize("crossed", [True, False])
def test_mixed_timesteps_equal_each_sample_alone(parts, begin, backend: str, crossed: bool) -> None:
    block = build(parts, backend)
    x, t, labels = torch.randn(4, TOKENS, WIDTH), [999, 0, 260, 510], [1, 2, 2, 3]
    states, bias = torch.randn(4, CONTEXT, DEPTH), torch.randn(4, CONTEXT)

    def run(part: slice) -> torch.Tensor:
        call = begin(t[part], labels[part])
        if crossed:
            call = begin(t[part], labels[part], block.context(states[part], call), bias[part])
        return block(x[part], call)

    together = run(slice(0, 4))
    for i in range(4):
        assert torch.allclose(run(slice(i, i + 1))[0], together[i], atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", INTERPRETED])
def test_a_context_is_made_for_all_timesteps(parts, begin, backend: str) -> None:
    """Its tensors can be copied elsewhere and given back."""
    block, x, states = build(parts, backend), torch.randn(2, TOKENS, WIDTH), torch.randn(2, CONTEXT, DEPTH)
    first, second = (block.context(states, begin([t], [1, 2])) for t in (5, 900))
    copied = pytree.tree_map_only(torch.Tensor, torch.clone, first)
    expected = block(x, begin([900], [1, 2], second))
    for context in (first, copied):
        assert torch.equal(block(x, begin([900], [1, 2], context)), expected)
    before, after = (pytree.tree_leaves(context) for context in (copied, first))
    assert any(isinstance(leaf, torch.Tensor) for leaf in after)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, "a call changed the context"


@pytest.mark.parametrize("backend", ["reference", "cpu", INTERPRETED])
@pytest.mark.parametrize("crossed", [True, False])
def test_the_input_is_left_as_it_was(parts, begin, backend: str, crossed: bool) -> None:
    block, x, states = build(parts, backend), torch.randn(2, TOKENS, WIDTH), torch.randn(2, CONTEXT, DEPTH)
    before = x.clone(), states.clone()
    call = begin([5], [1, 2])
    block(x, begin([5], [1, 2], block.context(states, call)) if crossed else call)
    assert torch.equal(x, before[0])
    assert torch.equal(states, before[1])


@pytest.mark.parametrize("backend", ["reference", "cpu", INTERPRETED])
def test_a_stream_of_bf16_stays_bf16(parts, begin, backend: str) -> None:
    """And differs from one of fp32 by its roundings alone: three additions of 8 bits, and codes that they move."""
    block, x, states = build(parts, backend), torch.randn(2, TOKENS, WIDTH).bfloat16(), torch.randn(2, CONTEXT, DEPTH)
    call = begin([5], [1, 2], block.context(states, begin([5], [1, 2])))
    y, wide = block(x, call), block(x.float(), call)
    assert y.dtype is torch.bfloat16
    assert wide.dtype is torch.float32
    assert (y.float() - wide).abs().max() < 0.05 * wide.abs().max()


def test_adapters_add_to_the_layers_of_a_cross_attention(parts, begin) -> None:
    """Of "cross_kv" one has a place for each of its layers; key and value of a context then have it in them."""
    peft = pytest.importorskip("peft")
    names = {"qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"], "out": ["attn1.to_out.0"], "fc1": ["ff.net.0.proj"],
             "cross_q": ["attn2.to_q"], "cross_kv": ["attn2.to_k", "attn2.to_v"], "cross_out": ["attn2.to_out.0"],
             "fc2": ["ff.net.2"]}  # fmt: skip
    shapes = {}
    for layer, modules in names.items():
        outputs, width = SHAPES[layer]
        shapes |= dict.fromkeys(modules, torch.Size((outputs // len(modules), width)))
    block, x, states = build(parts, "cpu"), torch.randn(3, TOKENS, WIDTH), torch.randn(3, CONTEXT, DEPTH)
    block.add_slots(names, shapes)
    assert not block.adapted
    attention: Any = block.attn2
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["attn2.to_q", "attn2.to_v"])
    peft.inject_adapter_in_model(config, block, "a")
    for name in ("to_q", "to_v"):
        torch.nn.init.normal_(getattr(attention, name).lora_B["a"].weight, std=0.2)
    assert block.adapted

    def added(name: str, width: int, first: int) -> Callable[[torch.Tensor], torch.Tensor]:
        module = getattr(attention, name)
        up, down = module.lora_B["a"].weight, module.lora_A["a"].weight
        return lambda x: F.pad(F.linear(F.linear(x, down), up) * 4, (first, width - first - WIDTH))

    with torch.no_grad():
        call = begin([999, 0, 260], [4, 7, 7], block.context(states, begin([999, 0, 260], [4, 7, 7])))
        y = block(x, call)
    layers = {"cross_q": added("to_q", WIDTH, 0), "cross_kv": added("to_v", 2 * WIDTH, WIDTH)}
    expected, plain = ByHand(parts, call, layers)(x, states), ByHand(parts, call)(x, states)
    assert_equal_but_for_codes(y, expected)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max(), "the adapters would not show an error"
