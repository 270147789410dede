"""Run a traced model over recorded calls: ranges, rows of inputs, and Fisher weights of its linear layers.

The model computes in its own dtype. What is picked goes to the CPU at once, so a device holds the model, the
activations of one call and the ranges. The Fisher diagonal needs a backward pass, with checkpointing of blocks, so only
models of at most `FISHER_PARAMETERS` parameters have it.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tqdit.calibration.call_values import floats_of
from tqdit.calibration.called import place_of
from tqdit.calibration.calls import Calls, RecordedCall
from tqdit.calibration.picker import share_of_rows
from tqdit.calibration.records import LinearRecord, Records, channels_of
from tqdit.calibration.rows import Site
from tqdit.errors import InputError
from tqdit.graph import Graph
from tqdit.recipe import Recipe
from tqdit.sampling.trajectory import Progress
from tqdit.system.hooks import hooks
from tqdit.timegroups import TimeGroups

RELATIVE = "each row counts relative to its own outputs"
FISHER_PARAMETERS = 3 * 10**9
FISHER = "fisher"  # the key of the note that says why there are no Fisher weights


def record(
    model: nn.Module,
    graph: Graph,
    calls: Calls,
    time_groups: TimeGroups,
    recipe: Recipe,
    progress: Progress = lambda _: None,
) -> Records:
    """Run a float model over `calls` and return the records of the linear layers of `graph`.

    Each layer keeps `recipe.rows` rows of its inputs at most, as many of each call, in the model's dtype. The model is
    left as it was. Raises `InputError` naming the site and the timestep of NaN or Inf, and naming
    a site that no call reaches.
    """
    if not len(calls):
        raise InputError("there are no calls to calibrate on; record at least one")
    parameters, notes = sum(parameter.numel() for parameter in model.parameters()), {}
    probed = recipe.probed and parameters <= FISHER_PARAMETERS
    if recipe.probed and not probed:
        notes[FISHER] = f"{RELATIVE}: no backward pass was made through {parameters / 1e9:.1f} billion parameters"
    try:
        found = _replayed(model, graph, calls, time_groups, recipe, probed, progress)
    except NotImplementedError as error:  # torch says so of an operation without a backward pass on this device
        if not probed:
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        notes[FISHER] = f"{RELATIVE}: no backward pass can be made here ({reason})"
        found = _replayed(model, graph, calls, time_groups, recipe, False, progress)
    return found.records(notes)


def _replayed(
    model: nn.Module,
    graph: Graph,
    calls: Calls,
    time_groups: TimeGroups,
    recipe: Recipe,
    probed: bool,
    progress: Progress,
) -> "_Replay":
    """Return the replay of all calls."""
    replay = _Replay(model, graph, time_groups, recipe, probed)
    with replay.attached():
        for number, call in enumerate(calls):
            replay.run(number, len(calls), call)
            progress((number + 1) / len(calls))
    return replay


class _Replay:
    """A model that is watched while it is called, and what was picked so far."""

    def __init__(self, model: nn.Module, graph: Graph, time_groups: TimeGroups, recipe: Recipe, probed: bool) -> None:
        self.model, self.graph, self.time_groups, self.recipe, self.probed = model, graph, time_groups, recipe, probed
        self.device, self.dtype = place_of(model)
        groups = time_groups.num_groups
        linears = [linear for block in graph.blocks for linear in block.linears]
        self.sites = [Site(linear, graph, groups) for linear in linears]
        self.times: list[float] = []
        self.listening = False  # hooks also run when a block is computed again for the backward pass

    def run(self, number: int, count: int, call: RecordedCall) -> None:
        """Make a call, backward too if the Fisher diagonal is asked for."""
        self.times.append(call.t)
        group = int(self.time_groups.index(torch.tensor(call.t, dtype=torch.float64)))
        rows = share_of_rows(self.recipe.rows, number, count)
        for site in self.sites:
            site.begin(number, group, rows, self.recipe.seed)
        arguments, leaves = call.to(self.device, self.dtype), list[torch.Tensor]()
        if self.probed:
            # A model counts the tokens of a mask in integers, which have no gradient.
            arguments = {
                name: value if "mask" in name else _with_leaves(value, leaves) for name, value in arguments.items()
            }
        self.listening = True
        with torch.set_grad_enabled(self.probed):
            output = self.model(**arguments)
        self.listening = False
        self._check_finite(call.t, group)
        if self.probed:
            self._probe(list(floats_of(output)), leaves, number)

    def _probe(self, outputs: list[torch.Tensor], leaves: list[torch.Tensor], number: int) -> None:
        """Send probes v ~ N(0, 1) from the outputs back to the leaves; hooks of outputs square what passes."""
        outputs = [output for output in outputs if output.requires_grad]
        if not outputs:
            return
        generator = torch.Generator().manual_seed(probe_seed(self.recipe.seed, number))
        for left in range(self.recipe.probes - 1, -1, -1):
            probes = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
            torch.autograd.grad(outputs, leaves, probes, retain_graph=left > 0, allow_unused=True)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the inputs of all layers, and their outputs if the Fisher diagonal is asked for."""
        with ExitStack() as stack:
            if self.probed:
                stack.enter_context(_without_parameter_gradients(self.model))
                stack.enter_context(_checkpointed(self.model, self.graph))
            keep = stack.enter_context(hooks())
            for site in self.sites:
                first = self.model.get_submodule(site.modules[0])
                keep(first.register_forward_pre_hook(partial(self._input, site), with_kwargs=True))
                for place, name in enumerate(site.modules if self.probed else ()):
                    keep(self.model.get_submodule(name).register_forward_hook(partial(self._output, site, place)))
            yield

    def _input(self, site: Site, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.listening:
            site.take(next(iter((*args, *kwargs.values()))).detach())

    def _output(self, site: Site, place: int, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        if self.listening and site.rows and output.requires_grad:
            output.register_hook(site.squares(place, self.recipe.probes))

    def _check_finite(self, t: float, group: int) -> None:
        """Raise `InputError` naming the first site, in the order of the graph, that had NaN or Inf, and when."""
        called = [site for site in self.sites if site.finite]
        finite = torch.stack([torch.stack(site.finite).all() for site in called]).cpu() if called else torch.ones(1)
        if finite.all():
            return
        site = called[int((~finite).nonzero()[0])]
        raise InputError(
            f"site '{site.name}': the float model has NaN or Inf values at timestep {t:g} (time group {group} "
            f"of {self.time_groups.num_groups}), no scale can represent them"
        )

    def records(self, notes: Mapping[str, str]) -> Records:
        """Return the records of all sites."""
        linears, ranges = {}, {}
        for site in self.sites:
            if not site.rows:
                raise InputError(
                    f"site '{site.name}': no call reaches the layer '{site.modules[0]}'; record calls that use it, or "
                    "trace the model with calls that do not"
                )
            ranges[site.name], ranges[channels_of(site.name)] = site.ranges()
            linears[site.name] = _joined(site, self.recipe)
        tokens = {site.name: site.tokens / len(self.times) for site in self.sites}
        times = torch.tensor(self.times, dtype=torch.float64)
        return Records(
            linears, {}, ranges, torch.zeros(0), times, self.recipe, self.time_groups, tokens=tokens,
            notes=dict(notes),
        )  # fmt: skip


def probe_seed(seed: int, call: int) -> int:
    """Return the seed of the probes of a call, which differs from that of every other call."""
    return random.Random(f"probes {seed} {call}").getrandbits(32)  # a generator of torch takes 32 bits


def _joined(site: Site, recipe: Recipe) -> LinearRecord:
    """Return the rows of all calls as one record, `recipe.rows` of them at most. All calls weigh the same."""
    chosen, fisher = site.chosen(recipe.rows, recipe.seed), site.weights()
    x, group = torch.cat(site.rows)[chosen], torch.cat(site.groups)[chosen]
    return LinearRecord(x, group, torch.ones(len(x)), torch.ones(len(x)), None if fisher is None else fisher[chosen])


def _with_leaves(tree: Any, leaves: list[torch.Tensor]) -> Any:
    """Return arguments whose floating-point tensors carry gradients to `leaves`.

    What the model gets are copies, since it may change its arguments in place.
    """
    if isinstance(tree, torch.Tensor):
        if not tree.is_floating_point():
            return tree
        leaves.append(tree.detach().clone().requires_grad_())
        return leaves[-1].clone()
    if isinstance(tree, Mapping):
        return {key: _with_leaves(value, leaves) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_with_leaves(value, leaves) for value in tree)
    return tree


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: only activations have one."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(model: nn.Module, graph: Graph) -> Iterator[None]:
    """Let a block keep its inputs alone for the backward pass, which computes the block again."""
    modules: dict[nn.Module, Any] = {
        module: module.__dict__.get("forward")
        for module in (model.get_submodule(block.prefix) for block in graph.blocks if block.prefix)
    }
    for module in modules:
        object.__setattr__(module, "forward", partial(checkpoint, module.forward, use_reentrant=False))
    try:
        yield
    finally:
        for module, former in modules.items():
            if former is None:
                object.__delattr__(module, "forward")
            else:
                object.__setattr__(module, "forward", former)
