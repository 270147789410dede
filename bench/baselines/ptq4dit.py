"""PTQ4DiT: balance the salience of channels between activation and weight, over all timesteps.

Wu et al. 2024 ("PTQ4DiT: Post-training Quantization for Diffusion Transformers"). The salience of channel j is the
largest absolute value, s(X_j) of an activation and s(W_j) of a weight.

Channel-wise Salience Balancing: both get the geometric mean sqrt(s(X_j) s(W_j)) by X B^X and B^W W, where B^X and B^W
are diagonal matrices and inverses of each other.
Spearman's-rho-guided Salience Calibration: s(X_j) is the sum over timesteps of eta_t s(X_j^(t)), with
eta_t = exp(-rho(s(X^(t)), s(W))) / sum_u exp(-rho(s(X^(u)), s(W))). Timesteps whose salient channels are not those of
the weight count most, since there balancing gains most.

As in the paper, weights have a scale for each output channel and activations one per tensor, and the inputs of the
query, key and value projections, of the output projection and of the first feed-forward layer are balanced: there the
factors fold into adaLN's modulation or the values. Choices where the paper is silent: the timesteps are the calibration
set's time groups; static ranges are those of least output error on calibration rows, among parts of the min-max range
from 30 % to all of it; weights have the scales of least error, each weight's error times the mean square of its input.
The authors learn the rounding of weights by reconstructing blocks (AdaRound, tens of thousands of iterations).
`nearest` has no such step, and in `gptq` GPTQ stands for it.
"""

import torch

from baselines import fake
from baselines.gptq import solve
from baselines.simulation import Context, Plan, foldable, follows_attention
from baselines.smoothquant import TUNING_ROWS, smoothed
from tqdit.architectures.interface import Linear

CLIPS = torch.linspace(0.3, 1.0, 15).tolist()


def nearest(context: Context) -> Plan:
    """Round the balanced weights to nearest."""
    return _plan(context, by_gptq=False)


def gptq(context: Context) -> Plan:
    """Round the balanced weights by GPTQ, in the place of the authors' reconstruction."""
    return _plan(context, by_gptq=True)


def factors(peaks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of B^W, (in,), for the salience of X by timestep (T, in) and a weight (out, in).

    X is divided by the factors and W multiplied with them. Dead channels have the factor 1.
    """
    columns = weight.abs().amax(0)
    salience = timestep_weights(peaks, columns) @ peaks
    balance = (salience / columns).sqrt()
    return torch.where((salience > 0) & (columns > 0), balance, 1.0)


def timestep_weights(peaks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return eta, (T,), for the salience of X by timestep (T, in) and the salience of W (in,)."""
    rho = torch.stack([spearman(row, columns) for row in peaks])
    return (-rho).softmax(0)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Spearman's rho of two vectors: Pearson's correlation of their ranks.

    It is 0 where a vector is constant.
    """
    x, y = (ranks(part) - (len(part) - 1) / 2 for part in (a, b))
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return torch.where(scale > 0, (x * y).sum() / scale.clamp(min=1e-30), 0.0)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the ranks of a vector's values from 0. Equal values share the mean of their ranks."""
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return (first + (counts - 1) / 2)[index].to(values.dtype)


def _plan(context: Context, by_gptq: bool) -> Plan:
    plan = Plan(operands=context.static_operands())
    for linear in context.linears:
        seen, weight, name = context.observed.inputs[linear.source.name], context.weight(linear), linear.source.name
        balanced = foldable(linear) or follows_attention(linear)
        factor = factors(seen.peaks, weight) if balanced else torch.ones_like(weight[0])
        scaled = weight * factor
        rows = seen.rows / factor
        grid = fake.per_channel_clipped(scaled, context.weight_bits, rows)
        rounded = solve(scaled, rows, grid) if by_gptq else grid(scaled)
        plan.weights |= context.split(linear, rounded)
        plan.inputs[name] = smoothed(_fitted(context, linear, factor, scaled), factor)
    return plan


def _fitted(context: Context, linear: Linear, factor: torch.Tensor, weight: torch.Tensor) -> fake.Quantizer:
    """Return the static quantizer of a balanced input whose range has the least error of the layer's output."""
    seen = context.observed.inputs[linear.source.name]
    whole, rows = seen.range(factor), seen.rows[:: max(1, len(seen.rows) // TUNING_ROWS)] / factor
    candidates = [fake.static(whole.low * clip, whole.high * clip, context.activation_bits) for clip in CLIPS]
    errors = torch.stack([((quantizer(rows) - rows) @ weight.T).square().sum() for quantizer in candidates])
    return candidates[int(errors.argmin())]
