"""ADM batches, folders of images and statistics: read as they are, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tqdit.errors import InputError
from tqdit.evaluation import measure
from tqdit.evaluation.collect import collect
from tqdit.evaluation.image_sets import NpzImages, folder_images, write_npz
from tqdit.evaluation.networks import Features, Network
from tqdit.evaluation.reference import open_reference

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 6, 5, 3), dtype=np.uint8)


def means(images: torch.Tensor) -> Features:
    x = images.double()
    return Features(x.mean((2, 3)).float(), x[:, 0, :2, :2].flatten(1).float(), x.mean((2, 3)).float().softmax(1))


NETWORK = Network("means", "0" * 64, means, torch.device("cpu"))


def folder(path: Path, pixels: np.ndarray = PIXELS) -> Path:
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


def test_a_batch_is_written_as_numpy_reads_it(tmp_path) -> None:
    images = folder_images(folder(tmp_path / "images"))
    write_npz(tmp_path / "batch.npz", images, labels=list(range(9)), batch=4)
    with np.load(tmp_path / "batch.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["arr_0"], PIXELS)
        assert archive["arr_1"].tolist() == list(range(9))
    before = (tmp_path / "batch.npz").read_bytes()
    write_npz(tmp_path / "batch.npz", images, labels=list(range(9)), batch=9)
    assert (tmp_path / "batch.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_grey_images_are_written_with_three_channels(tmp_path) -> None:
    write_npz(tmp_path / "batch.npz", folder_images(folder(tmp_path / "images", PIXELS[..., 0])))
    with np.load(tmp_path / "batch.npz") as archive:
        assert np.array_equal(archive["arr_0"], PIXELS[..., :1].repeat(3, -1))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_batch_is_read_in_any_order(tmp_path, save) -> None:
    save(tmp_path / "batch.npz", PIXELS)
    images = NpzImages(tmp_path / "batch.npz")
    assert (images.count, images.shape) == (9, (3, 6, 5))
    for indices in (range(2, 5), range(8, 9), range(0, 3)):
        expected = PIXELS[indices.start : indices.stop].transpose(0, 3, 1, 2)
        assert np.array_equal(images.read(indices).numpy(), expected)


def test_a_folder_and_its_batch_have_the_same_scores(tmp_path) -> None:
    files = folder_images(folder(tmp_path / "images"))
    write_npz(tmp_path / "batch.npz", files)
    found = [collect(images, NETWORK) for images in (files, NpzImages(tmp_path / "batch.npz"))]
    assert torch.equal(found[0].features, found[1].features)
    assert torch.equal(found[0].spatial.covariance, found[1].spatial.covariance)
    assert found[0].inception_score == found[1].inception_score


def test_features_do_not_depend_on_the_number_of_images(tmp_path) -> None:
    """A short batch is filled up, so the network is given the same number of images every time."""
    sizes = []

    def counted(images: torch.Tensor) -> Features:
        sizes.append(len(images))
        return means(images)

    network = Network("counted", "0" * 64, counted, torch.device("cpu"))
    np.savez(tmp_path / "batch.npz", np.resize(PIXELS, (53, 6, 5, 3)))
    few, many = (collect(NpzImages(tmp_path / "batch.npz", count), network) for count in (4, 53))
    assert sizes == [50, 50, 50]
    assert (few.count, many.count, len(many.features)) == (4, 53, 53)
    assert torch.equal(few.features, many.features[:4])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"arr_0": PIXELS.astype(np.float32)},
            r"'arr_0' must be uint8 \[N, H, W, C\] with 1 or 3 channels, got float32",
        ),
        ({"arr_0": PIXELS.transpose(0, 3, 1, 2)}, r"with 1 or 3 channels, got uint8 \[9, 3, 6, 5\]"),
        ({"arr_0": np.array([print], dtype=object)}, r"with 1 or 3 channels, got object \[1\]"),
        ({"labels": np.arange(3)}, r"has neither images \('arr_0'\) nor statistics"),
        ({"mu": np.zeros(3)}, r"has 'mu' but not both of 'mu' and 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"must be \[D\] and \[D, D\], got \[3\] and \[2, 2\]"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "has NaN or Inf"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [3, 1]])}, "is no covariance"),
        ({"mu": np.array([print]), "sigma": np.eye(1)}, "cannot be read: Object arrays cannot be loaded"),
        ({"mu": np.zeros(2, dtype=int), "sigma": np.eye(2)}, "numbers of the type int64, not floats"),
    ],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path, arrays, message: str) -> None:
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(InputError, match=message) as error:
        open_reference(tmp_path / "ref.npz", NETWORK)
    assert "ref.npz" in str(error.value)


def test_damaged_files_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "batch.npz", PIXELS)
    whole = (tmp_path / "batch.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("short.npz", "text.npz"):
        with pytest.raises(InputError, match=f"{name} is no .npz file"):
            open_reference(tmp_path / name, NETWORK)
    wrong = bytearray(whole)
    wrong[300] ^= 1  # a pixel: the archive's own checksum finds it
    (tmp_path / "wrong.npz").write_bytes(wrong)
    with pytest.raises(InputError, match=r"wrong\.npz.*Bad CRC-32"):
        NpzImages(tmp_path / "wrong.npz").read(range(9))
    with pytest.raises(InputError, match=r"batch.npz has 9 images, 10 are asked for"):
        NpzImages(tmp_path / "batch.npz", 10)


def test_a_file_that_may_not_be_read_is_not_called_another_kind(tmp_path, monkeypatch) -> None:
    np.savez(tmp_path / "batch.npz", PIXELS)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"^cannot read .*batch\.npz: Permission denied$"):
        open_reference(tmp_path / "batch.npz", NETWORK)


def test_a_folder_needs_images_of_one_size(tmp_path) -> None:
    path = folder(tmp_path / "images")
    Image.fromarray(PIXELS[0, :4]).save(path / "x.png")
    images = folder_images(path)
    with pytest.raises(InputError, match=r"x.png has shape \[3, 4, 5\], 000000.png \[3, 6, 5\]"):
        images.read(range(7, 10))
    Image.fromarray(PIXELS[0]).convert("RGBA").save(path / "x.png")
    with pytest.raises(InputError, match=r"x.png has pixels of mode RGBA; legal: L, RGB"):
        images.read(range(9, 10))
    (path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"x.png is no image that can be read"):
        images.read(range(9, 10))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no images"):
        open_reference(tmp_path / "empty", NETWORK)
    with pytest.raises(InputError, match=r"none is missing; a reference is an .npz file"):
        open_reference(tmp_path / "none", NETWORK)


# What a reference gives ----------------------------------------------------------------------------------------------

STATISTICS = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.ones(4), "sigma_s": 2 * np.eye(4)}


def measured(path: Path, **arrays: np.ndarray) -> measure.Measured:
    np.savez(path / "ref.npz", **arrays)
    np.savez(path / "drawn.npz", PIXELS[::-1])
    reference = open_reference(path / "ref.npz", NETWORK)
    return measure.measure(reference.collected(NETWORK), collect(NpzImages(path / "drawn.npz"), NETWORK), NETWORK)


def test_statistics_alone_give_the_distances_of_gaussians(tmp_path) -> None:
    found = measured(tmp_path, **STATISTICS)
    assert set(found.scores) == {measure.FD, measure.SFD, measure.IS}
    assert dict.fromkeys(("precision", "recall", "kernel_distance"), measure.NO_IMAGES) == found.absent


def test_statistics_go_before_the_images_of_the_same_file(tmp_path) -> None:
    """A file may have statistics for FID and images for precision and recall, as ADM's file for ImageNet has."""
    both = measured(tmp_path, arr_0=PIXELS, **STATISTICS)
    alone, images = measured(tmp_path, **STATISTICS), measured(tmp_path, arr_0=PIXELS)
    assert both.scores[measure.FD] == alone.scores[measure.FD] != images.scores[measure.FD]
    assert both.scores[measure.SFD] == alone.scores[measure.SFD]
    assert (both.scores["precision"], both.scores["recall"]) == (1, 1)
    assert images.scores[measure.FD] == pytest.approx(0, abs=1e-6)
    assert both.absent == images.absent == {}


def test_a_reference_without_spatial_statistics(tmp_path) -> None:
    found = measured(tmp_path, mu=np.zeros(3), sigma=np.eye(3))
    assert "no spatial statistics" in found.absent[measure.SFD]


def test_statistics_of_another_network_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(7), sigma=np.eye(7))
    reference = open_reference(tmp_path / "ref.npz", NETWORK)
    with pytest.raises(InputError, match="has statistics of 7 features, the network gives 3"):
        reference.check(NETWORK(torch.zeros(1, 3, 6, 5, dtype=torch.uint8)))
    with pytest.raises(InputError, match="'fashion-test' has features of the network 'fashion' alone"):
        open_reference("fashion-test", NETWORK)
