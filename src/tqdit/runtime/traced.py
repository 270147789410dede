"""Make a traced model out of a Solution: diffusers' own model, its linear layers on codes."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

from tqdit.architectures.traced import Traced, layer_names, traced
from tqdit.artifact.model_card import traced_card, traced_shape
from tqdit.errors import InputError
from tqdit.graph import Graph, Linear
from tqdit.layers.clock import Clock
from tqdit.layers.codes import LayerCodes
from tqdit.layers.quantized import QuantizedLinear
from tqdit.layers.shared_input import Source
from tqdit.ops.dispatch import get_backend, kernel_name
from tqdit.ops.modules import present
from tqdit.ops.schema import Backend, WeightParams
from tqdit.runtime.quantized import LOCK, QuantizedModel, SameAsDiffusers, offloading
from tqdit.spec import Solution
from tqdit.system.isolation import isolated

TRACED = "Traced"  # the first word of the names of classes that are made here
OURS = (
    "solution", "clock_argument", "quantization_backend", "site_kernels", "deviating", "requested_backend",
    "prepared_for",
)  # fmt: skip


class TracedModel(QuantizedModel):
    """The members that every traced model has beside those of diffusers' own class.

    The model's forward is diffusers' own. It never records gradients.
    """

    clock_argument: tuple[str, int]  # name and position of the time argument
    quantization_backend: str
    requested_backend: str
    prepared_for: str  # the kind of device that the layers are laid out for
    clock: Clock

    def shape_name(self) -> str:
        """Return the name of the class, and its parameters."""
        return traced_shape(self.solution)

    def card(self, size_bytes: int) -> str:
        """Return the model card of an artifact of this model."""
        return traced_card(self.solution, size_bytes)

    def in_call(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> AbstractContextManager[Any]:
        """Set the time groups of a call, if any layer has them; they hold until the context ends.

        Raises `InputError` for a call without its time, and for a time outside of the range of the groups.
        """
        if "clock" not in cast(Any, self)._modules:
            return nullcontext()
        name, position = self.clock_argument
        timestep = named.get(name, arguments[position] if position < len(arguments) else None)
        if timestep is None:
            raise InputError(f"the call has no '{name}', which the time groups of the model are of")
        return self.clock.during(timestep)

    def lay_out_for(self, device: torch.device) -> None:
        """Lay the layers out for a kind of device, only once however many threads ask.

        A model that accelerate offloads stays in the CPU's memory, and is offloaded as before.
        """
        with LOCK, isolated():
            model: Any = self
            if self.prepared_for == device.type:
                return
            hook = offloading(model)
            if hook is not None:
                remove_hook_from_module(model, recurse=True)
            for layer in model.modules():
                if isinstance(layer, QuantizedLinear):
                    layer.lay_out_for(device, layer.like.device if hook is None else torch.device("cpu"))
            chosen = get_backend(self.requested_backend, device)
            self.quantization_backend, self.prepared_for = chosen.NAME, device.type
            self.site_kernels, self.deviating = _report(self.solution, chosen), getattr(chosen, "deviating", None)
            if hook is not None:
                cpu_offload(model, device, offload_buffers=hook.offload_buffers)

    def enable_group_offload(
        self,
        onload_device: torch.device,
        offload_device: torch.device = torch.device("cpu"),
        offload_type: str = "block_level",
        **options: Any,
    ) -> None:
        """Offload groups of layers as diffusers does, after the layers have been laid out for their device.

        Raises `InputError` for single layers on disk: layers that read one input share its scales.
        """
        if options.get("offload_to_disk_path") is not None and offload_type != "block_level":
            raise InputError(
                f"a quantized model can be offloaded to disk by offload_type 'block_level' alone, got '{offload_type}':"
                " layers share the scales of the input that they read"
            )
        self.lay_out_for(torch.device(onload_device))
        cast(Any, super()).enable_group_offload(onload_device, offload_device, offload_type, **options)

    def adopt(self, other: "TracedModel") -> None:
        """Take over the parts of another converted model."""
        mine, others = cast(Any, self), cast(Any, other)
        mine._modules, mine._parameters, mine._buffers = others._modules, others._parameters, others._buffers
        for name in OURS:
            setattr(self, name, getattr(other, name))


def convert_traced(
    solution: Solution,
    backend: str,
    device: str | torch.device,
    dtype: torch.dtype | None,
    into: nn.Module | None = None,
) -> TracedModel:
    """Return the runnable model of a traced solution; see `runtime.convert.convert`.

    `dtype`: of the parameters that stay in float, but for those that the class keeps in fp32; None keeps the dtypes of
    the solution. Floats of the solution are shared where neither device nor dtype changes. `into`: the float model of
    the solution, which is made the runnable one itself. Each of its layers is freed once it has been replaced.
    """
    architecture, graph = traced(solution.model_config["_class_name"]), solution.graph
    assert graph is not None
    model: Any = architecture.empty(solution.model_config) if into is None else into
    device = torch.device(device)
    owners = _assemble(solution, graph, model, backend, device, dtype)
    _fill(solution, model, device, dtype)
    make_traced(model, architecture)
    chosen = get_backend(backend, device)
    model.requested_backend, model.quantization_backend = backend, chosen.NAME
    model.site_kernels, model.deviating = _report(solution, chosen), getattr(chosen, "deviating", None)
    model.prepared_for = device.type
    model.clock_argument = _position(architecture.model_class().forward, graph.timestep)
    places: Any = {f"{name}.weight": WholeLayer(layer) for name, layer in owners.items()}
    sites = {layer.source.params.spec.name: layer.source.params for layer in owners.values() if layer.source}
    codes = LayerCodes(places, sites, {})
    model.solution = replace(solution, codes=codes, floats=ModelFloats(model, owners, solution.floats))
    return cast(TracedModel, model.eval().requires_grad_(False))


def _report(solution: Solution, backend: Backend) -> dict[str, str]:
    return {name: kernel_name(params, backend) for name, params in solution.params.items()}


class WholeLayer:
    """The place of all codes of a layer, in the layout that it has now; see `layers.codes.Place`."""

    rows = slice(None)

    def __init__(self, owner: QuantizedLinear) -> None:
        self.owner = owner

    @property
    def layer(self) -> Any:
        """Return the layer in its backend's layout."""
        return self.owner.layer

    @property
    def shape(self) -> torch.Size:
        """Return the shape of the weight."""
        return torch.Size((self.owner.out_features, self.owner.in_features))


