"""Compare artifacts of traced models, by their folders, with the float model that they were made of."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.artifact import folder as artifact
from tqdit.calibration.calls import Calls
from tqdit.calibration.pipeline_calls import Recording, read_calls
from tqdit.errors import InputError
from tqdit.quality.artifacts import artifact_paths
from tqdit.quality.called import Compared, FolderComparison
from tqdit.quality.replayed import (
    ImageRow,
    check_drawing,
    check_options,
    check_prompts,
    compare_calls,
    compare_images,
    held_out,
)
from tqdit.quality.saved import CalledFacts, Drawn, SiteErrors
from tqdit.quality.site_errors import CALL_PASSES, called_states, measured_sites
from tqdit.recorded import weights_sha256
from tqdit.runtime import fitting
from tqdit.runtime.convert import convert
from tqdit.runtime.target import Device, checked_device, checked_dtype, dtype_name
from tqdit.sources import any_class
from tqdit.sources.components import PIPELINE
from tqdit.sources.resolve import found_folder
from tqdit.spec import Solution
from tqdit.stages import Report, silent
from tqdit.system.environment import environment
from tqdit.system.files import CONFIG, is_there, read_json
from tqdit.system.isolation import isolated
from tqdit.system.validation import check_counts, check_flags, check_seed

BFLOAT16 = "bfloat16"


@isolated()
def compare_folders(  # noqa: PLR0913 - options
    model: str | Path,
    quantized: str | Path | Sequence[str | Path],
    calls: Any,
    *,
    samples: int = 8,
    groups: int = 10,
    seed: int = 0,
    device: Device = "auto",
    dtype: str | torch.dtype = "float32",
    prompts: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    report: Report = silent,
    sites: bool = False,
) -> FolderComparison:
    """Compare artifacts with the float transformers of a folder, on recorded calls that calibration did not use.

    `quantized`: a list of artifacts, or one. `calls`: a recording, the path of one, or as in `read_calls`. At most
    `samples` calls of each of `groups` time groups are compared. `dtype`: in which all models run, also for images. In
    fp32 the row "bfloat16" says what rounding the float model to bf16 costs; in bf16 that noise hides a part of what is
    measured.
    `prompts`: also compare an image of each, drawn by the pipeline with the seeds `seed`, `seed` + 1, and so on.
    `options`: arguments of the pipeline for these images, such as `{"height": 512, "width": 768, "guidance_scale": 3.5,
    "num_inference_steps": 20}`; by default its own. One transformer is on the device at a time.
    `sites`: also measure the error of sites by themselves, in a simulation, for `FolderComparison.save`.
    Raises `InputError` for an artifact of another model, and before any work for an option that is not legal, for
    prompts where nothing draws images, and for options that the pipeline does not take.
    """
    if not isinstance(model, str | Path):
        raise InputError(f"a model is given by its path or name, got {type(model).__name__}")
    check_counts(samples=samples, groups=groups)
    check_seed(seed)
    check_flags(sites=sites)
    check_options(options)
    check_prompts(() if prompts is None else prompts)
    quantized = artifact_paths(quantized)
    source, where = any_class.find(found_folder(model)), checked_device(device)
    if prompts:
        check_drawing(_pipeline_class(source), prompts, options or {})
    elif options:
        raise InputError(f"{next(iter(options))} is for images; give prompts, too")
    recording = Recording.load(calls) if isinstance(calls, str | Path) else calls
    parts = []
    for component, folder in source.folders.items():
        stage = _Component(component, folder, quantized, where, dtype)
        if isinstance(recording, Recording) and len(source.folders) > 1 and component not in recording:
            raise InputError(f"there are no calls of '{component}'")
        parts.append(stage.compared(recording, samples, groups, seed, report))
        if sites:
            parts[-1] = stage.with_facts(parts[-1], report)
    rows, drawn = list[ImageRow](), Drawn(tuple(prompts)) if sites and prompts else None
    if prompts:
        wanted = checked_dtype(parts[0].dtype)
        pipe = load_pipeline(source.root, wanted).to(where)
        loaded = {Path(path).name: _Pipelines(Path(path), source.folders, where, wanted) for path in quantized}
        keep = drawn.keep if drawn else lambda name, images: None
        rows = compare_images(pipe, loaded, prompts, seed, options, report, keep)
    return FolderComparison(source.name, tuple(parts), tuple(rows), environment(str(where)), drawn)


def _pipeline_class(source: any_class.Transformers) -> type:
    """Return the class of a pipeline that draws images.

    Raises `InputError` for a transformer alone, for a pipeline whose decoder is left out, and for an unknown class.
    """
    import diffusers

    if source.index is None:
        raise InputError(f"'{source.name}' is a transformer alone; images are drawn by a pipeline")
    decoder = source.index.get("vae", "")
    if isinstance(decoder, list) and not all(decoder):
        raise InputError(f"the pipeline '{source.name}' has no vae to draw images with; compare it without prompts")
    name = str(source.index.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type):
        raise InputError(f"diffusers {diffusers.__version__} has no pipeline '{name}', by which '{source.name}' draws")
    return kind


class _Component:
    """A float transformer, and its artifacts' solutions."""

    def __init__(
        self, name: str, folder: Path, quantized: Sequence[str | Path], device: torch.device, dtype: Any
    ) -> None:
        self.name, self.folder, self.device = name, folder, device
        self.dtype = checked_dtype(dtype)
        self.places = {_unique(path, quantized): artifact_folder(Path(path), name) for path in quantized}
        self.calls: Calls  # those that were compared, and the hash of the float weights
        self.digest = ""

    def compared(self, recording: Any, samples: int, groups: int, seed: int, report: Report) -> Compared:
        report(f"loading {self.name}", 0.0)
        model = any_class.load_transformer(self.folder)
        digest, parameters = weights_sha256(model), sum(p.numel() for p in model.parameters())
        found = {name: _solution(place, digest) for name, place in self.places.items()}
        named = isinstance(recording, Recording) and self.name in recording
        calls = read_calls(recording[self.name] if named else recording, model)
        made = [(one.provenance.recipe, one.provenance.calibration_sha256) for one in found.values()]
        sizes = {name: artifact.size_bytes(place) / (2 * parameters) for name, place in self.places.items()}
        found.clear()
        calls, fresh = held_out(calls, made)
        calls = calls.thinned(samples, groups, seed)
        del model  # a model in both dtypes may not fit in memory
        exact = any_class.load_transformer(self.folder, self.dtype).to(self.device)
        comparison = compare_calls(exact, _Models(self, exact), calls, groups, report)
        self.calls, self.digest = calls, digest
        return Compared(self.name, comparison, sizes, fresh, dtype_name(self.dtype))

    def with_facts(self, compared: Compared, report: Report) -> Compared:
        """Return a comparison with the sites of each artifact, on some of the calls that were compared."""
        model = any_class.load_transformer(self.folder, self.dtype).to(self.device)
        states, sites, solutions = called_states(self.calls), {}, {}
        for name, place in self.places.items():
            solution = fitting.read(place)
            assert solution.graph is not None
            found = measured_sites(model, solution.graph, solution, states, report, f"sites of {name}", CALL_PASSES)
            sites[name] = SiteErrors(tuple(found[0]), found[1])
            solutions[name] = replace(solution, codes={}, floats={})
        stored, parameters = any_class.stored_dtypes(self.folder), sum(p.numel() for p in model.parameters())
        file_bytes = sum(dtype.itemsize * count for dtype, count in stored.items())
        file_dtype = dtype_name(stored.most_common(1)[0][0])
        facts = CalledFacts(self.digest, self.calls.sha256, parameters, file_bytes, file_dtype, sites, solutions)
        return replace(compared, facts=facts)


