"""Define the command `tqdit convert`."""

from pathlib import Path
from typing import Annotated

import typer

from tqdit.cli.options import ModelArgument, Quiet, Verbose


def convert(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to write")],
    num_heads: Annotated[
        int | None, typer.Option(help="attention heads of a checkpoint; known for the published widths")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="folder of a diffusers autoencoder to copy in")] = None,
    labels: Annotated[Path | None, typer.Option(help='class names to write: JSON such as {"0": "tench"}')] = None,
    official: Annotated[
        bool,
        typer.Option("--official", help="a diffusers folder was made from an official checkpoint: run as published"),
    ] = False,
    objective: Annotated[
        str | None, typer.Option(help="how a checkpoint that does not say was trained: diffusion (DiT) or flow (SiT)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a folder that convert wrote")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn an official DiT or SiT checkpoint (.pt) into a diffusers folder with safetensors."""
    from tqdit.architectures.registry import conditions, graph
    from tqdit.architectures.shapes import shape_name
    from tqdit.sources.export import convert_checkpoint

    result = convert_checkpoint(model, out, num_heads, vae, labels, official, overwrite, objective=objective)
    used = f", its {result['weights']} weights" if result["weights"] else ""
    config = result["config"]
    typer.echo(
        f"{out}: {result['name']}{used}, {shape_name(config)}, {graph(config).blocks[0].attentions[0].heads} heads, "
        f"{conditions(config).count} classes, {result['bytes'] / 1e6:.2f} MB"
    )
