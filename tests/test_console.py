"""What the command line shows fits 80 columns, with every figure whole."""

import io
import re
import sys
from collections.abc import Callable

import pytest

from tqdit.architectures.registry import config_of
from tqdit.cli import bars, console
from tqdit.plan import sites
from tqdit.quality.equivalence import Estimate, Verdict
from tqdit.quality.fidelity import EpsilonFidelity
from tqdit.quality.samples import Comparison, ModelRow
from tqdit.recipe import Recipe
from tqdit.speed.benchmark import Benchmark, TimedModel
from tqdit.speed.cost import Cost

LONG = "a-model-of-a-quite-long-name-in-a-folder-w8a8"


def shown(capsys: pytest.CaptureFixture[str], show: Callable[[], None]) -> str:
    """What `show` prints, which is at most 80 columns wide and nowhere cut."""
    show()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    return text


def row(name: str, **changes: object) -> ModelRow:
    values = {
        "preset": "plus (changed: hessian, softmax_grid)",
        "bits": "w8a8",
        "size_bytes": 675_123_456,
        "size_ratio": 0.2512,
        "images": None,
        "fd_fashion": 1234.5,
        "eps": EpsilonFidelity(132.44, [], []),
        "psnr_db": 100.57,
        "cost": Cost(12345.6, 98765.4, 12_345_678_901, 1),
    }
    return ModelRow(name, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [None, 12345.0])
def test_comparison(capsys: pytest.CaptureFixture[str], seconds: float | None) -> None:
    first = row("float[b]", preset=None, bits="float32", eps=None, psnr_db=None, cost=None)
    first = ModelRow(**{**first.__dict__, "size_bytes": 2_700_493_824, "file_bytes": 1_350_246_912})
    rows = (row(LONG, calibration_seconds=seconds), row("w6a6"))
    settings = {"num": 16, "samples_per_group": 8, "groups": 10, "states": 80, "call_batch": 32}
    text = shown(capsys, lambda: console.print_comparison(Comparison(first, rows, settings, {})))
    flat = " ".join(text.split())
    assert "float[b]" in text, "names are no markup"
    for figure in ("132.4", "100.6", "1234.5", "675.12", "0.500", "0.250", "12345.6", "8.00", "12346", "1350.25"):
        assert figure in text
    assert ("12345 " in text or "12345\n" in text) == (seconds is not None)
    assert "80 held-out states, 8 in each of 10 ranges" in flat
    assert "FD-fashion of 16 images is biased upwards: read it against the float model's own 1234.5" in flat
    many = Comparison(first, rows, {**settings, "num": 2000}, {})
    assert "biased" not in shown(capsys, lambda: console.print_comparison(many))


def timed(model: str, backend: str, integer: bool, **changes: object) -> TimedModel:
    values: dict = {
        "workload": "512-b16", "batch": 16, "p20_ms": 22999.9, "p50_ms": 23456.7, "p80_ms": 24999.9,
        "peak_bytes": 99_999_000_000, "integer": integer, "speedup_over": {}, "speedup_over_each": {}, "bits": None,
        "preset": None, "dtype": None, "resident_bytes": 12_345_000_000, "load_seconds": 123.4,
        "images_per_second": 1234.567, "operations": None, "operations_executed": None, "floor_ms": None,
        "floor_fraction": 0.42, "kernels": {"cpu.linear[fused, avx512-vnni u8 x s8, 2 products]": 61},
    }  # fmt: skip
    return TimedModel(model, backend, **(values | changes))


@pytest.mark.parametrize("every_site", [False, True])
def test_benchmark(capsys: pytest.CaptureFixture[str], every_site: bool) -> None:
    speedups = {"float32": 17.65, "bfloat16": 13.94, "bfloat16-blocks": 12.13, "torchao": 11.55}
    ours = timed("DiT-XL/2@512", "triton", True, speedup_over=speedups, bits="w8a8", preset="plus")
    rows = (ours, timed("DiT-XL/2@512", "torchao-fp8", False), timed("DiT-XL/2@512", "float32-compiled", False))
    where = {"int8_peak_gops": 123456.0, "read_gb_per_s": 4800.0}
    names = {f"transformer_blocks.27.{name}": "cpu.linear[fused, avx512-vnni u8 x s8]" for name in ("a", "b")}
    result = Benchmark({}, where, {"DiT-XL/2 torchao-int8": "too little memory"}, rows, ((ours.model, names),), ())
    text = shown(capsys, lambda: console.print_benchmark(result, every_site))
    for figure in ("22999.9", "23456.7", "24999.9", "17.65", "13.94", "12.13", "11.55", "1234.567", "99999", "12345"):
        assert figure in text
    for figure in ("123.4", "0.42"):
        assert figure in text
    assert "DiT-XL/2@512 plus w8a8" in " ".join(text.split())
    assert "float32-compiled" in text
    assert ("transformer_blocks.27.b" in text) == every_site
    assert "skipped DiT-XL/2 torchao-int8: too little memory" in text


