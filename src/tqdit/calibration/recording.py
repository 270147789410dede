"""Record the calls that a pipeline makes to its transformers while a user generates with it."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.calibration.call_values import largest
from tqdit.calibration.called import Signature, check_finite, config_of, kind_of, same_module, time_argument
from tqdit.calibration.calls import Calls, RecordedCall
from tqdit.calibration.held import Held
from tqdit.calibration.pipeline_calls import TRANSFORMER, Recording
from tqdit.errors import InputError
from tqdit.system.hooks import hooks

Take = Callable[[tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def record(
    pipe_or_transformer: Any, *, per_group: int = 32, groups: int = 10, seed: int = 0, folder: str | Path | None = None
) -> Iterator[Recording]:
    """Record the calls of a pipeline's transformers, or of one transformer, while the block runs.

        with tqdit.record(pipe) as calls:
            for prompt in prompts:
                pipe(prompt, num_inference_steps=28)
        calls.save("calls.safetensors")

    At most `per_group` calls of each of `groups` time groups are kept, drawn at random by `seed`; during the block as
    many of each different time. With a `folder`, their tensors are in files there, mapped, instead of in memory. What
    is generated stays the same.

    The block yields a `Recording`, which is filled when the block ends, also by an interruption. Raises `InputError`
    for a pipeline without a transformer that takes a time; inside the block for an argument that cannot be stored, or
    with NaN or Inf; at its end if no transformer was called. A transformer that was not called, while another was, has
    no calls.
    """
    for name, number in (("per_group", per_group), ("groups", groups)):
        if type(number) is not int or number < 1:
            raise InputError(f"{name} must be at least 1, got {number!r}")
    modules = transformers(pipe_or_transformer)
    held = Held(None if folder is None else Path(folder))
    takers = {name: _Taker(name, module, per_group, seed, held) for name, module in modules.items()}
    recording = Recording({}, modules)
    try:
        with ExitStack() as watched:
            for name, module in modules.items():
                watched.enter_context(_watched(module, takers[name].take))
            yield recording
    except InputError:  # such as an argument that cannot be stored
        held.sweep(everything=True)
        raise
    except BaseException:
        _finish(recording, takers, held, per_group, groups, seed)  # an interruption costs no call that was made
        raise
    if not _finish(recording, takers, held, per_group, groups, seed):
        raise InputError(f"nothing was recorded: nothing in the block called {' or '.join(modules)}")


def _finish(
    recording: "Recording", takers: dict[str, "_Taker"], held: Held, per_group: int, groups: int, seed: int
) -> bool:
    """Put the calls that were kept into the recording, and remove what they do not need; say whether there are any."""
    called = {name: taker.calls().thinned(per_group, groups, seed) for name, taker in takers.items() if taker.seen}
    takers.clear()
    if called:
        recording.fill(called)
    held.sweep(everything=not called)
    return bool(called)


def transformers(pipe_or_transformer: Any) -> dict[str, nn.Module]:
    """Return the transformers of a pipeline that take a time, by the name of the component.

    A transformer that is no part of a pipeline is named "transformer". Raises `InputError` if there is none.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        Signature.of(pipe_or_transformer)
        config_of(pipe_or_transformer)
        return {TRANSFORMER: pipe_or_transformer}
    components = getattr(pipe_or_transformer, "components", None)
    if not isinstance(components, Mapping):
        kind = type(pipe_or_transformer).__name__
        raise InputError(f"record takes a diffusers pipeline or transformer, got a {kind}")
    found = {name: part for name, part in components.items() if TRANSFORMER in name and _denoises(part)}
    if not found:
        kind, named = type(pipe_or_transformer).__name__, ", ".join(components)
        raise InputError(f"a {kind} has no transformer that takes a timestep; its components are {named}")
    return found


def _denoises(part: Any) -> bool:
    from diffusers import ModelMixin

    return isinstance(part, nn.Module) and isinstance(same_module(part), ModelMixin) and time_argument(part) is not None


@contextmanager
def _watched(module: nn.Module, take: Take) -> Iterator[None]:
    """Let `take` see the arguments of every call of a module, before anything else does.

    A module that `module.compile()` has compiled calls its hooks in compiled code, which could not run `take`; so it is
    called before.
    """
    compiled = module._compiled_call_impl
    if compiled is None:
        with hooks() as keep:
            keep(
                module.register_forward_pre_hook(
                    lambda _, positional, named: take(positional, named), with_kwargs=True, prepend=True
                )
            )
            yield
        return

    def call(*positional: Any, **named: Any) -> Any:
        take(positional, named)
        return compiled(*positional, **named)

    module._compiled_call_impl = call
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


class _Taker:
    """Keeps some of the calls of one transformer: of each different time at most `most`, every one as likely."""

    def __init__(self, name: str, module: nn.Module, most: int, seed: int, held: Held) -> None:
        self._name, self._module = name, module
        self._most, self._seed, self._held = most, seed, held
        self._signature, self._config = Signature.of(module), config_of(module)
        self._of_time: dict[float, _Reservoir] = {}
        self.seen = 0

    @torch.compiler.disable
    def take(self, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Look at a call, and keep it if it is drawn.

        Raises `InputError` naming the component and the argument if the call cannot be kept.
        """
        signature = self._signature
        try:
            given = signature.bound(positional, named)
            t = largest(given.get(signature.timestep))
            if t is None:
                raise InputError(f"argument '{signature.timestep}' must be a finite number, or a tensor of such")
            if t not in self._of_time:
                self._of_time[t] = _Reservoir(self._most, f"{self._seed} time {t!r}")
            if (place := self._of_time[t].place()) is not None:
                call = RecordedCall(signature.kept(given, self._held.keep), t, signature.timestep)
                signature.check(call.arguments, self._config)
                check_finite(call.arguments, set())
                self._of_time[t].kept[place] = (self.seen, call)
        except InputError as error:
            raise InputError(f"{self._name}: {error}") from None
        self.seen += 1

    def calls(self) -> Calls:
        """Return the calls that are kept, in the order in which they were made."""
        kept = dict(pair for reservoir in self._of_time.values() for pair in reservoir.kept.values())
        calls = [kept[number] for number in sorted(kept)]
        return Calls(kind_of(self._module), self._config, self._signature.timestep, calls, self._of_time)


class _Reservoir:
    """A sample of at most `most` of the calls seen so far, each as likely to be in it, however many there are."""

    def __init__(self, most: int, seed: str) -> None:
        self.kept: dict[int, tuple[int, RecordedCall]] = {}  # place -> (number, call)
        self._most, self._draw, self._seen = most, random.Random(seed), 0

    def place(self) -> int | None:
        """Return the place of the next call, which may be taken already; None if the call is not drawn."""
        self._seen += 1
        place = self._seen - 1 if self._seen <= self._most else self._draw.randrange(self._seen)
        return place if place < self._most else None
