"""torch.compile and torch.export on CPUs: the whole model, timestep and class still data, the same result.

Through "eager" and "aot_eager" everything is computed as in a plain call, so results are equal. Inductor rounds the
few float operations between the kernels in its own order: a code may fall on the other side of a rounding boundary.
"""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from tqdit.architectures import patches
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert

BOUND_DB = 45.0  # through Inductor


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


@pytest.fixture
def calls(model_inputs) -> list[dict[str, torch.Tensor]]:
    """Two calls with other states, time groups and classes."""
    first = {name: x[:2] for name, x in model_inputs.items()}
    second = {name: x[2:4] for name, x in model_inputs.items()}
    return [first, second | {"timestep": 999 - first["timestep"]}]


def run(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given, return_dict=False)[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiles_whole_and_for_every_timestep(solved, calls, backend: str) -> None:
    model = convert(solved("plus"), backend)
    expected = [run(model, given) for given in calls]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(run(compiled, calls[0]), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(run(compiled, calls[1]), expected[1])


def test_blocks_compile_once_for_all_of_them_and_for_all_threads(solved, calls) -> None:
    """A call is an argument of its blocks, in compiled code as well."""
    model = convert(solved("plus"), "cpu")
    expected = [run(model, given) for given in calls]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.equal(run(model, calls[0]), expected[0])
    wrong = []

    def check(which: int) -> None:
        wrong.extend(i for i in range(10) if not torch.equal(run(model, calls[which]), expected[which]))

    threads = [threading.Thread(target=check, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(run(model, calls[1]), expected[1])


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with a C++ compiler")
def test_inductor_is_within_the_bound(solved, calls) -> None:
    model = convert(solved("plus"), "cpu")
    expected = [run(model, given) for given in calls]
    compiled = torch.compile(model, fullgraph=True)
    assert all(sqnr_db(a, run(compiled, given)) > BOUND_DB for a, given in zip(expected, calls, strict=True))


@pytest.mark.parametrize("backend", ["cpu", pytest.param("reference", marks=pytest.mark.long)])
def test_an_exported_program_is_the_model(solved, calls, backend: str, tmp_path: Path) -> None:
    """For every batch size, timestep and class; also when it was saved and loaded, and under autocast, with kernels.

    The reference's products of floats are torch's own, which autocast rounds in an exported program.
    """
    model = convert(solved("plus"), backend)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in calls[0]} | {"return_dict": None}
    program = torch.export.export(model, (), {**calls[0], "return_dict": False}, dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    many = {name: torch.cat([given[name] for given in calls]) for name in calls[0]}
    for given in (*calls, many):
        expected = run(model, given)
        assert torch.equal(run(program.module(), given), expected)
        assert torch.equal(run(loaded, given), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backend == "cpu"):
            assert torch.equal(run(loaded, given), expected)
    assert torch.equal(run(model, calls[1]), run(loaded, calls[1]))  # the model is as it was


def test_the_backend_has_every_operator_of_an_exported_program(solved, calls, tmp_path: Path) -> None:
    """In another process, which knows the backend and nothing else of the package."""
    model = convert(solved("plus"), "cpu")
    program = torch.export.export(model, (), {**calls[0], "return_dict": False})
    torch.export.save(program, tmp_path / "model.pt2")
    code = f"import torch, tqdit.backends.cpu; torch.export.load({str(tmp_path / 'model.pt2')!r})"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_pixel_makes_its_sample_nan_in_compiled_code_too(solved, value: float) -> None:
    """Inductor takes x * 0 for 0. It compiles the last layer alone here: the whole model takes it long."""
    model = convert(solved("plus"), "reference")
    inner = model.config.num_attention_heads * model.config.attention_head_dim
    stream = torch.randn(2, 4, inner, generator=torch.Generator().manual_seed(0))
    stream[1, 2, 3] = value
    model.proj_out_2 = nn.Linear(inner, 8)  # a small one: how a product is compiled does not matter here
    with torch.no_grad():
        last = torch.compile(patches._patches, backend="inductor")
        found = last(model.norm_out, model.proj_out_2, stream, torch.zeros(2, 2 * inner))
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_pixel_makes_its_sample_nan_through_aot(solved, calls, value: float) -> None:
    given = calls[0] | {"hidden_states": calls[0]["hidden_states"].clone()}
    given["hidden_states"][1, 0, 0, 0] = value
    found = run(torch.compile(convert(solved("plus"), "cpu"), backend="aot_eager"), given)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
