"""Processes under torchrun, by gloo on the loopback device: the pixels, figures and bytes of one, and how it ends."""

import json
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import inception_like
import tqdit
from distributed_jobs import SAMPLING, drawn
from launcher import torchrun
from tqdit import workflow
from tqdit.calibration import store
from tqdit.cli import main as cli
from tqdit.errors import InputError
from tqdit.evaluation.results import read_evaluation
from tqdit.imaging.images import RUN
from tqdit.quality.compare import compare
from tqdit.recipe import Recipe
from tqdit.sampling.guidance import Sampling
from tqdit.system import distributed
from tqdit.system.files import write_bytes
from tqdit.system.locks import holding
from tqdit.system.swap import beside
from tqdit.system.torchrun import threads_of_each
from tqdit.system.world import World

JOBS = Path(__file__).with_name("distributed_jobs.py")
RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.fixture(scope="module")
def artifact(pipeline: Path, tiny_recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "w8a8"
    workflow.quantize(pipeline, out, tiny_recipe("plus", rounds=0, hessian=False))
    return out


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "inception-2015-12-05.pt"
    inception_like.save(path)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (15, 8, 8, 3), dtype=np.uint8))
    return path


@dataclass(frozen=True)
class Done:
    """A run of all jobs in two processes: the folder that they left, and what they said."""

    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def done(pipeline, artifact, recipe, network, reference, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The jobs of `every_job`: the same processes run them all, since starting processes takes most of the time."""
    out = tmp_path_factory.mktemp("done")
    (out / "quantized").mkdir()
    quantize = ["quantize", pipeline, "-o", out / "quantized" / "out", "--recipe", recipe, "--overwrite"]
    evaluate = ["evaluate", pipeline, "--reference", reference, "--network", network, "--steps", "2", "-q", "-n", "12"]
    commands = [
        [*quantize, "--json", out / "quantized" / "out.json"],
        [*evaluate, "--device", "cpu", "--batch", "5", "-o", out / "scores.json"],
    ]
    (out / "commands.json").write_text(json.dumps([list(map(str, command)) for command in commands]))
    found = torchrun(JOBS, "every_job", out, pipeline, artifact)
    assert found.returncode == 0, found.stderr
    return Done(out, found.stdout, found.stderr)


@pytest.mark.slow
def test_exchange(done: Done) -> None:
    found = [json.loads((done.folder / "exchange" / f"{rank}.json").read_text()) for rank in range(2)]
    assert [own.pop("world") for own in found] == [[0, 2, "cpu"], [1, 2, "cpu"]]
    assert [own.pop("mine") for own in found] == [[0, 1], [1, 1]]
    for count in (1, 2, 5):  # item i: "a" and "c" are for all, "0" and "1" for one rank each
        for rank, own in enumerate(found):
            items = [{"a": [[True] * i], "c": [i], str(rank): [[i + 0.5], [rank]]} for i in range(count)]
            assert own.pop(f"named {count}") == items
    assert found[0] == found[1]
    assert found[0].pop("sum") == [1, 2]
    assert found[0].pop("trainable") is True
    for count in (1, 2, 5):
        assert found[0][f"gathered {count}"] == [[[i, i]] * (i + 1) for i in range(count)]


@pytest.mark.slow
def test_same_pixels_and_figures_for_every_world(pipeline: Path, artifact: Path, done: Done) -> None:
    folder = done.folder / "images"
    expected = [drawn(str(model)) for model in (pipeline, artifact)]
    alone = json.loads(compare(pipeline, [artifact], 5, SAMPLING, samples=5, cost=False).to_json())
    for rank in range(2):
        for own, one in zip(torch.load(folder / f"{rank}.pt"), expected, strict=True):
            assert torch.equal(own, one)
        figures = json.loads((folder / f"{rank}.json").read_text())
        assert {**figures, "environment": None} == {**alone, "environment": None}


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two batches of trajectories, five of records, two blocks; as a file."""
    path = tmp_path_factory.mktemp("recipes") / "plus.toml"
    path.write_text(tiny_recipe("plus", samples=10).to_toml())
    return path


@pytest.fixture(scope="module")
def alone(pipeline: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The artifact of one process."""
    out = tmp_path_factory.mktemp("artifacts") / "alone"
    workflow.quantize(pipeline, out, Recipe.from_toml(recipe))
    return contents(out)


@pytest.mark.slow
def test_two_processes_make_the_artifact_of_one(alone, done: Done) -> None:
    assert_same_artifact(alone, done.folder / "quantized", done.stdout, done.stderr, 2)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "option"), [(2, "--overwrite"), (3, "--resumable")])
def test_same_artifact_for_every_world(pipeline, recipe, alone, tmp_path: Path, processes: int, option: str) -> None:
    command = ["quantize", pipeline, "-o", tmp_path / "out", "--recipe", recipe, option]
    done = torchrun("-m", "tqdit", *command, "--json", tmp_path / "out.json", processes=processes)
    assert done.returncode == 0, done.stderr
    assert_same_artifact(alone, tmp_path, done.stdout, done.stderr, processes)


def assert_same_artifact(alone: dict[str, bytes], folder: Path, stdout: str, stderr: str, processes: int) -> None:
    assert contents(folder / "out") == alone
    assert {file.name for file in folder.iterdir()} == {"out", "out.json"}, "no work folder is left"
    assert stdout.count("tiny-dit w8a8 plus") == 1
    assert [stderr.count(f"{stage}: 0 %") for stage in ("trajectories", "statistics", "search")] == [1, 1, 1]
    assert json.loads((folder / "out.json").read_text())["processes"] == processes


@pytest.mark.slow
def test_two_processes_have_the_scores_of_one(pipeline, network, reference, done: Done, tmp_path: Path) -> None:
    given = {"network": network, "num": 12, "sampling": Sampling("ddim", 2, 1.5), "batch": 5}
    alone = tqdit.evaluate(pipeline, reference, tmp_path / "alone.json", **given)
    assert done.stdout.count(f"results: {done.folder}") == 1, "one process writes and tells"
    assert read_evaluation(done.folder / "scores.json").rows[0].scores == alone.rows[0].scores


@pytest.mark.long
def test_a_rank_that_dies_leaves_its_work_to_another_world(
    pipeline: Path, recipe: Path, alone, tmp_path: Path, monkeypatch
) -> None:
    """Rank 1 breaks in its second matmul of the search; one process alone goes on."""
    out, work = tmp_path / "out", tmp_path / "out.work"
    done = torchrun(
        JOBS, "dies_searching", tmp_path, "quantize", pipeline, "-o", out, "--recipe", recipe, "--resumable"
    )
    assert done.returncode != 0
    assert "tqdit: rank 1 of 2: this process has failed" in done.stderr.replace("[rank1]: ", "")
    assert [file.name for file in tmp_path.iterdir()] == ["out.work"], "nothing half written"
    kept = {file.name for file in work.glob("*/*")}
    assert {name.partition("-")[0] for name in kept} == {"trajectories", "sensitivity", "records", "solved"}
    assert "solved-transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight.safetensors" in kept

    made = []
    monkeypatch.setattr(store, "write_bytes", lambda path, data: (made.append(path.name), write_bytes(path, data)))
    workflow.quantize(pipeline, out, Recipe.from_toml(recipe), resumable=True)
    assert contents(out) == alone
    assert made
    assert not kept & set(made), "nothing was made twice"


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_keeps_finished_images(pipeline: Path, tmp_path: Path, run_cli) -> None:
    """Rank 1 has images 1, 3 and 5 of 6 and breaks at 3; another call, by one process, makes what is missing."""
    options = ["--steps", "3", "--batch", "1", "-n", "6", "--quiet"]
    start = time.monotonic()
    done = torchrun(JOBS, "dies", tmp_path, "sample", pipeline, "-o", tmp_path / "out", *options)
    assert time.monotonic() - start < 60
    assert done.returncode != 0
    assert "a cosmic ray\ntqdit: rank 1 of 2: this process has failed" in done.stderr.replace("[rank1]: ", "")
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert {RUN, "000001.png"} <= set(kept) <= {RUN, *(f"{i:06d}.png" for i in (0, 1, 2, 4))}, "no partial files"

    new = 7 - len(kept)
    assert f"6 images ({new} new)" in run_cli("sample", pipeline, "-o", tmp_path / "out", *options)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert kept.items() <= after.items(), "what was there was not written again"
    run_cli("sample", pipeline, "-o", tmp_path / "whole", *options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.long
def test_command_line_under_torchrun(tmp_path: Path, run_cli) -> None:
    command = ["sample", "fashion-dit", "-n", "3", "--steps", "2", "--batch", "1"]
    done = torchrun("-m", "tqdit", *command, "-o", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 images of fashion-dit") == 1
    assert done.stderr.count("sampling: 100 %") == 1, "one process shows progress"
    run_cli(*command, "-o", tmp_path / "one.png", "--quiet")
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "one.png").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["sample", "fashion-dit", "--classes", "zebra"], "unknown class 'zebra'"),
        (["quantize", "no-such-model"], "no-such-model"),
        (["quantize", "fashion-dit", "--steps", "3"], "3 steps visit no timestep"),
    ],
)
def test_bad_input_is_told_once(tmp_path: Path, command: list[str], message: str) -> None:
    done = torchrun("-m", "tqdit", *command, "-o", tmp_path / "out")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("tqdit: ") and message in line]
    assert len(told) == 1
    assert message in " ".join(done.stderr.splitlines()[-3:]), "torchrun's own words end with ours"
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_fail_alike_speak_once(monkeypatch, capsys, tmp_path: Path) -> None:
    """The ranks' command lines one after another, in this process, at a store like that of torchrun."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reasons = [tmp_path / f"{rank}.json" for rank in range(2)]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr("tqdit.system.torchrun.check_alone", raises(InputError("both see this")))
    monkeypatch.setattr(sys, "argv", ["tqdit", "inspect", "fashion-dit"])
    told = []
    for rank, reason in enumerate(reasons):
        for name, value in {**RANK_1, "RANK": str(rank), "TORCHELASTIC_ERROR_FILE": str(reason)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        told.append(capsys.readouterr().err)
    assert told == ["tqdit: rank 0 of 2: both see this\n", ""]
    assert [json.loads(reason.read_text())["message"]["message"] for reason in reasons] == [
        f"tqdit: rank {rank} of 2: both see this" for rank in range(2)
    ]


def raises(error: Exception):
    """Return a function that raises `error` whatever it is given."""

    def call(*_: object) -> None:
        raise error

    return call


@pytest.mark.long
def test_output_that_another_job_is_writing_is_told_once(pipeline: Path, tmp_path: Path) -> None:
    """The first process finds the lock, and all hear of it."""
    out = tmp_path / "out"
    with holding(beside(out, "lock"), out):
        done = torchrun("-m", "tqdit", "quantize", pipeline, "-o", out)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("tqdit: ") and "is writing" in line]
    assert len(told) == 1
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run `tqdit ARGS` in this process, alone: its standard output."""

    def call(*args: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["tqdit", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        return capsys.readouterr().out

    return call


# One process ---------------------------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged() -> None:
    with distributed.joined("cpu") as world:
        assert (world, world.first) == (World(), True)
        parts = [torch.ones(2), torch.zeros(3)]
        assert all(a is b for a, b in zip(world.gather(parts, 2), parts, strict=True))
        assert world.add(parts[0]) is parts[0]
        named = [{"a": part} for part in parts]
        assert [item["a"] for item in world.gather_named(named, 2, lambda _: 0)] == parts
        world.wait()
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", [0, 1, 7, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_shares_are_everything_once(count: int, size: int) -> None:
    shares = [World(rank, size).share(range(count)) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert all(i in shares[World(0, size).owner(i)] for i in range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches() -> None:
    assert distributed.batches(5, 2) == [range(2), range(2, 4), range(4, 5)]
    assert distributed.batches(0, 2) == []


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is ''"),
        ({**RANK_1, "RANK": "-1"}, "RANK is '-1'"),
        ({**RANK_1, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({**RANK_1, "RANK": "2"}, "RANK is 2; with WORLD_SIZE 2 it must be below 2"),
        ({**RANK_1, "LOCAL_RANK": "7"}, "LOCAL_RANK is 7; with WORLD_SIZE 2"),
        ({"WORLD_SIZE": "0", "RANK": "0", "LOCAL_RANK": "0"}, "RANK is 0; with WORLD_SIZE 0"),
    ],
)
def test_environment_that_is_not_torchruns(monkeypatch, environment: dict[str, str], named: str) -> None:
    for name in RANK_1:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=named), distributed.joined():
        pass


@pytest.mark.parametrize(("device", "named"), [("cuda:0", "one GPU for several"), ("cuda", "finds 1 GPUs")])
def test_gpu_of_a_process(monkeypatch, device: str, named: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in RANK_1.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=named), distributed.joined(device):
        pass
    assert distributed.current() == World()


@pytest.mark.parametrize("command", ["bench", "convert", "demo", "inspect"])
def test_commands_of_one_process(monkeypatch, capsys, command: str) -> None:
    for name, value in RANK_1.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tqdit", command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"tqdit: rank 1 of 2: 'tqdit {command}' runs in one process, torchrun started 2; run it without torchrun\n"
    )


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "1"}, 4),  # as torchrun sets it
        ({"OMP_NUM_THREADS": "3"}, None),
        ({"OMP_NUM_THREADS": "3", "TQDIT_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, 2),
        ({"LOCAL_WORLD_SIZE": "100"}, 1),
    ],
)
def test_each_process_takes_its_share_of_the_cores(monkeypatch, variables: dict[str, str], threads: int | None) -> None:
    for name in ("OMP_NUM_THREADS", "TQDIT_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**RANK_1, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tqdit.system.environment.cores", lambda: 8)
    assert threads_of_each() == threads
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with distributed._own_threads(2):
        assert given == ([] if threads is None else [threads])
    assert given == ([] if threads is None else [threads, 7])
    with distributed._own_threads(1):
        pass
    assert given == ([] if threads is None else [threads, 7]), "a process alone has all threads"


def test_a_wrong_number_of_threads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "many", "-1", ""):
        monkeypatch.setenv("TQDIT_THREADS", value)
        with pytest.raises(InputError, match=f"TQDIT_THREADS is the number of threads .* got '{value}'"):
            threads_of_each()


def test_a_part_is_free_before_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a batch stay on the GPU until they are sent: the next pass needs that memory."""
    made: list[weakref.ref[torch.Tensor]] = []

    def part() -> store.Tensors:
        assert not made or made[-1]() is None
        tensor = torch.zeros(4)
        made.append(weakref.ref(tensor))
        return store.InMemory({"a": tensor})

    monkeypatch.setattr(distributed, "_current", World(1, 2))
    monkeypatch.setattr(World, "_exchange", lambda self, parcels: [{}, {}])
    pieces = store.Forgetful().together((part() for _ in range(3)), list("abcdef"), lambda name: None)
    assert len(pieces) == 6
    assert len(made) == 3
