"""Baselines of a quantized model's speed.

They are float models of its shape with random weights, and torchao's int8 and fp8.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.errors import InputError
from tqdit.speed.conditions import timed_conditions
from tqdit.speed.machine import synchronise
from tqdit.speed.openvino import OpenVino
from tqdit.speed.quiet import quiet
from tqdit.speed.random_weights import random_float
from tqdit.system import trees
from tqdit.system.capture import CudaGraphed
from tqdit.system.extras import install_command

# Family -> its contenders. A speed-up is over the best one of a family. All but the eager ones are compiled; those that
# are "autotuned", on a GPU alone, with every kernel tuned, which takes minutes.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "float32": ("float32-eager", "float32-autotuned", "float32-compiled"),
    "bfloat16": ("bf16-eager", "bf16-autotuned", "bf16-compiled"),
    "bfloat16-blocks": ("bf16-blocks",),  # autotuned block by block like torchao's on a GPU, to show the cost of that
    "torchao": ("torchao-int8", "torchao-fp8"),
    "openvino": ("openvino-int8",),
}
# Changed in place, so never shared.
OWN_WEIGHTS = (*FAMILIES["bfloat16-blocks"], *FAMILIES["torchao"], *FAMILIES["openvino"])
FP8_CAPABILITY = (8, 9)
COMPILE_OPTIONS: Mapping[str, Mapping[str, Any]] = {"cpu": {"freezing": True}}  # weights are packed
# torch.compile's options for the strongest baseline on a GPU: its mode "max-autotune", but for the CUDA graphs, which
# are ours (`CudaGraphed`).
AUTOTUNED: Mapping[str, Any] = {"max_autotune": True, "coordinate_descent_tuning": True}
# What torchao would set for the whole process (torchao.quantization.utils.recommended_inductor_config_setter) but for
# unique kernel names, which are for profiles, and for a search of pointwise kernels in all directions at once, which
# takes minutes.
TORCHAO_OPTIONS: Mapping[str, Any] = {"coordinate_descent_tuning": True, "force_fuse_int_mm_with_mul": True}
# Triton has a hundred candidates for each fp8 product: minutes of timing each, for DiT-XL/2 at 64 samples.
FP8_OPTIONS: Mapping[str, Any] = {"max_autotune_gemm_backends": "ATEN"}
RECOMPILE_LIMIT = 64  # every compiled contender at every batch size counts: diffusers' models are one piece of code


def contenders(against: Sequence[str], kind: str = "cpu", tuned: bool = True) -> dict[str, str]:
    """Return contender -> family for families and single contenders by name, in the order of `FAMILIES`.

    A family stands for its eager contender and its strongest compiled one on a device of that `kind`, or, on a GPU
    where `tuned` is false, the compiled one that is not tuned. `InputError` naming an unknown one and the known ones.
    """
    left_out = "-compiled" if kind == "cuda" and tuned else "-autotuned"
    for name in against:
        if name not in FAMILIES and all(name not in members for members in FAMILIES.values()):
            known = ", ".join([*FAMILIES, *(member for members in FAMILIES.values() for member in members)])
            raise InputError(f"unknown baseline '{name}'; known: {known}")
    return {
        member: family
        for family, members in FAMILIES.items()
        for member in members
        if member in against or (family in against and not member.endswith(left_out))
    }


def is_compiled(name: str) -> bool:
    """Say whether torch.compile runs that contender."""
    return not name.endswith("-eager")


def weights_of(name: str, kind: str = "cpu") -> str:
    """Return a key that is equal for contenders that share one set of weights on a device of that `kind`."""
    return name if _by_blocks(name, kind) or name in OWN_WEIGHTS else name.partition("-")[0]


def _by_blocks(name: str, kind: str) -> bool:
    """Say whether a contender is compiled block by block, in place: one compilation serves all blocks of a model."""
    return kind == "cuda" and (name in OWN_WEIGHTS or name.endswith("-compiled"))


def missing(name: str, device: torch.device) -> str | None:
    """Return why a contender cannot be built here, or None."""
    if name in FAMILIES["bfloat16-blocks"] and device.type != "cuda":
        return "models are compiled block by block on CUDA devices alone"
    if name.endswith("-autotuned") and device.type != "cuda":
        return "kernels are tuned on CUDA devices alone"
    if name in FAMILIES["openvino"]:
        return _missing_openvino(device)
    return _missing_torchao(name, device) if name in FAMILIES["torchao"] else None


def _missing_torchao(name: str, device: torch.device) -> str | None:
    if importlib.util.find_spec("torchao") is None:
        return f"torchao is not installed: {install_command('bench')}"
    if name == "torchao-fp8":
        found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if found is None or found < FP8_CAPABILITY:
            needed, here = (".".join(map(str, version)) if version else "none" for version in (FP8_CAPABILITY, found))
            return f"fp8 products need a CUDA device of compute capability {needed}; {device} has {here}"
    return None


def _missing_openvino(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "OpenVINO is timed on the CPU alone"
    if any(importlib.util.find_spec(name) is None for name in ("openvino", "nncf")):
        return f"OpenVINO is not installed: {install_command('openvino')}"
    return None


def build(names: Sequence[str], config: Mapping[str, Any], device: torch.device) -> dict[str, nn.Module]:
    """Build contenders with the same `weights_of`, on `device`.

    Compilation happens in their first call.
    """
    first = names[0]
    weights = weights_of(first, device.type)
    if first in FAMILIES["openvino"]:
        return {first: OpenVino(random_float(config, torch.float32))}
    model = random_float(config, torch.float32 if weights.startswith("float32") else torch.bfloat16)
    nn.Module.to(model, device)
    if device.type == "cuda":
        fuse_projections(model)
    if first in FAMILIES["torchao"]:
        quantize_with_torchao(model, first, only_blocks=device.type == "cuda")
    return {
        name: _compiled(model, _options(name, device.type), device, _by_blocks(name, device.type))
        if is_compiled(name)
        else Baseline(model, model)
        for name in names
    }


def _options(name: str, kind: str) -> dict[str, Any]:
    """Return torch.compile's options for a contender."""
    options = dict(COMPILE_OPTIONS.get(kind, {}))
    if kind == "cuda" and not name.endswith("-compiled"):
        options |= AUTOTUNED
    if name in FAMILIES["torchao"]:
        options |= TORCHAO_OPTIONS
    if name == "torchao-fp8":
        options |= FP8_OPTIONS
    return options


