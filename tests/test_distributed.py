"""Two processes under torchrun, by gloo on the loopback device: the same pixels and figures as one, and how it ends."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distributed_jobs import SAMPLING, drawn
from tqdit import cli, distributed, workflow
from tqdit.comparison import compare
from tqdit.errors import InputError
from tqdit.evaluation.images import RUN

JOBS = Path(__file__).with_name("distributed_jobs.py")
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", "OMP_NUM_THREADS": "1"}
RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


def torchrun(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes of a script, or of `-m MODULE`; for machines without a network."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*launcher, "--local-addr", "127.0.0.1", *map(str, command)],
        env={**os.environ, **LOOPBACK}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


@pytest.fixture(scope="module")
def artifact(pipeline: Path, tiny_recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "w8a8"
    workflow.quantize(pipeline, out, tiny_recipe("plus", rounds=0, hessian=False))
    return out


@pytest.mark.slow
def test_exchange(tmp_path: Path) -> None:
    done = torchrun(JOBS, "exchange", tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [own.pop("world") for own in found] == [[0, 2, "cpu"], [1, 2, "cpu"]]
    assert [own.pop("mine") for own in found] == [[0, 1], [1, 1]]
    assert found[0] == found[1]
    assert found[0].pop("sum") == [1, 2]
    assert found[0].pop("trainable") is True
    for count in (1, 2, 5):
        assert found[0][f"gathered {count}"] == [[[i, i]] * (i + 1) for i in range(count)]


@pytest.mark.slow
def test_same_pixels_and_figures_for_every_world(pipeline: Path, artifact: Path, tmp_path: Path) -> None:
    done = torchrun(JOBS, "images", tmp_path, pipeline, artifact)
    assert done.returncode == 0, done.stderr
    expected = [drawn(str(model)) for model in (pipeline, artifact)]
    alone = json.loads(compare(pipeline, [artifact], 5, SAMPLING, samples=5).to_json())
    for rank in range(2):
        for own, one in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert torch.equal(own, one)
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert {**figures, "environment": None} == {**alone, "environment": None}


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


@pytest.mark.slow
def test_command_line_under_torchrun(tmp_path: Path, run_cli) -> None:
    command = ["sample", "fashion-dit", "-n", "3", "--steps", "2", "--batch", "1"]
    done = torchrun("-m", "tqdit", *command, "-o", tmp_path / "grid.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 images of fashion-dit") == 1
    assert done.stderr.count("sampling") == 1, "one progress bar"
    run_cli(*command, "-o", tmp_path / "one.png", "--quiet")
    assert (tmp_path / "grid.png").read_bytes() == (tmp_path / "one.png").read_bytes()


@pytest.mark.slow
def test_bad_input_is_told_once(tmp_path: Path) -> None:
    done = torchrun("-m", "tqdit", "sample", "fashion-dit", "--classes", "zebra", "-o", tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count("unknown class 'zebra'") == 1
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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
        assert (world, world.first) == (distributed.World(), True)
        parts = [torch.ones(2), torch.zeros(3)]
        assert all(a is b for a, b in zip(world.gather(parts, 2), parts, strict=True))
        assert world.add(parts[0]) is parts[0]
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", [0, 1, 7, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_shares_are_everything_once(count: int, size: int) -> None:
    shares = [distributed.World(rank, size).share(range(count)) for rank in range(size)]
    assert sorted(i for share in shares for i in share) == list(range(count))
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
    assert distributed.current() == distributed.World()


@pytest.mark.parametrize("command", ["quantize", "bench", "demo", "inspect"])
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
