"""One traced call of a model says what is quantized in it, on what inputs, and what is not, for many classes."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import nn
from toys import BATCH, TOKENS, WIDTH, Toy, borrows, borrows_and_calls, call, fails, looks, plain
from zoo import ZOO

from tqdit.architectures import registry as architectures
from tqdit.architectures.interface import Graph, Linear
from tqdit.architectures.registry import config_of
from tqdit.architectures.traced_graph import (
    EXPERTS,
    NEVER_CALLED,
    POINTWISE,
    READ_ELSEWHERE,
    SEVERAL_NAMES,
    timestep_argument,
    trace,
)
from tqdit.architectures.tracing import watch
from tqdit.artifact.graph_json import from_json, to_json
from tqdit.errors import InputError
from tqdit.spec import Role

QKV = "to_q to_k to_v"
JOINT = {
    "attn.to_q attn.to_k attn.to_v": "modulated norm",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "modulated norm",
    "attn.to_out.0": "attention",
    "attn.to_add_out": "attention",
}
FEED_FORWARD = {"ff.net.0.proj": "modulated norm", "ff.net.2": "GELU tanh"}
CONTEXT = {"ff_context.net.0.proj": "modulated norm", "ff_context.net.2": "GELU tanh"}
SELF = {"attn1.to_q attn1.to_k attn1.to_v": "modulated norm", "attn1.to_out.0": "attention"}
SINGLE = {"proj_mlp attn.to_q attn.to_k attn.to_v": "modulated norm", "proj_out": "cat[attention, GELU tanh]"}
SWIGLU = {"attention.to_q attention.to_k attention.to_v": "modulated norm", "attention.to_out.0": "attention",
          "feed_forward.w1 feed_forward.w3": "modulated norm", "feed_forward.w2": "SwiGLU"}  # fmt: skip

# Of some blocks: all quantized layers by what feeds them, layers that read one tensor together.
FEEDS: dict[tuple[str, str], dict[str, str]] = {
    ("FluxTransformer2DModel", "transformer_blocks.1"): JOINT | FEED_FORWARD | CONTEXT,
    ("FluxTransformer2DModel", "single_transformer_blocks.0"): SINGLE,
    ("Flux2Transformer2DModel", "transformer_blocks.0"): {
        **JOINT,
        "ff.linear_in": "modulated norm",
        "ff.linear_out": "SwiGLU",
        "ff_context.linear_in": "modulated norm",
        "ff_context.linear_out": "SwiGLU",
    },
    ("Flux2Transformer2DModel", "single_transformer_blocks.1"): {
        "attn.to_qkv_mlp_proj": "modulated norm",
        "attn.to_out": "cat[attention, SwiGLU]",
    },
    ("ChromaTransformer2DModel", "single_transformer_blocks.0"): SINGLE,
    ("QwenImageTransformer2DModel", "transformer_blocks.0"): {
        **JOINT,
        "img_mlp.net.0.proj": "modulated norm",
        "img_mlp.net.2": "GELU tanh",
        "txt_mlp.net.0.proj": "modulated norm",
        "txt_mlp.net.2": "GELU tanh",
    },
    ("SD3Transformer2DModel", "transformer_blocks.0"): {
        **JOINT,
        "attn2.to_q attn2.to_k attn2.to_v": "modulated norm",
        "attn2.to_out.0": "attention",
        **FEED_FORWARD,
        **CONTEXT,
    },
    ("PixArtTransformer2DModel", "transformer_blocks.0"): {
        **SELF,
        "attn2.to_q": "stream",
        "attn2.to_out.0": "attention",
        **FEED_FORWARD,
    },
    ("WanTransformer3DModel", "blocks.1"): {
        **SELF,
        "attn2.to_q": "norm",
        "attn2.to_out.0": "attention",
        "ffn.net.0.proj": "modulated norm",
        "ffn.net.2": "GELU tanh",
    },
    ("LTXVideoTransformer3DModel", "transformer_blocks.0"): {
        **SELF,
        "attn2.to_q": "stream",
        "attn2.to_out.0": "attention",
        **FEED_FORWARD,
    },
    ("HunyuanVideoTransformer3DModel", "transformer_blocks.0"): JOINT | FEED_FORWARD | CONTEXT,
    ("HunyuanVideoTransformer3DModel", "single_transformer_blocks.0"): {
        "proj_mlp": "modulated norm",  # of image and text tokens apart, so it is another tensor than that of the next
        "attn.to_q attn.to_k attn.to_v": "modulated norm",
        "proj_out": "cat[attention, GELU tanh]",
    },
    ("HunyuanVideoTransformer3DModel", "context_embedder.token_refiner.refiner_blocks.0"): {
        "ff.net.0.proj": "norm",
        "ff.net.2": "SiLU",
    },
    ("ZImageTransformer2DModel", "layers.0"): SWIGLU,
    ("ZImageTransformer2DModel", "noise_refiner.0"): SWIGLU,
    ("Lumina2Transformer2DModel", "layers.1"): {
        "attn.to_q attn.to_k attn.to_v": "modulated norm",
        "attn.to_out.0": "attention",
        "feed_forward.linear_1 feed_forward.linear_3": "modulated norm",
        "feed_forward.linear_2": "SwiGLU",
    },
    ("SanaTransformer2DModel", "transformer_blocks.0"): {
        "attn1.to_q attn1.to_k attn1.to_v": "modulated norm",
        "attn1.to_out.0": "matmul",
        "attn2.to_q": "stream",
        "attn2.to_out.0": "attention",
    },
    ("AuraFlowTransformer2DModel", "single_transformer_blocks.0"): {
        "attn.to_q attn.to_k attn.to_v": "modulated norm",
        "attn.to_out.0": "attention",
        "ff.linear_1 ff.linear_2": "modulated norm",
        "ff.out_projection": "SwiGLU",
    },
    ("DiTTransformer2DModel", "transformer_blocks.0"): SELF | FEED_FORWARD,
    ("CogVideoXTransformer3DModel", "transformer_blocks.0"): SELF | FEED_FORWARD,
    ("HunyuanDiT2DModel", "blocks.3"): {
        "skip_linear": "norm",
        **SELF,
        "attn2.to_q": "norm",
        "attn2.to_out.0": "attention",
        "ff.net.0.proj": "norm",
        "ff.net.2": "GELU tanh",
    },
    ("Krea2Transformer2DModel", "transformer_blocks.0"): {
        "attn.to_q attn.to_k attn.to_v attn.to_gate": "modulated norm",
        "attn.to_out.0": "gated attention",
        "ff.gate ff.up": "modulated norm",
        "ff.down": "SwiGLU",
    },
}

# Of some classes: layers on float inputs, and layers that stay in float with the reason.
FLOAT_INPUT = {
    "FluxTransformer2DModel": ("x_embedder", "context_embedder", "transformer_blocks.0.norm1.linear", "proj_out"),
    "ChromaTransformer2DModel": ("distilled_guidance_layer.layers.0.linear_1",),  # rows, but of the time alone
    "WanTransformer3DModel": ("blocks.0.attn2.to_k", "blocks.0.attn2.to_v", "condition_embedder.time_proj"),
    "PixArtTransformer2DModel": (
        "transformer_blocks.1.attn2.to_k",
        "caption_projection.linear_1",
        "adaln_single.linear",
    ),
    "ZImageTransformer2DModel": ("context_refiner.0.feed_forward.w2", "t_embedder.mlp.0", "all_x_embedder.2-1"),
}
LEFT = {
    "HunyuanDiT2DModel": {f"time_extra_emb.pooler.{name}_proj": READ_ELSEWHERE for name in ("k", "q", "v", "c")},
    "SanaTransformer2DModel": {
        "patch_embed.proj": POINTWISE,
        **{f"transformer_blocks.{i}.ff.conv_{name}": POINTWISE for i in (0, 1) for name in ("inverted", "point")},
    },
    "NucleusMoEImageTransformer2DModel": {
        f"transformer_blocks.1.img_mlp.experts.{name}_proj": EXPERTS for name in ("gate_up", "down")
    },
}
ENDS = {
    "FluxTransformer2DModel": ("x_embedder", "proj_out"),
    "WanTransformer3DModel": ("proj_out",),  # a convolution reads the sample
    "ZImageTransformer2DModel": ("all_x_embedder.2-1", "all_final_layer.2-1.linear"),
}


@pytest.fixture(scope="module")
def graphs() -> Callable[[str], Graph]:
    made: dict[str, Graph] = {}

    def graph(name: str) -> Graph:
        if name not in made:
            made[name] = trace(ZOO[name].build(), ZOO[name].call(), ZOO[name].timestep)
        return made[name]

    return graph


@pytest.mark.parametrize(("name", "prefix"), FEEDS, ids=[f"{name}-{prefix}" for name, prefix in FEEDS])
def test_blocks_say_what_feeds_their_layers(name: str, prefix: str, graphs: Callable[[str], Graph]) -> None:
    (block,) = (block for block in graphs(name).blocks if block.prefix == prefix)
    assert {
        " ".join(module.removeprefix(f"{prefix}.") for module in linear.modules): linear.source.feed
        for linear in block.linears
    } == FEEDS[name, prefix]


@pytest.mark.parametrize("name", ZOO)
def test_every_class_of_the_zoo_has_a_graph(name: str, graphs: Callable[[str], Graph]) -> None:
    graph, model = graphs(name), ZOO[name].build()
    assert timestep_argument(model) == graph.timestep == ZOO[name].timestep
    assert [*graph.shapes.items()] == [(key, tensor.shape) for key, tensor in model.state_dict().items()]
    quantized = [module for block in graph.blocks for linear in block.linears for module in linear.modules]
    every = [*quantized, *graph.float_input, *graph.left]
    layers = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(set(every)) == len(every)  # each layer once
    assert layers <= {*every}
    for operand, linear in ((linear.source, linear) for block in graph.blocks for linear in block.linears):
        assert operand.name == f"{linear.modules[0]}.input"
        assert operand.timed
        assert (operand.role is Role.GELU) == (operand.feed in ("GELU tanh", "GELU erf"))
    assert from_json(json.loads(json.dumps(to_json(graph))), graph.shapes) == graph


def test_the_trace_of_a_dit_has_the_layers_of_its_architecture() -> None:
    """Attention apart, which stays in float, and the patch embedding, which is a convolution."""
    model = ZOO["DiTTransformer2DModel"].build()
    traced = trace(model, ZOO["DiTTransformer2DModel"].call(), "timestep")
    described = architectures.graph(config_of(model))
    for block, own in zip(traced.blocks, described.blocks, strict=True):
        assert (block.prefix, block.float_input) == (own.prefix, own.float_input)
        assert [linear.modules for linear in block.linears] == [linear.modules for linear in own.linears]
        assert [linear.source.role for linear in block.linears] == [linear.source.role for linear in own.linears]
    assert {*described.outside} - {*traced.outside} == {"pos_embed.proj"}
    assert dict(traced.shapes) == dict(described.shapes)


def test_a_full_size_model_is_traced_on_the_meta_device() -> None:
    """The FLUX.1 of two blocks at full width: default sizes, and no memory for weights or activations."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        arguments = {
            "hidden_states": torch.empty(1, 4096, 64), "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768), "timestep": torch.empty(1), "guidance": torch.empty(1),
            "img_ids": torch.empty(4096, 3), "txt_ids": torch.empty(512, 3),
        }  # fmt: skip
        graph = trace(model, arguments, "timestep")
    assert [len(block.linears) for block in graph.blocks] == [8, 2]
    assert graph.ends == ("x_embedder", "proj_out")


