"""Make the colour images that `train_colour_dit.py` trains on: emoji of 32 x 32 pixels, from packages of npm.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emoji-datasource-google@3.0.0
    python examples/colour_data.py FOLDER --out .data/colour/emoji.npz

`FOLDER` holds the three .tgz files as `npm pack` writes them. Their tables (emoji-data) are under the MIT license. The
pictures: Noto Emoji of Google, in its styles of 2024 and of 2017, Apache License 2.0; Twemoji of Twitter and others,
Creative Commons Attribution 4.0. Neither the file nor a picture is part of this project.

A class is a subcategory of emoji with at least `LEAST` pictures; the smaller subcategories of a category are one class,
which is left out if it is as small.
A tenth of each class is held out for tests, by emoji: all skin tones and styles of one emoji are on the same side.
"""

import argparse
import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SOURCES = (("google", "16.0.0"), ("twitter", "16.0.0"), ("google", "3.0.0"))  # vendor, version; the first has the table
SIDE, BORDER = 32, 1  # pixels; the white border makes a shift by a pixel a plain roll
LEAST, HELD_OUT = 100, 0.1  # pictures of a subcategory that is a class of its own; share of a class held out
WRITTEN = {"Flags", "Symbols"}  # categories with letters or a fixed direction, which a mirror would spoil
CLOCKS = "time"  # a subcategory with a direction


@dataclass(frozen=True)
class Emoji:
    """The entry of the table for one picture: the emoji it belongs to (without its skin tone), and its kind."""

    base: str
    category: str
    subcategory: str


@dataclass(frozen=True)
class Colours:
    """Images [N, 3, 32, 32] in [-1, 1] with labels [N], for training and held out; `mirrors` [classes] of bool."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    names: list[str]
    mirrors: Tensor
    sha256: str  # of the file

    def counts(self) -> dict[str, list[int]]:
        """Number of images of each class by name: for training, and held out."""
        both = [part[1].bincount(minlength=len(self.names)).tolist() for part in (self.train, self.test)]
        return {name: list(pair) for name, *pair in zip(self.names, *both, strict=True)}


def table(entries: Sequence[Mapping[str, Any]]) -> dict[str, Emoji]:
    """Every picture's emoji by the key of its file name, from emoji-data's emoji.json."""
    found = {}
    for entry in entries:
        emoji = Emoji(key(entry["image"]), entry["category"], entry["subcategory"])
        for picture in (entry, *entry.get("skin_variations", {}).values()):
            found[key(picture["image"])] = emoji
    return found


def key(image: str) -> str:
    """A file name without the variation selector, with which some versions write a name and some do not."""
    return "-".join(part for part in image.removesuffix(".png").split("-") if part != "fe0f")


def archive(folder: Path, vendor: str, version: str) -> Path:
    """The file that `npm pack` writes. Raises `SystemExit` that names it when it is missing."""
    name = f"emoji-datasource-{vendor}"
    path = folder / f"{name}-{version}.tgz"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: `npm pack {name}@{version}` in {folder} writes it")
    return path


def pictures(path: Path, vendor: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The table of a package, and its pictures [32, 32, 3] of uint8 by key."""
    folder, entries, found = f"package/img/{vendor}/64/", [], {}
    with tarfile.open(path, "r:gz") as package:
        for member in package:
            if member.name == "package/emoji.json":
                entries = json.load(package.extractfile(member))
            elif member.name.startswith(folder) and member.name.endswith(".png"):
                found[key(member.name.removeprefix(folder))] = pixels(package.extractfile(member).read())
    return entries, found


def pixels(png: bytes) -> np.ndarray:
    """A picture on white, scaled down to 30 x 30 pixels with a border of one: [32, 32, 3] of uint8."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    inner = SIDE - 2 * BORDER
    image = Image.new("RGB", (SIDE, SIDE), "white")
    image.paste(white.convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS), (BORDER, BORDER))
    return np.asarray(image)


def classes(kinds: Sequence[Emoji], least: int) -> list[str | None]:
    """The class of every picture: its subcategory, or that of its category's small ones, or None if that is small too.

    Small is one of fewer than `least` pictures.
    """
    sizes = Counter(kind.subcategory for kind in kinds)
    own = [kind.subcategory if sizes[kind.subcategory] >= least else f"other {kind.category}".lower() for kind in kinds]
    sizes = Counter(own)
    return [name if sizes[name] >= least else None for name in own]


def held_out(kinds: Sequence[Emoji], labels: Sequence[int]) -> np.ndarray:
    """Return which pictures are for tests, bool [N]: in each class about a tenth, the emoji whose hashes come first."""
    members: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, (kind, label) in enumerate(zip(kinds, labels, strict=True)):
        members[label][kind.base].append(i)
    chosen = np.zeros(len(kinds), dtype=bool)
    for emoji in members.values():
        wanted = HELD_OUT * sum(map(len, emoji.values()))
        for base in sorted(emoji, key=lambda base: hashlib.sha256(base.encode()).digest()):
            if len(emoji[base]) < 2 * wanted:
                chosen[emoji[base]] = True
                wanted -= len(emoji[base])
    return chosen


def prepare(folder: Path, out: Path, sources: Sequence[tuple[str, str]] = SOURCES, least: int = LEAST) -> None:
    """Write the images of the packages in `folder` to the file `out`; the order of everything is fixed."""
    read = [pictures(archive(folder, vendor, version), vendor) for vendor, version in sources]
    emoji = table(read[0][0])
    images, kinds = [], []
    for _, found in read:
        for name in sorted(found.keys() & emoji.keys()):
            images.append(found[name])
            kinds.append(emoji[name])
    of_each = classes(kinds, least)
    kept = [i for i, name in enumerate(of_each) if name]
    images, kinds, of_each = ([values[i] for i in kept] for values in (images, kinds, of_each))
    names = sorted(set(of_each))
    labels = [names.index(name) for name in of_each]
    spoiled = {
        label
        for label, kind in zip(labels, kinds, strict=True)
        if kind.category in WRITTEN or kind.subcategory == CLOCKS
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out,
        images=np.stack(images),
        labels=np.array(labels, dtype=np.uint8),
        held_out=held_out(kinds, labels),
        names=np.array(names),
        mirrors=np.array([label not in spoiled for label in range(len(names))]),
    )


def load(path: Path, device: torch.device | str) -> Colours:
    """The images of a file that `prepare` wrote."""
    if not path.is_file():
        raise SystemExit(f"{path} is missing: examples/colour_data.py writes it")
    with np.load(path) as file:
        test = torch.tensor(file["held_out"], device=device)
        images = torch.tensor(file["images"], device=device).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.tensor(file["labels"], device=device).long()
        names, mirrors = file["names"].tolist(), torch.tensor(file["mirrors"], device=device)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Colours((images[~test], labels[~test]), (images[test], labels[test]), names, mirrors, sha256)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, metavar="FOLDER", help="folder of the .tgz files of `npm pack`")
    parser.add_argument("--out", type=Path, default=Path(".data/colour/emoji.npz"))
    args = parser.parse_args()
    prepare(args.packages, args.out)
    colours = load(args.out, "cpu")
    for name, (train, test) in colours.counts().items():
        print(f"{name}: {train} images for training, {test} held out")
    print(f"{len(colours.names)} classes, {len(colours.train[1])} + {len(colours.test[1])} images, {args.out}")


if __name__ == "__main__":
    main()
