"""`tqdit bench --random` with the blocks of published transformers, on a tiny one."""

import functools
import json
import sys

import pytest
import torch
from torch import nn
from zoo import ZOO

from tqdit.architectures.traced import traced
from tqdit.calibration.calls import Calls
from tqdit.cli.main import main
from tqdit.errors import InputError
from tqdit.recorded import traced_graph
from tqdit.speed import blocks, published_calls, shortened
from tqdit.speed.block_entrants import entrant, first_blocks, inputs_of, rivals
from tqdit.speed.blocks import BlockSettings, race
from tqdit.speed.published import SHAPES, Published
from tqdit.speed.published_calls import Size

# Billions of parameters that the published models have.
PARAMETERS = {
    "flux.1-dev": 11.90, "flux.2-klein-4b": 3.88, "qwen-image": 20.43, "z-image": 6.15, "sd3.5-large": 8.06,
    "wan-1.3b": 1.42, "wan-14b": 14.29, "ltx-video": 1.92, "hunyuan-video": 12.82, "pixart": 0.61,
}  # fmt: skip
# fmt: off
TINY = Published(
    "tiny",
    "Flux2Transformer2DModel",
    {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 32,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (8, 8, 8, 8),
        "guidance_embeds": False,
    },
    Size((1, 4, 4), 8),
    published_calls.flux2,
)
# fmt: on


@pytest.fixture
def tiny(monkeypatch) -> Published:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(blocks, "OURS", ("ours-eager",))  # compiling takes minutes on a busy machine
    return TINY


@functools.cache
def published_model(name: str) -> nn.Module:
    """Return a published model of full depth with empty parameters; tables of positions take it a second."""
    return traced(SHAPES[name].kind).empty(SHAPES[name].shortened(None))


@pytest.mark.parametrize("name", SHAPES)
def test_published_configs_have_the_published_number_of_parameters(name) -> None:
    model = published_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=0.006)


@pytest.mark.parametrize("name", SHAPES)
def test_calls_fit_the_forward_of_their_class(name) -> None:
    """Of the published config by name and shape of every argument, and of a tiny config by a call."""
    shape, entry = SHAPES[name], ZOO[SHAPES[name].kind]
    size = shape.size.reduced(64)
    assert size.tokens <= 64
    assert len(Calls.of(published_model(name), [shape.arguments(torch.zeros, shape.config, size)])) == 1
    model = entry.build()
    arguments = shape.arguments(torch.randn, model.config, Size((2 if shape.size.patches[0] > 1 else 1, 4, 4), 16))
    with torch.no_grad():
        output = model(**arguments, return_dict=False)[0]
    assert all(part.isfinite().all() for part in output)


@pytest.mark.parametrize(
    ("tokens", "patches"), [(None, (21, 30, 52)), (10**6, (21, 30, 52)), (3200, (2, 30, 52)), (100, (1, 10, 10))]
)
def test_reduced_sizes_have_fewer_frames_first(tokens, patches) -> None:
    assert Size((21, 30, 52), 512).reduced(tokens).patches == patches


def test_a_race_has_ours_and_float_entrants_on_the_call_and_on_the_linears_alone(tiny) -> None:
    settings = BlockSettings(blocks=1, against=("bf16-eager",), repeats=2, device="cpu")
    seen = []
    (raced,) = race(["tiny"], settings, finished=lambda found: seen.append(len(found)))
    assert seen == [1]
    assert {(row.part, row.entrant) for row in raced.rows} == {
        (part, name)
        for part in ("call", "linears", "transformer_blocks", "single_transformer_blocks", "all blocks")
        for name in ("bf16-eager", "ours-eager")
    }
    assert raced.skipped == {}
    assert raced.blocks == {"transformer_blocks": 1, "single_transformer_blocks": 1}
    assert raced.depths == {"transformer_blocks": 2, "single_transformer_blocks": 3}
    times = {row.part: row.p50_ms for row in raced.rows if row.entrant == "ours-eager"}
    assert times["all blocks"] == pytest.approx(
        2 * times["transformer_blocks"] + 3 * times["single_transformer_blocks"]
    )
    eager = next(row for row in raced.rows if (row.part, row.entrant) == ("call", "bf16-eager"))
    assert eager.speedup_over_bf16 == 1
    figures = blocks.figures([raced], settings)
    assert figures["models"][0]["bytes_of_bf16"] == pytest.approx(raced.weight_bytes / raced.bf16_bytes)


