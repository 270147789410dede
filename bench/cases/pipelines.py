"""Pipelines whose parts are not where one looks first."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from tiny import artifact, folder, normal, output, recipe, refusal

import tqdit

OWN_CODE = """from diffusers import DiTPipeline


class MyDiT(DiTPipeline):
    def __init__(self, transformer, vae, scheduler, vae2, id2label=None):
        super().__init__(transformer, vae, scheduler, id2label=id2label)
        self.register_modules(vae2=vae2)
"""


def loads_or_refused(path: Path, source: Path, word: str, pipeline: type, **options: bool) -> str:
    """The artifact loads in diffusers, or `quantize` refuses the source before any work."""
    stages: list[str] = []
    try:
        tqdit.quantize(source, path, recipe(), report=lambda stage, _: stages.append(stage))
    except tqdit.InputError as error:
        return refusal(error, word, stages=stages)
    return f"loads: {type(pipeline.from_pretrained(path, **options)).__name__}"


def pickled_vae(work: Path) -> str:
    from safetensors.torch import load_file

    source = folder(work / "float", vae=True)
    weights = source / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    return loads_or_refused(work / "q", source, "vae", DiTPipeline)


def own_code(work: Path) -> str:
    source = folder(work / "float", vae=True)
    shutil.copytree(source / "vae", source / "vae2")
    (source / "my_dit.py").write_text(OWN_CODE, encoding="utf-8")
    index = source / "model_index.json"
    parts = {"_class_name": ["my_dit", "MyDiT"], "vae2": ["diffusers", "AutoencoderKL"]}
    index.write_text(json.dumps(json.loads(index.read_text(encoding="utf-8")) | parts), encoding="utf-8")
    return loads_or_refused(work / "q", source, "MyDiT", DiffusionPipeline, trust_remote_code=True)


def from_pipe(work: Path) -> str:
    pipe = DiTPipeline.from_pipe(DiTPipeline.from_pretrained(artifact(work, vae=True)))
    pipe.save_pretrained(work / "saved")
    again = DiTPipeline.from_pretrained(work / "saved")
    return (
        f"{type(pipe).__name__}, saved and loaded: {normal(output(pipe.transformer), output(again.transformer), 60.0)}"
    )


CASES: dict[str, Callable[[Path], str]] = {
    "a pipeline whose VAE has pickled weights alone": pickled_vae,
    "a pipeline with code and a component of its own": own_code,
    "from_pipe of a pipeline with an integer model": from_pipe,
}
