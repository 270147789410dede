"""Define the command `tqdit serve`."""

import threading
from typing import Annotated

import typer

from tqdit.cli.bars import progress
from tqdit.cli.exits import INTERRUPTED, StoppedError
from tqdit.cli.options import Backend, Device, Dtype, Prompts, Quiet, Size, Verbose, pixels, read_prompts


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="float models and artifacts, shown side by side")
    ],
    prompts: Prompts = None,
    size: Size = None,
    host: Annotated[
        str, typer.Option(help="address to serve on; by default only this machine can open it")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to serve on; 0 takes a free one")] = 7860,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="first measure the memory of each model; takes seconds")
    ] = True,
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    device: Device = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Serve a page that draws images with float and quantized models side by side, until Ctrl-C."""
    from tqdit.runtime.target import Target
    from tqdit.serving import gallery
    from tqdit.serving.server import free_port, served
    from tqdit.system.extras import check_serve

    check_serve()
    port = free_port(host, port)
    conditions, shape = read_prompts(prompts), pixels(size)
    with progress(quiet) as report:
        found = gallery.load(models, Target(backend, device, dtype), conditions, memory, report, shape)
    try:
        with served(found, host, port) as address:
            typer.echo(f"{address} shows {', '.join(model.label for model in found.models)}; Ctrl-C ends it")
            threading.Event().wait()
    except KeyboardInterrupt:
        raise StoppedError("the page is no longer served", INTERRUPTED) from None
