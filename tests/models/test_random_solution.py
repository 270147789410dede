"""Random solutions are complete and fill their grids."""

from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

from tqdit.architectures.shapes import shape_config
from tqdit.artifact import folder as artifact
from tqdit.grids import regions, uniform
from tqdit.recipe import Recipe
from tqdit.runtime.convert import convert
from tqdit.spec import Grid, Role, Solution
from tqdit.speed.random_solution import random_solution
from tqdit.speed.random_weights import Pool

# Scales of which each is drawn; the plans of `plus` have rows instead.
STATIC = {"input_grid": "uniform", "softmax_grid": "best", "gelu_channels": "one", "ends": "codes"}
SETTINGS = [("paper", "w8a8"), ("plus", "w8a8"), ("paper", "w6a6"), ("plus", "w4a4"), ("plus", "w2a4")]


def products(number: str) -> dict[str, str]:
    return {"gelu_products": number, "softmax_products": number}


@pytest.fixture
def config(tiny_dit) -> dict:
    sizes = {"in_channels": 4, "out_channels": 8, "sample_size": 32, "attention_head_dim": 32}
    return {"_class_name": "DiTTransformer2DModel", **tiny_dit(**sizes).config}


def run(model: torch.nn.Module) -> torch.Tensor:
    labels = torch.tensor([1, 2, 10, 10])
    with torch.inference_mode():
        x = torch.randn(4, 4, 32, 32)
        return model(x, timestep=torch.tensor([3, 333, 666, 999]), class_labels=labels, return_dict=False)[0]


def float_twin(solution: Solution) -> torch.nn.Module:
    """diffusers' model with the values of the codes: what the scales are for, without our layers."""
    state = dict(solution.floats)
    for name, codes in solution.codes.items():
        scale = solution.params[name].scale.reshape(-1)
        state[name] = codes.float() * scale.reshape(-1, *[1] * (codes.ndim - 1))
    model = DiTTransformer2DModel.from_config(dict(solution.model_config))
    model.load_state_dict(state, strict=True)
    return model.eval()


def test_the_residual_stream_is_below_its_bound(config) -> None:
    """With 28 blocks, as DiT-XL/2; with the margin, fp16 holds what is said of it."""
    solution = random_solution({**config, "num_layers": 28}, Recipe("plus", "w8a8"))
    assert solution.fits_float16
    model, seen = float_twin(solution), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda m, args, out: seen.append(out.abs().max().item()))
    run(model)
    assert len(seen) == 28
    assert 1 < max(seen) < solution.stream_max


def operands(model: torch.nn.Module, block: int) -> dict[str, torch.Tensor]:
    """Site -> its values in a run, but for the probabilities."""
    prefix = f"transformer_blocks.{block}"
    inside = model.transformer_blocks[block]
    heads, seen = inside.attn1.heads, {}

    def keep(name: str, value: torch.Tensor) -> None:
        seen[f"{prefix}.{name}"] = value

    inside.attn1.register_forward_hook(lambda m, args, out: keep("attn1.qkv_input", args[0]))
    inside.attn1.to_out[0].register_forward_hook(lambda m, args, out: keep("attn1.out_input", args[0]))
    inside.ff.register_forward_hook(lambda m, args, out: keep("ff.fc1_input", args[0]))
    inside.ff.net[2].register_forward_hook(lambda m, args, out: keep("ff.fc2_input", args[0]))
    for role in ("query", "key", "value"):
        projection = getattr(inside.attn1, f"to_{role[0]}")
        projection.register_forward_hook(
            lambda m, args, out, role=role: keep(f"attn1.{role}", out.unflatten(-1, (heads, -1)).transpose(1, 2))
        )
    run(model)
    return seen


@pytest.mark.parametrize(("preset", "bits"), SETTINGS)
def test_activations_fill_their_grids(config, preset: str, bits: str) -> None:
    """The highest and lowest code are rare, and many are used. After GELU the lowest is the function's own minimum."""
    solution = random_solution(config, Recipe(preset, bits, **STATIC if preset == "plus" else {}))
    found = operands(float_twin(solution), 1)
    assert len(found) == 7
    for name, x in found.items():
        params = solution.params[name]
        fmt, scale = params.spec.format, params.scale[0]
        if params.spec.grid.two_region:
            codes = regions.quantize(x, scale[..., 0], scale[..., 1], fmt.bits, params.spec.grid)
        else:
            shape = (-1, 1, 1) if scale.numel() > 1 else ()
            codes = uniform.quantize(x, scale.reshape(shape), params.zero_point[0].reshape(shape), fmt.bits)
        clipped = (codes == fmt.qmax) | ((codes == fmt.qmin) & (params.spec.role is not Role.GELU))
        assert clipped.float().mean() < 0.03, name
        assert codes.float().std() > 0.05 * (fmt.qmax - fmt.qmin), name


