"""Write the README.md of an artifact: a model card that says how the model is loaded and how it was made."""

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tqdit.spec import Solution
from tqdit.system.files import EDITABLE, MODEL_CARD, write_text

FOLDER = "FOLDER"  # stands for the place of the artifact
KIND = "KIND"  # stands for a class of diffusers
# The lines that load an artifact in diffusers: a pipeline, the transformer of one without a decoder, or a model alone.
LOAD_PIPELINE = f'from diffusers import {KIND}\n\npipe = {KIND}.from_pretrained("{FOLDER}")'
_LOAD = f"from diffusers import {KIND}\n\ntransformer = {KIND}.from_pretrained"
LOAD_TRANSFORMER = f'{_LOAD}("{FOLDER}", subfolder="transformer")'
LOAD_MODEL = f'{_LOAD}("{FOLDER}")'
# The lines that draw images without diffusers' own loading.
OF_CLASSES = f'images = tqdit.sample("{FOLDER}", num=16)'
PROMPTED = f"""prompts = tqdit.Prompts.read("prompts.safetensors")  # prompt_embeds and the like, of a text encoder
images = tqdit.sample("{FOLDER}", num=16, conditions=prompts)"""
TRACED_USE = f"""from diffusers import DiffusionPipeline, {KIND}

transformer = {KIND}.from_pretrained("{FOLDER}")
pipe = DiffusionPipeline.from_pretrained("PIPELINE", transformer=transformer)  # the pipeline of the float model"""
MARK = "<!-- Written by tqdit, sha256 {}. An edited file is kept when the model is replaced. -->\n"
MARKED = re.compile("(.*)" + re.escape(MARK).replace(r"\{\}", "([0-9a-f]{64})"), re.DOTALL)


def write_card(folder: Path, text: str, former: Path) -> None:
    """Write a model card into a new artifact's folder.

    What people have edited of the card of `former`, the artifact before, is kept instead.
    """
    write_text(folder / MODEL_CARD, text)
    keep_edited(folder, former)


def keep_edited(folder: Path, former: Path) -> None:
    """Copy what people have edited in the folder `former` into the new `folder`, which replaces it."""
    for name in EDITABLE:
        if (former / name).is_file() and not (name == MODEL_CARD and _is_generated(former / name)):
            shutil.copy2(former / name, folder / name)


