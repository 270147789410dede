"""Quantize every transformer class of diffusers whose own test config builds here; a job for the night.

python bench/class_sweep.py --diffusers ../diffusers --out bench/results/class-sweep.json
python bench/class_sweep.py --diffusers ../diffusers --out build/sweep.json --only flux

`--diffusers`: a checkout of diffusers' repository at the installed version. Its tests have, for each class, the config
of a tiny model and the arguments of a call; its package is not used. A parameter that a class starts at one value (0 or
1, which would hide what is before it) gets random ones. Each class is recorded, quantized, saved, loaded and run:

- outputs of the quantized model against the float model on a call that was not recorded: at least `--target` dB;
- codes and outputs of the loaded model equal those before it was saved;
- the CPU backend equals the reference: codes of every layer's input exactly, its output within `bound`.

A test module that cannot be imported here is skipped with the reason. Every test module is a process of its own; an
error or a crash in one does not end the job. The exit code is 1 if a class raised or missed the target.
"""

import argparse
import copy
import importlib
import inspect
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tqdit
from tqdit.layers.quantized import QuantizedLinear
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.system.environment import environment
from tqdit.system.files import read_json, write_json

TESTS = "tests.models.transformers"
ARGUMENTS = "get_dummy_inputs"
TIMES = ("timestep", "timesteps", "t")  # the names that forwards have for the time
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the time in diffusers' arguments: the calls that are recorded
HELD_OUT = 0.6  # the share of the call that is measured
RECIPE = {"groups": 2, "samples": 4, "rows": 64, "rounds": 1, "candidates": 12, "rounding": "second_order"}
SHIFT = 128  # an unsigned code is the code plus this
SPACING = 2.0**-21  # of an output's size: what the few fp32 operations after the exact sums may differ by


@dataclass(frozen=True)
class Case:
    """A class at a tiny size: its name, how to make a float model, and the arguments of a call."""

    name: str
    build: Callable[[], nn.Module]
    arguments: Callable[[], dict[str, Any]]


# The cases that diffusers' tests have.


def modules(root: Path) -> list[str]:
    """Return the names of diffusers' test modules of transformers."""
    folder = root / TESTS.replace(".", "/")
    if not folder.is_dir():
        raise SystemExit(f"{root} is no checkout of diffusers: it has no {TESTS.replace('.', '/')}")
    return sorted(path.stem for path in folder.glob("test_*.py"))


def cases(root: Path, module: str) -> list[Case]:
    """Return the cases of a test module, one for each config of it that has a class, a config and arguments."""
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    imported = importlib.import_module(f"{TESTS}.{module}")
    found: dict[str, Case] = {}
    for name, config in vars(imported).items():
        if inspect.isclass(config) and config.__module__ == imported.__name__ and not name.startswith("Test"):
            case = _case(config)
            if case is not None:
                found[case.name if case.name not in found else f"{case.name} ({name})"] = case
    if not found:
        raise LookupError("the module has no class with model_class, get_init_dict and get_dummy_inputs")
    return [replace(case, name=name) for name, case in found.items()]


def _case(config: type) -> Case | None:
    # A class without a config of its own repeats its parent's, or has arguments for a model of the Hub.
    if "get_init_dict" not in vars(config) or not all(hasattr(config, name) for name in ("model_class", ARGUMENTS)):
        return None
    made = config()
    kind = made.model_class
    return Case(kind.__name__, lambda: kind(**made.get_init_dict()), getattr(made, ARGUMENTS))


# One case: float model, calls, quantized model, checks.


