"""DiT as published (Peebles & Xie 2023), written from the paper with the names of the authors' checkpoints.

Nothing here is shared with diffusers or with `tqdit`: it says what a checkpoint computes.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def sinusoids(t: torch.Tensor, channels: int = 256) -> torch.Tensor:
    """(B,) -> (B, channels): the cosines, then the sines of t w_i, with w_i = 10000^(-i / half), i < half.

    In fp32, as in training: at t = 999 an angle is rounded by 3e-5.
    """
    half = channels // 2
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_table(side: int, channels: int) -> torch.Tensor:
    """(1, side^2, channels), row by row: the first half of the channels is of the column, the second of the row."""
    quarter = channels // 4
    table = torch.empty(side, side, channels, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for first, position in ((0, column), (2 * quarter, row)):
                for i in range(quarter):
                    angle = position / 10000 ** (i / quarter)
                    table[row, column, first + i] = math.sin(angle)
                    table[row, column, first + quarter + i] = math.cos(angle)
    return table.reshape(1, side * side, channels).float()


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LayerNorm without parameters, then scale and shift of each sample. x: (B, N, C); shift, scale: (B, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class PatchEmbedder(nn.Module):
    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))


class LabelEmbedder(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)  # the last is the null class


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = FeedForward(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(modulated(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulated(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width: int, patch: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class PublishedDiT(nn.Module):
    """x (B, C, S, S), t (B,), y (B,) -> (B, C or 2C, S, S)."""

    def __init__(
        self, depth: int = 2, width: int = 32, heads: int = 2, patch: int = 2, channels: int = 4, side: int = 8,
        classes: int = 10, learned_sigma: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.outputs = patch, channels * (2 if learned_sigma else 1)
        self.x_embedder = PatchEmbedder(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(position_table(side // patch, width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, self.outputs)

    def embedding(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """(B, width)."""
        return self.t_embedder.mlp(sinusoids(t)) + self.y_embedder.embedding_table(y)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows, p = x.shape[-1] // self.patch, self.patch
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.embedding(t, y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer.linear(modulated(x, *self.final_layer.adaLN_modulation(c).chunk(2, 1)))
        patches = x.unflatten(2, (p, p, self.outputs)).unflatten(1, (rows, rows))  # (B, row, column, p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.outputs, rows * p, rows * p)


def random_dit(seed: int = 0, **sizes: object) -> PublishedDiT:
    """With random weights that all matter: nothing is zero-initialised."""
    model = PublishedDiT(**sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
    return model.eval().requires_grad_(False)


class PublishedSiT(PublishedDiT):
    """SiT (Ma et al. 2024): DiT's module, its time from 0 at the noise to 1 at the data, and of 2C channels the first.

    x (B, C, S, S), t (B,) from 0 to 1, y (B,) -> the velocity data - noise, (B, C, S, S).
    """

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t, y)[:, : x.shape[1]]


@torch.inference_mode()
def euler(model: PublishedSiT, noise: torch.Tensor, y: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """The data that the velocity leads to from the noise, by steps between `times` from 0 to 1."""
    x = noise
    for now, then in pairwise(times):
        x = x + (then - now) * model(x, now.expand(len(x)), y)
    return x


def random_sit(seed: int = 0, **sizes: object) -> PublishedSiT:
    """A `PublishedSiT` with the weights of `random_dit`."""
    model = PublishedSiT(**sizes)  # type: ignore[arg-type]
    model.load_state_dict(random_dit(seed, **sizes).state_dict())
    return model.eval().requires_grad_(False)
