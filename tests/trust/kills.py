"""A process that writes is killed before each of its file-system calls: all outputs are whole, and the next run ends.

`run` forks a child for each call of each case: SIGKILL, or SIGINT as SIGTERM is handled too. Afterwards every output
is the old one or the new one, byte by byte. Then the same step runs again, undisturbed, and must leave the new outputs
and nothing else.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel

from tqdit import quantizing, workflow
from tqdit.calibration.store import WorkFolder
from tqdit.errors import InputError
from tqdit.imaging import images
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.sampling.guidance import Sampling
from tqdit.sources import export
from tqdit.sources.resolve import resolve
from tqdit.speed.random_solution import random_solution
from tqdit.system import files, swap
from tqdit.system.files import write_json

CALLS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.chmod", "os.truncate", "fcntl.flock"}
CONFIG = {
    "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 4, "patch_size": 2,
    "in_channels": 1, "out_channels": 2, "num_embeds_ada_norm": 4,
}  # fmt: skip
RECIPE = Recipe("plus", groups=2, samples=2, steps=6, rows=32, queries=32, candidates=4, rounds=1)
FINISHED, INTERRUPTED, BROKEN, REFUSED = 0, 3, 4, 5  # exit codes of a child

Contents = dict[str, bytes]


@dataclass(frozen=True)
class Case:
    """A step that writes into a folder. `start` fills the folder before; `outputs`: those that are whole or not."""

    start: Callable[[Path], None]
    act: Callable[[Path], None]
    outputs: Callable[[Path], dict[str, Any]]
    may_be_missing: bool = False  # between two renames, until the next run puts it back


@dataclass
class Counts:
    """What became of the children of one case."""

    killed: int = 0
    old: int = 0
    new: int = 0
    partly: int = 0  # of several outputs some were written, each whole
    put_back: int = 0  # was missing after the kill
    leftovers: int = 0  # hidden files, which the next run removes
    failures: list[str] = field(default_factory=list)


def run(
    made: dict[str, Case], scratch: Path, most: int | None = None, number: int = signal.SIGKILL
) -> dict[str, dict[str, Any]]:
    """Counts by case, in a scratch folder. `most`: kills per case, spread over its calls; by default before all."""
    torch.set_num_threads(1)
    with not_syncing():
        return {
            name: asdict(_killed(case, scratch / name.replace(" ", "-"), most, number)) for name, case in made.items()
        }


def races(made: dict[str, Case], scratch: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Two processes take each step at once: both end well, or one says that the other is at it; and all is whole."""
    torch.set_num_threads(1)
    with not_syncing():
        return {name: _raced(case, _place(scratch, name), rounds) for name, case in made.items()}


def cases(root: Path) -> dict[str, Case]:
    """The steps, on tiny models made in `root`."""
    source = _pipeline(root / "float")
    old, new = (random_solution(resolve(source).config, RECIPE, seed) for seed in (1, 2))
    module = convert(new, "reference")

    def artifact(folder: Path) -> None:
        workflow.save(old, resolve(source), folder / "out")

    def save(folder: Path) -> None:
        workflow.save(new, resolve(source), folder / "out", overwrite=True)

    def save_in_two_steps(folder: Path) -> None:
        renameat2, swap._renameat2 = swap._renameat2, lambda *_: False
        try:
            save(folder)
        finally:
            swap._renameat2 = renameat2

    def save_pretrained(folder: Path) -> None:
        module.save_pretrained(folder / "out" / "transformer")

    def convert_float(folder: Path) -> None:
        with existing_is_fine():
            export.convert_checkpoint(source, folder / "out", official=True)

    def piece(folder: Path) -> None:
        WorkFolder(folder / "work").once("x", lambda: {"a": torch.arange(9)})

    def json_file(folder: Path) -> None:
        write_json(folder / "a.json", {"new": 1})

    return {
        "save over an artifact": Case(artifact, save, whole),
        "save": Case(nothing, save, whole),
        "save without exchange": Case(artifact, save_in_two_steps, whole, may_be_missing=True),
        "save_pretrained in a pipeline": Case(artifact, save_pretrained, by_file_but_model),
        "convert": Case(nothing, convert_float, whole),
        "images": Case(nothing, drawing(source), by_file),
        "piece": Case(nothing, piece, by_file),
        "json": Case(lambda folder: write_json(folder / "a.json", {"old": 1}), json_file, by_file),
        "end of a resumable run": _resumable(source, root),
    }


