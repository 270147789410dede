"""Compare traced models with their float model: on recorded calls, and by same-seed images of a pipeline."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tqdit.calibration.call_values import floats_of
from tqdit.calibration.called import place_of
from tqdit.calibration.calls import Calls
from tqdit.errors import InputError
from tqdit.stages import Report, silent
from tqdit.system.validation import check_counts

GROUPS = 10  # time groups that errors are reported by
COUNTS = ("height", "width", "num_frames", "num_inference_steps")  # options of pipelines that are whole numbers
GIVEN = ("prompt", "class_labels", "generator", "output_type", "return_dict")  # what images are drawn with anyway


@dataclass(frozen=True)
class CallRow:
    """The SQNR in dB of one model's outputs: of all calls together, of each time group, and of the worst call.

    None: the outputs are equal, or some of them are not finite; then there is no worst call either.
    """

    name: str
    sqnr_db: float | None
    by_group: tuple[float | None, ...]
    worst_db: float | None


@dataclass(frozen=True)
class CallComparison:
    """The rows of all models on `calls` calls.

    `groups`: the least and the largest time of each group, and the number of its calls.
    """

    kind: str
    timestep: str
    calls: int
    groups: tuple[tuple[float, float, int], ...]
    rows: tuple[CallRow, ...]

    def figures(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ImageRow:
    """The PSNR in dB of one model's images against those of the float model, with the same seeds.

    None for equal images. If an image has NaN or Inf, it has no figure, and neither have all images together.
    """

    name: str
    mean_db: float | None
    worst_db: float | None
    worst_prompt: str
    each_db: tuple[float | None, ...]

    def figures(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def compare_calls(
    float_model: nn.Module,
    models: Mapping[str, nn.Module],
    calls: Calls,
    groups: int = GROUPS,
    report: Report = silent,
) -> CallComparison:
    """Run models on recorded calls, and return the errors of their outputs against those of the float model.

    Every model runs where it is and in its own dtype. `models` are read one after another, so a mapping may load them
    when they are read. Raises `InputError` for calls of another model.
    """
    calls.check(float_model)
    expected = outputs(float_model, calls, lambda f: report("float model", f))
    found = calls.time_groups(groups)
    index = found.index(calls.times)
    rows = []
    for name in models:
        model = models[name]
        actual = outputs(model, calls, lambda f, name=name: report(name, f))
        del model
        powers = torch.tensor([_powers(a, b) for a, b in zip(expected, actual, strict=True)], dtype=torch.float64)
        by_group = tuple(_sqnr(powers[index == group].sum(0)) for group in range(found.num_groups))
        finite = bool(powers.isfinite().all())
        each = [db for db in map(_sqnr, powers) if db is not None and finite]
        rows.append(CallRow(name, _sqnr(powers.sum(0)), by_group, min(each, default=None)))
    ranges = tuple((*found.bounds(group), int((index == group).sum())) for group in range(found.num_groups))
    return CallComparison(calls.kind, calls.timestep, len(calls), ranges, tuple(rows))


def outputs(model: nn.Module, calls: Calls, progress: Any = lambda _: None) -> list[torch.Tensor]:
    """Return what a model makes of every call, each flattened to one fp32 tensor on the CPU."""
    device, dtype = place_of(model)
    found = []
    with torch.no_grad():
        for number, call in enumerate(calls):
            output = model(**call.to(device, dtype))
            found.append(torch.cat([tensor.float().flatten().cpu() for tensor in floats_of(output)]))
            progress((number + 1) / len(calls))
    return found


def held_out(calls: Calls, recipes: Sequence[tuple[Mapping[str, Any], str | None]]) -> tuple[Calls, bool]:
    """Return the calls that no calibration used, and whether there are such; without any, all calls.

    `recipes`: of each artifact, its recipe and the sha256 of the calls that it was calibrated on.
    """
    used: set[int] = set()
    for recipe, sha256 in recipes:
        if sha256 is None:
            continue
        drawn = calls.thinned(recipe["samples"], recipe["groups"], recipe["seed"])
        if drawn.sha256 == sha256:
            used |= {id(call) for call in drawn}
    left = Calls(calls.kind, calls.config, calls.timestep, [call for call in calls if id(call) not in used])
    return (left, True) if len(left) else (calls, False)


def compare_images(
    pipe: Any,
    models: Mapping[str, Mapping[str, nn.Module]],
    prompts: Sequence[str],
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    report: Report = silent,
    keep: Callable[[str, Sequence[torch.Tensor]], None] = lambda name, images: None,
) -> list[ImageRow]:
    """Draw an image or video for each prompt by a pipeline with each model in turn, and compare them with its own.

    `models`: name -> component -> the transformer that takes its place; read one after another, and the pipeline's own
    transformers are dropped before the first one is read. `options`: arguments of the pipeline. `keep` is given the
    images of each model, [0, 1], by its name, which is "" for the pipeline's own. Raises `InputError` as
    `check_drawing` does, and for what the pipeline refuses.
    """
    check_drawing(type(pipe), prompts, options or {})
    expected = _images(pipe, prompts, seed, options or {}, lambda f: report("images of the float model", f))
    keep("", expected)
    rows = []
    for name in models:
        _drop_transformers(pipe)
        for component, model in models[name].items():
            pipe.register_modules(**{component: model})
        actual = _images(pipe, prompts, seed, options or {}, lambda f, name=name: report(f"images of {name}", f))
        keep(name, actual)
        each = [_psnr(a, b) for a, b in zip(expected, actual, strict=True)]
        finite = all(bool(image.isfinite().all()) for image in actual)
        decided = [(db, prompt) for db, prompt in zip(each, prompts, strict=True) if db is not None and finite]
        worst, of = min(decided, default=(None, ""))
        mean = sum(db for db, _ in decided) / len(decided) if decided else None
        rows.append(ImageRow(name, mean, worst, of, tuple(each)))
    return rows


def check_options(options: Any) -> None:
    """Raise `InputError` unless the options of images are the arguments of a pipeline by name, or None."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"options must be a dict of the pipeline's arguments by name, got {options!r:.80}")


