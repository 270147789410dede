"""The order of candidates, by all the times that were measured on an H200: one of the first few is nearly the best."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tqdit.backends.triton import candidates, costs, hopper, tuning
from tqdit.backends.triton.layouts import Config

MEASURED = Path(__file__).parents[3] / "bench" / "results" / "h200-kernels.json"
PROCESSORS = 132
ROWS = {"256-b64": (64, 256), "256-b2": (2, 256), "512-b16": (16, 1024)}  # workload -> samples, tokens
LINEARS = {"qkv": (3456, 1152), "out": (1152, 1152), "fc1": (4608, 1152), "fc2": (1152, 4608)}  # columns, depth
FLOATS = {
    "adaLN of all blocks": (193536, False), "final adaLN": (2304, False), "timestep, first": (1152, False),
    "timestep, second": (1152, False), "final": (32, True), "patches": (1152, True),
}  # fmt: skip
HEADS, HEAD_DIM = 16, 72


def measured() -> list[tuple[str, str, dict[Config, float]]]:
    found = []
    for row in json.loads(MEASURED.read_text())["rows"]:
        times = {Config(*row["config"]): row["us"]}
        times |= {Config(*json.loads(text.replace("None", "null"))): us for text, us in row["others_us"].items()}
        found.append((row["workload"], row["name"], times))
    return found


def ranked(workload: str, name: str) -> list[Config]:
    """The candidates as a call on an H200 lists them."""
    (batch, tokens), kind = ROWS[workload], name.split(",", maxsplit=1)[0]
    rows = batch * tokens
    if kind in LINEARS:
        columns, depth = LINEARS[kind]
        cost = lambda config: costs.linear(config, rows, columns, depth, PROCESSORS)  # noqa: E731
        epilogue = {"qkv": "heads", "fc1": "gelu"}.get(kind, "residual")
        two = "2 products" in name
        special = [] if two else candidates.hopper_linear(epilogue, rows, columns, 128)
        return costs.by_cost(special + candidates.linear(rows, two, 8), cost)
    if kind == "attention":
        two = name == "attention, MRQ"
        special = candidates.hopper_attention.__wrapped__(torch.device("cpu"), tokens, HEAD_DIM, two)  # not kept
        return special + candidates.attention(batch * HEADS, tokens)
    if kind == "norm":
        return candidates.norm(rows, 1152)
    columns, per_token = FLOATS[name]
    return candidates.float_input(min(rows, 8192) if per_token else batch, columns)


@pytest.mark.parametrize("special", [True, False], ids=["for Hopper", "for all"])
def test_one_of_the_first_candidates_is_nearly_the_best(special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are timed, and one is within 5 % of the fastest; fc1 at few rows without the Hopper kernel within 13 %."""
    monkeypatch.setattr(hopper, "processors", lambda device: PROCESSORS)
    seen: Counter[str] = Counter()
    for workload, name, times in measured():
        order = [config for config in ranked(workload, name) if bool(config.hopper) == special]
        here = {config: us for config, us in times.items() if bool(config.hopper) == special}
        if not order:
            continue
        assert set(order) <= set(here), (workload, name)
        kind = "linear" if name.split(",")[0] in LINEARS else name.split(",")[0]
        chosen = min(here[config] for config in order[: tuning.TIMED.get(kind, 1)])
        allowed = 1.13 if (workload, name, special) == ("256-b2", "fc1", False) else 1.05
        assert chosen <= allowed * min(here.values()), (workload, name)
        seen[kind] += 1
    assert seen["attention"] == 3 * len(ROWS)  # uniform, MRQ and merged codes of probabilities
    assert seen.total() == (27 if special else 57)


def test_configurations_for_hopper_come_first_and_tiles_differ() -> None:
    special = [Config(128, 128, 128, stages=stages, hopper=1) for stages in (6, 5)]
    order = candidates.best_first(special + candidates.linear(16384, False, 8), torch.device("cpu"), 16384, 3456, 1152)
    assert order[:2] == special
    small = candidates.best_first(candidates.linear(512, False, 8), torch.device("cpu"), 512, 1152, 1152)
    assert len({config[:2] for config in small[:3]}) == 3
    assert set(small) == set(candidates.linear(512, False, 8))
