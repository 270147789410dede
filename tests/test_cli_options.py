"""The options that commands share: they say the same, and take the same values, wherever they stand."""

import sys
from typing import Any

import pytest
import typer

from tqdit.cli.main import app, main

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands
DRAWING = ("sample", "evaluate", "compare", "serve")
DIFFERENT = {"--out", "--samples"}  # of the same name in other commands, for something else


def options(command: str) -> dict[str, Any]:
    """The options of a command by their last long name."""
    return {entry.opts[-1]: entry for entry in COMMANDS[command].params if entry.param_type_name == "option"}


def test_commands_that_draw_declare_their_options_alike() -> None:
    found: dict[str, dict[str, str]] = {}
    for command in DRAWING:
        for name, entry in options(command).items():
            if name not in DIFFERENT:
                found.setdefault(name, {})[command] = entry.help
    shared = {name: helps for name, helps in found.items() if len(helps) > 1}
    assert {name: helps for name, helps in shared.items() if len(set(helps.values())) > 1} == {}
    assert {"--steps", "--sampler", "--guidance", "--seed", "--num", "--dtype", "--device", "--prompts"} <= set(shared)


# What a command is not parsed without. The steps of `quantize` are a setting, whose limits the recipe checks.
NEEDED = {
    "sample": ["MODEL", "-o", "a.png"], "evaluate": ["MODEL"], "compare": ["MODEL", "w8a8"], "bench": ["w8a8"],
    "record": ["MODEL", "-o", "calls"],
}  # fmt: skip


@pytest.mark.parametrize("command", [name for name in COMMANDS if "--steps" in options(name) and name != "quantize"])
def test_every_command_takes_steps_from_one_on(monkeypatch, capsys, command: str) -> None:
    monkeypatch.setattr(sys, "argv", ["tqdit", command, *NEEDED[command], "--steps", "0"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err) == (2, "tqdit: --steps must be at least 1, got '0'\n")
