"""The README.md of an artifact: a model card for the Hub that says how the model is loaded and how it was made."""

from typing import Any

from tqdit.models.shapes import shape_name
from tqdit.models.sources import ModelSource
from tqdit.spec import Solution

CARD = "README.md"
FOLDER = "FOLDER"  # stands for where the artifact is


def model_card(solution: Solution, source: ModelSource, size_bytes: int) -> str:
    """Markdown with the Hub's front matter; the same for the same artifact. `size_bytes`: of its weight files."""
    recipe = solution.provenance.get("recipe", {})
    bits = f"w{recipe.get('weight_bits')}a{recipe.get('activation_bits')}"
    header = ["---", "library_name: diffusers"]
    if "/" in source.name:
        header.append(f"base_model: {source.name}")
    header += ["tags:", *(f"- {tag}" for tag in ("tqdit", "quantization", "dit", bits)), "---"]
    facts = "\n".join(f"| {label} | {text} |" for label, text in _facts(solution, source, size_bytes, recipe))
    return f"""{chr(10).join(header)}

# {source.name} {bits}

`{source.name}` quantized to {bits} after training, by TQ-DiT (arXiv 2502.04056) as `tqdit` implements it. Weights are
packed integer codes, and the matmuls of the blocks run in integers.

## Use

Import `tqdit` before the model is loaded: diffusers does not know this kind of quantization by itself.

```python
import tqdit
{_diffusers(source)}
```

Without diffusers' own loading:

```python
import tqdit

images = tqdit.sample("{FOLDER}", num=16)
tqdit.save_grid(images, "grid.png")
```

## How it was made

| | |
|---|---|
{facts}

`tqdit inspect {FOLDER}` shows every setting and the kernels that run it. Weights, config and the files beside them are
sealed by hashes and may not be edited; this file may.
"""


def _diffusers(source: ModelSource) -> str:
    """The lines that load the artifact in diffusers; a pipeline without a decoder is none there."""
    if source.pipeline is not None and source.vae is not None:
        return f'from diffusers import DiTPipeline\n\npipe = DiTPipeline.from_pretrained("{FOLDER}")'
    inside = ', subfolder="transformer"' if source.pipeline is not None else ""
    return (
        "from diffusers import DiTTransformer2DModel\n\n"
        f'transformer = DiTTransformer2DModel.from_pretrained("{FOLDER}"{inside})'
    )


def _facts(solution: Solution, source: ModelSource, size_bytes: int, recipe: dict[str, Any]) -> list[tuple[str, str]]:
    provenance = solution.provenance
    fp32 = 4 * sum(tensor.numel() for tensor in (*solution.codes.values(), *solution.floats.values()))
    kept = ("samples", "sampler", "steps", "guidance", "rounds", "seed")
    groups = solution.time_groups
    return [
        ("made from", f"{source.name}, weights sha256 `{provenance.get('source_sha256', '')}`"),
        ("shape", shape_name(solution.model_config)),
        ("preset", str(provenance.get("preset", ""))),
        ("size", f"{size_bytes / 1e6:.2f} MB: {2 * size_bytes / fp32:.3f} of bf16, {size_bytes / fp32:.3f} of fp32"),
        ("time groups", f"{groups.num_groups} of {groups.num_timesteps} training timesteps"),
        ("calibration", ", ".join(f"{key} {recipe[key]}" for key in kept if key in recipe)),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())),
    ]