def _compiled(model: nn.Module, options: Mapping[str, Any], device: torch.device, by_blocks: bool) -> nn.Module:
    """Return `model` compiled for one shape at a time.

    Where the compiler would silently leave a part uncompiled, it raises an error. The model is compiled whole, or
    `by_blocks`, in place. Then one compiled block serves all of them, the embedder for the final layer is compiled, and
    the patch embedding and the final layer are not: torchao's layers in 28 blocks take the compiler minutes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    if by_blocks:
        config = registry.config_of(model)
        blocks = [model.get_submodule(block.prefix) for block in registry.graph(config).blocks]
        for part in (*blocks, *registry.architecture(config).called_apart(model)):
            part.compile(dynamic=False, fullgraph=True, options=dict(options))
        baseline = Baseline(model, model)
    else:
        baseline = Baseline(model, torch.compile(model, dynamic=False, fullgraph=True, options=dict(options)))
    return CudaGraphed(baseline) if device.type == "cuda" else baseline


def fuse_projections(model: nn.Module) -> None:
    """Fuse query, key and value of every self-attention into one layer, in place.

    The numbers are the same, out of fewer and larger products.
    """
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    blocks = registry.graph(registry.config_of(model)).blocks
    for found in (attention for block in blocks for attention in block.attentions if not attention.context):
        attention: Any = model.get_submodule(found.module)
        attention.fuse_projections()
        attention.set_processor(FusedAttnProcessor2_0())
        del attention.to_q, attention.to_k, attention.to_v
    model.requires_grad_(False)


def quantize_with_torchao(model: nn.Module, name: str, only_blocks: bool = False) -> None:
    """Quantize every linear layer in place with torchao's dynamic int8 or fp8.

    A layer that blocks share is quantized once. `only_blocks`: the two layers of the final layer stay as they are,
    since they are not compiled and would be slower.
    """
    with quiet():
        from torchao.quantization import quantize_

    done: set[int] = set()
    blocks = tuple(f"{block.prefix}." for block in registry.graph(registry.config_of(model)).blocks)

    def is_new_linear(module: nn.Module, path: str) -> bool:
        outside = only_blocks and not path.startswith(blocks)
        if outside or not isinstance(module, nn.Linear) or id(module) in done:
            return False
        done.add(id(module))
        return True

    quantize_(model, torchao_config(name), is_new_linear)


def torchao_config(name: str) -> Any:
    """Return torchao's settings for a contender: scales by rows, which are found in every call."""
    with quiet():
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
        )

    # torchao would set options for the whole process; TORCHAO_OPTIONS sets them for its models alone.
    if name == "torchao-fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


class Baseline(nn.Module):
    """A float model that takes and gives fp32, whatever its own dtype, as the sampler expects. `run` computes it."""

    def __init__(self, model: nn.Module, run: Any) -> None:
        super().__init__()
        self.model = model
        self.run = run
        self.dtype = next(model.buffers()).dtype

    @property
    def config(self) -> Any:
        """Return the model's config."""
        return self.model.config

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, return_dict: bool = False, **condition: Any
    ) -> tuple[torch.Tensor]:
        """Return (output,) as diffusers' model with `return_dict=False`.

        (B, C, H, W), (B,) and conditions -> (B, C or 2C, H, W).
        """
        inputs = trees.mapped(lambda x: x.to(self.dtype) if x.is_floating_point() else x, condition)
        return (self.run(hidden_states.to(self.dtype), timestep=timestep, **inputs, return_dict=False)[0].float(),)


class DenoiserCall:
    """One denoiser call of a sampler with guidance: half of the batch is unconditional, t is the same for all.

    Its inputs are fixed but for t. It returns when the device has finished.
    """

    def __init__(self, module: nn.Module, config: Mapping[str, Any], batch: int, device: torch.device) -> None:
        conditions, half = timed_conditions(config), (batch + 1) // 2
        condition = conditions.rows(torch.arange(half) % conditions.count)
        null = conditions.null(batch - half, torch.device("cpu"))
        inputs = trees.mapped(lambda *halves: torch.cat(halves), condition, null)
        with torch.inference_mode():  # like the sampler's states: torch.compile compiles anew for other tensors
            noise = torch.randn(batch, *registry.sample(config).shape, generator=torch.Generator().manual_seed(0))
            self.x = noise.to(device).clone()
            self.inputs = trees.mapped(lambda x: x.to(device).clone(), inputs)
        self.module = module
        self.device = device

    @torch.inference_mode()
    def __call__(self, t: int) -> torch.Tensor:
        """Return the model's output for the training timestep t, (B, C or 2C, H, W)."""
        timestep = torch.full((len(self.x),), t, device=self.device)
        output = self.module(self.x, timestep=timestep, **self.inputs, return_dict=False)[0]
        synchronise(self.device)
        return output