def make_traced(model: nn.Module, architecture: Traced) -> None:
    """Give a diffusers model the traced class of its class."""
    made = traced_class(architecture.name)
    model.__class__ = cast(type[nn.Module], made)
    model.__dict__["__module__"] = made.original.__module__
    for module in model.modules():
        if hasattr(module, "fuse_projections"):  # it would make new float layers of dequantized weights
            module.fuse_projections = refuse_fusing  # type: ignore[assignment]


def refuse_fusing(*_: Any, **__: Any) -> None:
    """Raise `InputError`: this stands in the place of `fuse_projections` of attention modules."""
    raise InputError("projections of a quantized model cannot be fused: layers that read one input share its codes")


@functools.cache
def traced_class(name: str) -> Any:
    """Return the class of the traced models of a diffusers class.

    It equals diffusers' own class and has its name, so that pipelines take it for theirs.
    """
    original = traced(name).model_class()
    contents = {
        "original": original,
        "forward": _forward(original.forward),
        "__doc__": f"`{name}` with linear layers in integers.",
        "__module__": __name__,
        "__qualname__": TRACED + name,
    }
    return SameAsDiffusers(name, (TracedModel, original), contents)


def __getattr__(name: str) -> Any:
    """Make a traced class again by its name, for pickle."""
    if name.startswith(TRACED) and name != TRACED:
        try:
            return traced_class(name.removeprefix(TRACED))
        except InputError:
            pass
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return diffusers' forward without gradients, after the time groups of the call are set."""

    @functools.wraps(original)
    def forward(self: TracedModel, *arguments: Any, **named: Any) -> Any:
        device = next((x.device for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)), None)
        if device is not None and device.type != self.prepared_for:
            _lay_out(self, device)
        with torch.no_grad(), self.in_call(arguments, named):
            return original(self, *arguments, **named)

    return forward


@torch.compiler.disable  # the graph breaks here unless a call on the device came first
def _lay_out(model: TracedModel, device: torch.device) -> None:
    model.lay_out_for(device)


def _position(forward: Callable[..., Any], name: str) -> tuple[str, int]:
    """Return an argument's name and its position after `self`."""
    names = list(inspect.signature(forward).parameters)[1:]
    if name not in names:
        raise InputError(f"the model's forward has no argument '{name}', which its time groups are of")
    return name, names.index(name)


