"""`convert`: a Solution becomes a runnable transformer. The sole place where modules are swapped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tqdit.architectures.building import empty_model
from tqdit.architectures.sites import BlockLayout, LinearGroup, blocks, float_input_modules
from tqdit.artifact.tensors import decisive
from tqdit.errors import InputError
from tqdit.layers.block import IntBlock
from tqdit.layers.clock import TimestepClock
from tqdit.layers.conditioning import Conditioning, TimestepTable
from tqdit.layers.linear import IntLinear, WeightOnlyLinear, WeightOnlyPatchEmbed
from tqdit.layers.params import ActivationParams
from tqdit.ops.dispatch import get_backend, kernel_name
from tqdit.ops.modules import Fingerprint, present, state_names
from tqdit.ops.schema import Backend, WeightParams
from tqdit.runtime.calls import attach_runtime
from tqdit.runtime.fitting import check_solution
from tqdit.spec import Role, Solution

ADALN = "norm1.linear"  # of a block

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convert(
    solution: Solution,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    memory: str | torch.device | None = None,
) -> nn.Module:
    """A diffusers `DiTTransformer2DModel` whose sites run on the codes of `solution`, in eval mode, on `device`.

    The float weights are never materialised: the structure is built empty and filled. The result has
    `quantization_backend`, `quantization_report` (site name -> kernel) and `solution`, whose codes are those of its
    layers. `dtype`: as `torch_dtype` of diffusers; bfloat16 is also that of the residual stream. With the backend
    "auto" the model is converted again by a call on another kind of device. `memory`: the device that holds the
    tensors of a model that is offloaded, whose parts are moved to `device` one at a time; `device` itself by default.

    Raises `InputError` if the solution does not fit the model that its config describes (see `models.fitting`), and if
    the backend cannot run on the device.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    check_solution(solution)
    return _converted(solution, backend, device, dtype, memory)


def _converted(
    solution: Solution,
    backend: str,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    memory: str | torch.device | None = None,
) -> nn.Module:
    chosen = get_backend(backend, device)
    model: Any = empty_model(solution.model_config)
    builder = _Builder(solution, chosen, model)
    for name in float_input_modules(solution.model_config):
        if not name.endswith(ADALN):
            _replace(model, name, builder.float_input(model.get_submodule(name), name))
    embedders = {}
    for layout in blocks(solution.model_config):
        empty: Any = model.get_submodule(layout.prefix)
        embedders[layout.prefix] = builder.filled(empty.norm1.emb, f"{layout.prefix}.norm1.emb.")
        _replace(model, layout.prefix, builder.block(layout, empty))
    builder.filled(model)
    builder.condition(model, embedders)
    attach_runtime(model, builder.clock, builder.conditioning, graphs=chosen.GRAPHS)
    empty_yet = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    assert not empty_yet, f"not filled: {empty_yet}"
    model.quantization_backend = chosen.NAME
    model.quantization_report = {name: kernel_name(params, chosen) for name, params in solution.params.items()}
    model.solution = replace(solution, codes=LayerCodes(builder.places, builder.sites))
    model.reconvert = partial(_converted, backend=backend)  # of a solution that fits
    model.io_dtype = dtype
    model.prepared_for = torch.device(device).type
    model.fingerprint = Fingerprint(_described(solution, chosen.NAME, device))
    model.fixed = frozenset(state_names(model))
    return model.eval().requires_grad_(False).to(device if memory is None else memory)


def _described(solution: Solution, backend: str, device: str | torch.device) -> dict[str, Any]:
    """What a converted model is beside its tensors: grids, time groups, provenance, and how its layers are laid out."""
    return {
        "model_config": decisive(solution.model_config),
        "time_groups": asdict(solution.time_groups),
        "sites": [asdict(spec) for spec in solution.sites],
        "provenance": solution.provenance.to_json(),
        "layout": [backend, torch.device(device).type],
    }


@dataclass(frozen=True)
class _Place:
    """Where a weight's codes are: `rows` of a layer's."""

    layer: Any
    rows: slice
    shape: torch.Size


