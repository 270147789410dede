"""Compare artifacts with their float model, in either of the ways in which they were calibrated."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from tqdit.errors import InputError
from tqdit.quality.called import FolderComparison
from tqdit.quality.comparison import compare_samples
from tqdit.quality.samples import Comparison
from tqdit.quality.traced_artifacts import compare_folders
from tqdit.runtime.target import Device, Dtype
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.stages import Report, silent
from tqdit.system.deprecation import formerly_positional
from tqdit.system.validation import check_report


@overload
def compare(
    reference: str | Path,
    quantized: str | Path | Sequence[str | Path],
    num: int = 16,
    sampling: Sampling = Sampling(),
    samples: int = 8,
    seed: int = 0,
    *,
    calls: None = None,
    report: Report = silent,
    device: Device = "auto",
    dtype: Dtype = "float32",
    cost: bool = True,
    conditions: Conditions | str | Path | None = None,
    equivalence: bool = False,
    sites: bool = False,
) -> Comparison: ...


@overload
def compare(
    reference: str | Path,
    quantized: str | Path | Sequence[str | Path],
    *,
    calls: Any,
    samples: int = 8,
    groups: int = 10,
    seed: int = 0,
    report: Report = silent,
    device: Device = "auto",
    dtype: Dtype = "float32",
    prompts: Sequence[str] = (),
    options: dict[str, Any] | None = None,
    sites: bool = False,
) -> FolderComparison: ...


@formerly_positional("report", "device")
def compare(  # noqa: PLR0913 - options
    reference: str | Path,
    quantized: str | Path | Sequence[str | Path],
    num: int = 16,
    sampling: Sampling = Sampling(),
    samples: int = 8,
    seed: int = 0,
    *,
    calls: Any = None,
    report: Report = silent,
    device: Device = "auto",
    dtype: Dtype = "float32",
    cost: bool = True,
    conditions: Conditions | str | Path | None = None,
    equivalence: bool = False,
    groups: int = 10,
    prompts: Sequence[str] = (),
    options: dict[str, Any] | None = None,
    sites: bool = False,
) -> Comparison | FolderComparison:
    """Compare artifacts with their float model, on samples of its own or on recorded calls.

        comparison = tqdit.compare("fashion-dit", ["w8a8", "w4a8"], num=16)
        comparison = tqdit.compare("z-image", "z-image-w8a8", calls="calls.safetensors")

    `quantized`: a list of artifacts, or one. The first form is `comparison.compare_samples`, for DiT, SiT and PixArt.
    With `calls`, a recording or the path of one, it is `traced_artifacts.compare_folders`, for any class. They say what
    the options mean, and what they return. `num`, `sampling`, `cost`, `conditions` and `equivalence` are of the first
    form, `groups`, `prompts` and `options` of the second one. `sites`: also measure each site by itself; then
    `comparison.save("run.safetensors")` writes a run, of which `tqdit report` makes a page.

    Raises `InputError` for an option of the other form that has not its default.
    """
    check_report(report)
    common: dict[str, Any] = {"samples": samples, "seed": seed, "report": report, "device": device, "dtype": dtype}
    common["sites"] = sites
    of_samples: dict[str, Any] = {
        "num": num, "sampling": sampling, "cost": cost, "conditions": conditions, "equivalence": equivalence,
    }  # fmt: skip
    of_calls: dict[str, Any] = {"groups": groups, "prompts": prompts, "options": options}
    if calls is None:
        if wrong := _changed(of_calls):
            raise InputError(f"{wrong} is for a comparison on recorded calls; give calls, too")
        return compare_samples(reference, quantized, **common, **of_samples)
    if wrong := _changed(of_samples):
        raise InputError(f"{wrong} and calls exclude each other")
    return compare_folders(reference, quantized, calls, **common, **of_calls)


def _changed(given: Mapping[str, Any]) -> str | None:
    """Return the first of the options of `compare` that has another value than its default."""
    parameters = inspect.signature(compare).parameters
    return next((name for name, value in given.items() if _differs(value, parameters[name].default)), None)


def _differs(value: Any, default: Any) -> bool:
    """Say whether a value is another than the default; a tensor is, though it compares element by element."""
    try:
        return bool(value != default)
    except (RuntimeError, TypeError, ValueError):
        return True
