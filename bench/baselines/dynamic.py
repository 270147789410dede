"""Everything dynamic: each token has a scale from its own values, as ZeroQuant and most libraries do.

Yao et al. 2022 ("ZeroQuant", section 4.1: token-wise activations). The paper's token scales are symmetric and its
weights have groups; here the scales of tokens are asymmetric, which is never worse, and weights have one symmetric
scale for each output channel. Queries, keys and values have scales per token and head, probabilities per row.
"""

from baselines import fake
from baselines.gptq import solve
from baselines.simulation import Context, Plan


def nearest(context: Context) -> Plan:
    """Quantize weights to nearest with min-max scales."""
    return Plan(context.rounded(fake.per_channel), inputs(context), context.dynamic_operands())


def gptq(context: Context) -> Plan:
    """Quantize weights by GPTQ, with scales of least error."""
    weights = {}
    for linear in context.linears:
        weight, rows = context.weight(linear), context.observed.inputs[linear.source.name].rows
        grid = fake.per_channel_clipped(weight, context.weight_bits, rows)
        weights |= context.split(linear, solve(weight, rows, grid))
    return Plan(weights, inputs(context), context.dynamic_operands())


def inputs(context: Context) -> dict[str, fake.Quantizer]:
    """Return quantizers per token for the inputs of all linear layers."""
    return {name: fake.by_rows(context.activation_bits) for name in context.observed.inputs}
