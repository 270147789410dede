"""The class of a converted model; a module of its own because it imports diffusers."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from accelerate.utils import convert_file_size_to_int
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, LabelEmbedding, PatchEmbed, TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn import functional as F

from tqdit.architectures.shapes import shape_name
from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import model_card, write_card
from tqdit.errors import InputError
from tqdit.ops.modules import HOOK, Closed, Untrainable, check_same
from tqdit.spec import Solution
from tqdit.system.files import replacing
from tqdit.system.isolation import isolated

FEW_TOKENS = 8192  # of the samples that are in fp32 at a time
ONE_PIECE = 10 * 2**20  # bytes: torch's allocator takes memory for smaller tensors together, 20 MiB at a time
CONVERTED = ("quantization_backend", "quantization_report", "solution", "reconvert", "prepared_for", "fixed")
LOCK = threading.Lock()  # a model is converted again by one thread, however many ask


class _SameAsDiffusers(type):
    """Makes the class equal to diffusers' own. Pipelines compare the class of a part with the one that they expect."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is DiTTransformer2DModel

    def __hash__(cls) -> int:
        return hash(DiTTransformer2DModel)


class IntegerDiT(Closed, Untrainable, DiTTransformer2DModel, metaclass=_SameAsDiffusers):  # type: ignore[metaclass]
    """diffusers' transformer, its blocks, conditioning and call in integers; `convert` makes it."""

    solution: Solution  # its codes are those of the layers
    reconvert: Any  # a Solution and `device` -> a model converted in the same way
    prepared_for: str  # the kind of device that the layers are laid out for
    fixed: frozenset[str]  # names in a state dict that are the model's own, not an adapter's
    runtime: Any
    conditioning: Any
    config: Any
    out_channels: int
    io_dtype: torch.dtype = torch.float32
    _no_split_modules = ["IntBlock"]  # noqa: RUF012 - as diffusers has them
    _repeated_blocks = ["IntBlock"]  # noqa: RUF012

    @property
    def dtype(self) -> torch.dtype:
        """What a pipeline makes its latents in: the `torch_dtype` it was loaded with. See `stream_dtype`."""
        return self.io_dtype

    @property
    def stream_dtype(self) -> torch.dtype:
        """Of the residual stream between the blocks: bf16 in a model of that dtype, else fp32. All else is computed as
        ever. fp16 would not hold what real models add up.
        """
        return torch.bfloat16 if self.io_dtype is torch.bfloat16 else torch.float32

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Another dtype is that of inputs, outputs and the residual stream alone."""
        self.io_dtype = fn(torch.zeros((), dtype=self.io_dtype)).dtype

        def moved(x: torch.Tensor) -> torch.Tensor:
            new = fn(x)
            return new if new.dtype == x.dtype else x.to(new.device)

        nn.Module._apply(self, moved, recurse)
        return self

    def adopt(self, other: nn.Module) -> Self:
        """Become what another converted model is; the model's own hooks, config and adapters stay.

        Whether calls are graphs is the backend's choice again: one for CPUs has none, which says nothing about a GPU's.
        """
        mine, others = (cast(Any, model)._modules for model in (self, other))
        for old, new in zip(mine.get("transformer_blocks", ()), others["transformer_blocks"], strict=False):
            new.slots.take(old.slots)
        self._modules = others
        for name in CONVERTED:
            setattr(self, name, getattr(other, name))
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict the noise of a batch of latents; parameters and result are those of diffusers' own forward.

        `InputError` for what does not fit the model. The result never requires a gradient.
        """
        self.runtime.inputs.check_states(hidden_states)
        if hidden_states.device.type != self.prepared_for:
            self._prepare(hidden_states.device)
        blocks = self._modules["transformer_blocks"]
        output = self.runtime.call(self._denoised, hidden_states, timestep, class_labels, blocks)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    @torch.compiler.disable  # compile after a first call on the device, or the graph breaks here
    def _prepare(self, device: torch.device) -> None:
        """Be converted for a kind of device, once however many threads ask.

        A model that accelerate offloads stays in the CPU's memory, laid out for the device that its parts visit.
        """
        with LOCK, isolated():
            if self.prepared_for == device.type:
                return
            hook = _offloading(self)
            if hook is None:
                self.adopt(self.reconvert(self.solution, device=device))
                return
            if len({str(part) for part in (getattr(self, "hf_device_map", None) or {}).values()} - {"cpu"}) > 1:
                raise InputError(f"a model that is dispatched to several devices has to be loaded on {device} first")
            remove_hook_from_module(self, recurse=True)
            self.adopt(self.reconvert(self.solution, device=device, memory="cpu"))
            cpu_offload(self, device, offload_buffers=hook.offload_buffers)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Before any tensor is loaded: `InputError` for a state dict that is not this model's, or an adapter for it.

        Of an artifact only its own values are accepted, whose grids the model has. What neither the model nor an
        adapter in it has a place for is refused even where torch would ignore it: peft drops it in silence.
        """
        own = self.state_dict(prefix=prefix, keep_vars=True)
        fixed = {prefix + name for name in self.fixed}
        check_same(own, {name: value for name, value in state_dict.items() if name in fixed})
        for name in sorted(name for name in state_dict if name.startswith(prefix) and name not in own):
            parameter = name[len(prefix) :].replace(".base_layer.", ".")
            mine, value = self.solution.floats.get(parameter), state_dict[name]
            if mine is None or mine.shape != value.shape or not torch.equal(mine.to(value), value):
                raise InputError(
                    f"there is no place for '{parameter}' in an integer model: beside its own state only plain LoRA is"
                    " loaded, on the linear layers of attention and feed-forward, whose biases stay the artifact's"
                )
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """diffusers' own: what is in the folder decides the class."""
        return DiTTransformer2DModel.from_pretrained(*arguments, **options)

    @classmethod
    def from_config(cls, *arguments: Any, **options: Any) -> Any:
        """diffusers' own: a float model."""
        return DiTTransformer2DModel.from_config(*arguments, **options)

    @isolated()
    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        save_function: Any = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write an artifact that `from_pretrained` and tqdit read: whole or not at all, unlike diffusers' own.

        A model that is there is replaced. `InputError` for a folder with anything else in it, for options that an
        artifact does not have (pickled weights, variants), and for a model whose scales, zero points or biases are no
        longer those of its solution. To push, call `push_to_hub`.
        """
        refused = {"safe_serialization=False": not safe_serialization, f"variant='{variant}'": variant is not None,
                   "push_to_hub=True": push_to_hub}  # fmt: skip
        for name, given in refused.items():
            if given:
                raise InputError(f"save_pretrained of an integer model does not support {name}")
        if is_main_process:
            cast(Any, self.solution.codes).check_unchanged(self.solution)
            target = Path(save_directory)
            artifact.check_replaceable(target)
            most = None if max_shard_size is None else convert_file_size_to_int(max_shard_size)
            with replacing(target, overwrite=True, in_pipeline=True) as folder:
                artifact.write(self.solution, folder, most)
                text = model_card(self.solution, shape_name(self.solution.model_config), artifact.size_bytes(folder))
                write_card(folder, text, target)
            artifact.unseal_pipeline(target)

    def to(self, *arguments: Any, **options: Any) -> Self:
        """As torch's: `_apply` knows what another dtype changes. diffusers would refuse to cast a quantized model."""
        return nn.Module.to(self, *arguments, **options)

    def half(self, *_: Any) -> Self:
        """As torch's."""
        return nn.Module.half(self)

    def float(self, *_: Any) -> Self:  # below all annotations, which mean the type
        """As torch's."""
        return nn.Module.float(self)

    def _denoised(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C or 2C, H, W), as diffusers' own forward, for the call that clock and conditioning are
        set to; in the dtype of x, whatever that of the residual stream.

        Before and after the blocks samples are taken a few at a time: (B, N, D) in fp32, and several of them in the
        last LayerNorm, would be more than any block has alive.
        """
        side = self.config.patch_size
        few = max(1, FEW_TOKENS * side**2 // (x.shape[-2] * x.shape[-1]))
        layers: Any = self
        self._lay_out(x, few)
        stream = _joined([layers.pos_embed(part.float()).to(self.stream_dtype) for part in _parts(x, few)])
        for block in layers.transformer_blocks:
            stream = block(stream, block.modulation())
        modulation = layers.proj_out_1(F.silu(self.conditioning.embedding(0)))
        parts = zip(_parts(stream, few), _parts(modulation, few), strict=True)
        patches = _joined([self._patches(*part) for part in parts])
        rows, columns = (size // side for size in x.shape[-2:])
        patches = patches.reshape(-1, rows, columns, side, side, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(-1, self.out_channels, rows * side, columns * side).to(x.dtype)

    def _lay_out(self, x: torch.Tensor, few: int) -> None:
        """Give a CUDA graph under capture one piece of memory, about what a call has alive at most.

        Its tensors then are parts of that piece, or most of them: left to come as they may, most sizes would get memory
        of their own, which a graph keeps.
        """
        if x.device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
            return
        config, batch = self.config, x.shape[0]
        width = config.num_attention_heads * config.attention_head_dim
        tokens = x.shape[-2] * x.shape[-1] // config.patch_size**2
        stream = batch * tokens * width * self.stream_dtype.itemsize
        modulation = batch * config.num_layers * 6 * width * 4
        in_a_block = stream + batch * tokens * width * 4  # its output, beside codes after GELU
        around = min(few, batch) * tokens * width * 4 * 2  # fp32, before the blocks and after
        total = stream + modulation + max(in_a_block, around)
        if total >= ONE_PIECE:
            torch.empty(total + 2**20, dtype=torch.uint8, device=x.device)  # what is smaller comes besides

    def _patches(self, stream: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """The last layer of some samples: (B, N, D), (B, 2 D) -> (B, N, pixels and channels of a patch) in fp32."""
        layers: Any = self
        shift, scale = modulation[:, None].chunk(2, dim=-1)
        patches = layers.proj_out_2(layers.norm_out(stream.float()) * (1 + scale) + shift)
        # Codes hold no NaN and no Inf. The stream keeps them at their token; as in a float model, whose tokens all read
        # each other, the whole sample shall be NaN. Not by `patches * 0`, which compilers take for 0.
        finite = patches.isfinite().flatten(1).all(dim=1)[:, None, None]
        return patches.where(finite, torch.nan)


def _parts(x: torch.Tensor, few: int) -> Sequence[torch.Tensor]:
    """A batch, a few samples at a time; whole if compiled, since a graph for each number of parts is one too many."""
    return (x,) if torch.compiler.is_compiling() else x.split(few)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Parts of a batch as one."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# A pipeline that is saved notes the name and the module of each part, and is loaded by them. It has to find diffusers'
# own class, whose `from_pretrained` makes this one; pickling goes by `__qualname__`, which stays.
IntegerDiT.__name__ = DiTTransformer2DModel.__name__


class _ClosedEmbedder(Closed, CombinedTimestepLabelEmbeddings):
    """diffusers' own, closed to adapters."""


