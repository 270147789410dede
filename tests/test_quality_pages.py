"""The figures of docs/quality.md: every section, with its result file and without."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tqdit.quality.equivalence import Drawn, Yardstick, verdicts

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
WHERE = {"device": "a GPU", "torch": "2"}
RECIPE = {"samples": 32, "groups": 10}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The writer, which reads the result files of an empty folder."""
    monkeypatch.syspath_prepend(BENCH)
    import pages
    import quality_pages

    for module in (pages, quality_pages):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return quality_pages


def ablation(psnr: dict[str, float], bits: str = "w8a8") -> dict[str, Any]:
    rows = [
        {"variant": name, "bits": bits, "eps_sqnr_db": value - 10, "eps_sqnr_db_by_group": [20.04, 30.0],
         "psnr_db": value, "fd_fashion": 0.5, "calibration_seconds": 12.6, "peak_memory_bytes": None,
         "size_ratio": 0.2398}
        for name, value in psnr.items()
    ]  # fmt: skip
    settings = {"images": 640, "steps": 50, "guidance": 1.5, "held_out_per_group": 16, "calibration": RECIPE}
    return {"environment": WHERE, "settings": settings, "float_fd_fashion": [0.51, 0.55], "rows": rows}


def baseline(method: str, bits: str, psnr: float) -> dict[str, Any]:
    return {"method": method, "bits": bits, "eps_sqnr_db": 30.0, "psnr_db": psnr, "fd_fashion": None,
            "quantization_seconds": 1.23, "seconds": 4.0}  # fmt: skip


def test_without_files_every_section_says_so(script) -> None:
    page = script.quality((ROOT / "docs" / "quality.md").read_text(encoding="utf-8"))
    assert page.count("Not measured yet: there is no `bench/results/") == len(script.SECTIONS)
    assert script.quality(page) == page


def test_a_page_without_a_section_is_an_error(script) -> None:
    with pytest.raises(ValueError, match="has the sections"):
        script.quality("<!-- parts: written by bench/make_results.py -->\n<!-- end of parts -->\n")


def test_text_between_sections_stays(script, tmp_path: Path) -> None:
    (tmp_path / "ablation-quality.json").write_text(json.dumps(ablation({"plus": 48.0, "plus, x": 48.3})))
    empty = "".join(
        f"before {name}\n<!-- {name}: written by bench/make_results.py -->\nold\n<!-- end of {name} -->\n"
        for name in script.SECTIONS
    )
    page = script.quality(empty)
    assert "old" not in page
    assert "| W8A8 | x | 38.30 | +0.30 | 48.30 | +0.30 | 0.500 | 0.240 | better SQNR and PSNR |" in page
    assert all(f"before {name}\n" in page for name in script.SECTIONS)


def test_parts_are_shown_one_by_one_and_left_out(script) -> None:
    psnr = {
        "former plus": 40.0,
        "... + rows": 45.0,
        "plus": 48.0,
        "plus without rows": 42.0,
        "plus without ends": 48.05,
    }
    text = "\n".join(script.parts(ablation(psnr)))
    assert "FD-fashion of the float model over its seeds: 0.510 to 0.550" in text
    assert "| former plus | 30.00 | – | 40.00 | – | 0.500 | 0.240 | 13 | – |" in text
    assert "| ... + rows | 35.00 | +5.00 | 45.00 | +5.00 |" in text
    assert "| ... + ends: `plus` | 38.00 | +3.00 | 48.00 | +3.00 |" in text
    assert "| rows | 32.00 | -6.00 | 42.00 | -6.00 | 0.500 | 0.240 | worse SQNR and PSNR |" in text
    assert "| ends | 38.05 | +0.05 | 48.05 | +0.05 | 0.500 | 0.240 | the same |" in text
    assert "| W8A8 plus | 20.0 | 30.0 |" in text


def test_a_part_of_the_rows_is_enough(script) -> None:
    text = "\n".join(script.parts(ablation({"plus": 48.0})))
    assert "part by part" not in text
    assert "| W8A8 plus |" in text
    assert "no such variant" in script.alternatives(ablation({"former plus": 40.0}))[0]


def test_every_variant_of_plus_is_on_the_page(script) -> None:
    from ablation import VARIANTS

    run = ablation(dict.fromkeys(VARIANTS, 40.0))
    text = "\n".join([*script.parts(run), *script.alternatives(run)])
    names = [name for name in VARIANTS if "plus" in name or name.startswith("...")]
    assert len(names) > 15
    for name in names:
        short = name.removeprefix(script.WITHOUT).removeprefix(script.OTHER)
        assert f"| {short} |" in text or name == "plus", name


def test_a_verdict_names_what_is_better_and_what_is_worse(script) -> None:
    other = {"eps_sqnr_db": 30.0, "psnr_db": 40.0}
    assert script._verdict({"eps_sqnr_db": 30.5, "psnr_db": 39.0}, other) == "better SQNR, worse PSNR"
    assert script._verdict({"eps_sqnr_db": 30.05, "psnr_db": 40.2}, other) == "better PSNR"


def test_baselines_are_in_order_and_ours_are_marked(script) -> None:
    rows = [baseline("bf16", "bf16", 46.0), baseline("PTQ4DiT", "w8a8", 41.0), baseline("w8a8", "w8a8", 48.0)]
    rows += [{"method": "OpenVINO int8", "bits": "w8a8", "failed": "it runs on a CPU"}]
    settings = {"model": "m", "images": 256, "steps": 50, "guidance": 1.5, "held_out_per_group": 16,
                "rows_per_sample": 16, "calibration": RECIPE, "scope": "The scope."}  # fmt: skip
    run = {"environment": WHERE, "settings": settings, "float_fd_fashion": None, "rows": rows}
    lines = script.published(run)
    ours, theirs = "| **`w8a8`**, ours | 30.00 | 48.00 | – | 1.2 |", "| PTQ4DiT | 30.00 | 41.00 | – | 1.2 |"
    text = "\n".join(lines)
    assert text.index(ours) < text.index(theirs)
    assert "Not measured: W8A8 OpenVINO int8: it runs on a CPU." in lines
    assert "bf16" not in text
    assert "What methods chose" not in text
    yardstick = "\n".join(script.yardstick(run))
    assert yardstick.index("| **`w8a8`**, ours | 30.00 | 48.00 |") < yardstick.index("| the float model in bf16 |")
    assert "PTQ4DiT" not in yardstick


