"""The README.md of an artifact: true, the same for the same artifact, and free to be edited."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from diffusers import DiTTransformer2DModel

from tqdit import artifact, workflow
from tqdit.model_card import CARD, model_card
from tqdit.models.sources import resolve


@pytest.fixture(scope="module")
def folder(pipeline: Path, solved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "w8a8"
    workflow.save(solved("plus"), resolve(pipeline), out)
    return out


def test_card_says_how_to_load_and_how_it_was_made(folder: Path) -> None:
    text = (folder / CARD).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {"library_name": "diffusers", "tags": ["tqdit", "quantization", "dit", "w8a8"]}
    assert body.index("import tqdit\nfrom diffusers") > 0
    assert f"{artifact.size_bytes(folder) / 1e6:.2f} MB" in body
    assert "| shape | DiT-2x32/2@8 |" in body
    assert "4 of 1000 training timesteps" in body


def test_its_code_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = (folder / CARD).read_text().split("```python\n")[1:]
    for block in blocks:
        names: dict = {}
        exec(block.partition("```")[0].replace("FOLDER", str(folder)).replace("num=16", "num=1"), names)
    assert (tmp_path / "grid.png").is_file()
    assert names["images"].shape[0] == 1


def test_it_may_be_edited_and_survives_saving(solved, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    artifact.write(solved("plus"), out)
    (out / CARD).write_text("my own words")
    (out / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert workflow.inspect(out)["name"] == "mine"
    (out / ".gitattributes").unlink()  # saving over it is refused, as over any file that is no part of the model
    DiTTransformer2DModel.from_pretrained(out).save_pretrained(out)
    assert (out / CARD).read_text() == "my own words"


def test_a_pipeline_and_a_model_of_the_hub(solved, pipeline: Path, tmp_path: Path) -> None:
    source = replace(resolve(pipeline), name="owner/dit", vae=tmp_path)
    text = model_card(solved("plus"), source, 1_000_000)
    assert 'DiTPipeline.from_pretrained("FOLDER")' in text
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/dit"
