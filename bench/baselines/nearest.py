"""Round to nearest, static min-max ranges from calibration: what quantization is without any method.

Jacob et al. 2018 ("Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
equation 1: x = S (q - Z)). Activations have one asymmetric range per tensor for all timesteps, weights a symmetric one.
"""

from baselines import fake
from baselines.simulation import Context, Plan


def per_tensor(context: Context) -> Plan:
    """Quantize weights with one scale each."""
    return Plan(context.rounded(fake.per_tensor), _inputs(context), context.static_operands())


def per_channel(context: Context) -> Plan:
    """Quantize weights with a scale for each output channel."""
    return Plan(context.rounded(fake.per_channel), _inputs(context), context.static_operands())


def _inputs(context: Context) -> dict[str, fake.Quantizer]:
    ranges = {name: seen.range() for name, seen in context.observed.inputs.items()}
    return {name: fake.static(r.low, r.high, context.activation_bits) for name, r in ranges.items()}
