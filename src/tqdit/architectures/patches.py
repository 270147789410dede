"""The first and the last layer of a transformer on patches: latents to tokens, and tokens to latents."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed
from torch import nn

from tqdit.layers.linear import at_an_end
from tqdit.ops.ends import EndLayer, Ends
from tqdit.ops.modules import Ready, offloaded, only_moved, plain, present, untouched

FEW_TOKENS = 8192  # of the samples that are in fp32 at a time
ONE_PIECE = 10 * 2**20  # bytes: torch's allocator takes memory for smaller tensors together, 20 MiB at a time


def few_samples(x: torch.Tensor, side: int) -> int:
    """Return how many samples (C, H, W) of x are taken at a time before and after the blocks.

    (B, N, D) in fp32, and several of them in the last LayerNorm, would be more than any block has alive.
    """
    return max(1, FEW_TOKENS * side**2 // (x.shape[-2] * x.shape[-1]))


def embedded(embed: Any, x: torch.Tensor, side: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the residual stream (B, N, D) in `dtype` for latents x (B, C, H, W) of patches `side` wide."""

    def by_kernels(ready: Ready) -> torch.Tensor | None:
        first = _first(embed, x, side, ready)
        return None if first is None else first[0].embed(x, *first[1:], side, dtype)

    if (stream := _by_kernels(by_kernels, embed, embed.proj)) is not None:
        return stream
    return _joined([embed(part.float()).to(dtype) for part in _parts(x, few_samples(x, side))])


def output(
    model: Any, project: nn.Module, stream: torch.Tensor, shift_scale: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """Return the model's output (B, C or 2 C, H, W) in the dtype of x, for the residual stream after the last block.

    `project`: the last layer, D -> pixels and channels of a patch. `shift_scale`: (B, 2 D), its modulation.
    """
    side, channels = model.config.patch_size, model.out_channels

    def by_kernels(ready: Ready) -> torch.Tensor | None:
        last = _last(model.norm_out, project, ready)
        return None if last is None else last[0].unembed(stream, shift_scale, model.norm_out.eps, last[1], x, side)

    if (made := _by_kernels(by_kernels, model.norm_out, project)) is not None:
        return made
    few = few_samples(x, side)
    pairs = zip(_parts(stream, few), _parts(shift_scale, few), strict=True)
    patches = _joined([_patches(model.norm_out, project, *pair) for pair in pairs])
    rows, columns = (size // side for size in x.shape[-2:])
    patches = patches.reshape(-1, rows, columns, side, side, channels).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(-1, channels, rows * side, columns * side).to(x.dtype)


def _by_kernels(
    run: Callable[[Ready], torch.Tensor | None], module: nn.Module, layer: nn.Module
) -> torch.Tensor | None:
    """Return what kernels make in the place of a module and a layer, or None; `run` computes it.

    Tensors that accelerate sent away are brought back for that, where the backend shall serve such models, too.
    """
    if (made := run(untouched)) is not None or torch.compiler.is_compiling():
        return made
    parts = [module, *layer.modules()]
    if not any(map(offloaded, parts)) or not only_moved(*parts) or _found(layer, only_moved) is None:
        return None
    with present(parts):
        return run(only_moved)


def _first(
    embed: Any, x: torch.Tensor, side: int, ready: Ready = untouched
) -> tuple[Ends, EndLayer, torch.Tensor] | None:
    """Return a backend, the patch embedding and its positions (N, D) where kernels of the backend may take its place.

    A size that has no table of positions is left to diffusers, which makes one.
    """
    if not plain(embed, PatchEmbed, ready):
        return None
    sized = (embed.height, embed.width) == (x.shape[2] // side, x.shape[3] // side)
    if not sized or embed.layer_norm or not embed.flatten or embed.pos_embed_max_size or embed.pos_embed is None:
        return None
    found = _found(embed.proj, ready)
    return None if found is None else (*found, embed.pos_embed[0])


def _last(norm: nn.Module, project: nn.Module, ready: Ready = untouched) -> tuple[Ends, EndLayer] | None:
    """Return a backend and the last layer where kernels of the backend may take the places of norm and layer."""
    if not plain(norm, nn.LayerNorm, ready) or norm.weight is not None:
        return None
    return _found(project, ready)


def _found(module: nn.Module, ready: Ready) -> tuple[Ends, EndLayer] | None:
    """Return a backend and a layer as `at_an_end` does.

    In a graph of torch, or with tensors that accelerate moves, only if the backend shall serve such models.
    """
    found = at_an_end(module, ready)
    special = torch.compiler.is_compiling() or ready is only_moved
    return None if found is None or (special and not found[0].ENDS_EVERYWHERE) else found


def lay_out(model: Any, x: torch.Tensor, width: int) -> None:
    """Give a CUDA graph under capture one piece of memory for the tensors that blocks have alive at once.

    Its tensors then are parts of that piece: left to come as they may, most sizes would get memory of their own, which
    a graph keeps. At the end of a block these are three residual streams, of the caller, before the last addition and
    after it, and codes before and after GELU, one byte a number and four. `width`: channels D of the stream. What is
    alive before the first block, such as the modulation, has memory already.
    """
    if x.device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
        return
    side, dtype = model.config.patch_size, model.stream_dtype
    numbers = x.shape[0] * (x.shape[-2] * x.shape[-1] // side**2) * width
    total = numbers * (3 * dtype.itemsize + 1 + 4)
    if total >= ONE_PIECE:
        torch.empty(total + 2**20, dtype=torch.uint8, device=x.device)  # what is smaller comes besides


def _patches(norm: nn.Module, project: nn.Module, stream: torch.Tensor, shift_scale: torch.Tensor) -> torch.Tensor:
    """Return the last layer of some samples: (B, N, D), (B, 2 D) -> (B, N, pixels and channels of a patch) in fp32."""
    shift, scale = shift_scale[:, None].chunk(2, dim=-1)
    patches = project(norm(stream.float()) * (1 + scale) + shift)
    # Codes hold no NaN and no Inf. The stream keeps them at their token; as in a float model, whose tokens all read
    # each other, the whole sample shall be NaN. Not by `patches * 0`, which compilers take for 0.
    finite = patches.isfinite().flatten(1).all(dim=1)[:, None, None]
    return patches.where(finite, torch.nan)


def _parts(x: torch.Tensor, few: int) -> Sequence[torch.Tensor]:
    """Split a batch, a few samples at a time; not if compiled, which would make a graph for each number of parts."""
    return (x,) if torch.compiler.is_compiling() else x.split(few)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