@contextlib.contextmanager
def not_syncing() -> Iterator[None]:
    """What a killed process has given to the system is not lost, so nobody waits for the disk."""
    fsync, os.fsync = os.fsync, lambda _: None
    try:
        yield
    finally:
        os.fsync = fsync


@contextlib.contextmanager
def existing_is_fine() -> Iterator[None]:
    """A killed run may have come so far that its output is there, whole."""
    try:
        yield
    except InputError as error:
        if "exists" not in str(error):
            raise


def nothing(_: Path) -> None:
    """Start with an empty folder."""


def drawing(source: Path) -> Callable[[Path], None]:
    """Three images into a folder, without a model."""
    wanted = workflow.images_of(source, [], 3, Sampling("ddim", 2, 1.0), batch=2)

    def draw(_: object, __: object, members: Any, ___: object) -> Iterator[torch.Tensor]:
        for indices in members:
            yield torch.stack([torch.full((1, 4, 4), i / 3) for i in indices])

    def act(folder: Path) -> None:
        original, images.draw = images.draw, draw
        try:
            images.into_folder(wanted, wanted.run, torch.nn.Identity(), folder / "images", lambda _: None)
        finally:
            images.draw = original

    return act


def _resumable(source: Path, root: Path) -> Case:
    """All pieces are there: the run writes the artifact and removes its work."""
    template = root / "resumable"
    discard, quantizing.discard = quantizing.discard, lambda *_: None
    try:
        workflow.quantize(source, template / "out", RECIPE, resumable=True)
    finally:
        quantizing.discard = discard

    def start(folder: Path) -> None:
        shutil.copytree(template / "out.work", folder / "out.work")

    def act(folder: Path) -> None:
        with existing_is_fine():
            workflow.quantize(source, folder / "out", RECIPE, resumable=True)

    return Case(start, act, lambda folder: {key: value for key, value in whole(folder).items() if key == "out"})


