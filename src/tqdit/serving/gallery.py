"""`Gallery`: the models of a page, which can all be asked for the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdit.architectures.registry import CLASS_NAME
from tqdit.artifact.provenance import is_traced
from tqdit.errors import InputError
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import Conditions
from tqdit.serving import pipelines, sampled
from tqdit.serving.drawing import Served
from tqdit.sources.any_class import has_own_samples
from tqdit.sources.resolve import resolve
from tqdit.sources.source import ModelSource
from tqdit.stages import Report, silent

MOST = 4  # models that a page has room for


@dataclass(frozen=True)
class Gallery:
    """Models side by side. Raises `InputError` for models that cannot be asked for the same image."""

    models: tuple[Served, ...]

    def __post_init__(self) -> None:
        check_number(len(self.models))
        for other in self.models[1:]:
            self._check(self.models[0], other)

    @staticmethod
    def _check(first: Served, other: Served) -> None:
        if (first.asks_for, _count(first)) != (other.asks_for, _count(other)):
            raise InputError(
                f"models side by side draw the same: '{first.name}' draws {_drawn(first)}, "
                f"'{other.name}' {_drawn(other)}"
            )
        if first.shape != other.shape:
            raise InputError(
                f"models side by side start from the same noise: that of '{first.name}' is {first.shape}, that of "
                f"'{other.name}' {other.shape}"
            )

    @property
    def samplers(self) -> list[str]:
        """Return the samplers that suit every model."""
        others = self.models[1:]
        return [name for name in self.models[0].samplers if all(name in other.samplers for other in others)]


def _count(model: Served) -> int | None:
    return None if model.choices is None else len(model.choices)


def _drawn(model: Served) -> str:
    if model.choices is None:
        return "the text of a prompt"
    return f"{len(model.choices)} {'classes' if model.asks_for == 'class' else 'prompts'}"


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
    size: Mapping[str, int] = pipelines.NO_SIZE,
) -> Gallery:
    """Load models to be served, one after another.

    `conditions`: the prompts of a model of prompts. `measure`: also measure the memory of each in a process of its own.
    `size`: "height" and "width" of a pipeline's images.
    Raises `InputError` as `sampled.load`, `pipelines.load` and `Gallery` do.
    """
    check_number(len(names))
    found = []
    for number, name in enumerate(names):
        report("loading", number / len(names))
        found.append(_load(name, target, conditions, measure, size))
    report("loading", 1.0)
    return Gallery(tuple(found))


def _load(name: str, target: Target, conditions: Conditions | None, measure: bool, size: Mapping[str, int]) -> Served:
    source = resolve(name)
    if has_own_samples(source.config[CLASS_NAME]) and not _is_traced(source):
        if size:
            raise InputError(f"'{source.name}' draws images of one size; it has no use for another")
        return sampled.load(name, target, conditions, measure)
    if conditions is not None:
        raise InputError(f"'{source.name}' draws the text of a prompt; it has no use for embeddings of prompts")
    return pipelines.load(source, target, size)


def _is_traced(source: ModelSource) -> bool:
    """Say whether a model is an artifact of a traced model, which only its pipeline samples."""
    return source.quantized and is_traced(source.folder, source.config["quantization_config"].get("format_version"))