class _ClosedLabels(Closed, LabelEmbedding):
    """diffusers' own, closed to adapters."""


class _ClosedTimestep(Closed, TimestepEmbedding):
    """diffusers' own, closed to adapters."""


class _ClosedPatches(Closed, PatchEmbed):
    """diffusers' own, closed to adapters."""


class _ClosedList(Closed, nn.ModuleList):
    """torch's own, closed to adapters."""


CLOSED = {
    cls.__bases__[1]: cls for cls in (_ClosedEmbedder, _ClosedLabels, _ClosedTimestep, _ClosedPatches, _ClosedList)
}


def _offloading(model: nn.Module) -> AlignDevicesHook | None:
    """The first of accelerate's hooks that sends tensors away."""
    for module in model.modules():
        hook = module.__dict__.get(HOOK)
        for part in getattr(hook, "hooks", (hook,)):
            if isinstance(part, AlignDevicesHook) and part.offload:
                return part
    return None


def make_integer(model: nn.Module) -> IntegerDiT:
    """Give a diffusers transformer this class, and parts of it one that adapters cannot reach into."""
    for module in model.modules():
        module.__class__ = CLOSED.get(type(module), type(module))
    model.__class__ = cast(type[nn.Module], IntegerDiT)
    model.__dict__["__module__"] = DiTTransformer2DModel.__module__
    return cast(IntegerDiT, model)
