"""The report page: self-contained, escaped, deterministic, atomic, and whole for every kind of solution."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from comparisons import BLOCKS, attention_maxima, comparison, model_row, noise, solution

from tqdit.quality.comparison import Comparison
from tqdit.quality.fidelity import EpsilonFidelity
from tqdit.report import page as under_test
from tqdit.report.images import BUDGET, sheets
from tqdit.report.page import render, write_report
from tqdit.report.tables import number, site_table
from tqdit.spec import Grid, GridParams, Role, SiteSpec

HOSTILE = 'w8a8 <b>bold</b> & "x" $y_'
LIMIT = 3_000_000


class Elements(HTMLParser):
    """Every (tag, attributes) of a page, and the tags that are still open at its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture(scope="module")
def sample() -> Comparison:
    other = model_row("smaller", 24.24, size_bytes=4_000_000, size_ratio=0.1235, preset=None, fd_fashion=None)
    return comparison(model_row(HOSTILE), other)


@pytest.fixture(scope="module")
def text(sample: Comparison) -> str:
    return render(sample, *attention_maxima())


def test_page_needs_nothing_from_outside(text: str) -> None:
    elements = Elements(text)
    assert elements.open == []
    links = [attrs[key] or "" for _, attrs in elements.found for key in ("src", "href") if key in attrs]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in elements.found}
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert len(text.encode()) < LIMIT


def test_names_from_folders_are_escaped(text: str) -> None:
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &#34;x&#34; $y_" in text
    assert "A &lt;fast&gt; CPU" in text


def test_table_shows_formatted_values_and_a_dash_for_none(text: str) -> None:
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", text)]
    assert rows[0] == ["–", "float32", "16.20", "100.0", "100.0", "50.0", "–", "–", "12.35", "–", "–", "–", "–"]
    cost = ["12.5", "4.00", "51"]
    assert rows[1] == ["paper", "w8a8", "8.30", "51.2", "51.2", "25.6", "33.0", "28.8", "12.35", *cost, "74"]
    assert rows[2] == ["–", "w8a8", "4.00", "24.7", "24.7", "12.3", "24.2", "28.8", "–", *cost, "74"]
    assert "from 6 images per model. It is\nbiased upwards" in text


def test_headline_and_summary_name_the_closest_and_the_smallest(text: str) -> None:
    assert "<h1>float-model, 2.0× smaller than in float16 at 33.0 dB ε SQNR</h1>" in text
    assert "0.05 % of the signal" in text
    assert "It takes 8.30 MB, 51.2 % of that. A call of the denoiser takes 12.5 ms, 4.0× as fast as" in text
    assert "The smallest, smaller (w8a8), takes 4.00 MB (4.0× smaller than in float16) at 24.2 dB." in text


def test_pictures_and_charts_have_alternative_texts(text: str) -> None:
    elements = Elements(text)
    assert [image["alt"] for image in elements.named("img")] == [
        "6 images sampled from float-model (float32), in rows of 3",
        f"6 images sampled from {HOSTILE} (paper · w8a8 · PSNR 28.8 dB), in rows of 3",
        "6 images sampled from smaller (w8a8 · PSNR 28.8 dB), in rows of 3",
    ]
    charts = elements.named("svg")
    assert len(charts) == 2 + BLOCKS + 2
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert f"{HOSTILE}: 29.0 to 33.0 dB; smaller: 20.2 to 24.2 dB." in (charts[0]["aria-label"] or "")