@pytest.mark.long
def test_blocks_of_ours_compile_whole(tiny, monkeypatch) -> None:
    """Dynamo takes every block and the layers alone without a break, and leaves eager entrants as they are."""
    captured = []

    def backend(module, inputs):
        captured.append(module)
        return module.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options))
    monkeypatch.setattr(blocks, "OURS", ("ours-eager", "ours-compiled"))
    (raced,) = race(["tiny"], BlockSettings(blocks=2, against=(), repeats=1, device="cpu"))
    assert raced.skipped == {}
    assert len(captured) == 3  # a joint block, a single one, and the layers alone


def test_bytes_at_full_depth_are_those_of_the_full_model() -> None:
    few = shortened.random_transformer(TINY, 1, torch.device("cpu"))
    full = shortened.random_transformer(TINY, None, torch.device("cpu"))
    sizes = shortened.float_bytes(few)
    assert shortened.bytes_at_full_depth(TINY, sizes) == sum(shortened.float_bytes(full).values())
    assert sum(sizes.values()) < sum(shortened.float_bytes(full).values())


def test_a_block_alone_gets_what_it_gets_in_a_call(tiny) -> None:
    """The output of the last block of a kind is that of the same block run alone, for one block of each kind."""
    model = shortened.random_transformer(TINY, 1, torch.device("cpu"))
    arguments = shortened.one_call(TINY, model, None, torch.device("cpu"))
    given = {key: value for key, value in arguments.items() if key != "return_dict"}
    graph = traced_graph(model, Calls.of(model, [given]))
    made = {}
    for path, block in first_blocks(graph).items():
        model.get_submodule(block.prefix).register_forward_hook(lambda *a, path=path: made.setdefault(path, a[-1]))
    inputs = inputs_of(model, graph, arguments)
    alone = entrant("bf16-eager", model, graph, arguments, inputs)
    for path in ("transformer_blocks", "single_transformer_blocks"):
        found = alone.parts[path]()
        pairs = zip(found, made[path], strict=True) if isinstance(found, tuple) else [(found, made[path])]
        assert all(torch.equal(one, other) for one, other in pairs)


def test_the_chain_is_one_run_of_many(tiny, monkeypatch) -> None:
    """A part's time is of one run: that of all runs over their number."""
    runs = []
    part = blocks.Entrant("ours-eager", {"call": lambda: runs.append(1), "transformer_blocks": lambda: runs.append(4)})
    monkeypatch.setattr(blocks, "chain", lambda device: 4)
    monkeypatch.setattr(blocks, "interleaved", lambda calls, *_: {name: [8.0] for name in calls})
    race_ = blocks._Race(TINY, BlockSettings(device="cpu"), lambda *_: None)
    rows = {row.part: row.p50_ms for row in race_._timed({"transformer_blocks": 3}, [part])}
    assert rows == {"call": 8, "transformer_blocks": 2, "all blocks": 6}