def sweep(case: Case, target: float, quantize: Callable[..., nn.Module] = tqdit.quantize) -> dict[str, Any]:
    """Take a class through all that a user does; return its figures and what failed."""
    started = time.perf_counter()
    model = float_model(case)
    calls = list(varied(model, case.arguments(), SHARES))
    (held_out,) = varied(model, case.arguments(), (HELD_OUT,), seed=1)
    expected = output(model, held_out)
    with tqdit.record(model, per_group=len(SHARES), groups=2) as recording:
        for call in calls:
            output(model, call)
    quantized = quantize(model, tqdit.Recipe("plus", "w8a8", **RECIPE), calls=recording, device="cpu")
    actual = output(quantized, held_out)
    row = {"parameters": sum(parameter.numel() for parameter in model.parameters()), **counts(quantized)}
    row["sqnr_db"] = round(sqnr_db(expected, actual), 2)
    failures = [] if row["sqnr_db"] >= target else [f"{row['sqnr_db']} dB is below the target of {target}"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "quantized"
        quantized.save_pretrained(place)
        loaded = type(model).from_pretrained(place)
        failures += differences(quantized, loaded, held_out, actual)
        reference, cpu = (convert(loaded.solution, backend) for backend in ("reference", "cpu"))
    checked, found = against_reference(reference, cpu, held_out)
    row["cpu_to_reference_db"] = finite(sqnr_db(output(reference, held_out), output(cpu, held_out)))
    seconds = round(time.perf_counter() - started, 1)
    return {**row, "layers_checked": checked, "seconds": seconds, "failures": failures + found}


def float_model(case: Case) -> nn.Module:
    """Return the float model, in which every parameter has different finite values."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # memory that a class leaves uninitialised is then NaN
    model = case.build().float().eval().requires_grad_(False)
    torch.use_deterministic_algorithms(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.isfinite().all() or (parameter.numel() > 1 and parameter.min() == parameter.max()):
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            centre = parameter.flatten()[0].nan_to_num() if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + noise * max(fan_in, 1) ** -0.5)
    return model


def varied(
    model: nn.Module, arguments: Mapping[str, Any], shares: tuple[float, ...], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Yield calls like `arguments` at shares of its time, each with another sample of the same size."""
    names = list(inspect.signature(model.forward).parameters)
    timestep = next((name for name in TIMES if name in names), None)
    if timestep is None:
        raise TypeError(f"the forward has none of the arguments {', '.join(TIMES)}")
    sample = names[0]
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(drawn(part) for part in value)
        return torch.randn(value.shape, generator=generator).to(value) if torch.is_tensor(value) else value

    for share in shares:
        call = copy.deepcopy(dict(arguments))
        call[sample] = drawn(call[sample])
        call[timestep] = scaled(call[timestep], share)
        yield call | ({"return_dict": False} if "return_dict" in names else {})


def scaled(t: Any, share: float) -> Any:
    """Return a share of a time, in its own dtype."""
    return (t * share).to(t.dtype) if torch.is_tensor(t) else type(t)(t * share)


@torch.no_grad()
def output(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """Return all floating-point numbers of what a model returns, in one row. A model may change its arguments."""
    torch.manual_seed(0)
    found = list(floats(model(**copy.deepcopy(dict(call)))))
    if not found:
        raise TypeError("the model returns no floating-point tensor")
    return torch.cat([tensor.float().flatten() for tensor in found])


def floats(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of nested outputs."""
    if torch.is_tensor(value):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from floats(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from floats(part)


def counts(model: nn.Module) -> dict[str, Any]:
    """Return the number of layers on codes, on float inputs, and in float with the reasons."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    plain = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    graph = model.solution.graph
    reasons = Counter(graph.left.values())
    reasons["first or last layer"] = sum(name in graph.ends for name in plain if name not in graph.left)
    reasons["no reason given"] = sum(name not in graph.left and name not in graph.ends for name in plain)
    return {
        "quantized": sum(layer.source is not None for layer in layers),
        "weight_only": sum(layer.source is None for layer in layers),
        "left": {reason: number for reason, number in sorted(reasons.items()) if number},
    }


def differences(saved: nn.Module, loaded: nn.Module, call: Mapping[str, Any], expected: Tensor) -> list[str]:
    """Return in words how a loaded model differs from the one that was saved."""
    before, after = saved.solution.codes, loaded.solution.codes
    found = [f"loading changed the codes of {name}" for name in before if not torch.equal(before[name], after[name])]
    if list(before) != list(after):
        found.append("loading changed the names of the codes")
    return found if torch.equal(output(loaded, call), expected) else [*found, "loading changed the output"]


def against_reference(reference: nn.Module, cpu: nn.Module, call: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Compare the layers of both backends on the inputs of the reference; return how many, and faults."""
    others, faults, seen = dict(cpu.named_modules()), [], set()

    def compare(name: str, layer: QuantizedLinear, x: Tensor) -> None:
        other = others[name]
        if name not in seen and layer.source is not None and not torch.equal(codes(layer, x), codes(other, x)):
            faults.append(f"{name}: the CPU backend's codes differ")
        expected, actual = layer(x).float(), other(x).float()
        bias = 0 if layer.bias is None else layer.bias.abs()
        room = bound(layer, x) if layer.source is None else SPACING * (expected.abs() + 2 * bias)
        if not ((actual - expected).abs() <= room).all():
            faults.append(f"{name}: the CPU backend's output is out of its bound")
        seen.add(name)

    inputs: list[tuple[str, QuantizedLinear, Tensor]] = []
    with_inputs = [(name, layer) for name, layer in reference.named_modules() if isinstance(layer, QuantizedLinear)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: inputs.append((name, layer, args[0].clone())))
        for name, layer in with_inputs
    ]
    output(reference, call)
    for hook in hooks:
        hook.remove()
    with torch.no_grad(), reference.in_call((), call), cpu.in_call((), call):
        for name, layer, x in inputs:
            compare(name, layer, x)
    return len(seen), faults


def codes(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Return the signed codes of a layer's input."""
    samples = len(x) if layer.source.timed and x.ndim > 1 else 1
    rows = x.reshape(samples, -1, layer.in_features)
    found = layer.source.codes(rows, layer.source.operand(samples), layer.kernels)
    plain = found[0] if isinstance(found, tuple) else found
    return plain.short() - SHIFT if plain.dtype is torch.uint8 else plain.short()


def bound(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Return what the output of a layer on float inputs may differ by: the sum's rounding at any order of its terms."""
    sizes = x.float().abs() @ layer.weight.float().abs().t()
    sizes = sizes if layer.bias is None else sizes + layer.bias.abs()
    return (2 * layer.in_features + 4) * 2.0**-24 * sizes


def finite(value: float) -> float | None:
    """Return a number that JSON has, None for equal outputs."""
    return round(value, 2) if value < float("inf") else None


# All cases, each module in a process.


def run_module(root: Path, module: str, target: float, connection: Any) -> None:
    """Send the outcome of every case of a module: (name, row). A name is that of the module if it has no cases."""
    torch.set_num_threads(1)
    try:
        found = cases(root, module)
    except Exception as error:  # whatever a test module needs that is not here
        connection.send((module, {"skipped": reason(error)}))
        found = []
    for case in found:
        connection.send((case.name, attempt(case, target)))
    connection.send(None)


def attempt(case: Case, target: float, quantize: Callable[..., nn.Module] = tqdit.quantize) -> dict[str, Any]:
    """Return the row of a case; a float model that does not run here is skipped, any later error is a failure."""
    try:
        model = float_model(case)
        for call in varied(model, case.arguments(), SHARES[:1]):
            if not output(model, call).isfinite().all():
                return {"skipped": "the float model's output has NaN or Inf"}
    except Exception as error:  # whatever the class needs that is not here
        return {"skipped": f"the float model does not run: {reason(error)}"}
    try:
        return sweep(case, target, quantize)
    except Exception as error:  # a finding of this job
        return {"failures": [f"raised {reason(error)}"]}


def reason(error: BaseException) -> str:
    """Return an error in one line, without the place of a file."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return " ".join(word for word in text.split(" ") if "/" not in word)[:200]


def in_process(root: Path, module: str, target: float, seconds: float) -> dict[str, Any]:
    """Return the rows of a module from a process of its own, which has a limit of time for each of its cases."""
    context = multiprocessing.get_context("fork")  # the child has torch and diffusers already
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=run_module, args=(root, module, target, sender))
    child.start()  # the sender stays open here too: the end of the process is seen from the process
    rows: dict[str, Any] = {}
    ended = time.monotonic() + seconds
    while True:
        alive = child.is_alive()  # asked before the last look at what it has sent
        if receiver.poll(0.2):
            message = receiver.recv()
            if message is None:
                break
            rows[message[0]], ended = message[1], time.monotonic() + seconds
        elif not alive or time.monotonic() > ended:
            why = f"took more than {seconds:.0f} s" if alive else f"its process ended with {child.exitcode}"
            rows[module] = {"failures": [why]}
            break
    child.kill()
    child.join()
    return rows


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many classes there are of each outcome, and the lowest SQNR."""
    ran = [row for row in rows.values() if "skipped" not in row]
    return {
        "classes": len(ran),
        "failed": sum(bool(row["failures"]) for row in ran),
        "skipped": len(rows) - len(ran),
        "lowest_sqnr_db": min((row["sqnr_db"] for row in ran if "sqnr_db" in row), default=None),
        "quantized": sum(row.get("quantized", 0) for row in ran),
        "weight_only": sum(row.get("weight_only", 0) for row in ran),
    }


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusers", type=Path, required=True, help="checkout at the installed version")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[""], help="test modules with one of these words in their names")
    parser.add_argument("--keep", action="store_true", help="keep the file's rows of classes that are not run again")
    parser.add_argument("--target", type=float, default=30.0, help="dB that every class must reach")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit of one class")
    parser.add_argument("--jobs", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = arguments()
    torch.set_num_threads(1)  # before a fork, and for tiny tensors
    root = args.diffusers.resolve()
    wanted = [module for module in modules(root) if any(word in module for word in args.only)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = dict(read_json(args.out)["classes"]) if args.keep and args.out.is_file() else {}
    with ThreadPoolExecutor(args.jobs) as pool:
        parts = [pool.submit(in_process, root, module, args.target, args.seconds) for module in wanted]
        for part in parts:
            rows |= part.result()
            print(*part.result().items(), sep="\n", flush=True)
            result = {"environment": environment(), "target_db": args.target, "summary": summary(rows), "classes": rows}
            write_json(args.out, result)  # anew after every module: a run that is cut keeps what it has
    print(result["summary"])
    sys.exit(1 if result["summary"]["failed"] else 0)


if __name__ == "__main__":
    main()
