"""The README.md of an artifact: true, the same for the same artifact, and free to be edited."""

import re
from pathlib import Path

import pytest
import yaml
from diffusers import DiTTransformer2DModel

import tiny_called
import tqdit
from tqdit import workflow
from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import LOAD_PIPELINE, model_card
from tqdit.runtime.convert import convert
from tqdit.sources.resolve import resolve
from tqdit.system.files import EDITABLE, MODEL_CARD


@pytest.fixture(scope="module")
def folder(pipeline: Path, solved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "w8a8"
    workflow.save(solved("plus"), resolve(pipeline), out)
    return out


def test_card_says_how_to_load_and_how_it_was_made(folder: Path) -> None:
    text = (folder / MODEL_CARD).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "diffusers", "tags": ["tqdit", "quantization", "dit", "w8a8"]}
    assert body.index("import tqdit\nfrom diffusers") > 0
    assert f"{artifact.size_bytes(folder) / 1e6:.2f} MB" in body
    assert "| shape | DiT-2x32/2@8 |" in body
    assert "4 of 1000 training timesteps" in body


def test_its_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = (folder / MODEL_CARD).read_text().split("```python\n")[1:]
    for block in blocks:
        names: dict = {}
        exec(block.partition("```")[0].replace("FOLDER", str(folder)).replace("num=16", "num=1"), names)
    assert (tmp_path / "grid.png").is_file()
    assert names["images"].shape[0] == 1


def test_it_may_be_edited_and_survives_saving(solved, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    artifact.write(solved("plus"), out)
    (out / MODEL_CARD).write_text("my own words")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert workflow.inspect(out)["name"] == "mine"
    DiTTransformer2DModel.from_pretrained(out).save_pretrained(out)
    assert (out / MODEL_CARD).read_text() == "my own words"
    assert (out / ".gitattributes").read_text() == "*.safetensors filter=lfs"


def test_what_people_edit_survives_quantizing_anew(solved, pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    workflow.save(solved("plus"), resolve(pipeline), out)
    for folder in (out, out / "transformer"):
        for name in EDITABLE:
            (folder / name).write_text(f"my {name}")
    workflow.save(solved("plus", "w6a6"), resolve(pipeline), out, overwrite=True)
    edited = [folder / name for folder in (out, out / "transformer") for name in EDITABLE]
    assert all(path.read_text() == f"my {path.name}" for path in edited)


def test_an_edited_card_survives_and_that_of_another_model_does_not(solved, pipeline: Path, tmp_path: Path) -> None:
    """The same rule for both ways of writing an artifact over another."""
    source, out, saved = resolve(pipeline), tmp_path / "out", tmp_path / "saved"
    workflow.save(solved("plus"), source, out)
    convert(solved("plus")).save_pretrained(saved)
    first = [(folder / MODEL_CARD).read_text() for folder in (out, saved)]
    assert "DiT-2x32/2@8" in first[1]
    workflow.save(solved("plus", "w6a6"), source, out, overwrite=True)
    convert(solved("plus", "w6a6")).save_pretrained(saved)
    second = [(folder / MODEL_CARD).read_text() for folder in (out, saved)]
    assert all("w8a8" in a and "w6a6" in b and "w8a8" not in b for a, b in zip(first, second, strict=True))
    for folder, text in zip((out, saved), second, strict=True):
        (folder / MODEL_CARD).write_text(f"My own words.\n{text}")
    workflow.save(solved("plus"), source, out, overwrite=True)
    convert(solved("plus")).save_pretrained(saved)
    assert all((folder / MODEL_CARD).read_text().startswith("My own words.\n---") for folder in (out, saved))


def test_a_pipeline_and_a_model_of_the_hub(solved) -> None:
    text = model_card(solved("plus"), "DiT-2x32/2@8", 1_000_000, "owner/dit", LOAD_PIPELINE, "DiTPipeline")
    assert 'DiTPipeline.from_pretrained("FOLDER")' in text
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/dit"


def test_the_card_of_a_traced_model_says_what_is_true_of_it(tmp_path: Path) -> None:
    model, out = tiny_called.flux(), tmp_path / "dynamic"
    made = tqdit.quantize(model, tqdit.Recipe("dynamic"), out=out)
    text = (out / MODEL_CARD).read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "TQ-DiT" not in text
    assert "attention and everything else is diffusers' own code" in text
    assert "| calibration | none |" in text
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"| shape | FluxTransformer2DModel, {count / 1e3:.3g} k parameters |" in text
    code = block.partition("\npipe =")[0].replace("FOLDER", str(out))
    names: dict = {}
    exec(code, names)
    assert type(names["transformer"]) is type(made)
