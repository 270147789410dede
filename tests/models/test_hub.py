"""Models on the Hugging Face Hub: when one is looked up, what is asked for, and one clear error."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from tqdit.errors import InputError
from tqdit.sources.hub import is_id
from tqdit.sources.resolve import load_float, resolve, weights_hash


@pytest.fixture
def asked(monkeypatch, pipeline) -> list[tuple[str, list[str]]]:
    """The downloads asked for; each gives the tiny pipeline."""
    calls: list[tuple[str, list[str]]] = []

    def snapshot_download(repo_id: str, *, ignore_patterns: list[str]) -> str:
        calls.append((repo_id, ignore_patterns))
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize("model", ["facebook/DiT-XL-2-256", "a/b", "Some-One_1/x.y"])
def test_ids(model: str) -> None:
    assert is_id(model)


@pytest.mark.parametrize("model", ["name", "/etc/x", "a/b/c", "./a", "../a", "a/", "a b/c", "a/b\n", "~/a", "é/a"])
def test_what_is_no_id(model: str) -> None:
    assert not is_id(model)


def test_a_model_of_the_hub(asked, model) -> None:
    source = resolve("someone/tiny-hub-dit")
    assert [repo for repo, _ in asked] == ["someone/tiny-hub-dit"]
    assert source.name == "tiny-hub-dit"
    assert source.labels[3] == "class 3"
    assert weights_hash(load_float(source)) == weights_hash(model)


def test_a_download_has_every_part_of_a_pipeline_but_pickles(asked) -> None:
    resolve("someone/tiny-hub-dit")
    left_out = asked[0][1]
    parts = ["model_index.json", "my_dit.py", "tokenizer/merges.txt", "tokenizer/bpe.txt.gz", "vae/x.safetensors"]
    others = ["vae/diffusion_pytorch_model.bin", "a.ckpt", "DiT.pt", "unet/model.onnx", "flax_model.msgpack", "x.png"]
    assert list(filter_repo_objects([*parts, *others], ignore_patterns=left_out)) == parts


def test_a_part_whose_weights_are_left_out_is_refused(own_pipeline, monkeypatch) -> None:
    (own_pipeline / "vae").mkdir()
    (own_pipeline / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(own_pipeline))
    with pytest.raises(InputError, match=r"vae is of a model \(AutoencoderKL\), but has no \.safetensors weights"):
        resolve("someone/tiny-hub-dit").check_components()


def test_what_is_here_wins(asked, pipeline, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("someone").mkdir()
    Path("someone/dit").symlink_to(pipeline)
    assert resolve("someone/dit").folder == Path("someone/dit/transformer")
    Path("someone/file").touch()
    for model in ("someone/file", "someone/none.pt", Path("someone/none"), "none", str(tmp_path / "a" / "b")):
        with pytest.raises(InputError):
            resolve(model)
    assert not asked


@pytest.mark.parametrize(
    "error", [huggingface_hub.errors.OfflineModeIsEnabled("offline"), OSError("no route\nto host"), RuntimeError("x")]
)
def test_one_error_names_the_model(monkeypatch, error: Exception) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"unknown model 'a/b': no such folder here.*Hugging Face Hub: ") as caught:
        resolve("a/b")
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_hub_without_a_model(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match="'a/b' on the Hugging Face Hub has no safetensors weights"):
        resolve("a/b")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        resolve("a/b")