@pytest.mark.parametrize("name", FLOAT_INPUT)
def test_layers_on_float_inputs(name: str, graphs: Callable[[str], Graph]) -> None:
    assert {*FLOAT_INPUT[name]} <= {*graphs(name).float_input}


@pytest.mark.parametrize("name", LEFT)
def test_layers_left_in_float(name: str, graphs: Callable[[str], Graph]) -> None:
    assert graphs(name).left == LEFT[name]


@pytest.mark.parametrize("name", ENDS)
def test_ends(name: str, graphs: Callable[[str], Graph]) -> None:
    assert graphs(name).ends == ENDS[name]


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel"])
def test_graph_is_that_of_the_model_not_of_the_call(name: str, graphs: Callable[[str], Graph]) -> None:
    """Another batch, other values, a call before, bf16, and the mode of inference give the same graph."""
    entry = ZOO[name]
    assert trace(entry.build(1), entry.call(1, batch=3), entry.timestep) == graphs(name)
    with torch.inference_mode():
        assert trace(entry.build(), entry.call(), entry.timestep) == graphs(name)
    called = entry.build()
    called(**entry.call())  # tables that a model makes in its first call are there now
    assert trace(called, entry.call(), entry.timestep) == graphs(name)
    half = _to(entry.call(), torch.bfloat16)
    assert trace(entry.build().to(torch.bfloat16), half, entry.timestep) == graphs(name)


