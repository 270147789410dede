"""`tqdit serve` as a process: what it says, what it asks the network for, and how it ends."""

import html
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tqdit.cli.main import main
from tqdit.serving import gallery, server

# Every address that the process connects to, or looks up, goes into the file of its first argument.
# A shell that starts the tests in the background lets them ignore Ctrl-C, and their children inherit that.
WATCHED = """
import signal
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[1] if event == "socket.connect" else arguments[:2]
        with open(place, "a") as file:
            file.write(f"{address[0] if isinstance(address, tuple) else address}\\n")

signal.signal(signal.SIGINT, signal.default_int_handler)
place = sys.argv.pop(1)
sys.addaudithook(watch)
sys.argv[0] = "tqdit"
from tqdit.cli.main import main
main()
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A server of fashion-dit whose pictures go into a folder in `tmp_path`; killed at last if it has not ended."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `serve`)")
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", WATCHED, str(tmp_path / "addresses"), "serve", "fashion-dit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path / "temporary"))
        process = subprocess.Popen(
            [*command, "--port", "0", "--no-memory", "-q", "--device", "cpu"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_server_from_start_to_ctrl_c(serve: subprocess.Popen[str], tmp_path: Path) -> None:
    assert serve.stdout is not None
    line = serve.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), serve.stderr.read() if serve.stderr else ""
    assert line.endswith("/ shows fashion-dit · float32; Ctrl-C ends it\n")
    address = line.partition(" ")[0]
    assert "tqdit" in urllib.request.urlopen(address).read().decode()
    assert "steps must be at least 1, got 0" in called(address, [7, 0, 0, 1.5, "auto"])
    assert "seed must be a whole number, got nothing" in called(address, [7, None, 2, 1.5, "auto"])
    assert "unknown class '10'; known: t-shirt" in called(address, [10, 0, 2, 1.5, "auto"])
    assert "unknown sampler 'euler'" in called(address, [7, 0, 2, 1.5, "euler"])
    assert "2 of 2" in called(address, [7, 0, 2, 1.5, "auto"])
    with answered(address, [7, 0, 900, 1.5, "auto"]) as answer:
        assert answer.readline() == b"event: generating\n"
        serve.send_signal(signal.SIGINT)
    out, error = serve.communicate(timeout=240)  # on a busy machine a call may take long
    assert (serve.returncode, out, error) == (130, "", "tqdit: the page is no longer served\n")
    assert [entry for entry in (tmp_path / "temporary").iterdir() if entry.name.startswith("tqdit-serve")] == []
    addresses = set((tmp_path / "addresses").read_text().split())
    assert addresses <= {"127.0.0.1", "localhost", "::1", "None"}, "the network was asked for something"


def answered(address: str, values: list[object]) -> Any:
    """The stream of what the page's interface answers to a drawing with these values."""
    body = json.dumps({"data": values}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/call/draw", body, headers)) as answer:
        event = json.load(answer)["event_id"]
    return urllib.request.urlopen(f"{address}gradio_api/call/draw/{event}", timeout=120)


def called(address: str, values: list[object]) -> str:
    """All of it, when the drawing has ended."""
    with answered(address, values) as answer:
        return html.unescape(answer.read().decode())


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGTERM, 143, "tqdit: interrupted; nothing is half written\n"),
        (signal.SIGINT, 130, "tqdit: the page is no longer served\n"),
    ],
)
def test_a_signal_ends_a_server_as_it_ends_other_commands(monkeypatch, capsys, number, code: int, message: str) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `serve`)")
    before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(gallery, "load", lambda *_: SimpleNamespace(models=()))
    monkeypatch.setattr(server, "served", lambda *_: nullcontext("http://here/"))
    monkeypatch.setattr(threading.Event, "wait", lambda _: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["tqdit", "serve", "-q", "--port", "0", "fashion-dit"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    assert stop.value.code == code
    assert capsys.readouterr().err == message


def test_a_port_that_is_taken_is_named_before_any_work(monkeypatch, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = ended(monkeypatch, capsys, "no-such-model", "--port", str(port))
    assert message.startswith(f"tqdit: cannot serve on 127.0.0.1 port {port}: ")
    assert message.count("\n") == 1


def test_a_port_that_is_taken_while_models_load_is_named(monkeypatch, capsys) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "free_port", lambda host, port: port)
        message = ended(monkeypatch, capsys, "fashion-dit", "--no-memory", "-q", "--port", str(port))
    assert message.startswith(f"tqdit: cannot serve on 127.0.0.1 port {port}: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-model", "--port", "0"), "unknown model 'no-such-model'"),
        (("fashion-dit", "--port", "70000"), "--port must be at most 65535, got '70000'"),
        (("fashion-dit", "--port", "0", "--host", "192.0.2.1"), "cannot serve on 192.0.2.1 port 0: "),
        (("fashion-dit", "--port", "0", "--host", "no-such-host.invalid"), "cannot serve on no-such-host.invalid"),
        (("fashion-dit",) * 5 + ("--port", "0"), "a page shows 1 to 4 models, got 5"),
        (("fashion-dit", "--port", "0", "--dtype", "int8"), "dtype 'int8' is not one of"),
    ],
)
def test_wrong_options_get_one_line(monkeypatch, capsys, arguments: tuple[str, ...], message: str) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed (the extra `serve`)")
    said = ended(monkeypatch, capsys, *arguments)
    assert message in said
    assert said.count("\n") == 1


def test_without_gradio_a_line_says_what_to_install(monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name, *rest)
    )
    said = ended(monkeypatch, capsys, "fashion-dit", "--port", "0")
    assert said.startswith("tqdit: the page needs a package that is not installed: pip install ")
    assert said.count("\n") == 1


def ended(monkeypatch, capsys, *arguments: str) -> str:
    """What `tqdit serve ARGUMENTS` says on standard error before it ends with the exit code 2, leaving no folder."""
    monkeypatch.setattr(sys, "argv", ["tqdit", "serve", "-q", "--no-memory", *arguments])
    before = set(Path(tempfile.gettempdir()).glob("tqdit-serve-*"))
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert set(Path(tempfile.gettempdir()).glob("tqdit-serve-*")) <= before
    return captured.err
