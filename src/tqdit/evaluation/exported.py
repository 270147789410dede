"""Load a program that `torch.export.save` wrote (.pt2) only if nothing in the file is Python's own.

`torch.export.load` unpickles tensors of subclasses and opaque constants, loads compiled libraries, looks operators up
by any name below `torch`, and evaluates the text of symbolic sizes. A file that needs any of these is refused before
torch reads it. What is left are tensors, and a graph of torch's own `aten` operators.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.system.reading import read_bytes

MOST = 8 * 2**30  # bytes of a network's file
LONGEST = 100  # characters of torch's reason in an error
SHOWN = 60  # characters of a text from the file in an error
CONFIG = r"data/(weights|constants)/\w+_config\.json"
RECORDS = re.compile(
    rf"{CONFIG}|data/weights/weight_\d+|data/constants/tensor_\d+|models/model\.json|data/sample_inputs/model\.pt|"
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
# What torch takes for names or formulas, and puts into Python code or evaluates.
LEGAL = {
    "operator": re.compile(
        r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|eq|ne|ge|gt|le|lt)"
    ),
    "expr_str": re.compile(
        r"(?:'?[su]\d+'?|Symbol|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|Equality|"
        r"positive|nonnegative|integer|True|False|[\d ,=*/+()-])*"
    ),
    "forward_arg_names": re.compile(r"[A-Za-z]\w*"),
    "in_spec": re.compile(r'[\w "\\\[\]{}:,.-]*'),
    "out_spec": re.compile(r'[\w "\\\[\]{}:,.-]*'),
}


def load_exported(path: Path) -> nn.Module:
    """Return the module of an exported program on the CPU.

    Raises `InputError` naming the file for one that is damaged, and for content that is never loaded.
    """
    content = read_bytes(path, MOST)
    try:
        _check(content)
        # The program comes from the bytes that were checked; its guards are Python code, and stay where they are.
        return torch.export.load(io.BytesIO(content)).module(check_guards=False)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{path} is damaged or no file of torch.export.save: {short_reason(error)}") from None


def short_reason(error: Exception) -> str:
    """Return the first sentence of torch's reason why it could not load a file, of at most `LONGEST` characters."""
    text = str(error).strip()
    if "INTERNAL ASSERT" in text:  # a place in torch's source code
        return "a check inside torch failed"
    sentence = text.partition("\n")[0].partition(". ")[0].removesuffix(".")
    sentence = "".join(c if c.isprintable() else "?" for c in sentence) or type(error).__name__
    cut = sentence[: LONGEST - 2]
    return sentence if len(sentence) <= LONGEST else f"{cut[: cut.rfind(' ')] if ' ' in cut else cut} …"


def _check(content: bytes) -> None:
    """Raise `InputError` for anything that loading would run, or that is not known to be only data."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))  # the reader that torch.export.load has
    for name in reader.get_all_records():
        if not RECORDS.fullmatch(name):
            raise InputError(f"it has the record {name[:SHOWN]!r}, which is no tensor and no graph of one program")
        if name.endswith(".pt"):
            _check_inputs(reader.get_record(name))
        elif re.fullmatch(CONFIG, name):
            _check_payloads(json.loads(reader.get_record(name)))
        elif name.endswith(".json"):
            for key, text in _texts(json.loads(reader.get_record(name))):
                _check_text(key, text)


def _check_inputs(content: bytes) -> None:
    """Check the example inputs: torch unpickles them without limits where the limited way fails."""
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        raise InputError("its example inputs hold a Python object, which is never unpickled") from None


def _check_payloads(config: Any) -> None:
    for name, payload in config["config"].items():
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise InputError(f"{name[:SHOWN]!r} is a Python object, which is never unpickled")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text of a JSON value with the key that it stands under; the operator of a node has the key itself."""
    if isinstance(value, dict):
        for name, inner in value.items():
            called = name == "as_operator" or (name == "target" and "inputs" in value)
            yield from _texts(inner, "operator" if called else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value


def _check_text(key: str, text: str) -> None:
    legal = LEGAL.get(key)
    if legal is not None and not legal.fullmatch(text):
        raise InputError(
            f"its graph has the {key} {text[:SHOWN]!r}; only torch's own aten operators on tensors are loaded"
        )
