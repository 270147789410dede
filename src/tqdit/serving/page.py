"""The page itself, by gradio: a form on top, a picture and figures of each model below."""

import html
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdit.errors import InputError
from tqdit.imaging.generate import to_pil
from tqdit.serving.board import Board
from tqdit.serving.drawing import draw
from tqdit.serving.gallery import Gallery
from tqdit.serving.request import Request

TITLE = "tqdit"
FONTS = ("system-ui", "sans-serif")  # of the browser's machine: nothing is fetched
MONOSPACE = ("ui-monospace", "monospace")
CSS = """
.gradio-container { max-width: 960px !important; margin: 0 auto !important; }
.name h3 { margin: 0; overflow-wrap: anywhere; }
.picture .image-container, .picture .empty { aspect-ratio: 1; height: auto !important; min-height: 0 !important; }
.picture .image-container button, .picture .image-frame { width: 100% !important; height: 100% !important; }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.small img { image-rendering: pixelated; }
.figures table { width: 100%; margin: 0 !important; font-variant-numeric: tabular-nums; }
.figures :is(table, tr, th, td) { border: 0 !important; }
.figures :is(th, td) { padding: 0.1rem 0 !important; vertical-align: top; }
.figures th { text-align: left; font-weight: 400 !important; opacity: 0.75; }
.figures td { text-align: right; white-space: nowrap; }
.name .html-container, .figures .html-container { padding: 0 !important; }
"""


def page(gallery: Gallery) -> Any:
    """Return a `gradio.Blocks` that draws with the models of a gallery, one drawing at a time."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown("# tqdit\nThe same seed for every model, drawn step by step. One drawing runs at a time.")
        fields = _form(gallery)
        with gr.Row():
            start = gr.Button("Draw", variant="primary", scale=3, min_width=120, elem_id="draw")
            stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
        shown = _columns(gallery)
        drawing = start.click(
            _drawer(gallery), fields, shown,
            concurrency_limit=1, trigger_mode="once", show_progress_on=shown[::2], api_name="draw",
        )  # fmt: skip
        stop.click(None, cancels=[drawing])
    return blocks.queue(default_concurrency_limit=1)


def _form(gallery: Gallery) -> list[Any]:
    """Return the fields of a request, in the order of `Request.read`."""
    import gradio as gr

    first = gallery.models[0]
    defaults, typed = first.defaults, {"allow_custom_value": True}  # so that a wrong name gets our message
    if first.choices is None:
        condition = gr.Textbox(label="prompt", lines=2, elem_id="condition")
    with gr.Row(equal_height=True):
        if first.choices is not None:
            condition = gr.Dropdown(
                first.choices, value=first.choices[0][1], label=first.asks_for, min_width=140, elem_id="condition",
                **typed,
            )  # fmt: skip
        seed = gr.Number(0, label="seed", min_width=100, elem_id="seed")
        steps = gr.Number(defaults.steps, label="steps", min_width=100, elem_id="steps")
        guidance = gr.Number(defaults.guidance, label="guidance", step=0.1, min_width=100, elem_id="guidance")
        sampler = gr.Dropdown(
            gallery.samplers, value=defaults.sampler, label="sampler", min_width=100, elem_id="sampler", **typed
        )  # fmt: skip
    return [condition, seed, steps, guidance, sampler]


def _columns(gallery: Gallery) -> list[Any]:
    """Return a picture and figures for every model, side by side."""
    import gradio as gr

    board, shown = Board(gallery.models), []
    with gr.Row():
        for number, model in enumerate(gallery.models):
            with gr.Column(min_width=140, elem_id=f"model-{number}"):
                gr.HTML(f"<h3>{html.escape(model.label)}</h3>", elem_classes=["name"])
                picture = gr.Image(
                    label=model.label, show_label=False, format="png", type="pil", interactive=False,
                    buttons=["download"], elem_classes=["picture", *["small"] * model.pixelated],
                )  # fmt: skip
                shown += [picture, gr.HTML(table(board.figures(number)), elem_classes=["figures"])]
    return shown


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Return pairs of a name and a value as a table in HTML."""
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _drawer(gallery: Gallery) -> Callable[..., Iterator[list[Any]]]:
    """Return the function that the button calls: it yields a picture and figures for every model."""
    import gradio as gr

    # gradio calls from any of its threads, and each would start OpenMP threads of its own. One thread for all drawings
    # also ends the last step of one that was stopped before the next one begins.
    worker = ThreadPoolExecutor(1, "drawing")

    def drawn(*fields: Any) -> Iterator[list[Any]]:
        board, events = Board(gallery.models), None
        try:
            events = draw(gallery.models, Request.read(*fields))
            while (event := worker.submit(next, events, None).result()) is not None:
                number, frame = event
                board.take(number, frame)
                updates: list[Any] = [gr.skip()] * (2 * len(gallery.models))
                if frame.pixels is not None:
                    updates[2 * number] = to_pil(frame.pixels[None])[0]
                updates[2 * number + 1] = table(board.figures(number))
                yield updates
        except InputError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        finally:
            if events is not None:
                events.close()

    return drawn
