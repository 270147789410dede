"""The report page: self-contained, escaped, deterministic, atomic, and whole for every kind of run."""

import base64
import csv
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparisons import BLOCKS, GROUPS, histogram, model_row, pixels, reference, saved, site, verdict
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tqdit.quality.run import Boxes, Region, Steps
from tqdit.report import figures, histograms, softmax, svg
from tqdit.report import page as under_test
from tqdit.report.images import BUDGET, sheets
from tqdit.report.page import render, write_report
from tqdit.report.sections import Saved, sections
from tqdit.report.svg import Chart
from tqdit.report.tables import number, site_table

HOSTILE = 'w8a8 <b>bold</b> & "x" $y_'
LIMIT = 3_000_000
VOID = ("meta", "img", "br", "input", "image", "use")


class Elements(HTMLParser):
    """Every (tag, attributes) of a page, and the tags that are still open at its end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


@pytest.fixture
def _without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no chart, which takes most of the time of a page; its alternative text is there."""

    def undrawn(key: str, alt: str, paint: object, rows: object, size: object = None) -> Chart:
        return Chart(key, Markup('<svg role="img" aria-label="{}"></svg>').format(alt), "data:image/png;base64,", "")

    for module in (figures, histograms, softmax):
        monkeypatch.setattr(module, "draw", undrawn)


without_charts = pytest.mark.usefixtures("_without_charts")


@pytest.fixture(scope="module")
def sample() -> Saved:
    other = model_row("smaller", 24.24, size_bytes=4_000_000, preset=None, fd_fashion=None)
    return saved(model_row(HOSTILE, verdict=verdict()), other)


@pytest.fixture(scope="module")
def text(sample: Saved) -> str:
    return render([sample])


def test_page_needs_nothing_from_outside(text: str) -> None:
    elements = Elements(text)
    assert elements.open == []
    links = [attrs[key] or "" for _, attrs in elements.found for key in ("src", "href") if key in attrs]
    assert links
    assert all(
        link.startswith(("data:image/png;base64,", "data:text/csv;charset=utf-8;base64,", "#")) for link in links
    )
    assert not {"link", "iframe"} & {tag for tag, _ in elements.found}
    assert all("src" not in script for script in elements.named("script"))
    assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|XMLHttp", text)
    assert len(text.encode()) < LIMIT


def test_names_from_folders_are_escaped(text: str) -> None:
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; &#34;x&#34; $y_" in text
    assert "A &lt;fast&gt; CPU" in text


def test_table_shows_formatted_values_and_a_dash_for_none(text: str) -> None:
    results = text[text.index("<h2>Results") : text.index("<h2>Fidelity")]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", results)]
    assert rows[0] == ["–", "float32 (file: float16)", "16.20", "100.0", "100.0", "–", "–", "11.20", "–", "–", "–", "–"]
    cost = ["12.5", "4.00", "51"]
    assert rows[1] == ["paper", "w8a8", "8.30", "51.2", "51.2", "33.0", "28.8", "12.35", *cost, "74"]
    assert rows[2] == ["–", "w8a8", "4.00", "24.7", "24.7", "24.2", "28.8", "–", *cost, "74"]
    assert "from 6 images per model. It is\nbiased upwards" in text


