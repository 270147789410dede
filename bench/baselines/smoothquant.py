"""SmoothQuant: move large channels of an activation into the weight that reads it.

Xiao et al. 2023 ("SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", equations
3 and 4): Y = (X diag(s)^-1) (diag(s) W) with s_j = max|X_j|^a / max|W_j|^(1-a).

As in the paper, the inputs of the query, key and value projections and of the first feed-forward layer are smoothed,
where the factors fold into the layer before: here into adaLN's modulation. `static` is the paper's O3 (static scales
per tensor), `per_token` its O1. Where the paper is silent or weaker, the choice favours the method: the exponent a is
chosen for each layer, not for the whole model, by the least squared error of the layer's output on calibration rows,
among 0, 0.05, ... 1 and no smoothing at all; weights have a scale for each output channel instead of one; ranges of
activations are asymmetric.
"""

from collections.abc import Callable

import torch

from baselines import fake
from baselines.dynamic import inputs as dynamic_inputs
from baselines.simulation import Context, Plan, foldable
from tqdit.architectures.interface import Linear

EXPONENTS = [step / 20 for step in range(21)]
TUNING_ROWS = 2048
MakeQuantizer = Callable[[torch.Tensor], fake.Quantizer]  # of the rows of an input


def static(context: Context) -> Plan:
    """Quantize activations after smoothing with static min-max ranges per tensor."""
    return _plan(context, dynamic=False)


def per_token(context: Context) -> Plan:
    """Quantize activations after smoothing with a dynamic range for each token."""
    return _plan(context, dynamic=True)


def factors(peak: torch.Tensor, weight: torch.Tensor, exponent: float) -> torch.Tensor:
    """Return s_j of the equation, (in,), for the channels' maxima of X and a weight (out, in). Dead channels have 1."""
    columns = weight.abs().amax(0)
    factor = peak**exponent / columns ** (1 - exponent)
    return torch.where((peak > 0) & (columns > 0) & factor.isfinite() & (factor > 0), factor, 1.0)


def smoothed(quantizer: fake.Quantizer, factor: torch.Tensor) -> fake.Quantizer:
    """Return the quantizer of a smoothed input."""
    return lambda x: quantizer(x / factor)


def _plan(context: Context, dynamic: bool) -> Plan:
    operands = context.dynamic_operands() if dynamic else context.static_operands()
    plan = Plan({}, dynamic_inputs(context), operands, {"exponents": {}})
    for linear in context.linears:
        weight, name = context.weight(linear), linear.source.name
        factor, exponent = _tuned(context, linear, dynamic) if foldable(linear) else (_ones(weight), None)
        plan.weights |= context.split(linear, _rounded(weight * factor, context.weight_bits))
        plan.inputs[name] = smoothed(_quantizer(context, linear, factor, dynamic), factor)
        if foldable(linear):
            plan.notes["exponents"][name] = exponent
    return plan


def _tuned(context: Context, linear: Linear, dynamic: bool) -> tuple[torch.Tensor, float | None]:
    """Return the factors of least output error and their exponent, which is None without smoothing."""
    seen, weight = context.observed.inputs[linear.source.name], context.weight(linear)
    rows = seen.rows[:: max(1, len(seen.rows) // TUNING_ROWS)]
    expected = rows @ weight.T
    candidates: list[tuple[torch.Tensor, float | None]] = [(_ones(weight), None)]
    candidates += [(factors(seen.peak, weight, exponent), exponent) for exponent in EXPONENTS]
    errors = []
    for factor, _ in candidates:
        quantizer = _quantizer(context, linear, factor, dynamic)
        output = quantizer(rows / factor) @ _rounded(weight * factor, context.weight_bits).T
        errors.append((output - expected).square().sum())
    return candidates[int(torch.stack(errors).argmin())]


def _quantizer(context: Context, linear: Linear, factor: torch.Tensor, dynamic: bool) -> fake.Quantizer:
    """Return the quantizer of an input that is smoothed already."""
    if dynamic:
        return fake.by_rows(context.activation_bits)
    whole = context.observed.inputs[linear.source.name].range(factor)
    return fake.static(whole.low, whole.high, context.activation_bits)


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return fake.per_channel(weight, bits)(weight)


def _ones(weight: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(weight[0])
