"""Define the calls of one model: what a pipeline passes to its transformer, kept to run the transformer again."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import nn

from tqdit.calibration import call_file, call_values
from tqdit.calibration.called import Signature, check_finite, config_of, kind_of, same_module
from tqdit.calibration.held import Held
from tqdit.errors import InputError
from tqdit.timegroups import MAX_TIMESTEPS, TimeGroups

POSITIONS = ("ids", "rotary", "coords")  # in the names of arguments that hold positions, which 16 bits would round


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of a model: `model(**call.to(device))` runs it again.

    `arguments` has what the model's forward was given, by name: nested dicts, lists and tuples of CPU tensors of their
    own dtype, numbers, strings, bools and None. `t` decides the call's time group: it is the largest number of the
    argument `timestep`, since samples or tokens may have different times.
    """

    arguments: Mapping[str, Any]
    t: float
    timestep: str = "timestep"

    @classmethod
    def of(cls, arguments: Mapping[str, Any], timestep: str) -> Self:
        """Make a call of arguments that are copies. Raises `InputError` without a time that is a finite number."""
        t = call_values.largest(arguments.get(timestep))
        if t is None:
            raise InputError(f"argument '{timestep}' must be a finite number, or a tensor of such")
        return cls(arguments, t, timestep)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """Return copies of the arguments on a device, which the model may change.

        `dtype`: of the floating-point tensors, except times and positions, which keep the dtype that they were given
        in, and except float64.
        """

        def moved(name: str, value: Any) -> Any:
            exact = name == self.timestep or any(part in name for part in POSITIONS)

            def move(tensor: torch.Tensor) -> torch.Tensor:
                keep = exact or not tensor.is_floating_point() or tensor.dtype is torch.float64
                # A copy is aligned; a tensor in a mapped file may not be, and then sums differ in their last bits.
                return tensor.to(device, tensor.dtype if keep or dtype is None else dtype, copy=True)

            return call_values.mapped(value, move)

        return {name: moved(name, value) for name, value in self.arguments.items()}