@without_charts
@pytest.mark.parametrize(
    ("run_in", "file", "shown"),
    [
        ("float32", "float16", "float32 (file: float16)"),
        ("bfloat16", "float32", "bfloat16 (file: float32)"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32"),
        ("float32", None, "float32"),
    ],
)
def test_the_float_model_is_called_what_it_ran_in_and_what_its_file_is(run_in: str, file: str, shown: str) -> None:
    text = render([saved(model_row("q"), bits=run_in, file_dtype=file)])
    assert f'<tr><th scope="row">float-model</th><td class="word">–</td><td class="word">{shown}</td>' in text


def test_headline_and_summary_name_the_closest_and_the_smallest(text: str) -> None:
    headline = "float-model in W8A8: 2.0× smaller than in float16, 4.0× as fast as eager float32, images 28.8 dB PSNR"
    assert f"<h1>{headline} from the float model’s</h1>" in text
    assert "error has 0.05 % of the signal’s power. It takes 8.30 MB." in text
    assert "The smallest, smaller (w8a8), takes 4.00 MB (4.0× smaller than in float16) at 24.2 dB." in text


@without_charts
def test_the_verdict_comes_first_and_says_what_few_images_can_tell(text: str) -> None:
    assert text.index("Can the images be told") < text.index("<h2>Images") < text.index("<h2>Results")
    assert "no difference beyond that of other seeds, as far as 40 images can tell" in text
    assert "equivalent to the float model’s images" in render([saved(model_row("q", verdict=verdict(n=10_000)))])
    assert "40 images can tell little" in text
    assert "about 16 times as narrow" in text
    many = render([saved(model_row("q", verdict=verdict(n=10_000, equivalent=False)))])
    assert "equivalence not shown" in many
    assert "can tell little" not in many
    assert "20 blocks of 500 images" in many
    assert "not closer to them than bf16’s" in text
    untested = verdict(p_closer=None, closer_than_bf16=None)
    assert "than bf16’s" not in render([saved(model_row("q", verdict=untested))])
    assert "Can the images be told" not in render([saved(model_row("q"))])


def test_images_are_there_once_and_compared_without_a_script(text: str) -> None:
    elements = Elements(text)
    ids = [image["id"] for image in elements.named("image") if "id" in image]
    assert len(ids) == 3
    assert {use["href"] for use in elements.named("use") if (use["href"] or "")[1:].startswith("s0-")} == {
        f"#{name}" for name in ids
    }
    labels = [svg["aria-label"] for svg in elements.named("svg") if "aria-label" in svg]
    assert f"6 images of {HOSTILE} (paper · w8a8 · PSNR 28.8 dB), in rows of 3" in labels
    radios = [radio for radio in elements.named("input") if radio["type"] == "radio"]
    assert [radio["value"] for radio in radios] == ["1", "4", "16"] * 2
    assert sum("checked" in radio for radio in radios) == 2
    sliders = [slider for slider in elements.named("input") if slider["type"] == "range"]
    assert all(
        HOSTILE in (slider["aria-label"] or "") or "smaller" in (slider["aria-label"] or "") for slider in sliders
    )
    assert "In reading order: class 0 · class 1 · class 2 · class 3 · class 4 · class 5." in text


def test_every_plot_has_its_numbers_and_a_picture(text: str) -> None:
    elements = Elements(text)
    charts = [
        svg for svg in elements.named("svg") if (svg.get("class") or "") not in ("layer float", "layer quantized")
    ]
    charts = [svg for svg in charts if svg.get("role") == "img"]
    assert len(charts) == 2 + 2 + BLOCKS + 2  # fidelity, a histogram of each model, maxima, scales
    assert all(chart["aria-label"] for chart in charts)
    files = {link["download"]: link["href"] or "" for link in elements.named("a") if "download" in link}
    pictures = [href for name, href in files.items() if (name or "").endswith(".png")]
    assert len(pictures) == len(charts)
    assert all(base64.b64decode(href.partition(",")[2]).startswith(b"\x89PNG") for href in pictures)
    numbers = base64.b64decode(files["s0-groups.csv"].partition(",")[2]).decode()
    rows = list(csv.reader(numbers.splitlines()))
    assert rows[0] == ["model", "from_t", "to_t", "sqnr_db"]
    assert rows[1] == [HOSTILE, "0.0", "200.0", "33.04"]
    assert len(rows) == 1 + 2 * GROUPS


@without_charts
def test_sensitive_sites_have_advice_and_regions(text: str) -> None:
    table = text[text.index("The most sensitive sites") : text.index("Why time groups")]
    assert "<code>gelu_channels=best</code>" in table
    assert "Leave it: it makes a small part of the error." in table
    assert "<td>41.2</td>\n<td>40.0</td>\n<td>2.1</td>\n<td>30</td>" in table
    assert "codes from -0.7 to 0.7; 2.1 % are clipped, 30 % become 0." in table
    assert "2 of 2 sites" in table
    some = render([saved(model_row("q", sites_in_all=900))])
    assert "2 of 2 sites that were measured, of 900 in all" in some


@without_charts
def test_ids_do_not_collide(text: str, sample: Saved) -> None:
    for page in (text, render([sample, saved(model_row("other"), protocol={"steps": 20})])):
        ids = [attrs["id"] for _, attrs in Elements(page).found if "id" in attrs]
        assert len(ids) == len(set(ids))


def test_same_input_gives_the_same_bytes(sample: Saved, text: str) -> None:
    assert render([sample]) == text


@without_charts
def test_runs_of_one_protocol_share_a_table() -> None:
    runs = [saved(model_row("a")), saved(model_row("a"), model_row("b"))]
    (section,) = sections(runs)
    assert [shown.look.name for shown in section.models] == ["a", "a (run 2)", "b"]
    text = render(runs)
    assert text.count("<h2>Results") == 1
    assert "The rows come from several runs" in text
    assert "Run 2, 2026-01-02 03:04 UTC" in text
    assert "Not comparable" not in text


@without_charts
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": {"steps": 20}}, "steps: 20, not 50"),
        ({"protocol": {"seed": 1}}, "seed: 1, not 0"),
        ({"sha256": "b" * 64}, "float model: other weights"),
        ({"kind": "calls", "images": False}, "one is of samples, one of recorded calls"),
    ],
)
def test_runs_that_differ_get_sections_that_say_what_differs(changes: dict, named: str) -> None:
    runs = [saved(model_row("a")), saved(model_row("b"), **changes)]
    assert [[shown.look.name for shown in section.models] for section in sections(runs)] == [["a"], ["b"]]
    text = render(runs)
    assert text.count("<h2>Results") == 2
    assert "Not comparable with the first section.</b> What differs: " + named in text


