"""A Solution as a running model: complete, integer, dtype-safe, with calls of its own."""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tqdit.architectures import patches
from tqdit.architectures.registry import config_of
from tqdit.backends import native
from tqdit.errors import InputError
from tqdit.layers.adapters import AdapterSlot
from tqdit.layers.block import IntBlock
from tqdit.layers.conditioning import TimestepTable
from tqdit.layers.params import ActivationParams
from tqdit.ops.holders import FixedDtype
from tqdit.ops.schema import RowCodes
from tqdit.plan import sites
from tqdit.quality.metrics import sqnr_db
from tqdit.runtime.convert import convert
from tqdit.spec import Grid, Role, Solution
from tqdit.timegroups import TimeGroups

PRESETS = ["paper", "plus"]


def run(model: nn.Module, inputs: dict[str, torch.Tensor], members=slice(None)) -> torch.Tensor:
    with torch.inference_mode():
        return model(**{name: tensor[members] for name, tensor in inputs.items()}).sample


def without(mapping, name: str) -> dict:
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_float_layer_is_replaced(model, solved, preset: str) -> None:
    converted = convert(solved(preset))
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    left = {name: m for name, m in converted.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    ends = {"pos_embed.proj", "proj_out_2"} if preset == "plus" else set()
    assert {name for name, m in left.items() if not isinstance(m, AdapterSlot)} == ends
    for name in ends:
        assert torch.equal(left[name].weight, model.get_submodule(name).weight)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("backend", ["cpu", "reference", "simulated"])
def test_report_names_every_site_once(model, solved, tiny_recipe, preset: str, backend: str) -> None:
    converted = convert(solved(preset), backend)
    expected = [site.name for site in sites(config_of(model), tiny_recipe(preset))]
    assert list(converted.quantization_report) == expected
    assert converted.quantization_backend == backend
    assert all(kernel.startswith(f"{backend}.") for kernel in converted.quantization_report.values())


def test_every_activation_site_has_a_module(solved) -> None:
    solution = solved("plus")
    held = {m.spec.name for m in convert(solution).modules() if isinstance(m, ActivationParams)}
    assert held == {site.name for site in solution.sites if not site.is_weight}


@pytest.mark.parametrize(("preset", "bits", "least"), [
    ("paper", "w8a8", 30), ("plus", "w8a8", 30), ("paper", "w6a6", 20), ("plus", "w6a6", 22), ("plus", "w4a8", 15),
])  # fmt: skip
def test_converted_model_is_close_to_float(model, solved, model_inputs, preset, bits, least: float) -> None:
    assert sqnr_db(run(model, model_inputs), run(convert(solved(preset, bits)), model_inputs)) > least


ROWS = {"input_grid": "row", "attended_grid": "row", "softmax_grid": "row", "gelu_grid": "row"}
NEW_SETTINGS = {
    "rows": ROWS,
    "rows, ends in codes": {**ROWS, "ends": "codes"},
    "nearest, without HO": {**ROWS, "rounding": "nearest", "hessian": "none"},
    "factors, two products": {"gelu_channels": "best", "gelu_grid": "mrq", "gelu_products": "two"},
    "factors, uniform": {"gelu_channels": "best", "gelu_grid": "uniform", "attended_grid": "row"},
}


@pytest.mark.parametrize("settings", NEW_SETTINGS)
@pytest.mark.parametrize(("bits", "least"), [("w8a8", 38), ("w6a6", 26), ("w4a8", 19)])
def test_rows_factors_and_float_ends_run(model, solved, model_inputs, settings: str, bits: str, least: float) -> None:
    """On the reference as on its simulated twin, and close to float."""
    solution = with_factors(model, solved("plus", bits, **NEW_SETTINGS[settings]))
    a, b, equal = twins(solution, model_inputs)
    assert sqnr_db(a, b) >= 45  # a code that moved is a part of a row's step
    moving = bits == "w4a8" and settings == "factors, uniform"  # without AVX-512, sums have another order
    assert min(equal) > (0.98 if moving else 0.99)  # a float sum in another order moves a code, and what follows it
    assert sqnr_db(run(model, model_inputs), a) > least


def with_factors(model: nn.Module, solution: Solution) -> Solution:
    """A solution with factors beside the rows after GELU, where the search tries none; weights rounded to nearest."""
    params, codes = dict(solution.params), dict(solution.codes)
    for name, p in solution.params.items():
        weight = name.replace("fc2_input", "net.2.weight")
        if p.spec.role is Role.GELU and p.channels is None and p.spec.grid is Grid.ROW:
            factors = torch.tensor([0.5, 1.0]).repeat(64)
            params[name] = replace(p, channels=factors)
            values, half = model.state_dict()[weight] / factors, 2 ** (params[weight].spec.bits - 1)
            scale = values.abs().amax(1) / (half - 1)
            params[weight] = replace(params[weight], scale=scale[None])
            codes[weight] = (values / scale[:, None]).round().to(torch.int8)
    return replace(solution, params=params, codes=codes)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", ["w8a8", "w6a6"])
def test_integer_model_is_its_simulated_twin(solved, model_inputs, preset: str, bits: str) -> None:
    a, b, equal = twins(solved(preset, bits), model_inputs)
    assert sqnr_db(a, b) >= 50
    assert min(equal) > 0.995  # a float sum in another order moves a code, and what follows it


@pytest.mark.parametrize("bits", ["w6a6", "w4a4"])
def test_merged_model_is_its_simulated_twin(solved, model_inputs, bits: str) -> None:
    """Two regions in one product. At 4 bits, a code that moved in a block moves some in the next."""
    grids = {"gelu_grid": "mrq", "softmax_grid": "mrq", "gelu_products": "one", "softmax_products": "one"}
    a, b, equal = twins(solved("plus", bits, **grids), model_inputs)
    assert min(equal[:5]) > 0.999
    assert min(equal) > 0.97
    assert sqnr_db(a, b) > 30  # of the model to float: 10 to 20


def twins(solution: Solution, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """The outputs of an integer model and its simulated twin, and the share of equal codes of each operation."""
    outputs, codes = [], []
    for name in ("reference", "simulated"):
        converted, found = convert(solution, name), []
        for block in converted.transformer_blocks:
            record_codes(block.backend, found)
        outputs.append(run(converted, inputs))
        assert len(found) == 2 * 5  # of q, k and v, and of the inputs of every linear layer of a block
        codes.append(found)
    return *outputs, [(x == y).float().mean().item() for x, y in zip(*codes, strict=True)]


def record_codes(backend: Any, found: list[torch.Tensor]) -> None:
    """Keep the codes that an instance's operations return."""
    for name in ("quantize", "project", "attend", "linear"):

        def recorded(*args: Any, operation=getattr(backend, name)) -> Any:
            result = operation(*args)
            codes = result.codes if isinstance(result, RowCodes) else result
            if codes.dtype is torch.int8:
                found.append(codes)
            return result

        if name not in vars(backend):
            setattr(backend, name, recorded)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a8"])
def test_cpu_model_is_the_reference(solved, model_inputs, preset: str, bits: str) -> None:
    """Equal up to codes at rounding boundaries: far closer than quantization is to float (20 to 30 dB)."""
    cpu, reference = (run(convert(solved(preset, bits), name), model_inputs) for name in ("cpu", "reference"))
    assert sqnr_db(reference, cpu) >= 50


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a8"])
def test_weight_codes_reconstruct_within_half_a_step(model, solved, preset: str, bits: str) -> None:
    """Where weights are rounded to nearest, and no channel factor is in them."""
    solution = solved(preset, bits, rounding="nearest", gelu_channels="one")
    state = model.state_dict()
    for name, codes in solution.codes.items():
        spec, scale = solution.params[name].spec, solution.params[name].scale[0]
        scale = scale.reshape(-1, *(1,) * (codes.ndim - 1))
        assert codes.dtype is torch.int8
        assert codes.shape == state[name].shape
        assert spec.format.qmin <= codes.min()
        assert codes.max() <= spec.format.qmax
        inside = (codes > spec.format.qmin) & (codes < spec.format.qmax)  # not clipped
        error = (codes * scale - state[name]).abs()
        assert (error[inside] <= (scale / 2 * (1 + 1e-4)).expand_as(error)[inside]).all(), name


# Timesteps ---------------------------------------------------------------------------------------------------------


def test_mixed_timesteps_equal_batches_of_one_timestep(solved, model_inputs) -> None:
    converted = convert(solved("plus"))
    together = run(converted, model_inputs)
    for i in range(0, len(together), 3):
        same = model_inputs | {"timestep": model_inputs["timestep"][i].expand(len(together))}
        assert torch.equal(run(converted, same)[i], together[i])


def test_batch_split_changes_nothing(solved, model_inputs) -> None:
    converted = convert(solved("plus"))
    together = run(converted, model_inputs)
    for size in (1, 3, 8):
        parts = [run(converted, model_inputs, slice(i, i + size)) for i in range(0, len(together), size)]
        # Bit for bit where everything is compiled; torch orders float sums by batch size.
        assert torch.equal(together, torch.cat(parts)) or native.reason()
        assert sqnr_db(together, torch.cat(parts)) > 55


def test_timestep_positional_keyword_and_shared(solved, model_inputs) -> None:
    converted = convert(solved("plus"))
    x, labels = model_inputs["hidden_states"], model_inputs["class_labels"]
    t = torch.full((len(x),), 870)
    with torch.inference_mode():
        keyword = converted(x, timestep=t, class_labels=labels).sample
        assert torch.equal(converted(x, t, labels).sample, keyword)
        assert torch.equal(converted(hidden_states=x, timestep=t, class_labels=labels).sample, keyword)
        assert sqnr_db(keyword, converted(x, timestep=t[:1], class_labels=labels).sample) > 55


@pytest.mark.parametrize("t", [-1, 1000])
def test_timestep_outside_is_an_error(solved, model_inputs, t: int) -> None:
    with pytest.raises(InputError, match="outside"):
        run(convert(solved("plus")), model_inputs | {"timestep": torch.full((16,), t)})


def test_trap_5_calls_of_two_models_may_overlap(solved, model_inputs) -> None:
    first, second = convert(solved("plus")), convert(solved("plus", "w6a6"))
    alone = run(first, model_inputs)
    results = []

    def interrupt(*_) -> None:  # the second model runs in the middle of the first
        results.append(run(second, model_inputs | {"timestep": 999 - model_inputs["timestep"]}))

    first.transformer_blocks[0].register_forward_pre_hook(interrupt)
    assert torch.equal(run(first, model_inputs), alone)
    assert len(results) == 1


def test_a_deep_copy_is_a_model_of_its_own(solved, model_inputs) -> None:
    original = convert(solved("plus"))
    expected = run(original, model_inputs)
    twin = copy.deepcopy(original)
    assert not {id(module) for module in twin.modules()} & {id(module) for module in original.modules()}
    assert not torch.equal(run(twin, model_inputs | {"timestep": 999 - model_inputs["timestep"]}), expected)
    assert torch.equal(run(twin, model_inputs), expected)
    del original
    assert torch.equal(run(twin, model_inputs), expected)


def test_two_threads_on_one_model(solved, model_inputs) -> None:
    """Calls at other timesteps and batch sizes overlap: nothing of a call is kept in the model."""
    converted = convert(solved("plus"))
    other = {name: x[:5] for name, x in (model_inputs | {"timestep": 999 - model_inputs["timestep"]}).items()}
    expected = [run(converted, inputs) for inputs in (model_inputs, other)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run, converted, inputs) for _ in range(15) for inputs in (model_inputs, other)]
    for index, job in enumerate(jobs):
        assert torch.equal(job.result(), expected[index % 2])


def test_compiled_blocks_do_not_recompile_over_time_groups(solved, model_inputs) -> None:
    """Every group at once, and each alone: the graph must not depend on which."""
    converted = convert(solved("plus"), "reference")
    expected = [run(converted, at(model_inputs, t)) for t in (10, 300, 600, 990)]
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    converted.transformer_blocks[0].compile(backend=backend)
    run(converted, at(model_inputs, 10))
    first = len(compiled)
    for t, value in zip((10, 300, 600, 990), expected, strict=True):
        assert sqnr_db(value, run(converted, at(model_inputs, t))) > 50
    assert len(compiled) == first > 0
    torch.compiler.reset()


def at(inputs: dict[str, torch.Tensor], t: int) -> dict[str, torch.Tensor]:
    """The same inputs, all at one timestep."""
    return inputs | {"timestep": torch.full_like(inputs["timestep"], t)}


def test_model_with_other_timesteps_than_1000(solved, model_inputs) -> None:
    converted = convert(replace(solved("plus"), time_groups=TimeGroups.uniform(0, 500, 4)))
    with pytest.raises(InputError, match=r"\[0, 500\)"):
        run(converted, model_inputs)


# Dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("move", "least"), [("half", 35), ("bfloat16", 20), ("double", 70)])
def test_trap_7_cast_model_keeps_its_scales(solved, model_inputs, move: str, least: float) -> None:
    reference, cast = convert(solved("plus")), convert(solved("plus"))
    getattr(cast, move)()
    for (name, a), b in zip(reference.named_modules(), cast.modules(), strict=True):
        if isinstance(a, FixedDtype):
            for (key, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
                assert y.dtype is x.dtype, f"{name}.{key}"
                assert torch.equal(x, y), f"{name}.{key}"
    x = model_inputs["hidden_states"].to(cast.dtype)
    y = run(cast, model_inputs | {"hidden_states": x})
    assert y.dtype is x.dtype
    assert sqnr_db(run(reference, model_inputs), y) > least


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_stream_in_bf16(solved, model_inputs, backend: str) -> None:
    """Rounded after each addition: half a step of bf16 a time, two a block, in what the last LayerNorm reads."""
    wide, narrow = (convert(solved("plus"), backend, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    seen = []
    for model in (wide, narrow):
        for part in (*model.transformer_blocks, model.norm_out):
            part.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    run(wide, model_inputs), run(narrow, model_inputs)
    streams, shorts = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert {x.dtype for x in streams} == {torch.float32}
    assert {x.dtype for x in shorts[:-1]} == {torch.bfloat16}
    for x, y in zip(streams, shorts, strict=True):
        assert not torch.equal(x, y.float())
        assert sqnr_db(x, y.float()) > 40
    assert torch.equal(shorts[-1], shorts[-1].bfloat16().float())


def test_eval_mode_without_gradients(solved) -> None:
    converted = convert(solved())
    assert not converted.training
    assert not any(p.requires_grad for p in converted.parameters())


# Damaged solutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.1.attn1.softmax",
        "transformer_blocks.1.attn1.key",
        "transformer_blocks.0.ff.fc2_input",
        "transformer_blocks.0.ff.net.2.weight",
        "proj_out_2.weight",
        "pos_embed.proj.weight",
    ],
)
def test_missing_site_is_named(solved, name: str) -> None:
    solution = solved()
    with pytest.raises(InputError, match=name):
        convert(replace(solution, params=without(solution.params, name)))


def test_missing_codes_are_named(solved) -> None:
    solution = solved()
    name = "transformer_blocks.1.attn1.to_k.weight"
    with pytest.raises(InputError, match=name):
        convert(replace(solution, codes=without(solution.codes, name)))


def test_every_missing_float_parameter_is_named(model, solved) -> None:
    solution = solved()
    assert set(solution.floats) == set(model.state_dict()) - set(solution.codes)
    for name in solution.floats:
        with pytest.raises(InputError, match=name):
            convert(replace(solution, floats=without(solution.floats, name)))


def test_wrong_shape_of_a_float_parameter_is_named(solved) -> None:
    solution = solved()
    (name,) = [n for n in solution.floats if n.endswith("0.norm1.emb.class_embedder.embedding_table.weight")]
    with pytest.raises(InputError, match=name):
        convert(replace(solution, floats={**solution.floats, name: torch.zeros(3, 3)}))


def test_site_of_another_model_is_named(solved) -> None:
    solution = solved()
    stranger = replace(solution.params["proj_out_2.weight"].spec, name="block.99.q", role=Role.QUERY)
    params = {**solution.params, "block.99.q": replace(solution.params["proj_out_2.weight"], spec=stranger)}
    with pytest.raises(InputError, match=r"block\.99\.q"):
        convert(replace(solution, params=params))


def test_blocks_are_integer(solved) -> None:
    converted = convert(solved())
    assert all(isinstance(block, IntBlock) for block in converted.transformer_blocks)
    assert all(block.backend.INTEGER for block in converted.transformer_blocks)


def test_the_null_class_is_one_of_the_classes(model, solved) -> None:
    assert convert(solved("plus")).conditioning.classes == model.config.num_embeds_ada_norm + 1


def test_equal_embedders_are_held_once(solved) -> None:
    """diffusers copies one embedder into every block; equal copies become one, their adaLN layers too."""
    solution = solved()
    name = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    first, second = solution.floats[name.format(0)], solution.floats[name.format(1)]
    assert len(convert(solution).conditioning.embedders) == (1 if torch.equal(first, second) else 2)
    shared = dict(solution.floats), dict(solution.params), dict(solution.codes)
    for table in shared:
        for key in [k for k in table if k.startswith("transformer_blocks.1.norm1.emb.")]:
            table[key] = table[key.replace("blocks.1", "blocks.0")]
    floats, params, codes = shared
    params = {k: replace(p, spec=replace(p.spec, name=k)) for k, p in params.items()}
    conditioning = convert(replace(solution, floats=floats, params=params, codes=codes)).conditioning
    assert len(conditioning.embedders) == len(conditioning.linears) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_sinusoids_are_those_of_diffusers(model, dtype: torch.dtype) -> None:
    projection, t = model.transformer_blocks[0].norm1.emb.time_proj, torch.tensor([0, 7, 255], dtype=dtype)
    table = TimestepTable(projection, 300)
    assert torch.allclose(table(t), projection(t), atol=1e-6)
    assert torch.equal(table(t), projection(torch.arange(300))[[0, 7, 255]]) or dtype is torch.float32
    halves = torch.tensor([7.5, 254.25])
    assert torch.equal(table(halves), projection(halves))


def test_samples_before_and_after_the_blocks_are_taken_a_few_at_a_time(solved, model_inputs, monkeypatch) -> None:
    model = convert(solved("plus"), "reference")
    expected = run(model, model_inputs)
    tokens = model_inputs["hidden_states"].shape[-1] ** 2 // model.config.patch_size**2
    seen = []
    model.norm_out.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr(patches, "FEW_TOKENS", 5 * tokens + 1)
    assert torch.allclose(run(model, model_inputs), expected, atol=1e-5)
    assert seen == [5, 5, 5, 1]
    monkeypatch.setattr(patches, "FEW_TOKENS", 1)
    assert torch.allclose(run(model, model_inputs), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "capturing", "asked"), [(64, True, 209), (64, False, None), (1, True, None), (16, True, 53)]
)
def test_a_graph_asks_for_its_memory_in_one_piece(batch: int, capturing: bool, asked: int | None, monkeypatch) -> None:
    """MB for DiT-XL/2, counted by hand: 3 x 37.7 and 18.9 and 75.5, and 1 to spare; 16 samples are a quarter of 64."""
    pieces: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(patches.torch, "empty", lambda count, **_: pieces.append(count))
    x = SimpleNamespace(device=torch.device("cuda"), shape=(batch, 4, 32, 32))
    model = SimpleNamespace(config=SimpleNamespace(patch_size=2), stream_dtype=torch.bfloat16)
    patches.lay_out(model, x, 1152)
    assert [round(piece / 1e6) for piece in pieces] == ([] if asked is None else [asked])
