"""Q-DiT: groups of input channels with scales of their own, in weights and, dynamically, in activations.

Chen et al. 2024 ("Q-DiT: Accurate Post-Training Quantization for Diffusion Transformers"). Weights (out, in) have an
asymmetric min-max grid for each output channel and group of input channels; activations have one for each token and
group, from the values at hand.

Choices: the group is the largest divisor of a layer's width that is at most 128, the authors' default; their
evolutionary search for a group size of each layer by FID is left out. Their queries, keys, values and probabilities
stay in float by default; here they are quantized per token and head, and per row, as in every other row. The authors'
scripts round weights by GPTQ: `gptq` does, `nearest` shows the groups alone.
"""

from functools import partial

from baselines import fake
from baselines.gptq import solve
from baselines.simulation import Context, Plan

MOST = 128


def nearest(context: Context) -> Plan:
    """Round weights to nearest."""
    return _plan(context, by_gptq=False)


def gptq(context: Context) -> Plan:
    """Round weights by GPTQ."""
    return _plan(context, by_gptq=True)


def group_size(width: int, most: int = MOST) -> int:
    """Return the largest divisor of a width that is at most `most`."""
    return next(size for size in range(min(width, most), 0, -1) if width % size == 0)


def _plan(context: Context, by_gptq: bool) -> Plan:
    plan = Plan(operands=context.dynamic_operands(), notes={"group_sizes": {}})
    for linear in context.linears:
        weight, name = context.weight(linear), linear.source.name
        group = group_size(weight.shape[1])
        grid = fake.per_group(weight, context.weight_bits, group)
        rounded = solve(weight, context.observed.inputs[name].rows, grid) if by_gptq else grid(weight)
        plan.weights |= context.split(linear, rounded)
        plan.inputs[name] = partial(fake.grouped, bits=context.activation_bits, group=group)
        plan.notes["group_sizes"][name] = group
    return plan