class Calls(Sequence[RecordedCall]):
    """Calls of one transformer, in the order in which a pipeline made them.

    `kind` is the name of the transformer's diffusers class, `config` the part of its config that decides what it
    computes, and `timestep` the name of its time argument. `visited` are the different times at which the transformer
    was called, in order; only some of the calls may have been kept.

    Example: `Calls.of(transformer, [{"hidden_states": x, "timestep": t, "encoder_hidden_states": prompt}, ...])`.
    """

    def __init__(
        self,
        kind: str,
        config: Mapping[str, Any],
        timestep: str,
        calls: Iterable[RecordedCall],
        visited: Iterable[float] = (),
    ) -> None:
        self.kind, self.config, self.timestep = kind, dict(config), timestep
        self._calls = tuple(calls)
        self.visited = tuple(sorted({*visited, *(call.t for call in self._calls)}))

    @classmethod
    def of(cls, model: nn.Module, calls: Iterable[Mapping[str, Any]]) -> Self:
        """Return the calls of a model that keyword arguments make, such as from precomputed prompt embeddings.

        Tensors are copied, and equal ones are kept once. Raises `InputError` as `check` does.
        """
        signature, held, kept = Signature.of(model), Held(), []
        for index, arguments in enumerate(calls):
            if not isinstance(arguments, Mapping):
                raise InputError(f"call {index} is of type {type(arguments).__name__}, not a dict of arguments")
            try:
                given = signature.bound((), arguments)
                kept.append(RecordedCall.of(signature.kept(given, held.keep), signature.timestep))
            except InputError as error:
                raise InputError(f"call {index}: {error}") from None
        made = cls(kind_of(model), config_of(model), signature.timestep, kept)
        made.check(model)
        return made

    @overload
    def __getitem__(self, index: int) -> RecordedCall: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> "RecordedCall | Calls":
        return self._with(self._calls[index]) if isinstance(index, slice) else self._calls[index]

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"<{len(self)} calls of a {self.kind}>"

    @cached_property
    def times(self) -> torch.Tensor:
        """Return the time of every call, (n,) fp64, in the units of the model's own argument."""
        return torch.tensor([call.t for call in self], dtype=torch.float64)

    @cached_property
    def sha256(self) -> str:
        """Return the sha256 of all that the calls hold, which their file has, too."""
        return self.content().sha256

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` unless these are calls that the model can run.

        There must be calls; the model must be of the same class and config; arguments must be those of its forward.
        Latents must be of at most 32 bits and have the model's channels, and no tensor may have NaN or Inf, except Inf
        in a mask.
        """
        kind, config = kind_of(model), config_of(model)
        if self.kind not in (base.__name__ for base in type(same_module(model)).__mro__):
            raise InputError(f"these are calls of a {self.kind}, the model is a {kind}")
        for key in sorted({*config, *self.config}):
            if config.get(key) != self.config.get(key):
                raise InputError(
                    f"these are calls of a {kind} whose {key} is {self.config.get(key)!r}; the model's is "
                    f"{config.get(key)!r}"
                )
        if not self._calls:
            raise InputError(f"there are no calls of the {kind}")
        signature, finite = Signature.of(model), set[int]()
        if signature.timestep != self.timestep:
            raise InputError(f"the calls' time is '{self.timestep}', the model's is '{signature.timestep}'")
        for index, call in enumerate(self):
            try:
                signature.check(call.arguments, config)
                check_finite(call.arguments, finite)
            except InputError as error:
                raise InputError(f"call {index}: {error}") from None

    def time_groups(self, groups: int) -> TimeGroups:
        """Return at most `groups` time groups, each with about equally many of the times that were visited.

        There is a group for each time if that is fewer, as for models of few steps; every group has a call. The range
        is [0, 1] or [0, 1000], if the times are in it, since pipelines with other steps or sizes visit other times.
        """
        if not self._calls:
            raise InputError("time groups need at least one call")
        found = TimeGroups.visited(self.visited, groups, *self._range(), closed=True)
        if len(found.index(self.times).unique()) == found.num_groups:
            return found
        return TimeGroups.visited(self.times, groups, *self._range(), closed=True)

    def thinned(self, per_group: int, groups: int, seed: int = 0) -> Self:
        """Return at most `per_group` calls of each of `groups` time groups, drawn at random, in the same order.

        What is drawn of a group depends on the seed, and on the number and the calls of this group.
        """
        if per_group < 1:
            raise InputError(f"per_group must be at least 1, got {per_group}")
        found = self.time_groups(groups)
        index, chosen = found.index(self.times), list[int]()
        for group in range(found.num_groups):
            members = (index == group).nonzero()[:, 0].tolist()
            draw = random.Random(f"{seed} group {group}")
            chosen += members if len(members) <= per_group else draw.sample(members, per_group)
        return self._with(self._calls[i] for i in sorted(chosen))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; equal tensors are written once.

        Raises `InputError` for a path that is no file's.
        """
        call_file.write(Path(path), self.content())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the calls of a file; tensors stay in the file until they are used.

        Raises `InputError` naming the file if it is damaged, or of another kind.
        """
        return cls.of_content(call_file.read(Path(path)), path)

    @classmethod
    def of_content(cls, found: call_file.Content, path: str | Path) -> Self:
        """Return the calls that a file held. Raises `InputError` naming the file for a call without a time."""
        try:
            calls = [RecordedCall.of(arguments, found.timestep) for arguments in found.arguments]
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from None
        return cls(found.kind, found.config, found.timestep, calls, found.visited)

    def content(self, component: str = "") -> call_file.Content:
        """Return what a file of these calls holds; `component` is the transformer's name in its pipeline."""
        arguments = [call.arguments for call in self]
        return call_file.Content(self.kind, self.config, self.timestep, self.visited, arguments, component)

    def _with(self, calls: Iterable[RecordedCall]) -> Self:
        return type(self)(self.kind, self.config, self.timestep, calls, self.visited)

    def _range(self) -> tuple[float, float]:
        """Return a range that has all times, and those of other runs of the pipeline."""
        low, high = self.visited[0], self.visited[-1]
        whole = isinstance(time := self[0].arguments[self.timestep], torch.Tensor) and not time.is_floating_point()
        if low >= 0 and high <= 1000:
            return 0.0, 1.0 if high <= 1 and not whole and not isinstance(time, int) else 1000.0
        room = 2 * max(abs(low), abs(high))
        return (0.0 if low >= 0 else max(-room, -MAX_TIMESTEPS)), min(room, MAX_TIMESTEPS)