def _to(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _to(inner, dtype) for key, inner in value.items()}
    if isinstance(value, list):
        return [_to(inner, dtype) for inner in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def facts(forward: Callable[..., torch.Tensor], **layers: nn.Module) -> dict[str, Any]:
    """Return the only calls of the block's layers by their names."""
    found = watch(Toy(forward, **layers), call(), "x", "timestep").calls
    return {name.removeprefix("blocks.0."): calls[0] for name, calls in found.items()}


def then(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    """Return a tensor after what else has been written down as an argument."""
    return tensor


def through_an_older_view(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    early = h[:, :3]
    later = h[:, 2:]
    early.add_(x[:, :3])
    return later


# How x comes into a tensor h of zeros.
WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add_": lambda h, x: h.add_(x),
    "setitem": lambda h, x: then(h, h.__setitem__((slice(None), slice(2)), x[:, :2])),
    "copy_ to a view": lambda h, x: then(h, h[:, :2].copy_(x[:, :2])),
    "out": lambda h, x: then(h, torch.add(x, 1, out=h)),
    "index_copy_": lambda h, x: h.index_copy_(1, torch.arange(2), x[:, :2]),
    "an older view": through_an_older_view,
    "cat": lambda h, x: torch.cat([h, x], 1),
    "stack": lambda h, x: torch.stack([h, x]).sum(0),
    "split": lambda h, x: h + torch.cat(x.split(4, -1)[::-1], -1),
    "where": lambda h, x: torch.where(h > 0, h, x),
    "einsum": lambda h, x: torch.einsum("bnc,bnd->bnd", h, x),
    "index": lambda h, x: x[:, torch.arange(TOKENS)],
    "operator": torch.ops.aten.add.Tensor,
    "unpacked": lambda h, x: torch.stack([*x]),
    "as the index": lambda h, x: h[:, x.long().clamp(0, TOKENS - 1)[0, :, 0]],
}


@pytest.mark.parametrize("way", WAYS)
def test_dependence_follows_values(way: str) -> None:
    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return block.a(WAYS[way](torch.zeros(BATCH, TOKENS, WIDTH), x)).sum() + block.b(prompt).sum()

    found = facts(forward)
    assert found["a"].depends == {"x"}
    assert found["b"].depends == {"prompt"}


def test_dependence_of_constants_and_of_several_inputs() -> None:
    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        block.c(torch.randn_like(x) + x.new_ones(1) + torch.zeros(x.shape).type_as(x))
        return block.a(F.softmax(x @ prompt.mT, -1) @ prompt) + block.b(prompt * (1 + t))

    found = facts(forward, c=nn.Linear(WIDTH, WIDTH))
    assert found["c"].depends == frozenset()
    assert found["a"].depends == {"x", "prompt"}
    assert found["b"].depends == {"t", "prompt"}
    assert found["time"].depends == {"t"}


SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda h: h,
    "view": lambda h: h.view(1, BATCH * TOKENS, WIDTH),
    "reshape": lambda h: h.reshape(-1, WIDTH),
    "contiguous": lambda h: h.contiguous(),
    "cast to its own dtype": lambda h: h.to(torch.float32),
    "clone": lambda h: h.clone(),
    "dropout of nothing": lambda h: F.dropout(h, 0.0, training=True),
    "dropout when evaluated": lambda h: F.dropout(h, 0.5, training=False),
    "a new axis": lambda h: h[None],
}
OTHER: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "other rows": lambda h: h[:, 1:],
    "other order of rows": lambda h: h.flip(1),
    "other order of axes": lambda h: h.transpose(0, 1),
    "rows mixed": lambda h: h.transpose(1, 2).reshape(BATCH, TOKENS, WIDTH),
    "other values": lambda h: h * 1,
    "rounded": lambda h: h.bfloat16().float(),
    "dropped out": lambda h: F.dropout(h, 0.5, training=True),
    "written to": lambda h: h.mul_(2),
    "written to by a view": lambda h: then(h, h[:, 0].mul_(2)),
}