def test_ids_of_the_charts_do_not_collide(text: str) -> None:
    ids = [attrs["id"] for _, attrs in Elements(text).found if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_same_input_gives_the_same_bytes(sample: Comparison, text: str) -> None:
    assert render(sample, *attention_maxima()) == text


def test_page_is_written_whole_or_not_at_all(
    sample: Comparison, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "report.html"
    write_report(sample, *attention_maxima(), out)
    assert out.read_text(encoding="utf-8") == text

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    for owner, name in ((under_test, "_context"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(RuntimeError, match="stop"):
                write_report(comparison(), *attention_maxima(), out)
    assert out.read_text(encoding="utf-8") == text
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("grids", "groups", "note"),
    [
        ((Grid.MRQ_SOFTMAX,) * BLOCKS, 5, "s₁ of the MRQ grid<"),
        ((Grid.MRQ_SOFTMAX,) * BLOCKS, 1, "one scale for all timesteps"),
        ((Grid.UNIFORM,) * BLOCKS, 5, "the scale of the uniform grid"),
        ((Grid.UNIFORM,) * BLOCKS, 1, "one scale for all timesteps"),
        ((Grid.UNIFORM, Grid.MRQ_SOFTMAX, Grid.UNIFORM), 5, "in block 0, 2 the scale of a uniform grid"),
        ((Grid.MRQ_SOFTMAX,), 2, "s₁ of the MRQ grid<"),
        ((Grid.SOFTMAX_ROW,) * BLOCKS, 5, "</b>: a scale for each row, which needs no time groups.<"),
        ((Grid.SOFTMAX_ROW, Grid.UNIFORM, Grid.UNIFORM), 1, "a scale for each row, or one scale for all timesteps"),
    ],
)
def test_every_kind_of_softmax_grid(grids: tuple[Grid, ...], groups: int, note: str) -> None:
    text = render(comparison(model_row("q", solution=solution(grids, groups))), *attention_maxima())
    assert note in text
    changing = groups > 1 and Grid.SOFTMAX_ROW not in grids
    assert ("Heatmap of log2 step sizes" in text) == changing
    assert ("The step size for small probabilities" in text) == changing


def test_rows_beside_a_model_with_time_groups() -> None:
    """The heatmap is of the other model alone, and a sentence is about the rows."""
    rows = model_row("by-row", solution=solution((Grid.SOFTMAX_ROW,) * BLOCKS))
    text = render(comparison(model_row("by-time"), rows), *attention_maxima())
    assert text.count("Heatmap of log2 step sizes") == 1
    assert "<b>by-time</b>: s₁ of the MRQ grid<" in text
    assert "<p><b>by-row</b>: a scale for each row, which needs no time groups.</p>" in text


def test_the_table_of_sites_says_what_shares_a_scale() -> None:
    found = solution((Grid.SOFTMAX_ROW,) * BLOCKS)
    row = GridParams(SiteSpec("fc1_input", Role.INPUT, 8, Grid.ROW), torch.full((1, 1), 1 / 127))
    spec = SiteSpec("fc2_input", Role.GELU, 8, Grid.MRQ_GELU, groups=5)
    gelu = GridParams(spec, torch.ones(5, 1, 2), channels=torch.ones(16))
    params = {**found.params, "fc1_input": row, "fc2_input": gelu}
    table = dict(site_table([model_row("q", solution=replace(found, params=params))]))
    assert table["Inputs of linear layers"] == [[("1 × 8-bit row", "per row")]]
    assert table["Post-softmax probabilities"] == [[("3 × 8-bit softmax row", "per row")]]
    shared = "per tensor, 5 time groups, a factor for each channel"
    assert table["Post-GELU activations"] == [[("1 × 8-bit MRQ", shared)]]
    assert table["Weights"] == [[("1 × 6-bit uniform", "per channel")]]


def test_a_comparison_without_models_and_an_exact_model() -> None:
    assert "No quantized model was measured" in render(comparison(fd_fashion=None), *attention_maxima())
    unvisited = EpsilonFidelity(30.0, [30.0, float("nan")], [(0, 30.0)])
    assert "q: 30.0 to 30.0 dB." in render(comparison(model_row("q", eps=unvisited)), *attention_maxima())
    exact = EpsilonFidelity(float("inf"), [float("inf")] * 5, [(0, float("inf"))])
    text = render(comparison(model_row("exact", eps=exact)), *attention_maxima())
    assert "∞ dB ε SQNR" in text


def test_maxima_of_one_block_few_timesteps_and_underflow() -> None:
    text = render(comparison(model_row("q")), torch.zeros(2, 1, 4), torch.tensor([3, 999]))
    assert text.count("Box plots") == 1


def test_a_large_model_with_many_states_stays_small() -> None:
    states = [(t % 1000, 20 + t % 7) for t in range(2000)]
    eps = EpsilonFidelity(30.0, [30.0] * 25, states)  # 4000 points in all
    rows = [model_row(f"model {i}", eps=eps, solution=solution((Grid.MRQ_SOFTMAX,) * 28, 25)) for i in range(2)]
    maxima, t = noise(400, 28, 64), torch.arange(400) * 1000 // 400
    assert len(render(comparison(*rows), maxima, t).encode()) < LIMIT - BUDGET


def test_large_images_are_shrunk_until_the_page_fits() -> None:
    stacks = [noise(16, 3, 130, 130, seed=i) * 2 - 1 for i in range(3)]
    assert sum(len(sheet.uri) for sheet in sheets(stacks)) <= BUDGET


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (float("nan"), "–"), (float("inf"), "∞"), (1.25, "1.2")])
def test_number(value: float | None, shown: str) -> None:
    assert number(value, 1) == shown


def test_importing_the_report_loads_no_plotting_library() -> None:
    code = "import sys, tqdit.report.page; sys.exit(bool({'matplotlib', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
