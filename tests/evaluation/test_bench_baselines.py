"""`bench/baselines/` and its table: one property of each method that its paper promises, and the rows that are written.

The methods share one property: with very many bits they compute what the float model does, so whatever they move
between activations and weights cancels.
"""

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tqdit import workflow
from tqdit.architectures import registry
from tqdit.errors import InputError
from tqdit.quality.fidelity import compare_epsilon, predict_epsilon
from tqdit.quality.metrics import sqnr_db

BENCH = Path(__file__).parents[2] / "bench"
PARTS = ("fake", "gptq", "observed", "ptq4dit", "qdit", "simulation", "smoothquant", "dtypes", "openvino_int8")
METHODS = (
    "nearest, per tensor",
    "nearest, weights per channel",
    "dynamic per token",
    "dynamic per token, GPTQ",
    "SmoothQuant, static",
    "SmoothQuant, per token",
    "PTQ4DiT",
    "PTQ4DiT, GPTQ",
    "Q-DiT, nearest",
    "Q-DiT, GPTQ",
)


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The package, its parts and the script that writes the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(BENCH)])
        package = importlib.import_module("baselines")
        parts = {name: importlib.import_module(f"baselines.{name}") for name in PARTS}
        spec = importlib.util.spec_from_file_location("baseline_table", BENCH / "baseline_table.py")
        assert spec
        assert spec.loader
        table = importlib.util.module_from_spec(spec)
        sys.modules["baseline_table"] = table
        spec.loader.exec_module(table)
        yield SimpleNamespace(methods=package.METHODS, table=table, **parts)
        del sys.modules["baseline_table"]


@pytest.fixture(scope="module")
def observed(bench, model, data) -> Any:
    return bench.observed.observe(model, data, 1.5, rows=16)


@pytest.fixture(scope="module")
def sqnr(bench, model, data, observed) -> Any:
    """Return the SQNR of a method's epsilon at a number of bits of weights and activations."""
    expected = predict_epsilon(model, data)

    def measured(name: str, weight_bits: int, activation_bits: int) -> float:
        graph = registry.graph(registry.config_of(model))
        context = bench.simulation.Context(model, graph, observed, weight_bits, activation_bits)
        with bench.simulation.simulated(model, bench.methods[name](context)) as module:
            return compare_epsilon(expected, predict_epsilon(module, data), data).overall

    return measured


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(24, 16) * torch.linspace(0.1, 3, 16)


@pytest.fixture
def rows() -> torch.Tensor:
    mixing = torch.randn(16, 16)
    return torch.randn(200, 16) @ mixing


def test_the_methods_are_those_of_the_table(bench):
    assert tuple(bench.methods) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_with_very_many_bits_is_the_float_model_and_with_few_it_is_worse(sqnr, name):
    many, eight, four = sqnr(name, 20, 20), sqnr(name, 8, 8), sqnr(name, 4, 8)
    assert many > 85
    assert many - 20 > eight > four > 0