@pytest.mark.parametrize("how", [*SAME, *OTHER])
def test_layers_that_read_one_tensor_share_an_operand(how: str) -> None:
    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        h = x + t
        return block.a(h).sum() + block.b((SAME | OTHER)[how](h)).sum()

    (block,) = trace(Toy(forward), call(), "timestep").blocks
    modules = [linear.modules for linear in block.linears]
    both = ("blocks.0.a", "blocks.0.b")
    assert modules == ([both] if how in SAME else [both[:1], both[1:]])


def test_a_layer_called_on_several_tensors_has_an_operand_of_its_own() -> None:
    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        y, h = F.layer_norm(x, (WIDTH,)) + t, F.gelu(x)
        return block.a(y) + block.a(h) + block.b(y) + block.b(h)

    (block,) = trace(Toy(forward), call(), "timestep").blocks
    assert [(linear.modules, linear.source.feed, linear.source.role) for linear in block.linears] == [
        (("blocks.0.a",), "modulated norm or GELU erf", Role.INPUT),
        (("blocks.0.b",), "modulated norm or GELU erf", Role.INPUT),
    ]


def rms(h: torch.Tensor) -> torch.Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


WORDS: dict[str, Callable[..., torch.Tensor]] = {
    "norm": lambda x, t, p: rms(x.float()).to(x.dtype) * p[0, 0].detach().new_ones(WIDTH),
    "modulated norm": lambda x, t, p: torch.addcmul(t, rms(x), 1 + t),
    "GELU erf": lambda x, t, p: F.gelu(x),
    "SwiGLU": lambda x, t, p: x * F.silu(x + 1),
    "GEGLU": lambda x, t, p: F.gelu(x + 1, approximate="tanh") * x,
    "gated pair": lambda x, t, p: x * torch.tanh(x),
    "gated attention": lambda x, t, p: F.scaled_dot_product_attention(x, x, x) * torch.sigmoid(x),
    "attention": lambda x, t, p: torch.bmm(torch.softmax(x @ p.mT, -1), p)[:, :, :],
    "argument": lambda x, t, p: x[..., :1] + torch.zeros(WIDTH),
    "stream": lambda x, t, p: x + t * F.scaled_dot_product_attention(x, x, x),
    "cat[norm, SiLU]": lambda x, t, p: torch.cat([rms(x), F.silu(x)], -1)[..., :WIDTH],
}


