"""How many small faults of the numerical modules their own tests find: the mutation score.

    python bench/mutation.py --json bench/results/mutation.json
    python bench/mutation.py --module search/operands --sample 0    # every mutant of one module

Each mutant (`mutants.py`) is run in a process of its own, forked from one that has imported torch, diffusers and pytest
but nothing of tqdit: the fork imports the mutated source, so constants and defaults are the mutant's, too, and
runs the module's tests until one fails. A mutant that needs too much processor time or memory counts as killed.
Everything runs on the CPU; GPU code is left out (search/fused.py, search/kernels.py, `SKIPPED`).
"""

import argparse
import atexit
import gc
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from equivalent_mutants import reason
from mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tqdit"
SEARCH = ("tests/search/test_objectives.py", "tests/search/test_operands.py", "tests/search/test_alternating.py")
TESTS: dict[str, tuple[str, ...]] = {
    "grids/packing": ("tests/grids/test_packing.py",),
    "grids/regions": ("tests/grids/test_regions.py",),
    "grids/uniform": ("tests/grids/test_uniform.py",),
    "timegroups": ("tests/test_timegroups.py",),
    "search/operands": SEARCH,
    "search/objectives": SEARCH,
    "search/alternating": SEARCH,
    "search/solver": ("tests/search/test_solver.py",),
    "artifact/tensors": ("tests/test_artifact.py", "tests/test_artifact_forged.py"),
    "sampling/diffusion": ("tests/sampling/test_diffusion.py",),
    "sampling/trajectory": ("tests/sampling/test_diffusion.py", "tests/sampling/test_schedules.py"),
    "ops/reference": ("tests/ops/test_reference.py",),
}
SKIPPED = {"search/alternating": ("loss_of_steps",)}  # its kernels are for GPUs
DESELECTED = (  # slow, and no help: a process of its own does not see the mutant; Triton's interpreter runs GPU code
    "tests/ops/test_reference.py::test_int_matmul_is_exact_whatever_the_cpu_can_do",
    "tests/search/test_solver.py::test_the_search_of_a_gpu_chooses_the_same",
)
WARM = (  # what the tests import, but for tqdit
    "pytest", "_pytest.unittest", "_pytest.skipping", "_pytest.warnings", "_pytest.junitxml", "_pytest.pastebin", "pdb",
    "hypothesis.strategies", "safetensors.torch", "pydantic.main", "pydantic.json_schema", "tomllib", "scipy", "triton",
    "diffusers.models.transformers.dit_transformer_2d", "diffusers.schedulers.scheduling_ddim",
    "diffusers.schedulers.scheduling_ddpm", "torch.utils._pytree",
)  # fmt: skip
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}  # fmt: skip
MEMORY = 4 * 2**30  # above what the parent has
OUTCOMES = ("killed", "survived", "timed out")


@dataclass(frozen=True)
class Task:
    module: str
    source: str
    cpu_seconds: int
    mutant: Mutant | None = None  # None: the module as it is


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a source that is in no file."""

    def __init__(self, module: str, source: str) -> None:
        self.name, self.path, self.source = f"tqdit.{module.replace('/', '.')}", PACKAGE / f"{module}.py", source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def exec_module(self, module) -> None:
        exec(compile(self.source, self.path, "exec"), module.__dict__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--sample", type=int, default=36, help="mutants per module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    start = time.monotonic()
    _warm_up()
    rows = {}
    for module in args.module:
        rows[module] = row = _score(module, args.sample, args.seed, args.jobs)
        print(_line(module, row), flush=True)
        for survivor in row["survivors"]:
            print(f"    {module}.py:{survivor['line']} {survivor['operator']}: {survivor['change']}", flush=True)
    total = {name: sum(row[name] for row in rows.values()) for name in ("mutants", "equivalent", *OUTCOMES)}
    total["score"] = _percent(total)
    print(_line("all", total) + f"   {time.monotonic() - start:.0f} s")
    if args.json:
        from tqdit.system.environment import environment  # not before: forks import tqdit afresh

        result = {"command": f"python {shlex.join(sys.argv)}", "environment": environment()}
        result |= {"seed": args.seed, "seconds": round(time.monotonic() - start), "modules": rows, "all": total}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _warm_up() -> None:
    """Import what takes long, once for all forks."""
    os.environ |= ENVIRONMENT
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "models")]
    for name in WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or each fork searches all of that for garbage
    atexit.register(gc.unfreeze)
    assert not any(name.partition(".")[0] == "tqdit" for name in sys.modules)


def _score(module: str, sample: int, seed: int, jobs: int) -> dict:
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    every = mutants(source, SKIPPED.get(module, ()))
    real = [mutant for mutant in every if reason(module, source, mutant) is None]
    chosen = real if not sample or sample >= len(real) else random.Random(seed).sample(real, sample)
    chosen.sort(key=lambda mutant: (mutant.start, mutant.end))
    begin = time.monotonic()
    ((_, outcome),) = _run([Task(module, source, 600)], 1)
    if outcome != "survived":
        raise SystemExit(f"the tests of {module} fail without a mutant: {' '.join(TESTS[module])}")
    limit = 10 + 5 * round(time.monotonic() - begin)
    results = dict(_run([Task(module, mutant.apply(source), limit, mutant) for mutant in chosen], jobs))
    row: dict = {"possible": len(every), "equivalent": len(every) - len(real), "mutants": len(chosen)}
    row |= {name: sum(outcome == name for outcome in results.values()) for name in OUTCOMES}
    row["score"] = _percent(row)
    row["survivors"] = [
        {"line": mutant.line, "operator": mutant.operator, "change": f"{mutant.before} -> {mutant.after}"}
        for mutant in chosen if results[mutant] == "survived"
    ]  # fmt: skip
    return row


def _percent(row: dict) -> float:
    return round(100 * (1 - row["survived"] / max(row["mutants"], 1)), 1)


def _line(name: str, row: dict) -> str:
    counts = ", ".join(f"{row[outcome]:4} {outcome}" for outcome in OUTCOMES)
    return f"{name:20} {row['mutants']:4} mutants, {counts}: {row['score']:5.1f} % ({row['equivalent']} equivalent)"


def _run(tasks: list[Task], jobs: int) -> Iterator[tuple[Mutant | None, str]]:
    """The outcome of each task, `jobs` of them at a time."""
    waiting, running = tasks[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop()
            pid = os.fork()
            if pid == 0:
                _child(task)
            running[pid] = task
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        late = code in (-signal.SIGXCPU, -signal.SIGKILL)
        yield running.pop(pid).mutant, "timed out" if late else "killed" if code else "survived"


def _child(task: Task) -> None:
    """Test one mutant, and end with pytest's exit code."""
    code = 1
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (task.cpu_seconds, task.cpu_seconds + 5))
        signal.alarm(20 * task.cpu_seconds)  # it sleeps, or waits for another process
        code = _tested(task)
    finally:
        os._exit(code)


def _tested(task: Task) -> int:
    import hypothesis
    import pytest

    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # the same examples each time, none made smaller
    hypothesis.settings.register_profile("mutation", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    sys.meta_path.insert(0, Mutated(task.module, task.source))
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", f"--basetemp={folder}/pytest"]
        options += [f"--deselect={test}" for test in DESELECTED]
        return int(pytest.main([*options, *TESTS[task.module]]))


if __name__ == "__main__":
    main()
