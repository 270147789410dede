"""The table of attention kernels in docs/gpu.md: which of them lead, and what was not measured."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCH)
    import attention_pages

    return attention_pages


def row(tokens: int, **best: float | None) -> dict[str, Any]:
    us = {"one pass [1]": best.get("one_pass"), "one pass [2]": 1e4, "sdpa cudnn": best.get("sdpa")}
    return {
        "shape": str(tokens), "sizes": [2, 4, tokens, 64], "best_us": {k.replace("_", " "): t for k, t in best.items()},
        "us": {name: t for name, t in us.items() if t is not None},
        "error_of_bound": {"one pass [1]": tokens / 1e4, "one pass [2]": 3.0},
    }  # fmt: skip


def test_the_table_says_which_kernel_leads_and_what_is_missing(script: ModuleType) -> None:
    rows = [
        row(1000, sdpa=90.0, before=30.0, one_pass=40.0),
        row(2000, sdpa=80.0, before=None, one_pass=160.0, bf16=100.0),
    ]
    where = {"device": "a GPU", "multiprocessors": 100, "highest_clock_khz": 2_000_000}
    text = script.section({"environment": where, "left_out": ["large"], "rows": rows})
    assert "| 2 × 4 × 1000 × 64 | 90 | 30 | 40 | – | 3.00× |" in text
    assert "| 2 × 4 × 2000 × 64 | 80 | – | 160 | 100 | 0.80× |" in text
    assert "are 10 % to 20 % of their bound" in text
    assert "Of the integer kernels one pass is the fastest at 2 × 4 × 2000 × 64." in text
    assert "Not measured: large." in text
    assert "takes 1.000 to 1.000 clocks" in text


def test_where_nothing_ran_nothing_is_said(script: ModuleType) -> None:
    none = row(1000, sdpa=90.0, before=30.0, one_pass=None) | {"us": {"sdpa cudnn": 90.0}}
    text = script.section({"environment": {"device": "a GPU"}, "rows": [none]})
    assert "Of the integer kernels one pass is the fastest nowhere." in text
    assert "bound" not in text
    assert "Not measured" not in text
    page = "before\n<!-- attention: written by bench/make_results.py -->\nold\n<!-- end of attention -->\nafter\n"
    assert "old" not in script.attention(page)