def _pipeline(root: Path) -> Path:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(root / "transformer")
    write_json(root / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", "beta_end": 4e-3})
    write_json(root / "model_index.json", {"_class_name": "DiTPipeline", "id2label": {"0": "cat"}})
    return root


# What is in a folder -------------------------------------------------------------------------------------------------


def contents(folder: Path) -> Contents:
    """Every file, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_file(folder: Path) -> dict[str, Any]:
    """Each file is an output."""
    return {name: data for name, data in contents(folder).items() if not _hidden(name)}


def whole(folder: Path) -> dict[str, Any]:
    """Each entry of the folder is one output."""
    return {path.name: contents(path) for path in folder.iterdir() if not _hidden(path.name)}


def by_file_but_model(folder: Path) -> dict[str, Any]:
    """Files of a pipeline, whose model is one output. Its seal is removed last, which changes nothing that it says."""
    names = {name: data for name, data in by_file(folder).items() if "transformer" not in name and "tqdit" not in name}
    return {**names, "transformer": contents(folder / "out" / "transformer")}


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


# Killing -------------------------------------------------------------------------------------------------------------


def _killed(case: Case, scratch: Path, most: int | None, number: int) -> Counts:
    template, done = scratch / "template", scratch / "done"
    template.mkdir(parents=True)
    case.start(template)
    shutil.copytree(template, done)
    calls = _calls_of(case, done)
    step = max(1, calls // most) if most else 1
    counts = Counts()
    for k in range(1, calls + 1, step):
        folder = scratch / f"{k}"
        shutil.copytree(template, folder)
        try:
            _one(case, folder, template, done, k, number, counts)
        except Exception as error:
            counts.failures.append(f"call {k}: {type(error).__name__}: {error}")
        shutil.rmtree(folder)
    return counts


def _one(case: Case, folder: Path, template: Path, done: Path, k: int, number: int, counts: Counts) -> None:
    code = _child(lambda: case.act(folder), k, number)
    if code not in (FINISHED, INTERRUPTED, -number):
        counts.failures.append(f"call {k}: the child ended with {code}")
    counts.killed += code != FINISHED
    old, new, found = (case.outputs(each) for each in (template, done, folder))
    for name in {**old, **new, **found}:
        if found.get(name) not in (old.get(name), new.get(name)) and not (case.may_be_missing and name not in found):
            counts.failures.append(f"call {k}: {name} is neither the old nor the new one")
    counts.leftovers += any(map(_hidden, contents(folder)))
    counts.put_back += bool(old) and not found
    counts.old += found == old
    counts.new += found == new != old
    counts.partly += bool(found) and found not in (old, new)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.act(folder)
    if contents(folder) != contents(done):
        differing = sorted(set(contents(folder).items()) ^ set(contents(done).items()))
        counts.failures.append(f"call {k}: after the next run differ {sorted({name for name, _ in differing})}")


def _calls_of(case: Case, folder: Path) -> int:
    """How many calls the undisturbed step makes, counted in a child; and let it make them."""
    read, write = os.pipe()
    if _child(lambda: case.act(folder), None, 0, write) != FINISHED:
        raise AssertionError("the step fails undisturbed")
    os.close(write)
    with os.fdopen(read) as told:
        return int(told.read())


def _child(act: Callable[[], None], kill_at: int | None, number: int, tell: int | None = None) -> int:
    """Fork, act, and be killed before call `kill_at`: the exit code, negative for a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return _ended(pid)
    code, calls = BROKEN, 0
    try:
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGINT, signal.default_int_handler)

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), number)

        _watch(count)
        act()
        code = FINISHED
        if tell is not None:
            os.write(tell, str(calls).encode())
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _place(scratch: Path, name: str) -> Path:
    return scratch / name.replace(" ", "-")


def _ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _raced(case: Case, scratch: Path, rounds: int) -> dict[str, Any]:
    scratch.mkdir(parents=True)
    done, refused, failures = scratch / "done", 0, []
    done.mkdir()
    case.start(done)
    case.act(done)
    for i in range(rounds):
        folder = scratch / f"{i}"
        folder.mkdir()
        case.start(folder)
        begin = time.monotonic() + 0.02
        codes = [_ended(pid) for pid in [_racer(case.act, folder, begin) for _ in range(2)]]
        refused += codes.count(REFUSED)
        if FINISHED not in codes or not {*codes} <= {FINISHED, REFUSED}:
            failures.append(f"round {i}: the processes ended with {codes}")
        elif contents(folder) != contents(done):
            failures.append(f"round {i}: {sorted(contents(folder))} is not what one process makes")
        shutil.rmtree(folder)
    return {"rounds": rounds, "refused": refused, "failures": failures}


def _racer(act: Callable[[Path], None], folder: Path, begin: float) -> int:
    """Fork and act at a given moment: the process."""
    if pid := os.fork():
        return pid
    code = BROKEN
    try:
        time.sleep(max(0.0, begin - time.monotonic()))
        act(folder)
        code = FINISHED
    except InputError:
        code = REFUSED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _watch(count: Callable[[], None]) -> None:
    """Call `count` before each file-system call of this process."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CALLS or writes:
            count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            count()
            return function(*args, **options)

        return call

    sys.addaudithook(hook)
    os.fsync = counted(os.fsync)
    if swap._renameat2.__name__ != "<lambda>":
        swap._renameat2 = counted(swap._renameat2)
    files.save_file = counted(files.save_file)
