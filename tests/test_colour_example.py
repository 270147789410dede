"""The colour example: its images from packages, a tiny training, and `bench/colour.py` on what it wrote."""

import importlib
import importlib.util
import io
import json
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tqdit.sources.resolve import load_float, resolve

ROOT = Path(__file__).resolve().parent.parent
TONES = ("1F3FB", "1F3FF")  # two skin tones
KINDS = (("Animals & Nature", "animal-bird"), ("Flags", "flag"), ("Objects", "tool"), ("Objects", "lock"))
EMOJI = 10  # of each kind
TINY = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "patch_size": 8}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import an example by name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def png(colour: tuple[int, int, int, int]) -> bytes:
    """A picture of 64 x 64 pixels of which the left half has a colour, and the right half none."""
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste(colour, (0, 0, 32, 64))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def write_package(folder: Path, vendor: str, version: str, kinds: tuple[tuple[str, str], ...] = KINDS) -> None:
    """A package as `npm pack` writes it: emoji of each kind, with two skin tones each."""
    entries, files = [], {}
    for k, (category, subcategory) in enumerate(kinds):
        for i in range(EMOJI):
            name = f"{k:x}{i:x}"
            tones = {tone: {"image": f"{name}-{tone.lower()}.png"} for tone in TONES}
            entry = {"category": category, "subcategory": subcategory, "image": f"{name}-fe0f.png"}
            entries.append({**entry, "skin_variations": tones})
            for image in (entry["image"], *(tone["image"] for tone in tones.values())):
                files[f"package/img/{vendor}/64/{image}"] = png((255 - 60 * k, 20 * i, 0, 255))
    files["package/emoji.json"] = json.dumps(entries).encode()
    with tarfile.open(folder / f"emoji-datasource-{vendor}-{version}.tgz", "w:gz") as package:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))


def prepared(data: ModuleType, folder: Path, least: int = 2 * EMOJI * 3) -> Path:
    """The file of two packages; of `KINDS` the last three are smaller than `least` where it is twice the default."""
    for vendor in ("google", "twitter"):
        write_package(folder, vendor, "1.0.0")
    data.prepare(folder, folder / "emoji.npz", (("google", "1.0.0"), ("twitter", "1.0.0")), least)
    return folder / "emoji.npz"


def test_a_picture_is_put_on_white_with_a_border(example: Callable[[str], ModuleType]) -> None:
    image = example("colour_data").pixels(png((200, 0, 0, 255)))
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    border = np.ones((32, 32), dtype=bool)
    border[1:-1, 1:-1] = False
    assert (image[border] == 255).all()
    assert (image[1:31, 1:12] == (200, 0, 0)).all()
    assert (image[1:31, 20:] == 255).all(), "a transparent pixel is white"


def test_classes_and_sides(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    data = example("colour_data")
    colours = data.load(prepared(data, tmp_path), "cpu")
    assert colours.names == ["animal-bird", "flag", "lock", "tool"]
    assert colours.mirrors.tolist() == [True, False, True, True], "a mirror spoils flags"
    assert all(pair == [54, 6] for pair in colours.counts().values()), "one emoji of ten, in three tones and two styles"
    shades = [set(part[0][part[1] == 0][:, 1, 16, 8].tolist()) for part in (colours.train, colours.test)]
    assert len(shades[0]) == 9
    assert len(shades[1]) == 1
    assert not shades[0] & shades[1], "an emoji is on one side"
    assert -1 <= colours.train[0].min() < colours.train[0].max() == 1
    assert data.load(prepared(data, tmp_path), "cpu").sha256 == colours.sha256


def test_small_subcategories_are_one_class_or_none(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    data = example("colour_data")
    colours = data.load(prepared(data, tmp_path, least=100), "cpu")
    assert colours.names == ["other objects"]
    assert colours.counts() == {"other objects": [108, 12]}


def test_a_missing_package_is_named(example: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        example("colour_data").prepare(tmp_path, tmp_path / "emoji.npz")


@pytest.mark.long
def test_training_and_comparison(
    example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)  # would outlive the test
    script, out = example("train_colour_dit"), tmp_path / "out"
    monkeypatch.setattr(script, "shape_config", lambda _: {"_class_name": "DiTTransformer2DModel", **TINY})
    monkeypatch.setattr(script, "SCHEDULE", replace(script.SCHEDULE, batch=4))
    data = prepared(example("colour_data"), tmp_path)
    sizes = ["--steps", "3", "--classifier-epochs", "1", "--samples", "8", "--sampling-steps", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_colour_dit.py", "--data", str(data), "--out", str(out), *sizes])
    script.main()

    report = json.loads((out / "training.json").read_text())
    assert report["training"]["steps"] == 3
    assert report["images_train_test"]["flag"] == [54, 6]
    assert Image.open(out / "samples.png").size == (8 * 32, 4 * 32)
    source = resolve(out / "dit")
    assert source.labels[1] == "flag"
    model = load_float(source)
    assert (model.config.in_channels, model.config.out_channels) == (3, 6)
    assert model.proj_out_2.weight.abs().max() > 0, "it was trained"

    bench = imported_bench()
    sizes = ["--num", "8", "--steps", "2", "--batch", "8", "--bits", "w8a8", "w4a8", "--presets", "paper"]
    options = ["--model", str(out), "--device", "cpu", "--quick", *sizes]
    monkeypatch.setattr(sys, "argv", ["colour.py", str(tmp_path / "colour.json"), *options])
    bench.main()
    result = json.loads((tmp_path / "colour.json").read_text())
    rows = result["models"]
    assert [row["bits"] for row in rows] == ["w8a8", "w4a8"]
    assert (
        rows[0]["eps_sqnr_db"] > rows[1]["eps_sqnr_db"] + 5
    )  # of paper: plus has float ends, and the rest is untrained
    assert rows[0]["psnr_db"] > rows[1]["psnr_db"]
    assert rows[0]["size_bytes"] > rows[1]["size_bytes"]
    assert result["training"] == report


def imported_bench() -> ModuleType:
    """`bench/colour.py` as a module."""
    spec = importlib.util.spec_from_file_location("bench_colour", ROOT / "bench" / "colour.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_labels_are_as_frequent_as_the_held_out_images() -> None:
    drawn = imported_bench().drawn_labels([1, 0, 3], 80)
    assert [drawn.count(i) for i in range(3)] == [20, 0, 60]
