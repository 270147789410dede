"""Write a float model as a diffusers folder, which is what `tqdit convert` does."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tqdit.architectures.dit_checkpoint import AS_PUBLISHED, DIFFUSION
from tqdit.architectures.registry import architecture, conditions, config_of
from tqdit.architectures.sit_checkpoint import SCHEDULER as FLOW
from tqdit.artifact.model_card import keep_edited
from tqdit.errors import InputError
from tqdit.sources.components import PIPELINE, check_vae
from tqdit.sources.labels import LABELS, class_names
from tqdit.sources.resolve import load_float, resolve
from tqdit.sources.scheduler import SCHEDULER
from tqdit.sources.source import ModelSource
from tqdit.system.files import (
    CONFIG,
    EDITABLE,
    TRANSFORMER,
    WEIGHTS,
    components_named,
    is_artifact,
    is_debris,
    read_json,
    write_json,
    write_tensors,
)
from tqdit.system.isolation import isolated
from tqdit.system.outputs import check_space, check_target, repair, replacing


@isolated()
def convert_checkpoint(
    model: str | Path,
    out: str | Path,
    num_heads: int | None = None,
    vae: str | Path | None = None,
    labels: str | Path | None = None,
    official: bool = False,
    overwrite: bool = False,
    *,
    objective: str | None = None,
) -> dict[str, Any]:
    """Write an official DiT or SiT checkpoint as the new folder `out`: transformer, scheduler, and a VAE where given.

    A DiT with a VAE is a whole pipeline. A SiT is written in diffusers' conventions of flow matching.

    `num_heads`: needed where the checkpoint's width is not published. `vae`: a diffusers autoencoder's folder, which is
    copied. `labels`: a JSON file of class numbers to names. `official`: lets MODEL be a diffusers folder, which is
    marked as made from an official checkpoint, so that it runs with the published frequencies. `objective`: how a
    checkpoint without training arguments was trained, "flow" for a SiT, "diffusion" for a DiT (the default).
    `overwrite`: replace the folder of a float model, if the folder has nothing else.

    Returns the name, the set of weights used, the config and the bytes written. Raises `InputError` for whatever
    `resolve` and `load_float` refuse, for `out` that exists (or, with `overwrite`, has anything else), for a folder
    that is no VAE, and for a file without class names or with one too many.
    """
    out = Path(out)
    repair(out, _is_float_model)
    check_target(out, overwrite, _is_float_model)
    source = resolve(model, num_heads, objective)
    if source.folder.resolve().is_relative_to(out.resolve()) and source.checkpoint is None:
        raise InputError(f"output {out} is the model that is converted; choose another folder")
    if source.checkpoint is None and not official and not source.quantized:
        raise InputError(
            f"'{model}' is in diffusers' format already; call it official if it was made from an official checkpoint "
            "and is to run as published"
        )
    classes = conditions(source.config).count
    source = replace(
        source,
        config={**source.config, **AS_PUBLISHED},
        vae=source.vae if vae is None else Path(vae),
        labels=source.labels if labels is None else class_names(read_json(Path(labels)), str(labels), classes),
    )
    if source.vae is not None:
        check_vae(source.vae, architecture(source.config).input_shape(source.config)[0])
        if out.resolve().is_relative_to(source.vae.resolve()):
            raise InputError(f"output {out} is inside {source.vae}, which is copied into it")
    source.check_components()
    module = load_float(source)
    check_space(out, sum(parameter.nbytes for parameter in module.parameters()))
    with replacing(out, overwrite, _is_float_model) as folder:
        _write(folder, source, module)
        for part in ("", TRANSFORMER):
            keep_edited(folder / part, out / part)
    return {
        "name": source.name,
        "weights": source.weights,
        "config": config_of(module),
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def _is_float_model(folder: Path) -> bool:
    """Say whether a folder has a float model as `convert_checkpoint` writes it, and nothing else.

    A replacement of the folder keeps the files that people edit there, and drops those that programs leave there.
    """
    entries = {entry.name for entry in folder.iterdir() if not is_debris(Path(entry.name))} - set(EDITABLE)
    written = {TRANSFORMER, SCHEDULER.parts[0], "vae", PIPELINE, LABELS, *components_named(folder)}
    return (folder / TRANSFORMER / CONFIG).is_file() and entries <= written and not is_artifact(folder)


def _write(folder: Path, source: ModelSource, module: nn.Module) -> None:
    transformer = folder / TRANSFORMER
    transformer.mkdir()
    write_tensors(transformer / WEIGHTS, _separate(module.state_dict()))
    write_json(transformer / CONFIG, dict(config_of(module)))
    write_json(folder / SCHEDULER, source.scheduler)
    source.copy_components(folder)
    labels = {str(number): label for number, label in sorted(source.labels.items())}
    whole = source.vae is not None and not _by_flow(source)  # diffusers has no pipeline for a SiT
    if whole or source.pipeline is not None:
        write_json(folder / PIPELINE, _index(source) | ({"id2label": labels} if labels else {}))
    elif labels:
        write_json(folder / LABELS, labels)


def _by_flow(source: ModelSource) -> bool:
    return source.scheduler.get("_class_name") == FLOW["_class_name"]


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors that share no memory: diffusers' own loader wants every block's copy of the embedder."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def _index(source: ModelSource) -> dict[str, Any]:
    """Return the model_index.json of a pipeline, by which diffusers' `DiTPipeline` loads the folder."""
    index = {"_class_name": "DiTPipeline", **(source.pipeline or {})}
    index["scheduler"] = ["diffusers", source.scheduler.get("_class_name", DIFFUSION["_class_name"])]
    index[TRANSFORMER] = ["diffusers", architecture(source.config).name]
    if source.vae is not None:
        index["vae"] = ["diffusers", read_json(source.vae / CONFIG).get("_class_name", "AutoencoderKL")]
    return index