@without_charts
def test_page_is_written_whole_or_not_at_all(sample: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = render([sample])
    out = tmp_path / "new" / "report.html"
    write_report([sample], out)
    assert out.read_text(encoding="utf-8") == text

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    for owner, name in ((under_test, "_context"), (Path, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(RuntimeError, match="stop"):
                write_report([saved()], out)
    assert out.read_text(encoding="utf-8") == text
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]


@without_charts
@pytest.mark.parametrize(
    ("grids", "rows", "note"),
    [
        (("mrq_softmax",) * BLOCKS, False, "s₁, the step of the fine region of the MRQ grid<"),
        (("uniform",) * BLOCKS, False, "the scale of the uniform grid<"),
        (("uniform", "mrq_softmax", "uniform"), False, "in block 0, 2 the scale of a uniform grid<"),
        ((), False, "</b>: one scale for all timesteps."),
        ((), True, "</b>: a scale for each row, which needs no time groups."),
    ],
)
def test_every_kind_of_softmax_grid(grids: tuple[str, ...], rows: bool, note: str) -> None:
    steps = [Steps(grid=grid, log2=[-7.0, -8.0]) for grid in grids]
    text = render([saved(model_row("q", softmax_steps=steps, softmax_rows=rows))])
    assert note in text
    assert ("Heatmap of log2 step sizes" in text) == bool(grids)
    assert ("The step size for small probabilities" in text) == bool(grids)


def test_the_table_of_sites_says_what_shares_a_scale() -> None:
    sites = [
        site("a", role="softmax", grid="softmax_row", groups=1), site("b", role="input", grid="row", rotation=128),
        site("c", grid="mrq_gelu", channels=True),
        site("d", role="weight", bits=6, granularity="per_channel", groups=1),
    ]  # fmt: skip
    (section,) = sections([saved(model_row("q", sites=sites))])
    table = dict(site_table(section))
    assert table["Inputs of linear layers"] == [[("1 × 8-bit row", "per row, 5 time groups, rotated by 128")]]
    assert table["Post-softmax probabilities"] == [[("1 × 8-bit softmax row", "per row")]]
    shared = "per tensor, 5 time groups, a factor for each channel"
    assert table["Post-GELU activations"] == [[("1 × 8-bit MRQ", shared)]]
    assert table["Weights"] == [[("1 × 6-bit uniform", "per channel")]]


@without_charts
def test_a_run_without_models_and_an_exact_model() -> None:
    assert "No quantized model was measured" in render([saved(fd_fashion=None)])
    row = model_row("q", sqnr_by_group=[30.0, None], groups=[0.0, 500.0, 1000.0], by_timestep=[[0.0, 30.0]])
    assert "q: 30.0 to 30.0 dB." in render([saved(row)])
    exact = model_row("exact", sqnr_db=None, exact=True, sqnr_by_group=[None] * GROUPS, by_timestep=[[0.0, None]])
    text = render([saved(exact)])
    assert "(SQNR) of ∞ dB" in text
    assert "<td>∞</td>" in text


@without_charts
def test_a_run_on_recorded_calls_has_neither_images_nor_boxes() -> None:
    bfloat16 = model_row("bfloat16", 50.0, recipe={}, sites=[], softmax_steps=[], worst_db=44.4)
    text = render([saved(bfloat16, model_row("q", worst_db=21.5), kind="calls", images=False)])
    assert Elements(text).open == []
    assert "<h2>Images" not in text
    assert "Why time groups" not in text
    assert "predicts the outputs of recorded calls" in text
    assert "<td>21.5</td>" in text
    assert "some of the recorded calls" in text


def test_regions_of_a_logarithmic_axis_and_many_groups() -> None:
    regions = [
        Region(label="coded as 0", low=[0.0] * 40, high=[1e-6 * (i + 1) for i in range(40)]),
        Region(label="fine region", low=[1e-6 * (i + 1) for i in range(40)], high=[1e-3] * 40),
    ]
    found = histogram(log=True, edges=[1e-8, 1e-6, 1e-3, 1.0], counts=[0, 5, 9], regions=regions)
    text = render([saved(model_row("q", sites=[site("p", role="softmax", grid="mrq_softmax", histogram=found)]))])
    assert "Histogram of 53 values of p. coded as 0 from 0 to 2.05e-05; fine region from 2.05e-05 to 0.001;" in text


@without_charts
def test_boxes_of_a_block_without_states_are_left_out() -> None:
    run, images = saved(model_row("q"))
    empty = Boxes(block=0, bounds=[0.0, 500.0, 1000.0], boxes=[None, None])
    part = run.parts[0].model_copy(update={"boxes": [empty]})
    assert "Box plots" not in render([(run.model_copy(update={"parts": [part]}), images)])


def test_a_chart_is_laid_out_once_and_drawn_once_in_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()

    def counted(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def call(self: object, *args: object, **options: object) -> object:
            counts[name] += 1
            return original(self, *args, **options)

        monkeypatch.setattr(owner, name, call)

    counted(Figure, "draw")
    counted(ConstrainedLayoutEngine, "execute")
    histograms.site_histogram("key", site(), histogram())
    assert counts == {"draw": 2, "execute": 1}


def test_a_logarithmic_axis_has_labels_in_plain_text_and_all_its_minor_ticks() -> None:
    def paint(axes: Axes, low: float, high: float) -> None:
        axes.set_xticks([])
        svg.log_scale(axes, "y")
        axes.set_ylim(low, high)

    wide = svg.draw("wide", "", partial(paint, low=0.045, high=25), []).svg
    assert re.findall(r"<text[^>]*>([^<]*)</text>", wide) == ["10⁻¹", "10⁰", "10¹"]
    minor = [0.05, 0.06, 0.07, 0.08, 0.09, *(k / 10 for k in range(2, 10)), *range(2, 10), 20]
    assert wide.count("<use ") == 3 + len(minor)
    narrow = svg.draw("narrow", "", partial(paint, low=1.5, high=4.5), []).svg
    assert [label.count("×") for label in re.findall(r"<text.*?</text>", narrow, re.DOTALL)] == [1, 1, 1]


@pytest.mark.slow
def test_large_runs_stay_small() -> None:
    states = [[float(t % 1000), 20.0 + t % 7] for t in range(2000)]
    sites = [site(f"transformer_blocks.{i}.attn1.out_input") for i in range(200)]
    steps = [Steps(grid="mrq_softmax", log2=[-7.0] * 25) for _ in range(28)]
    rows = [model_row(f"model {i}", by_timestep=states, sites=sites, softmax_steps=steps) for i in range(2)]
    assert len(render([saved(*rows)]).encode()) < LIMIT - BUDGET


def test_large_images_are_shrunk_until_the_page_fits() -> None:
    found = sheets([pixels(16, 3, 130, 130, seed=i) for i in range(3)])
    assert sum(len(sheet.uri) for sheet in found) <= BUDGET
    assert found[0].shrunk > 1


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), (float("nan"), "–"), (float("inf"), "∞"), (1.25, "1.2")])
def test_number(value: float | None, shown: str) -> None:
    assert number(value, 1) == shown


@without_charts
def test_a_float_model_of_two_runs_is_there_twice_where_its_figures_differ() -> None:
    runs = [saved(model_row("a")), saved(model_row("b"), ms_per_call=80.0)]
    results = render(runs).partition("<h2>Results")[2]
    assert '<th scope="row">float-model</th>' in results
    assert '<th scope="row">float-model (run 2)</th>' in results
    assert reference().name == "float-model"


def test_importing_the_report_loads_no_plotting_library() -> None:
    code = "import sys, tqdit.report.page; sys.exit(bool({'matplotlib', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
