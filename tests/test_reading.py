"""Files that others wrote: what is no regular file of plain values is refused in one line, and never waited for."""

import json
import os
from pathlib import Path

import pytest

from tqdit.errors import InputError
from tqdit.recipe import Recipe
from tqdit.system.files import read_json, read_tensors, read_weights
from tqdit.system.reading import MAX_BYTES, MAX_DEPTH, parse_json


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


def nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [pipe, device, loop, nothing, Path.mkdir])
@pytest.mark.parametrize("read", [read_json, read_tensors, Recipe.from_toml])
@pytest.mark.timeout(20)
def test_what_is_no_regular_file(tmp_path, make, read) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(InputError, match=r"^[^\n]*file (is not a regular file|cannot be read|is missing)"):
        read(path)


def test_a_link_to_a_file_is_read(tmp_path) -> None:
    (tmp_path / "real").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to("real")
    assert read_json(tmp_path / "link") == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ' + "9" * 5000 + "}",
        '{"a": 9223372036854775808}',
        '{"a": 1e999}',
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        '{"\\ud800": 1}',
        '{"a": 1, "b": 2, "a": 1}',
        '{"a": [{"b": 1, "b": 2}]}',
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
        '{"a": 1',
        "[1]",
        "",
    ],
)
def test_json_that_is_refused(tmp_path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1100


def test_json_that_is_taken() -> None:
    text = '{"a": [1, -9223372036854775808, 1.5e300, null, true], "ü": {"": "\\u00e9"}, "b": -Infinity}'
    assert parse_json(text.encode()) == json.loads(text)
    with pytest.raises(InputError, match="-Infinity"):
        parse_json(text.encode(), infinite=False)


def test_a_huge_file_is_not_read(tmp_path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputError, match=f"a.json has {MAX_BYTES + 1} bytes"):
        read_json(path)


@pytest.mark.parametrize("name", ["\\ud800", "a\\u0000b", "..", "", "x" * 300, "a\\u001b[31m"])
def test_names_of_shards(tmp_path, name: str) -> None:
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    with pytest.raises(InputError) as error:
        read_weights(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "text",
    ["groups = " + "9" * 5000, "a" + ".a" * 30_000 + " = 1", "a = " + "[" * 5000, 'x = "' + "a" * 2**17 + '"', "\xff"],
)
def test_recipes_that_are_refused(tmp_path, text: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"r\.toml"):
        Recipe.from_toml(path)


def test_dots_in_a_comment_of_a_recipe(tmp_path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("# " + "." * 200 + "\ngroups = 3  # one of 1. to 10.\n")
    assert Recipe.from_toml(path).groups == 3


def test_messages_are_one_line_that_a_terminal_shows() -> None:
    assert str(InputError("a\nb\x1b[31m\ud800é")) == "a\\nb\\x1b[31m\\ud800é"
    long = str(InputError("start" + "x" * 10_000 + "end"))
    assert len(long) <= 1000
    assert long.startswith("start")
    assert long.endswith("end")