@pytest.mark.parametrize(("preset", "bits"), SETTINGS)
def test_output_is_not_degenerate(config, preset: str, bits: str) -> None:
    y = run(convert(random_solution(config, Recipe(preset, bits))))
    assert torch.isfinite(y).all()
    assert 0.3 < y.std() < 4
    assert (y[0] - y[1]).std() > 0.1


@pytest.mark.parametrize(
    ("preset", "bits", "gelu", "softmax"),
    [
        ("plus", "w8a8", Grid.MRQ_GELU, Grid.MRQ_SOFTMAX),
        ("plus", "w4a8", Grid.MRQ_GELU, Grid.MRQ_SOFTMAX),
        ("plus", "w6a6", Grid.MRQ_GELU, Grid.MRQ_SOFTMAX),
        ("paper", "w8a8", Grid.MRQ_GELU, Grid.MRQ_SOFTMAX),
    ],
)
def test_grids(config, preset: str, bits: str, gelu: Grid, softmax: Grid) -> None:
    grids = {"gelu_grid": "best", "softmax_grid": "best"} if preset == "plus" else {}
    recipe = Recipe(preset, bits, **products("two"), **grids)
    solution = random_solution(config, recipe)
    assert {site.grid for site in solution.sites if site.role is Role.GELU} == {gelu}
    assert {site.grid for site in solution.sites if site.role is Role.SOFTMAX} == {softmax}
    assert solution.provenance.preset == recipe.label


@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w8a7", "w6a6", "w4a4"])
@pytest.mark.parametrize("number", ["one", "two"])
def test_products(config, bits: str, number: str) -> None:
    """What costs most of what the recipe allows: two products, one of merged regions, or a uniform grid at 8 bits."""
    solution = random_solution(config, Recipe("plus", bits, **products(number), softmax_grid="best"))
    sites = [params for params in solution.params.values() if params.spec.role in (Role.GELU, Role.SOFTMAX)]
    assert len(sites) == 4
    if number == "one":
        assert all(params.spec.grid.two_region != bits.endswith("a8") for params in sites)
        assert all(params.merged for params in sites if params.spec.grid.two_region)
    else:
        gelu = [params for params in sites if params.spec.role is Role.GELU]
        assert all(params.spec.grid.two_region for params in sites)
        assert not any(params.merged for params in gelu)


@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w2a4"])
def test_one_product_leaves_the_rest_as_it_is(config, bits: str) -> None:
    one, two = (random_solution(config, Recipe("plus", bits, **products(number))) for number in ("one", "two"))
    assert all(torch.equal(one.codes[name], codes) for name, codes in two.codes.items())
    y = run(convert(one))
    assert torch.isfinite(y).all()
    assert 0.3 < y.std() < 4


def test_uniform_grids_everywhere(config) -> None:
    recipe = Recipe("plus", softmax_grid="uniform", gelu_grid="uniform", time_grouped="none")
    solution = random_solution(config, recipe)
    assert not any(site.grid.two_region for site in solution.sites)
    assert 0.3 < run(convert(solution)).std() < 4


@pytest.mark.parametrize(("preset", "bits"), SETTINGS)
def test_an_artifact_of_it_reads_back(config, tmp_path: Path, preset: str, bits: str) -> None:
    """Writing checks that it is complete, reading that every scale, zero point and code is legal."""
    solution = random_solution(config, Recipe(preset, bits))
    artifact.write(solution, tmp_path)
    again = artifact.read(tmp_path)
    assert again.sites == solution.sites
    assert all(torch.equal(again.codes[name], codes) for name, codes in solution.codes.items())
    assert torch.equal(run_seeded(again), run_seeded(solution))


def run_seeded(solution) -> torch.Tensor:
    torch.manual_seed(1)
    return run(convert(solution))


ROWS = {"input_grid": "row", "attended_grid": "row", "softmax_grid": "row", "gelu_grid": "row"}


