"""Make a published transformer with random weights, and say how many bytes it takes at its whole depth."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tqdit.architectures.traced import traced
from tqdit.calibration.calls import Calls
from tqdit.spec import Solution
from tqdit.speed.published import Published

BIAS_STD = 0.1


def random_transformer(shape: Published, blocks: int | None, device: torch.device, seed: int = 0) -> nn.Module:
    """Return a bf16 model of a published shape with at most `blocks` blocks of each kind and random weights.

    Weights have unit gain. As `from_pretrained` does, parameters that the class keeps in fp32 are of fp32.
    """
    model = traced(shape.kind).empty(shape.shortened(blocks))
    exact: Iterable[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    generator = torch.Generator(device).manual_seed(seed)
    persistent = set(model.state_dict())
    for path, module in model.named_modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            name = f"{path}.{leaf}" if path else leaf
            dtype = torch.float32 if any(part in name.split(".") for part in exact) else torch.bfloat16
            if leaf in module._parameters:
                value = _drawn(name, tensor.shape, dtype, generator)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                stored = name in persistent and tensor.is_floating_point()
                module._buffers[leaf] = tensor.to(device, dtype if stored else None)
    return model.eval()


def _drawn(name: str, size: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(size, dtype=dtype, device=generator.device, generator=generator)
    if len(size) > 1:
        return values.mul_(size[1:].numel() ** -0.5)
    return values.mul_(BIAS_STD).add_(0 if name.endswith("bias") else 1)


def one_call(shape: Published, model: nn.Module, tokens: int | None, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments of one call of at most `tokens` image tokens, on the device and in bf16."""
    generator = torch.Generator().manual_seed(0)
    size, config = shape.size.reduced(tokens), dict(model.config)  # type: ignore[arg-type]
    arguments = shape.arguments(lambda *wanted: torch.randn(wanted, generator=generator), config, size)
    moved = Calls.of(model, [arguments])[0].to(device, torch.bfloat16)
    return {**moved, "return_dict": False}


def full_depths(shape: Published) -> dict[str, int]:
    """Return the length of every list of modules of a published model, by its path."""
    full = traced(shape.kind).empty(shape.shortened(None))
    return {name: len(module) for name, module in full.named_modules() if isinstance(module, nn.ModuleList)}


def bytes_at_full_depth(shape: Published, sizes: Mapping[str, int]) -> int:
    """Return the bytes of a model with all of its blocks.

    `sizes` has the bytes of every tensor of a model with fewer blocks, by name.
    """
    total, depths = 0.0, full_depths(shape)
    found: dict[str, dict[str, int]] = {}  # list of blocks -> index -> bytes
    for name, size in sizes.items():
        keys = name.split(".")
        family = next((".".join(keys[:end]) for end in range(1, len(keys)) if ".".join(keys[:end]) in depths), None)
        if family is None:
            total += size
        else:
            index = name.removeprefix(f"{family}.").partition(".")[0]
            found.setdefault(family, {})[index] = found.setdefault(family, {}).get(index, 0) + size
    for family, by_index in found.items():
        total += sum(by_index.values()) * depths[family] / len(by_index)
    return round(total)


def float_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of every parameter and stored buffer in bf16, by name."""
    return {name: 2 * tensor.numel() for name, tensor in model.state_dict().items()}


def quantized_bytes(solution: Solution) -> dict[str, int]:
    """Return the bytes of every tensor of a solution, by name: codes packed to their bits with their scales, floats."""
    found = {name: tensor.nbytes for name, tensor in solution.floats.items()}
    for name, params in solution.params.items():
        factors = 0 if params.channels is None else params.channels.nbytes
        codes = solution.codes[name].numel() * params.spec.bits // 8 if params.spec.is_weight else 0
        found[name] = codes + params.scale.nbytes + factors
    return found