def check_prompts(prompts: Any) -> None:
    """Raise `InputError` unless the prompts of images are a list of texts."""
    listed = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    if not listed or not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError(f"prompts are a list of texts, got {prompts!r:.80}")


def check_drawing(kind: type, prompts: Sequence[str], options: Mapping[str, Any]) -> None:
    """Check what images are asked of a class of pipelines.

    Raises `InputError` without prompts, for options that have no names, and for an option that the pipeline does not
    take, that every image is drawn with anyway, or that is a nonsensical size or number of steps.
    """
    check_options(options)
    check_prompts(prompts)
    if not prompts:
        raise InputError("there are no prompts to draw images of")
    taken = inspect.signature(kind.__call__).parameters
    for name, value in options.items():
        if name in GIVEN:
            raise InputError(f"images are drawn with a {name} of their own; leave the option out")
        if name not in taken:
            raise InputError(f"a {kind.__name__} takes no {name}")
        if name in COUNTS:
            check_counts(**{name: value})


def _images(
    pipe: Any, prompts: Sequence[str], seed: int, options: Mapping[str, Any], progress: Any
) -> list[torch.Tensor]:
    """Return the images of all prompts, each with values in [0, 1]."""
    taken, found = inspect.signature(type(pipe).__call__).parameters, []
    for number, prompt in enumerate(prompts):
        given = {"prompt": prompt} if "prompt" in taken else {"class_labels": [int(prompt)]}
        generator = torch.Generator().manual_seed(seed + number)
        try:
            made = pipe(**given, **options, generator=generator, output_type="np", return_dict=False)[0]
        except InputError:
            raise
        except ValueError as error:  # so a pipeline says what it is wrongly called with
            raise InputError(f"the pipeline refuses the call: {error}") from error
        found.append(torch.as_tensor(made).double().cpu())
        progress((number + 1) / len(prompts))
    return found


def _drop_transformers(pipe: Any) -> None:
    """Free the transformers of a pipeline, so that only one model at a time takes memory."""
    for name in [name for name in pipe.components if name.startswith("transformer")]:
        if getattr(pipe, name) is not None:
            setattr(pipe, name, None)


def _powers(expected: torch.Tensor, actual: torch.Tensor) -> tuple[float, float]:
    """Return the powers of a signal and of its error."""
    expected, error = expected.double(), actual.double() - expected.double()
    return float(expected.square().sum()), float(error.square().sum())


def _sqnr(powers: torch.Tensor) -> float | None:
    signal, error = powers.tolist()
    return 10 * math.log10(signal / error) if 0 < error < math.inf and 0 < signal < math.inf else None


def _psnr(expected: torch.Tensor, actual: torch.Tensor) -> float | None:
    error = float((expected - actual).square().mean())
    return -10 * math.log10(error) if 0 < error < math.inf else None