@pytest.mark.parametrize("word", WORDS)
def test_words(word: str) -> None:
    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return block.a(WORDS[word](x, t, prompt))

    assert facts(forward)["a"].word == word


def test_what_no_function_is_seen_of_has_a_float_input() -> None:
    """A value by way of numpy or vmap looks like a constant, and the call goes through."""

    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        rows = torch.vmap(lambda row: row * 2)(x)
        return block.a(x) + block.b(torch.from_numpy(x.numpy() * 2)) + block.c(rows)

    (block,) = trace(Toy(forward, c=nn.Linear(WIDTH, WIDTH)), call(), "timestep").blocks
    assert [linear.modules for linear in block.linears] == [("blocks.0.a",)]
    assert block.float_input == ("blocks.0.b", "blocks.0.c")


def test_weights_that_other_code_reads_stay_in_float() -> None:
    assert trace(Toy(borrows), call(), "timestep").left == {"blocks.0.b": READ_ELSEWHERE}
    assert trace(Toy(borrows_and_calls), call(), "timestep").left == {"blocks.0.b": READ_ELSEWHERE}
    assert trace(Toy(looks), call(), "timestep").left == {}


def test_what_is_no_plain_linear_layer_stays_in_float() -> None:
    class Rounded(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x.round(), self.weight)

    adapted = nn.Module()
    adapted.base_layer, adapted.lora_A = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)

    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return block.a(x) + block.b(x) + block.c.base_layer(x) + block.c.lora_A(x).sum()

    class Packed(torch.Tensor):
        """Stands for the tensors that other libraries put in the place of weights."""

    packed = nn.Linear(WIDTH, WIDTH)
    packed.weight = nn.Parameter(packed.weight.data.as_subclass(Packed), requires_grad=False)
    assert trace(Toy(plain, b=packed), call(), "timestep").left == {
        "blocks.0.b": "its weight is a Packed of torch.float32, which is no plain float weight"
    }
    adapter = "part of an adapter: fuse or unload adapters before quantizing"
    assert trace(Toy(forward, b=Rounded(WIDTH, WIDTH), c=adapted), call(), "timestep").left == {
        "blocks.0.b": "a Rounded, which is no plain linear layer",
        "blocks.0.c.base_layer": adapter,
        "blocks.0.c.lora_A": adapter,
    }