class _Models(Mapping[str, nn.Module]):
    """The float model in bf16, unless all models are, then the artifacts, each loaded when it is read."""

    def __init__(self, component: _Component, exact: nn.Module) -> None:
        self._component, self._exact = component, exact

    def __getitem__(self, name: str) -> nn.Module:
        component = self._component
        if name == BFLOAT16:
            return any_class.load_transformer(component.folder, torch.bfloat16).to(component.device)
        self._exact.to("cpu")  # its outputs are known
        solution = fitting.read(component.places[name])
        return convert(solution, device=component.device, dtype=component.dtype)

    def __iter__(self) -> Iterator[str]:
        rounded = (BFLOAT16,) if self._component.dtype is torch.float32 else ()
        return iter((*rounded, *self._component.places))

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Pipelines(Mapping[str, nn.Module]):
    """The transformers of an artifact by component, each loaded when it is read."""

    def __init__(self, path: Path, components: Sequence[str] | Mapping[str, Path], device: Any, dtype: Any) -> None:
        self._path, self._components, self._device, self._dtype = path, list(components), device, dtype

    def __getitem__(self, name: str) -> nn.Module:
        return convert(fitting.read(artifact_folder(self._path, name)), device=self._device, dtype=self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


def artifact_folder(path: Path, component: str) -> Path:
    """Return the folder of a transformer in an artifact. Raises `InputError` if it has none."""
    found = next((place for place in (path / component, path) if is_there(place / CONFIG)), None)
    if found is None:
        raise InputError(f"'{path}' has no folder '{component}' with a {CONFIG}")
    return found


def _solution(folder: Path, digest: str) -> Solution:
    """Return the solution of an artifact that was made of the float model with this hash."""
    solution = fitting.read(folder)
    if solution.graph is None:
        raise InputError(f"'{folder}' was not made from recorded calls; compare it without calls")
    if solution.provenance.source_sha256 != digest:
        made_from = solution.provenance.source or "an unknown model"
        raise InputError(
            f"'{folder}' was made from other weights ('{made_from}'), or from these in another dtype; compare it with "
            "the folder that it was made from"
        )
    return solution


def _unique(path: str | Path, among: Sequence[str | Path]) -> str:
    """Return the name of a folder, or its whole path where another one has the same name."""
    name = Path(path).resolve().name
    return name if sum(Path(other).resolve().name == name for other in among) == 1 else str(path)


def load_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    """Return the pipeline of a folder, without progress bars. Raises `InputError` if diffusers refuses it."""
    from diffusers import DiffusionPipeline

    index = read_json(folder / PIPELINE)  # diffusers wants to be told of what a pipeline leaves out
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and not all(entry)}
    options = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True, **absent}
    try:
        with _without_notes():
            pipe = DiffusionPipeline.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise InputError(f"{folder}: diffusers cannot load the pipeline: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _without_notes() -> Iterator[None]:
    """Silence diffusers' progress bars, and its warning that newer versions call `torch_dtype` otherwise."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
