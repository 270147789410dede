"""Draw the images of several models below each other: a row with a label for each model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tqdit.imaging.generate import to_pil

LABEL, GAP, TEXT = 92, 4, 17  # pixels: the least width of labels, between images, of a letter's height
MARGIN = 10  # pixels on both sides of a label
GROUND, INK = "#ffffff", "#22303a"


def labelled_rows(rows: Mapping[str, Tensor], scale: int) -> Any:
    """Return one PIL image with a row for each model, its label on the left, in Pillow's own font.

    `rows`: images (N, C, H, W) in [-1, 1] by label, of one shape. They are enlarged `scale` times without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    number, _, height, width = next(iter(rows.values())).shape
    height, width, font = height * scale, width * scale, ImageFont.load_default(TEXT)
    label = max(LABEL, *(round(font.getlength(name)) + 2 * MARGIN for name in rows))
    whole = Image.new("RGB", (label + number * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP), GROUND)
    pen = ImageDraw.Draw(whole)
    for line, (name, pixels) in enumerate(rows.items()):
        top = GAP + line * (height + GAP)
        pen.text((MARGIN, top + height // 2), name, INK, font, anchor="lm")
        for column, image in enumerate(to_pil(pixels)):
            large = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            whole.paste(large, (label + GAP + column * (width + GAP), top))
    return whole