class LayerCodes(Mapping[str, torch.Tensor]):
    """Weight codes by site, as the layers of a model hold them, unpacked on demand: int8, on the CPU."""

    def __init__(self, places: Mapping[str, _Place], sites: Mapping[str, ActivationParams]) -> None:
        """`sites`: the activation sites of the same model."""
        self._places = places
        self._sites = sites

    def __getitem__(self, site: str) -> torch.Tensor:
        place = self._places[site]
        with _readable(site, place.layer):
            return place.layer.unpacked()[place.rows].reshape(place.shape).cpu()

    def __contains__(self, site: object) -> bool:
        return site in self._places  # a Mapping's own would unpack the codes

    def shape_of(self, site: str) -> torch.Size:
        """The shape of a site's codes, without unpacking them."""
        return self._places[site].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def check_unchanged(self, solution: Solution) -> None:
        """`InputError` if a scale, zero point or bias of the model is not that of `solution`, which has no others."""
        for site, place in self._places.items():
            layer, bias = place.layer, solution.floats.get(f"{site.removesuffix('.weight')}.bias")
            with _readable(site, layer):
                mine = layer.scale if len(layer.scale) == 1 else layer.scale[place.rows]
                pairs = [(mine, solution.params[site].scale)]
                if bias is not None:
                    pairs.append((layer.bias[place.rows], bias))
                _check_equal(site, pairs)
        for name, module in self._sites.items():
            with _readable(name, module):
                params = solution.params[name]
                scales = params.scale.unbind(-1) if params.spec.grid.two_region else (params.scale,)
                pairs = list(zip((module.scale, module.coarse), scales, strict=False))
                if params.zero_point is not None:
                    pairs.append((module.zero_point, params.zero_point))
                _check_equal(name, pairs)


@contextmanager
def _readable(site: str, module: nn.Module) -> Iterator[None]:
    """Have the tensors of an offloaded module here, or an `InputError` where they came with a whole block only."""
    with present([module]):
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise InputError(f"the tensors of '{site}' are offloaded; remove accelerate's hooks before reading them")
        yield


