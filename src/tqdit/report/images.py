"""Make image sheets as PNG data URIs, small enough that the whole page stays below 3 MB."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import torch
from torch.nn import functional as F

from tqdit.imaging.generate import image_grid
from tqdit.report.svg import data_uri

SHOWN = 20
LARGEST_EDGE = 128
BUDGET = 1_600_000  # characters of base64 over all sheets
GAP = 0.0  # mid-grey between images, neither page colour


@dataclass(frozen=True)
class Sheet:
    """The first images of one model.

    `uri` is a PNG of `width` x `height` pixels; `shown` images stand in rows of `columns`. `shrunk`: by how much.
    """

    uri: str
    shown: int
    columns: int
    width: int
    height: int
    shrunk: int


def sheets(images: Sequence[torch.Tensor], budget: int = BUDGET) -> list[Sheet]:
    """Return a sheet for each uint8 (N, C, H, W) stack.

    Large images are shrunk until all sheets fit the budget.
    """
    edge = LARGEST_EDGE
    while True:
        found = [_sheet(pixels, edge) for pixels in images]
        if sum(len(sheet.uri) for sheet in found) <= budget or edge <= 8:
            return found
        edge //= 2


def _sheet(pixels: torch.Tensor, edge: int) -> Sheet:
    pixels = pixels[:SHOWN].float() / 127.5 - 1
    shown = len(pixels)
    columns = min(5, math.ceil(math.sqrt(shown)))
    shrink = max(1, math.ceil(max(pixels.shape[-2:]) / edge))
    if shrink > 1:
        size = [max(1, length // shrink) for length in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size=size, mode="area")
    pixels = F.pad(pixels, (0, 1, 0, 1), value=GAP)
    missing = -shown % columns
    pixels = torch.cat([pixels, torch.full_like(pixels[:1], GAP).expand(missing, -1, -1, -1)])
    image = image_grid(pixels, columns, scale=1)  # the browser enlarges: `image-rendering: pixelated`
    image = image.crop((0, 0, image.width - 1, image.height - 1))
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return Sheet(data_uri("image/png", buffer.getvalue()), shown, columns, image.width, image.height, shrink)