def _assemble(
    solution: Solution, graph: Graph, model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype | None
) -> dict[str, QuantizedLinear]:
    """Put layers on codes into an empty model; return them by name."""
    clock = Clock(solution.time_groups).to(device)
    layers: dict[str, QuantizedLinear] = {}
    linears = {name: linear for block in graph.blocks for linear in block.linears for name in linear.modules}
    sources: dict[str, Source] = {}
    for name in layer_names(graph):
        if f"{name}.weight" not in solution.params:  # an end that stays in float
            continue
        source = _source(solution, linears.get(name), sources, clock, device)
        layers[name] = _layer(solution, name, source, backend, device, _dtype_in(model, name, dtype))
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        owner._modules[leaf] = layers[name]
    if any(source.timed for source in sources.values()):
        model.add_module("clock", clock)
    return layers


def _source(
    solution: Solution, linear: Linear | None, made: dict[str, Source], clock: Clock, device: torch.device
) -> Source | None:
    """Return the source of a layer, one for all layers of its input; None for a layer on float inputs."""
    if linear is None:
        return None
    site = linear.source.name
    if site not in made:
        made[site] = Source(solution.params[site], clock, len(linear.modules)).to(device)
    return made[site]


def _layer(
    solution: Solution, name: str, source: Source | None, backend: str, device: torch.device, dtype: torch.dtype | None
) -> QuantizedLinear:
    site, bias = f"{name}.weight", solution.floats.get(f"{name}.bias")
    params = solution.params[site]
    weight = WeightParams(solution.codes[site].to(device), params.scale.reshape(-1).to(device), params.spec.bits)
    like = dtype or (_common_dtype(solution) if bias is None else bias.dtype)
    return QuantizedLinear(weight, None if bias is None else bias.float().to(device), source, backend, like)


def _dtype_in(model: nn.Module, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a layer or parameter in a model of `dtype`: fp32 for what its class keeps so."""
    kept: Iterable[str] = getattr(model, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if dtype is not None and any(part in name.split(".") for part in kept) else dtype


def _common_dtype(solution: Solution) -> torch.dtype:
    """Return the dtype that most of the solution's floats have."""
    dtypes = [tensor.dtype for tensor in solution.floats.values() if tensor.is_floating_point()]
    return max(set(dtypes), key=dtypes.count, default=torch.float32)


def _fill(solution: Solution, model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Put the parameters and buffers that stay in float into a model, and move what it computed for itself."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            continue
        for held in (module._parameters, module._buffers):
            for leaf, tensor in list(held.items()):
                name = f"{path}.{leaf}" if path else leaf
                value = solution.floats.get(name)
                if value is None and (tensor is None or _is_part(module)):
                    continue
                value = tensor if value is None else value
                assert value is not None
                assert not value.is_meta, f"not filled: {name}"
                cast_too = value.is_floating_point() and name in solution.floats
                value = value.to(device, _dtype_in(model, name, dtype) if cast_too else None)
                held[leaf] = nn.Parameter(value, requires_grad=False) if held is module._parameters else value


def _is_part(module: nn.Module) -> bool:
    """Say whether a module belongs to a layer on codes, and is filled already."""
    return type(module).__module__.startswith("tqdit.") or hasattr(module, "unpacked")


class ModelFloats(Mapping[str, torch.Tensor]):
    """The parameters of a traced model that stay in float, by the name that they have in the float model.

    They are read from the model's modules, in the order of the solution's, wherever adapters have moved these to.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, QuantizedLinear], given: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name in given:
            owner, _, leaf = name.rpartition(".")
            self._places[name] = (layers.get(owner) or modules[owner], leaf)

    def __getitem__(self, name: str) -> torch.Tensor:
        owner, leaf = self._places[name]
        with present([owner.layer if isinstance(owner, QuantizedLinear) else owner]):
            value = owner.layer.bias if isinstance(owner, QuantizedLinear) else getattr(owner, leaf)
            if value.is_meta:
                raise InputError(f"'{name}' is offloaded; remove accelerate's hooks before reading it")
            value = cast(torch.Tensor, value).detach().cpu()
        if isinstance(owner, QuantizedLinear):  # products add the bias in fp32, and a model's dtype may be less
            rounded = value.to(owner.like.dtype)
            value = rounded if torch.equal(rounded.float(), value) else value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