def test_an_entrant_that_fails_is_named_and_the_others_stay(tiny, monkeypatch) -> None:
    def fails(name, *rest):
        if name == "bf16-eager":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return genuine(name, *rest)

    genuine = blocks.entrant
    monkeypatch.setattr(blocks, "entrant", fails)
    (raced,) = race(["tiny"], BlockSettings(blocks=1, against=("bf16-eager",), repeats=1, device="cpu"))
    assert raced.skipped == {"bf16-eager": "OutOfMemoryError: CUDA out of memory. Tried to allocate"}
    assert {row.entrant for row in raced.rows} == {"ours-eager"}
    assert not raced.failed


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `tqdit ARGS`: exit code, standard output, standard error."""

    def call(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tqdit", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_the_command_prints_and_writes_what_it_measured(tiny, run, tmp_path) -> None:
    path = tmp_path / "figures.json"
    options = ("--blocks", "1", "--against", "bf16-eager", "--repeats", "1", "--device", "cpu", "-q", "--json", path)
    code, said, err = run("bench", "--random", "tiny", *options)
    assert (code, err) == (0, f"figures: {path}\n")
    written = json.loads(path.read_text())
    assert written["command"].startswith("tqdit bench --random tiny --blocks 1")
    assert written["settings"]["blocks"] == 1
    assert {"torch", "device", "cpu", "torchao"} <= written["environment"].keys()
    (model,) = written["models"]
    assert [(row["part"], row["entrant"]) for row in model["rows"]] == [
        (part, name)
        for part in ("call", "linears", "transformer_blocks", "single_transformer_blocks", "all blocks")
        for name in ("ours-eager", "bf16-eager")
    ]
    assert "tiny (Flux2Transformer2DModel): 1 x 4 x 4 patches, 8 text tokens; 1 transformer_blocks" in " ".join(
        said.split()
    )
    assert f"{model['bytes_of_bf16']:.3f} of bf16" in said


def test_the_command_fails_where_no_model_of_ours_runs(tiny, run, monkeypatch) -> None:
    def fails(*_):
        raise RuntimeError("no kernel here")

    monkeypatch.setattr(blocks, "weights", fails)
    code, said, err = run("bench", "--random", "tiny", "--blocks", "1", "--against", "", "--device", "cpu", "-q")
    assert code == 1
    assert "skipped ours-eager: RuntimeError: no kernel here" in said
    assert err == "tqdit: failed: tiny\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--random", "flux.1-dev", "some-artifact"), "unknown shape 'some-artifact'"),
        (("--random", "flux.1-dev", "--batch", "2"), "--batch is for artifacts and DiT shapes"),
        (
            ("--random", "z-image", "--against", "openvino"),
            "'openvino' is for artifacts and DiT shapes",
        ),
        (("--random", "z-image", "--bits", "w9"), "bits 'w9' must be w<2-8>a<4-8>"),
        (("--random", "DiT-XL/2", "--tokens", "64"), "--tokens is for the published models of --random"),
    ],
)
def test_wrong_arguments_of_the_command(run, arguments, message) -> None:
    code, _, err = run("bench", *arguments)
    assert code == 2
    assert message in err


def test_families_name_their_members_and_unknown_ones_are_refused() -> None:
    assert rivals(("torchao", "bf16-autotuned")) == ("bf16-autotuned", "torchao-int8", "torchao-fp8")
    with pytest.raises(InputError, match="unknown baseline 'fp4'; known: bfloat16, torchao, bf16-eager"):
        BlockSettings(against=("fp4",))
    with pytest.raises(InputError, match=r"'float32-eager' is for artifacts and .* models: bfloat16, torchao"):
        BlockSettings(against=("float32-eager",))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"blocks": 0}, "^blocks must be a whole number of at least 1, got 0$"),
        ({"tokens": 0}, "^tokens must be a whole number of at least 1, got 0$"),
        ({"tokens": 1.5}, "^tokens must be a whole number of at least 1, got 1.5$"),
        ({"repeats": 0}, "^repeats must be a whole number of at least 1, got 0$"),
        ({"bits": "w9"}, "^bits 'w9' must be w<2-8>a<4-8>"),
    ],
)
def test_settings_that_no_race_can_have(setting: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BlockSettings(**setting)
    assert BlockSettings(blocks=None, tokens=None, repeats=1)