def _is_generated(path: Path) -> bool:
    """Say whether a file is a card as `model_card` made it, of any model."""
    found = MARKED.fullmatch(path.read_text(encoding="utf-8", errors="replace"))
    return found is not None and _digest(found[1]) == found[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_card(
    solution: Solution,
    shape: str,
    size_bytes: int,
    name: str = "",
    load: str = LOAD_MODEL,
    pipeline: str | None = None,
    *,
    prompted: bool = False,
    draw: str | None = None,
) -> str:
    """Return Markdown with the Hub's front matter; it is the same for the same artifact.

    `shape`: the model's, by name. `size_bytes`: of its weight files. `name`: what the model was made from, by default
    as the artifact says. `load`: one of the `LOAD_`s. `pipeline`: diffusers' class of the pipeline, for
    `LOAD_PIPELINE`. `prompted`: whether the model is sampled under prompts. `draw`: the lines that load and use a
    traced transformer, instead of `load` and those that draw images without diffusers. The last line says whether
    people have edited the card since.
    """
    name = name or solution.provenance.source or "DiT"
    of_model = str(solution.model_config["_class_name"])
    kind = pipeline or "DiffusionPipeline" if load == LOAD_PIPELINE else of_model
    facts, bits = _facts(solution, shape, size_bytes, name), solution.provenance.bits
    if draw is not None:
        return _marked(_page(name, bits, _PYTHON.format(draw.replace(KIND, of_model)), facts, OF_TRACED, SEALED))
    uses = _use(load.replace(KIND, kind), PROMPTED if prompted else OF_CLASSES)
    return _marked(_page(name, bits, uses, facts, OF_BLOCKS, SEALED))


# How a model of an architecture, and a traced one, were made integers; and what may not be edited.
OF_BLOCKS = """by TQ-DiT (arXiv 2502.04056) as `tqdit` implements it. Weights are
packed integer codes, and the matmuls of the blocks run in integers."""
OF_TRACED = """by `tqdit`. Weights are packed integer codes, and the linear layers on
tokens run in integers; attention and everything else is diffusers' own code."""
SEALED = "Weights, config and the files beside them are\nsealed by hashes and may not be edited; this file may."
TRANSFORMERS_SEALED = "Weights and config of each transformer are\nsealed by hashes and may not be edited."


def traced_shape(solution: Solution) -> str:
    """Return the class of a traced solution with the number of its parameters, such as "Flux2…, 3.9 B parameters"."""
    assert solution.graph is not None
    count = sum(torch.Size(shape).numel() for shape in solution.graph.shapes.values())
    unit, name = next((u, n) for u, n in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if count >= u or u == 1e3)
    return f"{solution.model_config['_class_name']}, {count / unit:.3g} {name} parameters"


def traced_card(solution: Solution, size_bytes: int) -> str:
    """Return the card of a traced model, as `model_card` does."""
    return model_card(solution, traced_shape(solution), size_bytes, draw=TRACED_USE)


_PYTHON = """Import `tqdit` before the model is loaded: diffusers does not know this kind of quantization by itself.

```python
import tqdit
{}
```"""


def _use(load: str, draw: str) -> str:
    """Return how a model is used: the lines that load it, and those that draw images without diffusers."""
    return f"""{_PYTHON.format(load)}

Without diffusers' own loading:

```python
import tqdit

{draw}
tqdit.save_grid(images, "grid.png")
```"""


def pipeline_card(name: str, facts: Mapping[str, str], pipeline: str, bits: str) -> str:
    """Return the card of a pipeline whose transformers, of any class, are quantized.

    `facts`: label -> text, for the table. `pipeline`: diffusers' class of the pipeline.
    """
    use = _PYTHON.format(LOAD_PIPELINE.replace(KIND, pipeline))
    return _marked(_page(name, bits, use, list(facts.items()), OF_TRACED, TRANSFORMERS_SEALED))


def _marked(text: str) -> str:
    return text + MARK.format(_digest(text))


def _page(name: str, bits: str, use: str, facts: Sequence[tuple[str, str]], method: str, sealed: str) -> str:
    """Return the card without its last line; `use`: how a model is used, in Markdown."""
    header = ["---", "library_name: diffusers"]
    if "/" in name:
        header.append(f"base_model: {name}")
    header += ["tags:", *(f"- {tag}" for tag in ("tqdit", "quantization", "dit", bits)), "---"]
    table = "\n".join(f"| {label} | {text} |" for label, text in facts)
    return f"""{chr(10).join(header)}

# {name} {bits}

`{name}` quantized to {bits} after training, {method}

## Use

{use}

## How it was made

| | |
|---|---|
{table}

`tqdit inspect {FOLDER}` shows every setting and the kernels that run it. {sealed}
"""


def _facts(solution: Solution, shape: str, size_bytes: int, name: str) -> list[tuple[str, str]]:
    provenance = solution.provenance
    recipe = provenance.recipe
    fp32 = 4 * sum(tensor.numel() for tensor in (*solution.codes.values(), *solution.floats.values()))
    sampled = ("samples", "sampler", "steps", "guidance", "rounds", "seed")
    recorded = ("samples", "rows", "fallback", "rounding", "seed")
    kept: tuple[str, ...] = sampled if solution.graph is None else recorded
    groups = solution.time_groups
    settings = ", ".join(f"{key} {recipe[key]}" for key in kept if key in recipe)
    uncalibrated = solution.graph is not None and provenance.calibration_sha256 is None
    return [
        ("made from", f"{name}, weights sha256 `{provenance.source_sha256 or ''}`"),
        ("shape", shape),
        *([] if solution.graph is None else _traced_facts(solution)),
        ("preset", provenance.preset or ""),
        ("size", f"{size_bytes / 1e6:.2f} MB: {2 * size_bytes / fp32:.3f} of bf16, {size_bytes / fp32:.3f} of fp32"),
        ("time groups", groups.summary),
        ("calibration", "none" if uncalibrated else settings),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())),
    ]


def _traced_facts(solution: Solution) -> list[tuple[str, str]]:
    """Return which layers of a traced model are integers, on which inputs, and which are not."""
    graph = solution.graph
    assert graph is not None
    linears = [linear for block in graph.blocks for linear in block.linears]
    kinds = Counter(_input_kind(solution, linear.source.name) for linear in linears)
    coded = sum(f"{name}.weight" in solution.params for name in graph.float_input)
    left = len(graph.left) + len(graph.float_input) - coded
    integer = sum(len(linear.modules) for linear in linears)
    fallen = sum(site.removesuffix(".input") in graph.float_input for site in solution.notes)  # other notes are of none
    return [
        ("layers", f"{integer} in integers, {coded} with integer weights alone, {left} in float"),
        ("inputs", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())),
        *([("on float inputs after all", str(fallen))] if fallen else []),
    ]


def _input_kind(solution: Solution, site: str) -> str:
    params = solution.params[site]
    parts = [str(params.spec.grid)]
    parts += ["with channel factors"] * (params.channels is not None)
    parts += [f"rotated by {params.rotation}"] * bool(params.rotation)
    return " ".join(parts)