@pytest.mark.parametrize("bits", ["w8a8", "w6a6", "w4a4"])
def test_rows_are_as_a_search_starts_them(config, bits: str) -> None:
    """One scale without time groups, of all inputs of linear layers and of softmax."""
    solution, top = random_solution(config, Recipe("plus", bits, **ROWS)), 2 ** (int(bits[-1]) - 1) - 1
    for params in solution.params.values():
        if params.spec.role in (Role.INPUT, Role.GELU):
            assert params.spec.grid is Grid.ROW
            assert params.scale.tolist() == [[pytest.approx(1 / top)]]
        elif params.spec.role is Role.SOFTMAX:
            assert params.spec.grid is Grid.SOFTMAX_ROW
            assert params.scale.tolist() == [[pytest.approx(1 / (2 * top + 1))]]
    y = run(convert(solution, "reference"))
    assert torch.isfinite(y).all()
    assert 0.3 < y.std() < 4


@pytest.mark.parametrize(("choice", "gelu"), [("one", "best"), ("best", "best"), ("best", "mrq"), ("best", "row")])
def test_factors_of_channels_where_the_search_tries_some(config, choice: str, gelu: str) -> None:
    recipe = Recipe("plus", gelu_channels=choice, gelu_grid=gelu, gelu_products="two")
    solution = random_solution(config, recipe)
    found = {name: params.channels for name, params in solution.params.items() if params.channels is not None}
    after = {name for name, params in solution.params.items() if params.spec.role is Role.GELU}
    assert set(found) == (after if choice == "best" and gelu != "row" else set())
    assert all(channels.shape == (256,) for channels in found.values())


@pytest.mark.parametrize("ends", ["codes", "float"])
def test_ends_are_drawn_as_codes_or_in_float(config, tmp_path: Path, ends: str) -> None:
    solution = random_solution(config, Recipe("plus", ends=ends))
    for name in ("pos_embed.proj.weight", "proj_out_2.weight"):
        assert (name in solution.floats, name in solution.codes) == (ends == "float", ends == "codes")
        assert (name in solution.params) == (ends == "codes")
    artifact.write(solution, tmp_path)
    assert artifact.read(tmp_path).sites == solution.sites
    assert 0.3 < run(convert(solution, "reference")).std() < 4


def test_time_groups_differ_a_little(config) -> None:
    for params in random_solution(config, Recipe("plus", **STATIC)).params.values():
        if params.spec.role in (Role.INPUT, Role.QUERY, Role.GELU):
            scale = params.scale[:, 0].reshape(10, -1)[:, -1]
            assert 1.01 < scale.max() / scale.min() < 1.25
            assert scale.unique().numel() == 10


def test_blocks_share_the_embedder(config) -> None:
    solution = random_solution(config, Recipe("plus"))
    emb = "transformer_blocks.{}.norm1.emb."
    weight, bias = "timestep_embedder.linear_2.weight", "timestep_embedder.linear_2.bias"
    table = "class_embedder.embedding_table.weight"
    zero, one = emb.format(0), emb.format(1)
    assert solution.codes[zero + weight] is solution.codes[one + weight]
    assert solution.params[zero + weight].scale is solution.params[one + weight].scale
    assert solution.params[one + weight].spec.name == one + weight
    assert solution.floats[zero + bias] is solution.floats[one + bias]
    assert solution.floats[zero + table] is solution.floats[one + table]
    other = "transformer_blocks.{}.norm1.linear.weight"
    assert not torch.equal(solution.codes[other.format(0)], solution.codes[other.format(1)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_use_their_bits(config, bits: int) -> None:
    solution = random_solution(config, Recipe("plus", f"w{bits}a8"))
    used = solution.codes["transformer_blocks.0.ff.net.2.weight"].unique()
    high = (1 << bits - 1) - 1
    assert -high - 1 <= used.min() <= -0.7 * high
    assert 0.7 * high <= used.max() <= high
    assert len(used) > 1.2 * high


def test_few_numbers_are_drawn(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model takes seconds because its codes are dealt out of a pool as large as its largest weight."""
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **options: drawn.append(size) or randn(*size, **options))
    sizes = [codes.numel() for codes in random_solution(shape_config("DiT-B/4"), Recipe("plus")).codes.values()]
    large = [size for size in drawn if torch.Size(size).numel() > 100_000]
    assert large == [(max(sizes) + Pool.MARGIN,)]
