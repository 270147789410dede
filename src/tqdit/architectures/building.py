"""diffusers' `DiTTransformer2DModel` of a config: the one place where a float model's structure is made."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tqdit.architectures import timestep
from tqdit.architectures.sites import FREQUENCY_SHIFT, check_supported
from tqdit.errors import InputError

KEPT = (FREQUENCY_SHIFT, *timestep.DEFAULTS)  # keys of a config that diffusers does not know and a model heeds
OURS = (*KEPT, "quantization_config")  # keys of a config that diffusers does not take


def new_model(config: Mapping[str, Any]) -> nn.Module:
    """A float model whose weights are diffusers' initial ones. Its config has the `KEPT` keys that `config` has.

    A timestep t is embedded as cos and sin of s * 10000^(-i / (128 - shift)), i = 0 .. 127, with s = offset + scale t.
    Published DiT has shift 0; diffusers has 1, and no key for it, so `FREQUENCY_SHIFT` is ours, as are scale and offset
    (`tqdit.architectures.timestep`). Raises `InputError` for a config that is not supported or that diffusers refuses.
    """
    from diffusers import DiTTransformer2DModel

    check_supported(config)
    try:
        model: Any = DiTTransformer2DModel.from_config({k: v for k, v in config.items() if k not in OURS})
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"diffusers refuses it: {str(error).strip().partition(chr(10))[0]}") from None
    if FREQUENCY_SHIFT in config:
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = config[FREQUENCY_SHIFT]
    timestep.apply_timestep(model.transformer_blocks, config)
    if kept := {key: config[key] for key in KEPT if key in config}:
        model.register_to_config(**kept)
    return cast(nn.Module, model)


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """`new_model` on the meta device, its position table real."""
    with _EmptyOnMeta():
        return new_model(config)


class _EmptyOnMeta(TorchFunctionMode):
    """Memory for parameters is on the meta device; whatever is computed is real. Other threads notice nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def share_embedder(model: nn.Module) -> None:
    """Let all blocks use the embedder of block 0: diffusers gives every block its own copy of one embedder."""
    first, *others = cast(Iterable[Any], model.transformer_blocks)
    for block in others:
        block.norm1.emb = first.norm1.emb


def set_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Make `value` the parameter at a dotted path, without gradient and without a copy."""
    owner, _, leaf = name.rpartition(".")
    # accelerate changes `register_parameter` while another thread loads a model.
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
