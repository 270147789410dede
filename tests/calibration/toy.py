"""A float model with self-attention and masked cross-attention that no architecture of the package has."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import nn

from tqdit.architectures.interface import Architecture, Attention, Block, Graph, Linear, Operand
from tqdit.sampling.guidance import ClassLabels
from tqdit.spec import Role
from tqdit.timegroups import TimeGroups

CONTEXT, HEADS, DIM = 5, 2, 4
WIDTH = HEADS * DIM
KEPT = (3, 5, 1)  # tokens of the context that count, of class 0, 1 and the null class


class ToyTransformer(nn.Module):
    """Pixels are tokens; a class is a context of 5 tokens, of which some are masked and large."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"_class_name": "ToyTransformer", "num_embeds_ada_norm": 2, "in_channels": 1, "out_channels": 1}
        self.patch = nn.Linear(1, WIDTH)
        self.table = nn.Embedding(3, CONTEXT * 6)
        self.self_attention = DiffusersAttention(WIDTH, heads=HEADS, dim_head=DIM, bias=True)
        self.cross = DiffusersAttention(WIDTH, cross_attention_dim=6, heads=HEADS, dim_head=DIM, bias=True)
        self.last = nn.Linear(WIDTH, 1)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        context = self.table(class_labels).unflatten(-1, (CONTEXT, 6))
        keep = torch.arange(CONTEXT) < torch.tensor(KEPT)[class_labels][:, None]
        context = torch.where(keep[..., None], context, 100.0)  # what is masked must not spoil a range
        stream = self.patch(x.flatten(1)[..., None]) * (1 + timestep[:, None, None] / 1000)
        stream = stream + self.self_attention(stream)
        mask = (1 - keep.float())[:, None] * -10000.0
        stream = stream + self.cross(stream, encoder_hidden_states=context, attention_mask=mask)
        return (self.last(stream)[..., 0].reshape(x.shape),)


class Toy(Architecture):
    """Its graph: one block of a self-attention and a cross-attention."""

    name = "ToyTransformer"

    def check(self, config: Any) -> None:
        assert config["_class_name"] == self.name

    def graph(self, config: Any) -> Graph:
        inner, cross = _attention("self_attention", timed=True), _attention("cross", timed=False)
        matmuls = (
            Linear(Operand("self.input", Role.INPUT), tuple(f"self_attention.to_{part}" for part in "qkv")),
            inner,
            Linear(Operand("self.out", Role.INPUT), ("self_attention.to_out.0",)),
            Linear(Operand("cross.input", Role.INPUT), ("cross.to_q",)),
            Linear(Operand("cross.context", Role.INPUT, timed=False), ("cross.to_k", "cross.to_v")),
            cross,
            Linear(Operand("cross.out", Role.INPUT), ("cross.to_out.0",)),
        )
        shapes = {name: parameter.shape for name, parameter in ToyTransformer().named_parameters()}
        return Graph((Block("", matmuls),), ("patch", "last"), shapes)

    def tokens(self, config: Any) -> int:
        return 16

    def context_tokens(self, condition: Any) -> int:
        return CONTEXT


def _attention(module: str, timed: bool) -> Attention:
    query = Operand(f"{module}.query", Role.QUERY, HEADS)
    key, value = (Operand(f"{module}.{role}", role, HEADS, timed) for role in (Role.KEY, Role.VALUE))
    return Attention(
        module, query, key, value, Operand(f"{module}.softmax", Role.SOFTMAX), HEADS, DIM, context=not timed
    )


TOY = Toy()


def toy_model() -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(3)
    return ToyTransformer().eval().requires_grad_(False)


def toy_data(samples: int = 8) -> Any:
    """States in four time groups."""
    t = torch.arange(samples) * 1000 // samples
    x = torch.randn(samples, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    group = t * 4 // 1000
    labels, weight, groups = torch.arange(samples) % 2, torch.ones(samples), TimeGroups.uniform(0, 1000, 4)
    weights = {"step_weight": weight, "image_weight": weight / 2}
    return _Data(x=x, t=t, labels=labels, group=group, **weights, conditions=ClassLabels(2), time_groups=groups)


class _Data(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.t)
