"""Compare artifacts with their float model, in either of the ways in which they were calibrated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from tqdit.errors import InputError
from tqdit.quality.comparison import Comparison, compare_samples
from tqdit.quality.traced_artifacts import FolderComparison, compare_folders
from tqdit.runtime.target import Device, Dtype
from tqdit.sampling.guidance import Conditions, Sampling
from tqdit.stages import Report, silent

# Options that one way has and the other has no use for.
OF_SAMPLES = ("num", "sampling", "cost", "conditions", "equivalence")
OF_CALLS = ("groups", "prompts", "options")


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
) -> FolderComparison: ...


def compare(
    reference: str | Path,
    quantized: str | Path | Sequence[str | Path],
    *arguments: Any,
    calls: Any = None,
    **given: Any,
) -> Any:
    """Compare artifacts with their float model, on samples of its own or on recorded calls.

        comparison = tqdit.compare("fashion-dit", ["w8a8", "w4a8"], num=16)
        comparison = tqdit.compare("z-image", "z-image-w8a8", calls="calls.safetensors")

    `quantized`: a list of artifacts, or one. The first form is `comparison.compare_samples`, for DiT, SiT and PixArt.
    With `calls`, a recording or the path of one, it is `traced_artifacts.compare_folders`, for any class. They say what
    else they take, and what they return.

    Raises `InputError` for an option of the other form.
    """
    if calls is None:
        if wrong := [name for name in OF_CALLS if name in given]:
            raise InputError(f"{wrong[0]} is for a comparison on recorded calls; give calls, too")
        return compare_samples(reference, quantized, *arguments, **given)
    if arguments:
        raise InputError("a comparison on recorded calls takes all behind the artifacts by name, as samples=8")
    if wrong := [name for name in OF_SAMPLES if name in given]:
        raise InputError(f"{wrong[0]} and calls exclude each other")
    return compare_folders(reference, quantized, calls, **given)
