"""Published quantization methods in this project's harness: what its own artifacts are compared with.

One file has one method, written from its paper. Every method makes a `simulation.Plan`: weights, and functions that
quantize and dequantize the operands of a float model. `bench/baseline_table.py` measures all of them on the same states
and the same noise. The layers on float inputs (patches, timestep, class, modulation) and the final layer stay in float
in every simulated method, as in the methods' papers or in the authors' favour.
"""

from baselines import dynamic, nearest, ptq4dit, qdit, smoothquant
from baselines.simulation import Method

METHODS: dict[str, Method] = {
    "nearest, per tensor": nearest.per_tensor,
    "nearest, weights per channel": nearest.per_channel,
    "dynamic per token": dynamic.nearest,
    "dynamic per token, GPTQ": dynamic.gptq,
    "SmoothQuant, static": smoothquant.static,
    "SmoothQuant, per token": smoothquant.per_token,
    "PTQ4DiT": ptq4dit.nearest,
    "PTQ4DiT, GPTQ": ptq4dit.gptq,
    "Q-DiT, nearest": qdit.nearest,
    "Q-DiT, GPTQ": qdit.gptq,
}
