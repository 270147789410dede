"""A whole converted model on the GPU backend: close to the reference, compiled without a break, replayed as it runs."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tqdit.errors import InputError
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime import calls
from tqdit.runtime.calls import Runtime
from tqdit.runtime.convert import convert

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
BOUND_DB = 45.0  # single codes that fall on the other side of a rounding boundary


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).sample


def some(inputs: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Return some samples, of different time groups."""
    return {name: x[:: len(x) // count][:count].contiguous().to(DEVICE) for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("preset", "bits", "dtype", "backend"),
    [
        pytest.param(*case, backend, marks=pytest.mark.long if DEVICE == "cpu" and backend != usually else ())
        for *case, usually in [
            ("paper", "w8a8", torch.float32, "triton"),
            ("paper", "w8a8", torch.bfloat16, "triton-packed"),
            ("paper", "w8a8", torch.float16, "triton"),
            ("plus", "w6a6", torch.float32, "triton-packed"),
            ("plus", "w4a8", torch.float32, "triton-packed"),
        ]
        for backend in ("triton", "triton-packed")
    ],
)
def test_model_is_within_the_bound_of_the_reference(
    solved, model_inputs, preset: str, bits: str, dtype: torch.dtype, backend: str
) -> None:
    """`dtype`: of the residual stream, of both."""
    inputs, solution = some(model_inputs, 2), solved(preset, bits)
    expected, found = (run(convert(solution, name, DEVICE, dtype), inputs) for name in ("reference", backend))
    assert sqnr_db(expected.cpu(), found.cpu()) > BOUND_DB


def test_compiles_whole_and_for_every_timestep(solved, model_inputs) -> None:
    """Around the blocks a graph has torch's operations, a plain call kernels, which round sums in another order."""
    inputs = some(model_inputs, 2)
    later = inputs | {"timestep": 999 - inputs["timestep"]}
    model = convert(solved("plus"), "triton", DEVICE)
    expected = [run(model, inputs), run(model, later)]
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.inference_mode():
        found = compiled(**inputs, return_dict=False)[0]
        assert sqnr_db(expected[0].cpu(), found.cpu()) > BOUND_DB
        with torch.compiler.set_stance("fail_on_recompile"):
            other = compiled(**later, return_dict=False)[0]
    assert sqnr_db(expected[1].cpu(), other.cpu()) > BOUND_DB


def test_operators_have_true_fake_implementations(solved, model_inputs) -> None:
    """Shapes, dtypes and aliasing of every operator, as torch checks them."""
    from tqdit.backends.triton import operators

    calls: dict[str, tuple[Any, ...]] = {}
    names = ("norm_quantize_rows", "project", "attend", "linear_residual", "linear_activation", "float_input_linear")
    originals = {name: getattr(operators, name) for name in names}
    model = convert(solved("plus"), "triton", DEVICE)
    model.runtime.graphs = False
    try:
        for name, op in originals.items():

            def kept(*args: Any, name: str = name, op: Any = op) -> torch.Tensor:
                calls.setdefault(name, args)
                return op(*args)

            setattr(operators, name, kept)
        with torch.no_grad():
            model(**some(model_inputs, 2))
    finally:
        for name, op in originals.items():
            setattr(operators, name, op)
    assert set(calls) == set(names)
    for name, args in calls.items():
        torch.library.opcheck(originals[name], args, test_utils=("test_schema", "test_faketensor"))


def test_one_sample_alone_is_that_sample(solved, model_inputs) -> None:
    """Its patches are a view with other strides than a batch's."""
    model, inputs = convert(solved("plus"), "triton", DEVICE), some(model_inputs, 2)
    together = run(model, inputs)
    for i in range(2):
        alone = run(model, {name: x[i : i + 1] for name, x in inputs.items()})
        assert sqnr_db(together[i : i + 1].cpu(), alone.cpu()) > BOUND_DB


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_wrong_inputs_are_named(solved, model_inputs, backend: str) -> None:
    device = DEVICE if backend == "triton" else "cpu"
    inputs = {name: x[:2].to(device) for name, x in model_inputs.items()}
    model = convert(solved("plus"), backend, device)
    for changed, message in [
        ({"class_labels": inputs["class_labels"][:1]}, r"class_labels have shape \(1,\), the batch needs \(2,\)"),
        ({"class_labels": None}, "needs `class_labels`"),
        ({"class_labels": [1, 2]}, "needs `class_labels`, a tensor"),
        ({"timestep": torch.tensor([1, 2, 3], device=device)}, "timestep has 3 entries for a batch of 2"),
        ({"timestep": None}, "needs `timestep`"),
        ({"timestep": 1000}, "timestep 1000 is outside"),
        ({name: x[:0] for name, x in inputs.items()}, "batch of 0 samples"),
    ]:
        with pytest.raises(InputError, match=message):
            run(model, inputs | changed)
    with pytest.raises(TypeError, match="colour"):
        model(**inputs, colour=3)


def test_a_deleted_model_is_gone_at_once(solved) -> None:
    model = convert(solved("plus"))
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_model_can_be_pickled(solved, model_inputs) -> None:
    model = convert(solved("plus"), "reference")
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, model_inputs), run(model, model_inputs))