def test_a_layer_that_is_not_called_stays_in_float() -> None:
    model = Toy(lambda block, x, t, prompt: block.a(x))
    assert trace(model, call(), "timestep").left == {"blocks.0.b": NEVER_CALLED}


def test_a_layer_of_several_names_stays_in_float() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    model = Toy(lambda block, x, t, prompt: block.a(x) + block.b(x) + block.c(x), b=layer, c=layer)
    assert trace(model, call(), "timestep").left == {"blocks.0.b": SEVERAL_NAMES}


def test_small_layers_have_a_float_input() -> None:
    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        return block.b(block.a(x)) + block.c(x)

    model = Toy(forward, a=nn.Linear(WIDTH, 4), b=nn.Linear(4, WIDTH), c=nn.Linear(WIDTH, WIDTH))

    def quantized(smallest: int | None) -> list[str]:
        (block,) = trace(model, call(), "timestep", smallest).blocks
        return [module for linear in block.linears for module in linear.modules]

    assert quantized(5) == ["blocks.0.c"]
    assert quantized(None) == ["blocks.0.a", "blocks.0.c", "blocks.0.b"]  # 4, half of what most layers read


def test_a_number_as_the_time_leaves_the_same_trace() -> None:
    model = Toy(lambda block, x, t, prompt: block.a(x + t) + block.b(prompt + t))
    assert trace(model, {**call(), "timestep": 0.5}, "timestep") == trace(model, call(), "timestep")


@pytest.mark.parametrize("forward", [plain, fails])
def test_the_model_is_left_as_it_was(forward: Callable[..., torch.Tensor]) -> None:
    model = Toy(forward).train()
    before, arguments = copy.deepcopy(model.state_dict()), call()
    given = {name: value.clone() for name, value in arguments.items()}
    if forward is fails:
        with pytest.raises(InputError, match="the Toy fails on the first recorded call: RuntimeError: out of cheese"):
            trace(model, arguments, "timestep")
    else:
        trace(model, arguments, "timestep")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(given[name], value) for name, value in arguments.items())
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_no_tensor_is_held() -> None:
    gone: list[bool] = []

    def forward(block: Any, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        h = F.gelu(x)
        y, alive = block.a(h), weakref.ref(h)
        del h
        gc.collect()
        gone.append(alive() is None)
        return y

    trace(Toy(forward), call(), "timestep")
    assert gone == [True]


def test_compiled_blocks_are_traced() -> None:
    model = Toy(plain, c=nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)))
    model._forward = lambda block, x, t, prompt: block.c(x)
    expected = trace(model, call(), "timestep")
    model.blocks[0].c.compile(backend="eager")
    assert trace(model, call(), "timestep") == expected
    assert [linear.source.feed for linear in expected.blocks[0].linears] == ["argument", "GELU erf"]


