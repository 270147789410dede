"""Tracing, exporting, compiling, and inputs that do not fit."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny import SIZES, WrongError, artifact, dit, inputs, load, normal, output, refusal, refused
from torch import nn


class Positional(nn.Module):
    """The model with positional inputs, as tracers want it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.model(x, t, y, return_dict=False)[0]


def traced(work: Path) -> str:
    """A trace works for another timestep, or is refused in one line."""
    import tqdit

    model = load(artifact(work))
    try:
        with torch.no_grad():
            found = torch.jit.trace(Positional(model), tuple(inputs().values()), check_trace=False)
    except tqdit.InputError as error:
        return refusal(error)
    late = inputs(t=900)
    return normal(output(model, **late), found(*late.values()))


def legacy_onnx(work: Path) -> str:
    model = load(artifact(work))

    def export() -> None:
        with torch.no_grad():
            torch.onnx.export(Positional(model), tuple(inputs().values()), str(work / "x.onnx"), dynamo=False)

    return refused(export)


def exported(backend: str) -> Callable[[Path], str]:
    def run(work: Path) -> str:
        model = load(artifact(work), backend)
        program = torch.export.export(model, (), {**inputs(), "return_dict": False})
        late = inputs(t=900)
        found = program.module()(**late, return_dict=False)[0]
        return normal(output(model, **late), found, 60.0)

    return run


def compiled(**options: Any) -> Callable[[Path], str]:
    def run(work: Path) -> str:
        path = artifact(work)
        expected = [output(load(path), **inputs(t=t)) for t in (500, 900)]
        model = torch.compile(load(path), **options)
        return normal(torch.cat(expected), torch.cat([output(model, **inputs(t=t)) for t in (500, 900)]), 60.0)

    return run


def compiled_blocks(work: Path) -> str:
    path = artifact(work)
    model = load(path)
    model.compile_repeated_blocks(fullgraph=True)
    return normal(output(load(path)), output(model), 60.0)


def gradient(backend: str) -> Callable[[Path], str]:
    """A gradient through integers is refused; it would be none, or meaningless."""

    def run(work: Path) -> str:
        model = load(artifact(work), backend)
        given = inputs()
        given["hidden_states"].requires_grad_()
        return refused(lambda: model(**given, return_dict=False)[0].square().sum().backward(), "gradient")

    return run


def layer_skip(work: Path) -> str:
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    path = artifact(work)
    skip = LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    expected, model = load_float_skipped(skip), load(path)
    try:
        apply_layer_skip(model, skip)
    except Exception as error:
        line = str(error)
        if "\n" in line or "IntBlock" not in line:
            raise
        return f"refused: {line}"
    return normal(expected, output(model))


def load_float_skipped(skip: Any) -> torch.Tensor:
    from diffusers.hooks import apply_layer_skip

    model = dit()
    apply_layer_skip(model, skip)
    return output(model)


WRONG_INPUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "3 channels": ({"hidden_states": torch.randn(2, 3, 8, 8)}, ("3",)),
    "9 x 9 pixels": ({"hidden_states": torch.randn(2, 4, 9, 9)}, ("9",)),
    "class 11 of 10": ({"class_labels": torch.tensor([1, 11])}, ("11",)),
    "a NaN timestep": ({"timestep": torch.tensor([float("nan")] * 2)}, ("nan",)),
    "uint8 pixels": ({"hidden_states": torch.zeros(2, 4, 8, 8, dtype=torch.uint8)}, ("uint8",)),
}


def wrong_input(name: str) -> Callable[[Path], str]:
    changed, words = WRONG_INPUTS[name]

    def run(work: Path) -> str:
        model = load(artifact(work))
        return refused(lambda: output(model, **changed), *words)

    return run


def wrong_input_optimized(work: Path) -> str:
    """Checks are no asserts, which `python -O` removes."""
    path = artifact(work)
    code = (
        "import sys, torch, tqdit\n"
        f"m = tqdit.load({str(path)!r}, device='cpu')\n"
        f"x = torch.randn(2, {SIZES['in_channels'] - 1}, 8, 8)\n"
        "try: m(x, torch.tensor([500, 500]), torch.tensor([0, 1]))\n"
        "except tqdit.InputError as error: print(error)\n"
        "else: sys.exit('accepted')\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise WrongError(f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return f"refused: {done.stdout.strip()}"


def not_a_number(work: Path) -> str:
    """A NaN pixel makes its own sample NaN, as in the float model, and no other."""
    model = load(artifact(work))
    given = inputs()
    given["hidden_states"][0, 0, 0, 0] = float("nan")
    found = output(model, **given)
    if not found[0].isnan().all():
        raise WrongError(f"{int(found[0].isnan().sum())} of {found[0].numel()} outputs of the sample are NaN")
    return normal(output(model)[1:], found[1:], 60.0)


CASES: dict[str, Callable[[Path], str]] = {
    "torch.jit.trace of an integer model": traced,
    "legacy ONNX export": legacy_onnx,
    **{f"torch.export, backend {name}": exported(name) for name in ("cpu", "reference")},
    "torch.compile": compiled(),
    "torch.compile(fullgraph=True)": compiled(fullgraph=True),
    "compile_repeated_blocks(fullgraph=True)": compiled_blocks,
    **{f"an input that needs a gradient, backend {name}": gradient(name) for name in ("cpu", "reference", "simulated")},
    "diffusers' layer skip": layer_skip,
    **{f"input with {name}": wrong_input(name) for name in WRONG_INPUTS},
    "input with 3 channels under python -O": wrong_input_optimized,
    "a NaN pixel": not_a_number,
}
