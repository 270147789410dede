"""`Gallery`: the models of a page, which can all be asked for the same."""

from collections.abc import Sequence
from dataclasses import dataclass

from tqdit.errors import InputError
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import Conditions
from tqdit.serving import sampled
from tqdit.serving.sampled import Sampled
from tqdit.stages import Report, silent

MOST = 4  # models that a page has room for


@dataclass(frozen=True)
class Gallery:
    """Models side by side. Raises `InputError` for models that cannot be asked for the same image."""

    models: tuple[Sampled, ...]

    def __post_init__(self) -> None:
        check_number(len(self.models))
        first = self.models[0]
        for other in self.models[1:]:
            if len(other.choices) != len(first.choices):
                raise InputError(
                    f"models side by side draw the same classes: '{first.source.name}' has {len(first.choices)}, "
                    f"'{other.source.name}' has {len(other.choices)}"
                )
            if other.shape != first.shape:
                raise InputError(
                    f"models side by side start from the same noise: that of '{first.source.name}' is {first.shape}, "
                    f"that of '{other.source.name}' {other.shape}"
                )

    @property
    def choices(self) -> list[tuple[str, int]]:
        """Return the name and number of every class or prompt."""
        return self.models[0].choices

    @property
    def prompted(self) -> bool:
        """Say whether the models draw prompts rather than classes."""
        return self.models[0].conditions is not None

    @property
    def samplers(self) -> list[str]:
        """Return the samplers that suit every model."""
        others = self.models[1:]
        return [name for name in self.models[0].samplers if all(name in other.samplers for other in others)]

    @property
    def small(self) -> bool:
        """Say whether an image is so small that a page should enlarge it without smoothing."""
        return self.models[0].source.vae is None


def check_number(count: int) -> None:
    """Raise `InputError` for more models than a page has room for, or none."""
    if not 1 <= count <= MOST:
        raise InputError(f"a page shows 1 to {MOST} models, got {count}")


def load(
    names: Sequence[str],
    target: Target,
    conditions: Conditions | None = None,
    measure: bool = True,
    report: Report = silent,
) -> Gallery:
    """Load models to be served, one after another. Raises `InputError` as `sampled.load` and `Gallery` do.

    `measure`: also measure the memory of each in a process of its own.
    """
    check_number(len(names))
    found = []
    for number, name in enumerate(names):
        report("loading", number / len(names))
        found.append(sampled.load(name, target, conditions, measure))
    report("loading", 1.0)
    return Gallery(tuple(found))