class Untimed(nn.Module):
    """A model without a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"the forward of Untimed has no argument 'timestep' or 'timesteps' or 't'"):
        timestep_argument(Untimed())
    with pytest.raises(InputError, match="a call of Toy to trace has no argument 'sigma'"):
        trace(Toy(plain), call(), "sigma")
    with pytest.raises(InputError, match="a call of Toy to trace has no argument 'x'"):
        trace(Toy(plain), {"timestep": torch.ones(1)}, "timestep")
    with pytest.raises(InputError, match="the argument 'x' of Toy holds no tensor"):
        trace(Toy(plain), {**call(), "x": []}, "timestep")
    with pytest.raises(InputError, match=r"layer 'time' reads torch\.float64"):
        trace(Toy(plain).double(), call(torch.float64), "timestep")
    with pytest.raises(InputError, match=r"layer 'blocks\.0\.a' reads torch\.complex64"):
        trace(Toy(lambda block, x, t, prompt: block.a(torch.complex(x, x))), call(), "timestep")
    with pytest.raises(InputError, match="Toy has no linear layer in repeated blocks that can be quantized"):
        trace(Toy(lambda block, x, t, prompt: block.a(prompt)), call(), "timestep")


def changed(change: Callable[[dict[str, Any]], Any]) -> Any:
    value = json.loads(json.dumps(to_json(trace(Toy(plain), call(), "timestep"))))
    return change(value) or value


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "'graph.timestep' is wrong": lambda value: value.pop("timestep") and None,
    "'graph.more' is wrong": lambda value: value.update(more=1),
    "'graph.blocks' is wrong": lambda value: value.update(blocks=[]),
    "'graph.outside.0' is wrong": lambda value: value.update(outside=[1]),
    "'graph.blocks.0.matmuls.0.source.role' is wrong": lambda value: source(value).update(role="weight"),
    "'graph.blocks.0.matmuls.0.source.timed' is wrong": lambda value: source(value).update(timed=1),
    "'graph.blocks.0.matmuls.0.source.units' is wrong": lambda value: source(value).update(units=0),
    "'graph.blocks.0.matmuls.0.modules' is wrong": lambda value: value["blocks"][0]["matmuls"][0].update(modules=[]),
    "'graph.left.time' is wrong": lambda value: value.update(left={"time": 3}),
    "'graph' has the layer 'time' twice": lambda value: value.update(left={"time": "never called"}),
    "'graph' has the layer 'gone', which": lambda value: value.update(outside=["gone"]),
    "'graph' has the layer 'time' in block 'blocks.0'": lambda value: (
        value.update(outside=[], ends=[]) or value["blocks"][0].update(float_input=["time"])
    ),
    "'graph' has the block 'blocks.0' twice": lambda value: value["blocks"].append(
        {**value["blocks"][0], "matmuls": []}
    ),
    "'graph' has the site 'blocks.0.a.weight' twice": lambda value: source(value).update(name="blocks.0.a.weight"),
    "'graph.ends' has 'blocks.0.a', which": lambda value: value.update(ends=["blocks.0.a"]),
    "'graph.left' has 'gone', which": lambda value: value.update(left={"gone": "never called"}),
}


def source(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = value["blocks"][0]["matmuls"][0]["source"]
    return found


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_graph_is_refused_by_the_name_of_its_entry(message: str) -> None:
    with pytest.raises(InputError) as caught:
        from_json(changed(WRONG[message]), dict.fromkeys(SHAPES) | SHAPES)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "graph", 3])
def test_what_is_no_graph_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="'graph' is wrong"):
        from_json(value, SHAPES)


SHAPES = {name: parameter.shape for name, parameter in Toy(plain).named_parameters()}


def test_shapes_must_fit_a_stored_graph() -> None:
    value = to_json(trace(Toy(plain), call(), "timestep"))
    with pytest.raises(InputError, match=r"the layer 'blocks\.0\.b', whose weight has 3 axes"):
        from_json(value, SHAPES | {"blocks.0.b.weight": torch.Size((1, WIDTH, WIDTH))})
    with pytest.raises(InputError, match=r"layers of different inputs on the operand 'blocks\.0\.a\.input'"):
        from_json(value, SHAPES | {"blocks.0.b.weight": torch.Size((WIDTH, 2 * WIDTH))})


def test_a_graph_that_was_not_traced_is_not_stored() -> None:
    graph = trace(Toy(plain), call(), "timestep")
    with pytest.raises(InputError, match="only the graph of a traced model can be stored"):
        to_json(Graph(graph.blocks, graph.outside, graph.shapes))
    assert all(isinstance(matmul, Linear) for matmul in graph.blocks[0].matmuls)