def test_the_choices_of_baselines_are_told(script) -> None:
    import verdict_pages

    rows = [
        {**baseline("SmoothQuant, static", "w8a8", 1.0), "notes": {"exponents": {"a": 0.25, "b": None, "c": 0.5}}},
        {**baseline("Q-DiT, GPTQ", "w4a8", 1.0), "notes": {"group_sizes": {"a": 96, "b": 128, "c": 96}}},
        {**baseline("SmoothQuant, per token", "w8a8", 1.0), "notes": {"exponents": {"a": None}}},
        baseline("PTQ4DiT", "w8a8", 1.0),
    ]
    assert verdict_pages._chosen(rows) == [
        "W8A8 SmoothQuant, static: 2 of 3 layers smoothed, exponents 0.25 to 0.5",
        "W4A8 Q-DiT, GPTQ: groups of 96 and 128",
        "W8A8 SmoothQuant, per token: 0 of 1 layers smoothed",
    ]


def test_the_equivalence_test_is_counted_and_shown(script) -> None:
    torch.manual_seed(0)
    pixels, features, real = torch.rand(40, 1, 2, 2), torch.randn(40, 3), torch.randn(40, 3)
    yardstick = Yardstick(Drawn(pixels, features), pixels + 0.1, torch.randn(40, 3), real)
    near = Drawn(pixels + 1e-3 * torch.rand(40, 1, 2, 2), features.clone())
    far = Drawn(1 - pixels, features + 3)
    judged = verdicts({"near": near, "far": far}, yardstick)
    models: dict[str, Any] = {"float32": {"psnr_db": None, "fd_fashion": 0.5}}
    models |= {n: {"psnr_db": 40.0, "fd_fashion": 0.5, "verdict": v.figures()} for n, v in judged.items()}
    models["bfloat16"] = models["far"]
    trial = {"sampler": "ddim", "steps": 50, "guidance": 1.5, "num": 40, "seed": 7, "other_seed": 8, "models": models}
    artifacts = {name: {"bits": "w8a8", "preset": name} for name in ("near", "far")}
    settings = {"blocks": 20, "alpha": 0.05, "margin_standard_errors": 1.96, "real_images": 40, "artifacts": artifacts}
    run = {"command": "c", "environment": WHERE, "settings": settings, "trials": [trial, trial]}
    text = "\n".join(script.equivalence(run))
    head = "| DDIM 50, guidance 1.5, 40 images |"
    assert f"{head} W8A8 `near` | 2 | 2 | 2 |" in text
    assert f"{head} W8A8 `far` | 2 | 0 | 0 |" in text
    assert f"{head} the float model in bfloat16 | 2 | 0 | – |" in text
    assert f"{head} 7 | float32 | – | – | – | – | FD 0.500 |" in text
    margin = f"{judged['near'].margin / 1e-5:.2f}"
    assert f"{head} 7 | near | +0.00 (+0.00 to +0.00) | {margin} | -" in text


def test_objectives_and_the_second_model(script) -> None:
    settings = {"model": "m", "images": 32, "sampler": "ddim", "steps": 50, "guidance": 1.5, "states": 16, "probes": 8}
    run = {
        "environment": WHERE, "settings": settings, "seconds": {"sensitivity": 9.6},
        "spearman": {"plain": None, "sampler": 0.5, "white": 0.75, "image": 0.9876},
        "variants": [{"psnr_db": 40.0, "predicted_psnr_db": 39.0}, {"psnr_db": 30.0, "predicted_psnr_db": 33.0}],
        "sensitivity": {"white": {"by_group": [1.0, 4.0]}, "image": {"by_group": [2.0, 1.0]}},
    }  # fmt: skip
    text = "\n".join(script.objective(run))
    assert "| by the image, for errors that arise in the layers | 0.988 |" in text
    assert "| all states alike | – |" in text
    assert "off by 2.0 dB in the mean over the variants, and by 3.0 dB at most" in text
    assert "| white, of its largest | 0.25 | 1 |" in text
    row = {"preset": "plus", "bits": "w4a8", "eps_sqnr_db": 30.0, "psnr_db": 35.0, "fd": 3.0, "class_agreement": 0.9,
           "size_ratio": 0.15}  # fmt: skip
    training = {
        "shape": "DiT-S/2",
        "parameters": 33_000_000,
        "training": {"steps": 3},
        "images_train_test": {"cat": [5, 1], "dog": [7, 2]},
    }
    settings = {"images": 1000, "steps": 50, "guidance": 1.5, "states": 80}
    reference = {"fd": 2.5, "class_agreement": 0.95, "fd_other_seeds": 2.75}
    run = {"environment": WHERE, "settings": settings, "training": training, "calibration_seconds": 20.4,
           "reference": reference, "models": [row]}  # fmt: skip
    text = "\n".join(script.colour(run))
    assert "a DiT-S/2 of 33.0 M parameters for colour images of 2 classes, trained on 12 images" in text
    assert "| W4A8 | `plus` | 0.150 | 30.00 | 35.00 | 3.00 | 0.900 |" in text
    assert "from other seeds have 2.75" in text