@pytest.mark.parametrize("every_site", [False, True])
def test_inspection(capsys: pytest.CaptureFixture[str], model, every_site: bool) -> None:
    found = sites(config_of(model), Recipe("paper"))
    kernel = "cpu.linear[fused, avx512-vnni u8 x s8, 2 products]"
    rows = [
        {key: getattr(site, key) for key in ("name", "role", "bits", "grid", "groups", "granularity")}
        | {"kernel": kernel}
        for site in found
    ]
    result = {
        "name": "w8a8", "shape": "DiT-2x32/2@8", "preset": "paper", "bits": "w8a8", "size_bytes": 4_430_000,
        "float32_bytes": 18_460_000, "time_groups": 10, "num_timesteps": 1000, "backend": "cpu", "device": "cpu",
        "sites": rows, "stream_max": 20.7323, "fits_float16": True,
        "provenance": {
            "recipe": Recipe("paper").model_dump(), "source": "fashion-dit", "source_sha256": "0123456789abcdef",
            "versions": {"tqdit": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1"},
        },
    }  # fmt: skip
    text = shown(capsys, lambda: console.print_inspection(result, every_site))
    summary, _, listed = text.partition("\n\n")
    assert 6 <= len(summary.splitlines()) <= 9
    for fact in (
        "4.43 MB: 0.480 of bf16, 0.240 of fp32",
        "10 of 1000",
        "float16 when loaded as float16, up to 20.73 in calibration",
        "fashion-dit sha256 0123456789ab",
        "2.13.0+cpu",
    ):
        assert fact in summary
    counted = [int(count) for count in re.findall(r"^ *(\d+) x ", listed, re.MULTILINE)]
    assert sum(counted) == len(found)
    assert len(counted) < len(found) / 2, "alike sites are one entry"
    assert all((site.name in listed) == every_site for site in found)
    shown(capsys, lambda: console.print_inspection({**result, "provenance": {}}))


def test_an_inspection_says_what_shares_a_scale(capsys: pytest.CaptureFixture[str]) -> None:
    common = {"bits": 8, "groups": 1, "granularity": "per_tensor", "kernel": "reference.linear[int8]"}
    rows = [
        {**common, "name": "a", "role": "input", "grid": "row", "channels": False},
        {**common, "name": "b", "role": "input", "grid": "row", "channels": False},
        {**common, "name": "c", "role": "softmax", "grid": "softmax_row", "channels": False},
        {**common, "name": "d", "role": "gelu", "grid": "uniform", "groups": 4, "channels": True},
        {**common, "name": "e", "role": "gelu", "grid": "uniform", "groups": 4, "channels": False},
        {**common, "name": "f", "role": "query", "grid": "uniform", "granularity": "per_head", "channels": False},
    ]
    result = {
        "name": "w8a8", "shape": "DiT-2x32/2@8", "preset": "plus", "bits": "w8a8", "size_bytes": 1, "float32_bytes": 4,
        "time_groups": 4, "num_timesteps": 1000, "backend": "reference", "device": "cpu", "sites": rows,
        "provenance": {},
    }  # fmt: skip
    lines = shown(capsys, lambda: console.print_inspection(result)).partition("\n\n")[2].splitlines()
    assert [" ".join(line.split()) for line in lines[::2]] == [
        "2 x input 8 bits, row, per_row",
        "1 x softmax 8 bits, softmax_row, per_row",
        "1 x gelu 8 bits, uniform, per_tensor, 4 time groups, channel factors",
        "1 x gelu 8 bits, uniform, per_tensor, 4 time groups",
        "1 x query 8 bits, uniform, per_head",
    ]


# Progress ------------------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_from_the_beginning_with_a_time_left_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with bars.progress(False, {"first": 1, "second": 3}) as report:
        assert screen.getvalue() == "", "nothing before the first report"
        report("first", 0.0)
        report("first", 1.0)
        report("second", 0.0)
        report("second", 0.25)
        report("not among the stages", 0.5)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    last = [line for line in text.splitlines() if line.strip()][-4:]
    assert [line.split()[1] for line in last] == ["total", "first", "second", "not"]
    assert ["44%" in last[0], "100%" in last[1], "25%" in last[2]] == [True, True, True]
    assert all("0:00 left" in line for line in (last[0], last[2]))
    assert max(map(len, last)) <= 80


def test_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0, 0, 1, 20, 21, 100, 100, 101])
    lines = bars.Lines(bars.Total({"first": 1, "second": 1}), lambda: next(seconds))
    for stage, fraction in (
        ("first", 0), ("first", 0.1), ("first", 0.25), ("first", 0.3), ("first", 1), ("second", 0), ("second", 0.01),
    ):  # fmt: skip
        lines.report(stage, fraction)
    assert capsys.readouterr().err.splitlines() == [
        "first: 0 % after 0:00; total: 0 % after 0:00",
        "first: 25 % after 0:20, 1:00 left; total: 12 % after 0:20, 2:20 left",
        "first: 100 % after 1:40; total: 50 % after 1:40, 1:40 left",
        "second: 0 % after 0:00; total: 50 % after 1:40",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-:--"), (0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (11100, "3:05:00")]
)
def test_clock(seconds: float | None, text: str) -> None:
    assert bars.clock(seconds) == text


@pytest.mark.parametrize(("elapsed", "fraction", "left"), [(5, 0, None), (30, 0.25, 90), (31, 0.01, 3069), (9, 1, 0)])
def test_time_left_does_not_forget(elapsed: float, fraction: float, left: float | None) -> None:
    assert bars.remaining(elapsed, fraction) == (None if left is None else pytest.approx(left))


@pytest.mark.parametrize(
    ("n", "passes", "said"),
    [
        (40, True, "w6a6: no difference as far as 40 images can tell (KID -0.1 to +0.2"),
        (10_000, True, "w6a6: equivalent (KID -0.1 to +0.2"),
        (40, False, "w6a6: equivalence not shown (KID -0.1 to +0.2"),
    ],
)
def test_a_verdict_claims_no_more_than_its_images_can_tell(n: int, passes: bool, said: str) -> None:
    found = Estimate(0.05, 0.1, -0.1, 0.2)
    verdict = Verdict(n, 20, found, 1.1, 0.01, 0.01, passes, None, None, None, None, 0, None, found)
    assert console._verdict("w6a6", verdict).startswith(said)
