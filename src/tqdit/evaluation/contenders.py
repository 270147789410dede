"""Define what is evaluated: models that are sampled here, and batches of images that were drawn elsewhere."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdit import drawing
from tqdit.architectures import registry
from tqdit.errors import InputError
from tqdit.evaluation.image_sets import FileImages, ImageSet, NpzImages, file_sha256
from tqdit.imaging.images import RUN, Images, check_folder, image_file
from tqdit.runtime.target import Target
from tqdit.sampling.guidance import conditions_sha256
from tqdit.system.files import CONFIG, read_json
from tqdit.system.reading import check_regular

BATCH_SUFFIX = ".npz"


class Contender(Protocol):
    """A set of images that is evaluated under a name."""

    @property
    def name(self) -> str:
        """Return the name in tables."""

    @property
    def drawn(self) -> Mapping[str, Any]:
        """Return how the images are drawn, for the protocol."""

    @property
    def run(self) -> Mapping[str, Any]:
        """Return what else decides the images."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of an image."""

    @property
    def labels(self) -> Sequence[int] | None:
        """Return the class of each image, or None without classes."""

    def images(self, report: Callable[[str, float], None]) -> ImageSet:
        """Return the images. Those that are not there yet are drawn; processes share the work."""


@dataclass(frozen=True)
class Model:
    """A model whose images are drawn into a folder of its own below `place`, where they stay."""

    wanted: Images
    target: Target
    place: Path

    def __post_init__(self) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            check_folder(self.folder, {**_run_there(self.folder), **self.wanted.run})

    @property
    def name(self) -> str:
        """Return the name of the model's folder or file."""
        return self.wanted.source.name

    @property
    def drawn(self) -> Mapping[str, Any]:
        """Return how the images are drawn."""
        wanted, conditions = self.wanted, self.wanted.conditions
        return {
            "num": wanted.num,
            **asdict(wanted.drawn_with),
            "seed": wanted.seed,
            "classes": list(wanted.classes),
            "conditions_sha256": None if conditions is None else conditions_sha256(conditions),
        }

    @property
    def run(self) -> Mapping[str, Any]:
        """Return the model's hash, the batch, and where it runs."""
        device = self.target.device.type
        return {**self.wanted.run, "backend": self.target.backend, "device": device, "dtype": self.target.dtype_name}

    @property
    def folder(self) -> Path:
        """Return the folder of the images, which belongs to this run alone."""
        key = {name: value for name, value in self.run.items() if name != "model"}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.place / f"{self.name}-{digest[:12]}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return (C, H, W) of an image: a decoder doubles height and width between its blocks."""
        channels, height, width = registry.sample(self.wanted.source.config).shape
        if self.wanted.source.vae is None:
            return channels, height, width
        blocks = read_json(self.wanted.source.vae / CONFIG).get("block_out_channels", [])
        scale = 2 ** max(0, len(blocks) - 1)
        return 3, height * scale, width * scale

    @property
    def labels(self) -> Sequence[int] | None:
        """Return the class of each image; None for a model of prompts."""
        return self.wanted.labels if self.wanted.conditions is None else None

    def images(self, report: Callable[[str, float], None]) -> ImageSet:
        """Return the images of the folder, after those that lack have been drawn.

        Raises `InputError` where a process does not see the images of the others.
        """
        drawing.sample_folder(self.wanted, self.folder, self.target, lambda _, f: report(f"images of {self.name}", f))
        files = [image_file(self.folder, i) for i in range(self.wanted.num)]
        if lacking := next((file for file in files if not file.is_file()), None):
            raise InputError(f"{lacking} is missing; all processes of an evaluation must see the same folder")
        return FileImages(files)


class Batch:
    """The first `num` images of an `.npz` batch that was drawn elsewhere, by whatever sampler and seeds."""

    labels: Sequence[int] | None = None

    def __init__(self, path: Path, num: int) -> None:
        check_regular(path, "a batch of images is an .npz file")
        self._images = NpzImages(path, num)
        self.name = path.name
        self.drawn: Mapping[str, Any] = {"num": num, "batch": "drawn elsewhere"}
        self.shape = self._images.shape
        self.run: Mapping[str, Any] = {"model": path.name, "sha256": file_sha256(path)}

    def images(self, report: Callable[[str, float], None]) -> ImageSet:
        """Return the images of the file."""
        return self._images


def _run_there(folder: Path) -> dict[str, Any]:
    """Return what a folder says about its images that is only known when a model is loaded."""
    found = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    return {name: found[name] for name in ("backend", "device", "dtype") if name in found}
