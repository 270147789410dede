"""Serve a page on this machine, without telemetry and without a tunnel to the outside; leave nothing on disk."""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdit.errors import InputError
from tqdit.serving.gallery import Gallery
from tqdit.serving.page import CSS, FONTS, MONOSPACE, page

LOOPBACK = "127.0.0.1"


@contextmanager
def served(gallery: Gallery, host: str = LOOPBACK, port: int = 0) -> Iterator[str]:
    """Serve the page of a gallery until the context ends; yields the page's address.

    `port`: 0 takes a free one. Raises `InputError` if another program has the port, or if this machine has no such
    host. gradio writes pictures into a folder that is deleted at the end.
    """
    port = free_port(host, port)
    with tempfile.TemporaryDirectory(prefix="tqdit-serve-") as pictures:
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=pictures)
        blocks = page(gallery)
        try:
            _launch(blocks, host, port)
            yield f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        finally:
            _close(blocks)


def _launch(blocks: Any, host: str, port: int) -> None:
    """Start the server. Raises `InputError` if another program took the port since it was found free."""
    try:
        blocks.launch(**_options(host, port))
    except OSError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"cannot serve on {host} port {port}: {reason}; choose another --host or --port") from None


def free_port(host: str, port: int) -> int:
    """Return the port, or any free one for 0. Raises `InputError` if a server cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot serve on {host} port {port}: {error}; choose another --host or --port") from None


def _close(blocks: Any) -> None:
    """End the server at once, if it began. Pages that are still open hold connections; uvicorn would report errors."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # until the next server sets its level
    if getattr(blocks, "server", None) is not None:  # gradio sets it once the server listens
        blocks.server.force_exit = True
        blocks.close(verbose=False)


def _options(host: str, port: int) -> dict[str, Any]:
    """Return the arguments of `gradio.Blocks.launch`: nothing is fetched from the network, nothing recorded."""
    import gradio as gr

    theme = gr.themes.Default(font=list(FONTS), font_mono=list(MONOSPACE))
    off = dict.fromkeys(
        ("share", "inbrowser", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False
    )
    return {
        "server_name": f"[{host}]" if ":" in host else host, "server_port": port, "theme": theme, "css": CSS,
        "footer_links": [], "max_file_size": "1kb", "prevent_thread_lock": True, "quiet": True, **off,
    }  # fmt: skip
