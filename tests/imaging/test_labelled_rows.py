"""Rows of images with labels."""

import torch
from PIL import Image, ImageChops, ImageColor

from tqdit.imaging.rows import GAP, GROUND, INK, LABEL, labelled_rows


def test_rows_of_images_stand_below_each_other() -> None:
    rows = {"float32": torch.ones(2, 3, 4, 4), "W8A8": -torch.ones(2, 3, 4, 4)}
    rows["W8A8"][:, 0] = 1  # red
    made = labelled_rows(rows, 5)
    assert made.size == (LABEL + 2 * (20 + GAP) + GAP, 2 * (20 + GAP) + GAP)
    right = made.width - GAP - 10
    assert made.getpixel((right, GAP + 10)) == (255, 255, 255)
    assert made.getpixel((right, 2 * GAP + 30)) == (255, 0, 0)


def test_each_row_has_its_own_label_on_clear_ground() -> None:
    names = ("float32", "plus W8A8", "a model with a long name")
    made = labelled_rows({name: torch.zeros(1, 1, 8, 8) for name in names}, 4)
    width = made.width - (32 + GAP) - GAP
    assert width > LABEL, "the longest name has room"
    rows = [made.crop((0, top, width, top + 32)) for top in range(GAP, made.height - GAP, 32 + GAP)]
    blank = Image.new("RGB", rows[0].size, GROUND)
    written = [ImageChops.difference(row, blank).getbbox() for row in rows]
    widths = [box[2] - box[0] for box in written if box is not None]
    assert widths == sorted(set(widths)), "a longer name is longer"
    assert len(widths) == len(names)
    assert all(box is not None and box[2] <= width - 5 for box in written)
    ink = ImageColor.getrgb(INK)
    assert all(ink in {colour for _, colour in row.getcolors()} for row in rows)
