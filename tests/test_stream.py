"""The residual stream is fp16 in a float16 model whose calibration shows that fp16 holds it, and fp32 in any other."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tqdit
from test_artifact import forge
from tqdit import workflow
from tqdit.artifact import folder as artifact
from tqdit.artifact.manifest import Manifest
from tqdit.artifact.tensors import MANIFEST_TENSOR, pack
from tqdit.errors import InputError
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.spec import Solution

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
LIMIT = 65504 / 8


@pytest.fixture(scope="module")
def solution(solved) -> Solution:
    return solved("paper")


def run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).sample


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_fp16_is_closer_to_fp32_than_bf16_is(solution, model_inputs, backend: str) -> None:
    """Only by some dB here: in so small a model, codes that fall on the other side of a boundary are most of both."""
    models = {dtype: convert(solution, backend, dtype=dtype) for dtype in (FULL, HALF, BRAIN)}
    assert {dtype: model.stream_dtype for dtype, model in models.items()} == {dtype: dtype for dtype in models}
    expected, half, brain = (run(model, model_inputs) for model in models.values())
    assert half.dtype is FULL  # that of the input
    assert not torch.equal(half, expected)
    assert sqnr_db(expected, half) > sqnr_db(expected, brain) + 1


@pytest.mark.parametrize(
    ("stream_max", "fits"), [(None, False), (0.0, True), (LIMIT, True), (LIMIT + 0.01, False), (1e30, False)]
)
def test_only_a_stream_that_fits_is_fp16(solution, model_inputs, stream_max: float | None, fits: bool) -> None:
    given = replace(solution, stream_max=stream_max)
    model = convert(given, "reference", dtype=HALF)
    assert given.fits_float16 == fits
    assert (model.dtype, model.stream_dtype) == (HALF, HALF if fits else FULL)
    full = run(convert(given, "reference"), model_inputs)
    assert torch.equal(run(model, model_inputs), full) != fits
    for dtype in (BRAIN, FULL):
        assert convert(given, "reference", dtype=dtype).stream_dtype is dtype


def test_the_dtype_may_change_later(solution) -> None:
    model = convert(solution, "reference")
    assert (model.half().stream_dtype, model.float().stream_dtype, model.bfloat16().stream_dtype) == (HALF, FULL, BRAIN)
    model = convert(replace(solution, stream_max=1e5), "reference")
    assert (model.half().dtype, model.stream_dtype) == (HALF, FULL)


def test_it_compiles_whole(solution, model_inputs) -> None:
    model = convert(solution, "reference", dtype=HALF)
    expected = run(model, model_inputs)
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend="eager"), model_inputs), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_leaves_the_range_of_fp16_is_nan(solution, model_inputs, backend: str) -> None:
    """A block that adds more than calibration has seen: Inf at its tokens, and not a number of either sign."""
    name = "transformer_blocks.0.ff.net.2.bias"
    large = replace(solution, floats={**solution.floats, name: solution.floats[name] + 1e6})
    models = [convert(large, backend, dtype=dtype) for dtype in (FULL, HALF)]
    assert models[1].stream_dtype is HALF
    full, half = (run(model, model_inputs) for model in models)
    assert full.isfinite().all()
    assert half.isnan().all()


def test_an_artifact_keeps_it(tmp_path, solution) -> None:
    assert 0 < solution.stream_max < LIMIT
    folder, saved = tmp_path / "artifact", tmp_path / "saved"
    folder.mkdir()
    artifact.write(solution, folder)
    found = artifact.read(folder)
    assert found.stream_max == solution.stream_max
    assert workflow.load(folder, backend="reference", dtype="float16").stream_dtype is HALF
    assert tqdit.load(folder, backend="reference", dtype=HALF).stream_dtype is HALF
    convert(found, "reference").save_pretrained(saved)
    assert artifact.read(saved).stream_max == solution.stream_max
    inspected = tqdit.inspect(folder, backend="reference")
    assert (inspected["stream_max"], inspected["fits_float16"]) == (solution.stream_max, True)


def test_older_artifacts_do_not_have_it(solution) -> None:
    stored, _ = pack(solution)
    data = bytes(stored[MANIFEST_TENSOR].tolist())
    assert Manifest.parse(data, 4).stream_max == solution.stream_max
    assert Manifest.parse(data, 3).stream_max is None  # a key that means nothing in that format


def test_one_without_it_is_read(tmp_path, solution) -> None:
    artifact.write(replace(solution, stream_max=None), tmp_path)
    assert artifact.read(tmp_path).stream_max is None
    forge(tmp_path, lambda manifest: manifest.pop("stream_max"))
    assert artifact.read(tmp_path).stream_max is None
    assert workflow.load(tmp_path, backend="reference", dtype="float16").stream_dtype is FULL
    assert tqdit.inspect(tmp_path, backend="reference")["fits_float16"] is False


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), "9", True, [1.0]])
def test_a_forged_one_is_refused(tmp_path, solution, value: object) -> None:
    artifact.write(solution, tmp_path)
    forge(tmp_path, lambda manifest: manifest.update(stream_max=value))
    with pytest.raises(InputError, match=r"stream_max|Infinity|NaN"):
        artifact.read(tmp_path)