def test_a_plan_without_quantizers_is_the_float_model_and_leaves_it_alone(bench, model, model_inputs):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    processors = [block.attn1.processor for block in model.transformer_blocks]
    expected = model(**model_inputs, return_dict=False)[0]
    weights = {"transformer_blocks.0.ff.net.2.weight": torch.zeros(32, 128)}
    with bench.simulation.simulated(model, bench.simulation.Plan()) as same:
        torch.testing.assert_close(same(**model_inputs, return_dict=False)[0], expected)
    with bench.simulation.simulated(model, bench.simulation.Plan(weights)) as other:
        assert not torch.allclose(other(**model_inputs, return_dict=False)[0], expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [block.attn1.processor for block in model.transformer_blocks] == processors
    torch.testing.assert_close(model(**model_inputs, return_dict=False)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("operand", ["query", "key", "value", "softmax", "out_input", "qkv_input"])
def test_every_operand_goes_through_its_quantizer(bench, model, model_inputs, operand):
    expected = model(**model_inputs, return_dict=False)[0]
    name, plan = f"transformer_blocks.1.attn1.{operand}", bench.simulation.Plan()
    quantizers = plan.inputs if operand.endswith("input") else plan.operands
    shapes: list[torch.Size] = []
    quantizers[name] = lambda x: shapes.append(x.shape) or torch.zeros_like(x)
    with bench.simulation.simulated(model, plan) as module:
        assert not torch.allclose(module(**model_inputs, return_dict=False)[0], expected)
    batch = len(model_inputs["timestep"])
    inner = {"softmax": (batch, 2, 16, 16), "out_input": (batch, 16, 32), "qkv_input": (batch, 16, 32)}
    assert shapes == [inner.get(operand, (batch, 2, 16, 16))]


def test_ranges_and_rows_of_the_statistics(model, data, observed):
    """They are those of a watched forward pass of the conditional and the unconditional half."""
    name = "transformer_blocks.0.ff.fc1_input"
    seen: list[torch.Tensor] = []
    handle = model.transformer_blocks[0].ff.net[0].proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for labels in (data.labels, torch.full_like(data.labels, 10)):
            model(data.x, timestep=data.t, class_labels=labels)
    finally:
        handle.remove()
    x, group = torch.cat(seen), data.group.repeat(2)
    found = observed.inputs[name]
    for g in range(4):
        torch.testing.assert_close(found.peaks[g], x[group == g].abs().flatten(0, 1).amax(0))
    torch.testing.assert_close(found.range().low, x.amin())
    torch.testing.assert_close(found.range().high, x.amax())
    assert found.rows.shape == (2 * len(data) * 16, 32)


def test_nearest_is_within_half_a_step(bench, weight):
    tensor, channel = bench.fake.per_tensor(weight, 6), bench.fake.per_channel(weight, 6)
    for grid in (tensor, channel):
        assert ((grid(weight) - weight).abs() <= grid.step / 2 * 1.0001).all()
    assert len((channel(weight) / channel.step).round().unique()) <= 2**6 - 1
    assert (channel.step <= tensor.step).all()


def test_clipped_ranges_have_less_error_of_the_output(bench, weight):
    """Inputs are independent, so that the error that is minimized is the output's."""
    rows = torch.diag(torch.linspace(0.1, 2, 16))
    grids = bench.fake.per_channel_clipped(weight, 4, rows), bench.fake.per_channel(weight, 4)
    clipped, whole = (((grid(weight) - weight) @ rows).square().sum(1) for grid in grids)
    assert (clipped <= whole * 1.0001).all()
    assert (clipped < whole * 0.99).any()


def test_dynamic_rows_are_exact_for_zeros_and_do_not_see_each_other(bench, rows):
    rows = rows.clone()
    rows[3] = 0
    rows[5] *= 1000
    quantized = bench.fake.rows(rows, 8)
    assert torch.equal(quantized[3], torch.zeros(16))
    torch.testing.assert_close(bench.fake.rows(rows[4:5], 8), quantized[4:5], rtol=0, atol=0)
    width = rows.amax(-1) - rows.amin(-1)
    assert ((quantized - rows).abs().amax(-1) <= width / 255).all()


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_smoothquant_leaves_the_product_and_moves_the_maxima(bench, weight, rows, exponent):
    peak = rows.abs().amax(0)
    factor = bench.smoothquant.factors(peak, weight, exponent)
    assert torch.allclose((rows / factor) @ (weight * factor).T, rows @ weight.T, rtol=1e-4, atol=1e-3)
    after, columns = peak / factor, (weight * factor).abs().amax(0)
    if exponent == 0.5:  # equation 4: both have the same maxima
        torch.testing.assert_close(after, columns)
    else:
        torch.testing.assert_close(after if exponent == 1 else columns, torch.ones(16))


def test_smoothquant_keeps_dead_channels(bench, weight):
    weight[:, 2] = 0
    peak = torch.ones(16)
    peak[4] = 0
    factor = bench.smoothquant.factors(peak, weight, 0.5)
    assert factor[2] == factor[4] == 1
    assert factor.isfinite().all()


def test_ptq4dit_balances_the_salience_and_leaves_the_product(bench, weight, rows):
    peaks = rows.abs().amax(0)[None]
    factor = bench.ptq4dit.factors(peaks, weight)
    assert torch.allclose((rows / factor) @ (weight * factor).T, rows @ weight.T, rtol=1e-4, atol=1e-3)
    geometric = (peaks[0] * weight.abs().amax(0)).sqrt()
    torch.testing.assert_close(peaks[0] / factor, geometric)
    torch.testing.assert_close((weight * factor).abs().amax(0), geometric)


def test_ptq4dit_weighs_timesteps_by_spearmans_rho(bench):
    columns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rising, falling, tied = torch.tensor([1.0, 10.0, 11.0, 500.0]), -columns, torch.tensor([5.0, 5.0, 5.0, 5.0])
    assert bench.ptq4dit.spearman(rising, columns).item() == pytest.approx(1)
    assert bench.ptq4dit.spearman(falling, columns).item() == pytest.approx(-1)
    assert bench.ptq4dit.spearman(tied, columns).item() == 0
    assert bench.ptq4dit.ranks(torch.tensor([7.0, 1.0, 7.0])).tolist() == [1.5, 0.0, 1.5]
    eta = bench.ptq4dit.timestep_weights(torch.stack([rising, columns.flip(0)]), columns)
    assert eta.tolist() == pytest.approx([1 / (1 + torch.e**2), 1 / (1 + torch.e**-2)])


def test_qdit_with_one_group_is_per_token_and_per_channel(bench, weight, rows):
    torch.testing.assert_close(bench.fake.grouped(rows, 6, 16), bench.fake.rows(rows, 6), rtol=0, atol=0)
    whole = bench.fake.per_group(weight, 4, 16)
    assert (whole.step == whole.step[:, :1]).all()
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    assert torch.equal(whole(weight), bench.fake.asymmetric(low, high, 4)(weight))
    errors = [(bench.fake.grouped(rows, 6, size) - rows).square().sum() for size in (4, 16)]
    assert errors[0] < errors[1]


def test_qdit_groups_divide_the_width(bench):
    assert [bench.qdit.group_size(width) for width in (192, 768, 64, 1152, 4608)] == [96, 128, 64, 128, 128]


def test_gptq_has_less_output_error_on_the_same_grid(bench, weight, rows):
    grid = bench.fake.per_channel(weight, 4)
    solved, nearest = bench.gptq.solve(weight, rows, grid), grid(weight)
    torch.testing.assert_close(grid(solved), solved)
    expected = rows @ weight.T
    assert sqnr_db(expected, rows @ solved.T) > sqnr_db(expected, rows @ nearest.T) + 1


def test_gptq_of_inputs_without_correlation_is_nearest(bench, weight):
    grid = bench.fake.per_channel(weight, 4)
    for rows in (torch.eye(16), torch.zeros(3, 16)):
        assert torch.allclose(bench.gptq.solve(weight, rows, grid), grid(weight))


def test_float_types_take_and_give_fp32(bench, model, data):
    expected = predict_epsilon(model, data)
    actual = {name: predict_epsilon(bench.dtypes.in_dtype(model, name), data) for name in bench.dtypes.DTYPES}
    assert next(model.parameters()).dtype == torch.float32
    assert sqnr_db(expected, actual["fp16"]) > sqnr_db(expected, actual["bf16"]) + 10 > 30


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_torchao_quantizes_the_layers_that_the_methods_do(bench, model, data):
    module = bench.dtypes.torchao_int8(model)
    kinds = {name: type(layer.weight).__name__ for name, layer in module.named_modules() if hasattr(layer, "weight")}
    plain = {name for name, kind in kinds.items() if kind in ("Parameter", "NoneType")}
    assert "transformer_blocks.0.attn1.to_q" not in plain
    assert {"proj_out_1", "proj_out_2", "transformer_blocks.0.norm1.linear"} <= plain
    assert sqnr_db(predict_epsilon(model, data), predict_epsilon(module, data)) > 25


def test_a_limit_of_time_ends_its_block_alone(bench):
    with pytest.raises(bench.table.TimeLimitError), bench.table.limited(0.05):
        time.sleep(5)
    with bench.table.limited(5):
        pass
    time.sleep(0.06)


def test_rows_are_written_and_kept(bench, pipeline, tmp_path, monkeypatch):
    """A row over its limit says so, and `--missing` measures only that one again."""
    out, methods = tmp_path / "table.json", ["fp16", "dynamic per token", "OpenVINO int8"]
    small = "--num 2 --steps 2 --samples 1 --calibration-samples 1 --calibration-steps 10 --bits w8a8"
    command = ["baseline_table.py", str(out), "--model", str(pipeline), *small.split(), "--methods", *methods]
    monkeypatch.setattr(bench.openvino_int8, "missing", lambda: "not installed: nncf")

    def too_slow(context: Any) -> Any:
        raise bench.table.TimeLimitError

    with monkeypatch.context() as patch:
        patch.setattr(bench.table, "METHODS", dict.fromkeys(bench.methods, too_slow))
        patch.setattr(sys, "argv", command)
        bench.table.main()
    first = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert first["dynamic per token"]["failed"] == "it took longer than its limit of 60 s"
    assert first["OpenVINO int8"]["failed"] == "not installed: nncf"
    assert first["fp16"]["eps_sqnr_db"] > 30
    assert len(first["fp16"]["eps_sqnr_db_by_group"]) == 10
    monkeypatch.setattr(sys, "argv", [*command, "--missing"])
    bench.table.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    second = {row["method"]: row for row in rows}
    assert second["fp16"] == first["fp16"]
    assert second["dynamic per token"]["psnr_db"] > 20


def test_artifacts_have_rows(bench, pipeline, tiny_recipe, tmp_path, monkeypatch):
    """The row of an artifact has the artifact's bits; other weights than the model's are refused."""
    folder, out = tmp_path / "mine", tmp_path / "table.json"
    workflow.quantize(pipeline, folder, tiny_recipe("plus", "w6a6", groups=2, samples=2, steps=8, rounds=0))
    small = "--num 2 --steps 2 --samples 1 --calibration-samples 1 --calibration-steps 10 --methods"
    command = ["baseline_table.py", str(out), "--model", str(pipeline), "--artifacts", str(folder), *small.split()]
    monkeypatch.setattr(sys, "argv", command)
    bench.table.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["method"], row["bits"]) == ("mine", "w6a6")
    assert 5 < row["eps_sqnr_db"] < 60
    command[3] = "fashion-dit"
    with pytest.raises(InputError, match="not made from 'fashion-dit'"):
        bench.table.main()
