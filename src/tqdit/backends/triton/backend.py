"""The GPU backend: its verbs are Triton kernels, with int8 codes between them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.backends.triton import conditioning, deviations, ends, flat, float_operators, floats, operators, tuning
from tqdit.backends.triton.layer import TritonLinear
from tqdit.backends.triton.layouts import NATIVE, Projected, weight_of, with_steps
from tqdit.errors import InputError
from tqdit.ops.composed import FUNCTIONS
from tqdit.ops.ends import EndLayer, Ends, Lookup
from tqdit.ops.schema import (
    AttentionParams,
    Codes,
    Float,
    Norm,
    OperandParams,
    Residual,
    RowCodes,
    Then,
    WeightParams,
)
from tqdit.spec import Grid

STORED = 4, 6, 8  # bits of packed weights


class TritonBackend(Ends):
    """The backend whose weights are int8 on the device, whatever their bits: the fastest one.

    Rows of codes are padded to 16 bytes, what is beyond a layer's depth is never read. Codes of two regions are one
    int8 tensor, those of merged regions their integer. Projected codes are a `Projected`. Codes on the grid of rows are
    `RowCodes`. A norm writes them; after attention and GELU no kernel has whole rows, so the values leave it in fp32.
    """

    NAME = "triton"
    INTEGER = True
    GRAPHS = True
    PACKED = False
    compile_ahead = staticmethod(tuning.prepare)

    deviating = staticmethod(deviations.described)  # in reports of models, after the names of attention's kernels

    def kernel(self, operation: str) -> str:
        if operation in ("scores", "values"):
            return "fused attention, int8"
        return "bf16 x 3 x int8" if operation == "float_input_linear" else "fused, int8"

    def prepare(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        stored = next(bits for bits in STORED if bits >= weight.bits) if self.PACKED else 8
        return TritonLinear(weight, bias, stored)

    def prepare_float_input(self, weight: WeightParams, bias: torch.Tensor | None) -> nn.Module:
        return self.prepare(weight, bias)

    def quantize(self, x: torch.Tensor, target: OperandParams, norm: Norm | None = None) -> Codes:
        if norm is not None and target.channels is not None:  # no kernel has both
            x, norm = _modulated(x, norm), None
        if norm is None:
            return self._quantize(x, target)
        operands = flat.flatten(target)
        x = x.contiguous()
        assert norm.shift.stride(0) == norm.scale.stride(0)
        given = x, norm.shift, norm.scale, norm.eps, *operands
        if target.grid is Grid.ROW:
            return RowCodes(*operators.norm_quantize_rows(*given))
        return operators.norm_quantize(*given)

    def _quantize(self, x: torch.Tensor, target: OperandParams) -> Codes:
        """Return the codes of x itself.

        In a graph, those on a uniform grid are made by operations of torch, which fuse with those before: a pass over x
        less. Those of rows are made by the kernel, which the compiler's own code launches: what torch's compiler makes
        of two passes over a row is slower.
        """
        if not torch.compiler.is_compiling():
            with flat.on(x):
                return floats.quantize(x, target)
        if target.grid is Grid.ROW and NATIVE and not torch.compiler.is_exporting():
            return floats.quantize_rows_in_graph(x, target)
        if target.grid is Grid.ROW:
            return RowCodes(*float_operators.quantize_floats(x, target.channels, *flat.flatten(target)))
        if not target.grid.two_region:
            return floats.quantize_in_torch(x, target)
        if target.channels is not None:
            x, target = x.float() * target.channels, target._replace(channels=None)
        return operators.quantize(x.contiguous(), *flat.flatten(target))

    def project(
        self,
        codes: Codes,
        source: OperandParams,
        layer: TritonLinear,
        targets: Sequence[OperandParams],
        heads: int,
    ) -> Projected:
        for target in targets:
            _check_static(target, self.NAME)
        given = _tensors(codes)
        batch, tokens, _ = given[0].shape
        operands = flat.flatten(source, *(_per_head(target, heads) for target in targets))
        out = operators.project(given, *_weight(layer), *operands, heads)
        return Projected(out, batch, tokens, layer.shape[0] // len(targets) // heads)

    def attend(
        self,
        projected: Projected,
        attention: AttentionParams,
        target: OperandParams,
        context: Projected | None = None,
        bias: torch.Tensor | None = None,
    ) -> Codes:
        fused = target.grid is not Grid.ROW and target.channels is None
        projections = (_per_head(params, attention.heads) for params in attention.projections)
        operands = flat.flatten(*projections, attention.softmax, *((target,) if fused else ()))
        keys = (context or projected).tokens
        sizes = [projected.batch, projected.tokens, keys, attention.heads, projected.head_dim]
        added = None if bias is None else bias.float().contiguous()
        out = operators.attend(projected.codes, context.codes if context else None, added, sizes, *operands)
        return out if fused else self.quantize(out, target)

    def linear(
        self,
        codes: Codes,
        source: OperandParams,
        layer: TritonLinear,
        then: Then | None = None,
    ) -> Codes:
        if isinstance(then, Float) and not torch.compiler.is_compiling():
            with flat.on(with_steps(codes)[0]):
                return floats.linear(codes, source, weight_of(layer), then.dtype)
        given = _tensors(codes), *_weight(layer)
        if isinstance(then, Float):
            return float_operators.linear_to_floats(*given, *flat.flatten(source), then.dtype)
        if then is None:
            return operators.linear(*given, *flat.flatten(source))
        if isinstance(then, Residual):
            return operators.linear_residual(*given, *flat.flatten(source), then.x.contiguous(), then.gate)
        target = then.target
        if then.function != "gelu_tanh" or target.grid is Grid.ROW:  # no kernel has this function, or whole rows
            y = operators.linear(*given, *flat.flatten(source))
            return self.quantize(FUNCTIONS[then.function](y), target)
        return operators.linear_activation(*given, *flat.flatten(source, target), target.channels)

    def float_input_linear(
        self, x: torch.Tensor, layer: TritonLinear, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return x W^T + bias for float x: (..., in) -> (..., out).

        With a `dtype` x is read as it is, and the result is rounded once to that dtype (`floats.float_input`); without
        one it is fp32.
        """
        if dtype is None:
            rows = x.float().reshape(-1, x.shape[-1]).contiguous()
            out = operators.float_input_linear(rows, *_weight(layer))
        else:
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            if torch.compiler.is_compiling():
                out = float_operators.linear_from_floats(rows, *_weight(layer), dtype)
            else:
                with flat.on(rows):
                    out = floats.float_input(rows, weight_of(layer), dtype)
        return out.view(*x.shape[:-1], layer.shape[0])

    def embed(
        self, x: torch.Tensor, layer: EndLayer, position: torch.Tensor, side: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        if x.dtype not in ends.DTYPES:
            return None
        with flat.on(x):
            return ends.embed(x, layer, position, side, dtype)

    def unembed(
        self, stream: torch.Tensor, shift_scale: torch.Tensor, eps: float, layer: EndLayer, x: torch.Tensor, side: int
    ) -> torch.Tensor | None:
        if x.dtype not in ends.DTYPES:
            return None
        with flat.on(stream):
            return ends.unembed(stream, shift_scale, eps, layer, x, side)

    def activated(self, x: torch.Tensor | Lookup, layer: Any, added: Lookup | None = None) -> torch.Tensor | None:
        with flat.on(layer.codes):
            return conditioning.activated(x, weight_of(layer), added)


class PackedTritonBackend(TritonBackend):
    """The backend that packs weights of at most 4 or 6 bits on the device.

    It takes less memory, and is slower where arithmetic is the bound.
    """

    NAME = "triton-packed"
    PACKED = True


def _per_head(params: OperandParams, heads: int) -> OperandParams:
    """Return an operand whose table has a unit per head, which kernels look up."""
    if params.table.shape[1] == heads:
        return params
    return params._replace(table=params.table.expand(-1, heads, -1).contiguous())


def _modulated(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Return LayerNorm(x) (1 + scale) + shift, fp32."""
    normal = F.layer_norm(x.float(), x.shape[-1:], eps=norm.eps)
    return normal * (1 + norm.scale[:, None]) + norm.shift[:, None]


def _tensors(codes: Codes) -> list[torch.Tensor]:
    """Return codes as operators take them."""
    return [codes.codes, codes.scale.contiguous()] if isinstance(codes, RowCodes) else [codes]


def _check_static(target: OperandParams, backend: str) -> None:
    """Raise `InputError` for a target of projections whose step follows from rows."""
    if target.grid.per_row:
        raise InputError(f"the backend '{backend}' projects to heads on static grids, not on the grid '{target.grid}'")


def _weight(layer: TritonLinear) -> tuple[list[torch.Tensor], list[int]]:
    tensors: list[Any] = [layer.codes, layer.scale, layer.bias, layer.sums]
    return tensors + ([] if layer.high is None else [layer.high]), [layer.shape[1], layer.bits]