def test_what_a_graph_needs_is_compiled_before_its_first_call(solved, model_inputs, monkeypatch) -> None:
    """The backend gets the call that is captured next; no prompt that is made on the way is kept."""
    model, made = convert(solved("plus"), "reference"), []
    expected = run(model, model_inputs)
    monkeypatch.setattr(Runtime, "_graphable", lambda self, x: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(calls, "Captured", lambda call, inputs, device: made.append("captured") or call)
    model.runtime.compile_ahead = lambda call: made.append(call())
    model.runtime._prompt = "of before"
    assert torch.equal(run(model, model_inputs), expected)
    ahead, captured = made
    assert (torch.equal(ahead, expected), captured) == (True, "captured")
    assert model.runtime._prompt is calls.NO_PROMPT


class TestGraphs:
    pytestmark = gpu

    @pytest.fixture
    def integer(self, solved) -> nn.Module:
        return convert(solved("plus"), "triton", "cuda")

    def test_a_replay_is_the_call(self, integer, model_inputs) -> None:
        inputs = some(model_inputs, 4)
        other = inputs | {"timestep": 999 - inputs["timestep"], "hidden_states": inputs["hidden_states"] * 0.5}
        integer.runtime.graphs = False
        expected = [run(integer, inputs), run(integer, other)]
        integer.runtime.graphs = True
        for _ in range(2):
            assert torch.equal(run(integer, inputs), expected[0])
            assert torch.equal(run(integer, other), expected[1])
        assert len(integer.runtime._captured) == 1

    def test_outputs_are_the_callers(self, integer, model_inputs) -> None:
        inputs = some(model_inputs, 2)
        first = run(integer, inputs)
        before = first.clone()
        run(integer, inputs | {"timestep": 999 - inputs["timestep"]})
        assert torch.equal(first, before)

    def test_batches_of_every_size_and_a_scalar_timestep(self, integer, model_inputs) -> None:
        inputs = some(model_inputs, 5)
        inputs["timestep"] = torch.full_like(inputs["timestep"], 431)
        whole = run(integer, inputs)
        for count in (1, 3, 5):
            part = {name: x[:count] for name, x in inputs.items()}
            assert sqnr_db(whole[:count], run(integer, part)) > BOUND_DB
            for timestep in (torch.tensor(431, device="cuda"), torch.tensor(431)):
                assert torch.equal(run(integer, part | {"timestep": timestep}), run(integer, part))

    def test_nothing_waits_for_the_host(self, integer, model_inputs) -> None:
        inputs = some(model_inputs, 2)
        expected = run(integer, inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = run(integer, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, expected)

    def test_streams_take_turns(self, integer, model_inputs) -> None:
        """A replay on another stream waits for the one before, which reads the same inputs."""
        inputs = some(model_inputs, 4)
        others = [inputs | {"timestep": torch.full_like(inputs["timestep"], t)} for t in (100, 500, 900)]
        expected = [run(integer, other) for other in others]
        streams = [torch.cuda.Stream() for _ in others]
        torch.cuda.synchronize()
        found = []
        for other, stream in zip(others * 5, streams * 5, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(integer, other))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(expected * 5, found, strict=True))

    def test_a_copy_and_a_moved_model_have_graphs_of_their_own(self, integer, model_inputs) -> None:
        inputs = some(model_inputs, 2)
        expected = run(integer, inputs)
        twin = copy.deepcopy(integer)
        assert not twin.runtime._captured
        del integer
        assert torch.equal(run(twin, inputs), expected)
        twin.cpu()
        assert not twin.runtime._captured
        assert torch.equal(run(twin.cuda(), inputs), expected)
