"""A hook of mkdocs: equations of the pages, in fences of the kind `math`, become MathML.

Browsers show MathML by themselves, so that a page needs no script of another host.
"""

import re
from typing import Any

from latex2mathml.converter import convert

FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page's Markdown with an element `math` in the place of each fence of LaTeX."""
    return FENCE.sub(lambda found: f'<div class="equation">{convert(found[1], display="block")}</div>', markdown)
