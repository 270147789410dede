"""`bench/architecture_shares.py`: counts of a small model by hand, and the committed file."""

import json
from pathlib import Path
from types import ModuleType

import pytest

from tqdit.speed import published_calls
from tqdit.speed.published import SHAPES, Published
from tqdit.speed.published_calls import Size

BENCH = Path(__file__).resolve().parent.parent / "bench"
WIDTH, HEADS, LAYERS, TEXT_WIDTH, CHANNELS = 512, 8, 3, 384, 4
ROWS, TEXT = 16, 8
SMALL = Published(
    "small",
    "PixArtTransformer2DModel",
    {
        "sample_size": 8, "patch_size": 2, "in_channels": CHANNELS, "out_channels": 8, "num_layers": LAYERS,
        "num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "cross_attention_dim": WIDTH,
        "caption_channels": TEXT_WIDTH, "use_additional_conditions": False,
    },
    Size((1, 4, 4), TEXT),
    published_calls.pixart,
)  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import architecture_shares

    return architecture_shares


def test_operations_are_those_of_the_formulas(script) -> None:
    """A block has six products of WIDTH x WIDTH on image tokens and two of 4 WIDTH, and two on the prompt alone."""
    row = script.shares(SMALL)
    block = 6 * WIDTH**2 + 2 * 4 * WIDTH**2
    assert row["flops"]["integer"] == 2 * ROWS * LAYERS * block
    assert row["flops"]["attention"] == LAYERS * 4 * WIDTH * ROWS * (ROWS + TEXT)
    assert row["flops"]["float"] == 2 * ROWS * WIDTH * 2 * 2 * 8
    assert row["flops"]["convolution"] == 2 * ROWS * WIDTH * 2 * 2 * CHANNELS
    prompt = LAYERS * 2 * WIDTH**2 + TEXT_WIDTH * WIDTH + WIDTH**2
    conditions = 256 * WIDTH + WIDTH**2 + 6 * WIDTH**2
    assert row["flops"]["weight_only"] == 2 * (TEXT * prompt + conditions)
    assert row["attention"] == (ROWS, ROWS, WIDTH // HEADS)


def test_parameters_add_up(script) -> None:
    row = script.shares(SMALL)
    biases = LAYERS * (6 * WIDTH + 5 * WIDTH)
    assert row["parameters"]["integer"] == row["flops"]["integer"] // (2 * ROWS) + biases
    assert row["layers"] == {"integer": 8 * LAYERS, "weight_only": 2 * LAYERS + 5, "float": 1}


def test_the_file_has_all_shapes_and_what_is_counted_now(script) -> None:
    rows = json.loads((BENCH / "results" / "architecture-shares.json").read_text(encoding="utf-8"))["models"]
    assert [row["model"] for row in rows] == list(SHAPES)
    assert json.loads(json.dumps(script.shares(SHAPES["pixart"]))) == rows[-1]
