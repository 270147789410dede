"""Launch the kernels around the blocks of a transformer: the first and the last layer on patches."""

import functools
from typing import NamedTuple

import torch
import triton

from tqdit.backends.triton import tuning
from tqdit.backends.triton.kernels.ends import embed_kernel, poison_kernel, unembed_kernel
from tqdit.backends.triton.layouts import NATIVE, Config, weight_of
from tqdit.backends.triton.relaunch import PLANS, Plan, aligned, check_device
from tqdit.ops.ends import EndLayer

DTYPES = torch.float32, torch.float16, torch.bfloat16  # of latents and of the residual stream
MANY_SAMPLES, TOGETHER = 16, 4  # samples of a batch from which programs of `embed_kernel` take several
FEW_ROWS, SOME_ROWS = 4096, 8192  # rows of the stream up to which tiles of `unembed_kernel` are small
FLOAT = 0  # bits of a weight in float
LEAST = 16  # rows, columns and depth of a product's tile


class _Form(NamedTuple):
    """The numbers by which kernels read a layer: those of its rows, of the codes' upper bits, and how it is stored."""

    columns: int
    depth: int
    stride: int
    high_stride: int
    bits: int
    biased: bool


def embed(x: torch.Tensor, layer: EndLayer, position: torch.Tensor, side: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the residual stream (B, N, D) as `ops.ends.Ends.embed` does, with |error| <= (K + 8) 2^-24 Σ|terms|."""
    batch, _, height, width = x.shape
    tokens, (weight, form) = height * width // side**2, _read(layer)
    out = torch.empty((batch, tokens, form.columns), dtype=dtype, device=x.device)
    config = _embed_config(batch, form.columns, form.depth)
    numbers = batch, tokens, width // side, *x.stride()
    plan = _embed_plan(x.get_device(), (x.dtype, dtype), numbers, side, form, config)
    _launch(f"embed {dtype} {numbers} {form}", plan, (x, *weight, position.contiguous(), out), config)
    return out


def unembed(
    stream: torch.Tensor, shift_scale: torch.Tensor, eps: float, layer: EndLayer, x: torch.Tensor, side: int
) -> torch.Tensor:
    """Return latents (B, C', H, W) as `ops.ends.Ends.unembed` does.

    The product of the modulated norm, fp32 numbers, has |error| <= (D + 8) 2^-24 Σ|terms|.
    """
    batch, tokens, width = stream.shape
    weight, form = _read(layer)
    out = torch.empty((batch, form.columns // side**2, *x.shape[-2:]), dtype=x.dtype, device=x.device)
    config = _unembed_config(batch * tokens, width, form.columns, stream.dtype)
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(form.columns, config.block_n)
    flags = torch.empty((batch, tiles), dtype=torch.int8, device=x.device)
    numbers = eps, tokens, x.shape[-1] // side, shift_scale.stride(0)
    dtypes = stream.dtype, x.dtype
    plan = _unembed_plan(stream.get_device(), dtypes, (tiles, batch), numbers, side, form, config)
    tensors = stream.contiguous(), shift_scale, *weight, out, flags
    _launch(f"unembed {dtypes} {batch} {numbers} {form}", plan, tensors, config)
    plan = _poison_plan(out.get_device(), x.dtype, batch, tokens * form.columns, tiles)
    _launch(f"poison {x.dtype} {batch} {tiles}", plan, (out, flags), config)
    return out


def _launch(key: str, plan: Plan, tensors: tuple[torch.Tensor, ...], config: Config) -> None:
    """Launch a kernel with its only configuration, or note it where kernels are noted."""
    check_device(*tensors)
    launch = plan.launch if aligned(*tensors) else plan.launch_any
    if not tuning.noted(key, tensors[0].device, config, lambda _: launch(tensors)):
        launch(tensors)


def _read(layer: EndLayer) -> tuple[tuple[torch.Tensor, ...], _Form]:
    """Return weight or codes, the codes' upper bits, scale and bias, stand-ins where there are none; and their form."""
    if layer.codes is not None:
        held = weight_of(layer.codes)
        high = held.codes if held.high is None else held.high
        form = _Form(held.codes.shape[0], held.depth, held.codes.stride(0), high.stride(0), held.bits, True)
        return (held.codes, high, held.scale, held.bias), form
    assert layer.weight is not None
    w, biased = layer.weight.contiguous(), layer.bias is not None
    form = _Form(w.shape[0], w.shape[1], w.stride(0), 0, FLOAT, biased)
    return (w, w, w, w if layer.bias is None else layer.bias), form


@functools.cache
def _embed_config(batch: int, columns: int, depth: int) -> Config:
    """Return tiles whose weight and positions registers hold; `blocks`: samples of a program."""
    blocks = TOGETHER if batch >= MANY_SAMPLES else 1
    return Config(LEAST, _tile(columns, 128), _tile(depth, 32), warps=4, stages=1, blocks=blocks)


@functools.cache
def _unembed_config(rows: int, width: int, columns: int, stream: torch.dtype) -> Config:
    """Return tiles for so many rows that all multiprocessors have some; two programs fit in the shared memory of one.

    Where rows are few, a program waits for its reads, so that it reads more at a time.
    """
    bm = 16 if rows <= FEW_ROWS else 32 if rows <= SOME_ROWS else 64
    stages = 4 if bm == LEAST else 3 if stream is not torch.float32 else 2
    return Config(bm, _tile(columns, 32), _tile(width, 128 if bm == LEAST else 64), warps=4, stages=stages)


def _tile(size: int, most: int) -> int:
    return max(LEAST, min(most, triton.next_power_of_2(size)))


@functools.lru_cache(PLANS)
def _embed_plan(
    device: int, dtypes: tuple[torch.dtype, ...], numbers: tuple[int, ...], side: int, form: _Form, config: Config
) -> Plan:
    """`numbers`: samples, tokens, patches in a row, and the strides of the latents."""
    batch, tokens, *_ = numbers
    bm, bn, bk = config[:3]
    columns, depth, *strides, bits, biased = form
    grid = triton.cdiv(tokens, bm) * triton.cdiv(columns, bn), triton.cdiv(batch, config.blocks)
    others = *numbers, *strides, columns, depth, side, bits, biased, NATIVE, bm, bn, bk, config.blocks
    return Plan(embed_kernel, grid, others, num_warps=config.warps, enable_fp_fusion=True)


@functools.lru_cache(PLANS)
def _unembed_plan(
    device: int, dtypes: tuple[torch.dtype, ...], grid: tuple[int, int], numbers: tuple[float, ...], side: int,
    form: _Form, config: Config,
) -> Plan:  # fmt: skip
    """`numbers`: the norm's epsilon, tokens, patches in a row, and the stride of the modulation."""
    bm, bn, bk = config[:3]
    columns, depth, *strides, bits, biased = form
    others = *numbers, *strides, columns, depth, side, bits, biased, NATIVE, bm, bn, bk, config.stages
    return Plan(unembed_kernel, grid, others, num_warps=config.warps, enable_fp_fusion=True)


@functools.lru_cache(PLANS)
def _poison_plan(device: int, dtype: torch.dtype, batch: int, size: int, tiles: int) -> Plan:
    return Plan(poison_kernel, (batch, 1), (size, tiles, 1024, triton.next_power_of_2(tiles)), num_warps=4)
