"""The file of a run: it comes back as it was, and what is damaged or of another kind is refused by name."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tqdit.errors import InputError
from tqdit.quality.run import Histogram, Part, Region, Row, Run, Site
from tqdit.quality.run_file import SEAL, check_path, read, write

IMAGES = {0: torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 1: torch.ones(2, 1, 4, 4, dtype=torch.uint8)}


def run() -> Run:
    site = Site(
        name="a.weight", role="weight", bits=8, grid="uniform", granularity="per_tensor", groups=1, units=1,
        channels=False, rotation=0, sqnr_db=40.0, share=1.0,
        histogram=Histogram(
            unit="value", log=False, edges=[0.0, 0.5, 1.0], counts=[1, 2], values=3, clipped=0.0, zeroed=0.25,
            regions=[Region(label="codes", low=[0.0], high=[1.0])],
        ),
    )  # fmt: skip
    row = Row(
        name="q",
        bits="w8a8",
        sites=[site],
        sites_in_all=1,
        images=1,
        sqnr_by_group=[30.0, None],
        groups=[0.0, 1.0, 2.0],
    )
    part = Part(
        component="transformer", reference_sha256="a", protocol={"num": 2}, low=0.0, high=2.0,
        reference=Row(name="f", bits="float32", images=0), models=[row],
    )  # fmt: skip
    return Run(kind="samples", command="", created="", environment={"threads": 1}, parts=[part])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.safetensors"
    write(path, run(), IMAGES)
    return path


def rewritten(path: Path, change: Any) -> Path:
    """Change the JSON of a run, and seal it again."""
    tensors = load_file(path)
    value = json.loads(tensors[SEAL].numpy().tobytes())
    change(value)
    text = json.dumps(value).encode()
    tensors[SEAL] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, path, metadata={SEAL: hashlib.sha256(text).hexdigest()})
    return path


def test_a_run_comes_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    found, images = read(saved)
    assert found == run()
    assert images.keys() == IMAGES.keys()
    assert all(torch.equal(images[number], pixels) for number, pixels in IMAGES.items())
    write(tmp_path / "again.safetensors", found, images)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(kind="other"), "kind must be samples or calls"),
        (lambda v: v.update(further=1), "further: Extra inputs are not permitted"),
        (lambda v: v["parts"].clear(), "parts: List should have at least 1 item"),
        (lambda v: v["parts"][0]["models"][0].update(size_bytes="8"), "size_bytes must be a whole number"),
        (lambda v: v["parts"][0]["models"][0].pop("name"), r"parts\.0\.models\.0\.name: Field required"),
        (lambda v: v["parts"][0]["models"][0].update(groups=[0.0]), "groups must be one more than sqnr_by_group"),
        (lambda v: v["parts"][0]["models"][0].update(images=5), "the images of 'q' are missing"),
        (lambda v: v["parts"][0]["models"][0]["sites"][0].update(share=2.0), "share must be at most 1"),
        (
            lambda v: v["parts"][0]["models"][0]["sites"][0]["histogram"]["counts"].pop(),
            "edges must increase, and be one more than counts",
        ),
        (
            lambda v: v["parts"][0]["models"][0]["sites"][0]["histogram"]["regions"][0]["low"].append(1.0),
            "low and high must be of one length",
        ),
        (lambda v: v["sha256"].pop("images/1"), "its images are not those that it lists"),
        (lambda v: v["sha256"].update({"images/1": "0"}), "'images/1' was changed"),
    ],
)
def test_a_run_with_a_wrong_value_is_refused_by_its_name(saved: Path, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"run\.safetensors is damaged: .*{message}"):
        read(rewritten(saved, change))


def test_damage_and_other_files_are_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    at = whole.index(b'"bits"')
    saved.write_bytes(whole[:at] + b'"bitz"' + whole[at + 6 :])
    with pytest.raises(InputError, match=r"'tqdit\.run' was changed"):
        read(saved)
    saved.write_bytes(whole[:-5])
    with pytest.raises(InputError, match="is truncated or damaged"):
        read(saved)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is no run that `tqdit compare --out` saved"):
        read(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="is missing"):
        read(tmp_path / "none.safetensors")


def test_images_that_no_page_could_show_are_refused(saved: Path, tmp_path: Path) -> None:
    for pixels, message in (
        (torch.zeros(2, 1, 4, 4), r"the images of 'q' are torch.float32 \(2, 1, 4, 4\)"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), r"the images of 'q' are torch.uint8 \(2, 2, 4, 4\)"),
        (torch.zeros(3, 1, 4, 4, dtype=torch.uint8), "its models have images of different sizes"),
    ):
        write(tmp_path / "wrong.safetensors", run(), {0: IMAGES[0], 1: pixels})
        with pytest.raises(InputError, match=message):
            read(tmp_path / "wrong.safetensors")


def test_a_run_is_saved_as_safetensors_alone(tmp_path: Path) -> None:
    check_path(tmp_path / "run.safetensors")
    with pytest.raises(InputError, match=r"a run is saved as a \.safetensors file, got 'run\.json'"):
        check_path(Path("run.json"))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder; give a file"):
        check_path(tmp_path / "folder.safetensors")


def test_a_run_of_a_later_format_is_not_called_damaged(saved: Path) -> None:
    with pytest.raises(InputError, match=r"run\.safetensors has a run of version 2; this tqdit reads 1"):
        read(rewritten(saved, lambda v: v.update(version=2)))