def _check_equal(site: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Of a site: what a model has, and what its solution has, which may be one value for all channels."""
    for mine, given in pairs:
        if not torch.equal(mine.flatten().cpu(), given.flatten().to(mine.dtype).expand(mine.numel())):
            raise InputError(f"'{site}' was changed in the integer model; what it was solved for cannot be saved so")


class _Builder:
    """Makes the layers of one model out of a solution that fits it; `model` is empty."""

    def __init__(self, solution: Solution, backend: Backend, model: nn.Module) -> None:
        self.solution = solution
        self.backend = backend
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.heads = int(solution.model_config["num_attention_heads"])
        self.clock = TimestepClock(solution.time_groups)
        self.conditioning = Conditioning()
        self.float_inputs: dict[tuple[int, ...], nn.Module] = {}
        self.places: dict[str, _Place] = {}
        self.sites: dict[str, ActivationParams] = {}

    def weight(self, name: str) -> WeightParams:
        params, codes = self.solution.params[name], self.solution.codes[name]
        return WeightParams(codes.flatten(1), params.scale.reshape(-1))

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter that stays in float."""
        return self.solution.floats[name]

    def bias(self, module: str) -> torch.Tensor | None:
        name = f"{module}.bias"
        return self.parameter(name) if name in self.shapes else None

    def site(self, name: str, ndim: int) -> ActivationParams:
        self.sites[name] = ActivationParams(self.solution.params[name], self.clock, ndim, self.backend.TABLES)
        return self.sites[name]

    def linear(self, group: LinearGroup) -> IntLinear:
        """Layers that read one site, stacked along their outputs."""
        weights = [self.weight(f"{module}.weight") for module in group.modules]
        biases = [self.bias(module) for module in group.modules]
        layer = self.backend.prepare(_stacked(weights), _stacked_biases(biases))
        self._placed(group.modules, layer)
        return IntLinear(self.site(group.source, 3), layer)

    def block(self, layout: BlockLayout, empty: Any) -> IntBlock:
        """`empty`: diffusers' block."""
        roles = (Role.QUERY, Role.KEY, Role.VALUE, Role.SOFTMAX)
        block = IntBlock(
            {"qkv": self.linear(layout.qkv), "out": self.linear(layout.out),
             "fc1": self.linear(layout.fc1), "fc2": self.linear(layout.fc2)},
            {role.value: self.site(layout.operand(role), 4) for role in roles},
            self.heads,
            (float(empty.norm1.norm.eps), float(empty.norm3.eps)),
            self.backend,
            self.conditioning,
        )  # fmt: skip
        linears = {"qkv": layout.qkv, "out": layout.out, "fc1": layout.fc1, "fc2": layout.fc2}
        inside = len(layout.prefix) + 1
        names = {layer: [name[inside:] for name in group.modules] for layer, group in linears.items()}
        shapes = {name: empty.get_submodule(name).weight.shape for ns in names.values() for name in ns}
        block.add_slots(names, shapes, closed=[name[inside:] for name in layout.float_input])
        return block

    def condition(self, model: Any, embedders: Mapping[str, nn.Module]) -> None:
        """Stack the adaLN layers of all blocks whose embedders are equal: diffusers gives each block its own copy."""
        groups: list[tuple[nn.Module, list[str]]] = []
        for block, embedder in embedders.items():
            same = next((members for other, members in groups if _equal(other, embedder)), None)
            if same is None:
                groups.append((embedder, [block]))
            else:
                same.append(block)
        for embedder, members in groups:
            projection = embedder.get_submodule("time_proj")
            embedder.time_proj = TimestepTable(projection, int(self.solution.time_groups.high))
            group = self.conditioning.add(embedder, self.adaln(members))
            for place, name in enumerate(members):
                model.get_submodule(name).join(group, place)

    def adaln(self, members: Sequence[str]) -> WeightOnlyLinear:
        """The adaLN layers of some blocks as one."""
        weights = _stacked([self.weight(f"{name}.{ADALN}.weight") for name in members])
        bias = _stacked_biases([self.bias(f"{name}.{ADALN}") for name in members])
        layer = self.backend.prepare_float_input(weights, bias)
        self._placed([f"{name}.{ADALN}" for name in members], layer)
        return WeightOnlyLinear(layer, self.backend)

    def float_input(self, module: nn.Module, name: str) -> nn.Module:
        weight, bias = self.weight(f"{name}.weight"), self.bias(name)
        key = tuple(0 if tensor is None else tensor.data_ptr() for tensor in (weight.codes, weight.scale, bias))
        if key not in self.float_inputs:  # an artifact stores a tied layer once: hold it once
            self.float_inputs[key] = self.backend.prepare_float_input(weight, bias)
        self._placed([name], self.float_inputs[key])
        linear = WeightOnlyLinear(self.float_inputs[key], self.backend)
        return WeightOnlyPatchEmbed(linear, module.stride[0]) if isinstance(module, nn.Conv2d) else linear

    def _placed(self, modules: Iterable[str], layer: nn.Module) -> None:
        """Note that the weights of `modules` are `layer`, one under the other."""
        first = 0
        for name in modules:
            shape = self.shapes[f"{name}.weight"]
            self.places[f"{name}.weight"] = _Place(layer, slice(first, first + shape[0]), shape)
            first += shape[0]

    def filled(self, module: nn.Module, prefix: str = "") -> nn.Module:
        """The module, the parameters that stay in float put where its empty ones are. `prefix`: of their names."""
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                _replace(module, name, nn.Parameter(self.parameter(prefix + name), requires_grad=False))
        return module


def _stacked(weights: list[WeightParams]) -> WeightParams:
    if len(weights) == 1:
        return weights[0]
    scales = [w.scale.expand(len(w.codes)) for w in weights]  # per tensor or per channel
    return WeightParams(torch.cat([w.codes for w in weights]), torch.cat(scales))


def _stacked_biases(biases: list[torch.Tensor | None]) -> torch.Tensor | None:
    found = [bias for bias in biases if bias is not None]
    assert len(found) in (0, len(biases)), "an architecture has biases on all of q, k and v or on none"
    return torch.cat(found) if found else None


def _equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(x.data_ptr() == y.data_ptr() or torch.equal(x, y) for x, y in pairs)


def _replace(model: nn.Module, name: str, value: Any) -> None:
    """Set the submodule or parameter at a dotted path."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value  # accelerate changes `register_parameter` while another thread loads a model
    elif isinstance(owner, nn.Sequential | nn.ModuleList):
        owner[int(leaf)] = value
    else:
        setattr(owner, leaf, value)
