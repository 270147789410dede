"""Situations where a model says what it is: by its scheduler, its training arguments, or the files beside it."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from tiny import WrongError, artifact, dit, folder, load, normal, output, quantized, refusal, refused

import tqdit
from tqdit.architectures.dit_checkpoint import POSITIONS, published_names
from tqdit.sampling.diffusion import make_scheduler, step_weights
from tqdit.sources.resolve import load_float, resolve

V_PREDICTION = {
    "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 4000,
    "clip_sample": False,
}  # fmt: skip
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled linear": {"beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "v prediction": {"prediction_type": "v_prediction"},
    "sample prediction": {"prediction_type": "sample"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                          "timestep_spacing": "trailing"},
}  # fmt: skip
EFFECTIVE = 50  # timesteps of 1000 that share the weight, at least; a schedule that puts it all on few has not many


def flow_matching(work: Path) -> str:
    source = folder(work / "float", scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    path = quantized(work / "q", source, sampler="auto")
    given = {"timestep": torch.full((2,), 500.5)}
    return normal(output(load_float(resolve(source)), **given), output(load(path), **given))


def official(rows: int, classes: int) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by their published names; `rows` of the label table."""
    model = dit(num_attention_heads=6, attention_head_dim=64, num_layers=1, num_embeds_ada_norm=classes, norm_eps=1e-6)
    state = model.state_dict()
    names = published_names({**model.config, "_class_name": type(model).__name__})
    tensors = {name: torch.cat([state[part] for part in parts]).clone() for name, parts in names}
    tensors[POSITIONS] = model.pos_embed.pos_embed.clone()
    table = "y_embedder.embedding_table.weight"
    return tensors | {table: tensors[table][:rows]}


def checkpoint(path: Path, tensors: dict[str, torch.Tensor], **arguments: Any) -> Path:
    torch.save({"model": tensors, "ema": tensors, "opt": {}, "args": argparse.Namespace(**arguments)}, path)
    return path


def unserved_scheduler(work: Path) -> str:
    source = folder(work / "float", scheduler=EDMEulerScheduler())
    return refused(lambda: quantized(work / "q", source), "EDMEulerScheduler")


def sit(work: Path) -> str:
    """A SiT is served as it is; its calibration states are those of flow matching."""
    path = checkpoint(work / "sit.pt", official(11, 10), path_type="Linear", prediction="velocity", num_classes=10)
    found = load(quantized(work / "q", path, sampler="auto"))
    if not found.solution.time_groups.closed:
        raise WrongError("its time groups are those of diffusion")
    given = {"timestep": torch.full((2,), 500.5)}
    return normal(output(load_float(resolve(path)), **given), output(found, **given))


def doubtful_sit(work: Path) -> str:
    """Weights alone do not say that they are a SiT's."""
    path = work / "SiT-S-2.pt"
    torch.save(official(11, 10), path)
    return refused(lambda: tqdit.convert_checkpoint(path, work / "sit"), "SiT", "objective")


def no_null_class(work: Path) -> str:
    path = checkpoint(work / "plain.pt", official(10, 10), model="DiT-S/2", num_classes=10, class_dropout_prob=0.0)
    try:
        result = tqdit.convert_checkpoint(path, work / "plain")
    except tqdit.InputError as error:
        return refusal(error, "null")
    if (found := result["config"]["num_embeds_ada_norm"]) != 10:
        raise WrongError(f"{found} classes of 10")
    return "10 classes"


def compiled_names(work: Path) -> str:
    path = work / "compiled.pt"
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in official(11, 10).items()}, path)
    return f"{tqdit.convert_checkpoint(path, work / 'out')['config']['num_embeds_ada_norm']} classes"


def beside_its_pipeline(name: str) -> Callable[[Path], str]:
    """A transformer in a pipeline's folder has the pipeline's scheduler, whatever its own folder is called."""

    def run(work: Path) -> str:
        source = folder(work / "float", scheduler=DDIMScheduler(**V_PREDICTION), vae=True)
        if name != "transformer":
            shutil.copytree(source / "transformer", source / name)
        found = load(quantized(work / "q", source / name)).solution.time_groups.num_timesteps
        if found != 4000:
            raise WrongError(f"{found} training timesteps of 4000")
        return f"{found} training timesteps"

    return run


def no_scheduler(work: Path) -> str:
    """A default is taken, a line says which, and the artifact holds it."""
    import warnings

    source = folder(work / "float")
    shutil.rmtree(source / "scheduler")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        path = quantized(work / "q", source)
    lines = [str(warning.message) for warning in told if "schedul" in str(warning.message)]
    if not lines:
        raise WrongError("no line says which schedule is taken")
    if not list(path.rglob("scheduler_config.json")):
        raise WrongError("the artifact has no scheduler")
    return f"noted: {lines[0]}"


def weights_of_steps(name: str) -> Callable[[Path], str]:
    def run(_: Path) -> str:
        config = DDIMScheduler(clip_sample=False, **SCHEDULES[name]).config
        weights = step_weights(make_scheduler(config, tqdit.Sampling("ddim", 20), True)).double()
        if not torch.isfinite(weights).all():
            raise WrongError(f"{int((~torch.isfinite(weights)).sum())} weights are not finite")
        effective = float(weights.sum() ** 2 / weights.square().sum())
        if effective < EFFECTIVE:
            raise WrongError(f"{effective:.1f} timesteps have all the weight")
        return f"finite; {effective:.0f} effective timesteps of {len(weights)}"

    return run


def hessian_is_used(work: Path) -> str:
    """The preset `plus` uses HO with zero terminal SNR too: its scales differ from those without HO."""
    source = folder(work / "float", scheduler=DDIMScheduler(prediction_type="v_prediction", **ZERO_SNR))
    with_it, without = (
        load(quantized(work / "q", source, hessian=hessian)).solution.params for hessian in (True, False)
    )
    same = sum(torch.equal(params.scale, without[name].scale) for name, params in with_it.items())
    if same == len(with_it):
        raise WrongError("every scale is what it is without HO")
    return f"{len(with_it) - same} of {len(with_it)} scales differ from those without HO"


def epsilon_of_zero_snr(work: Path) -> str:
    source = folder(work / "float", scheduler=DDIMScheduler(**ZERO_SNR))
    return refused(lambda: quantized(work / "q", source), "rescale_betas_zero_snr")


def stored_dtype(dtype: torch.dtype) -> Callable[[Path], str]:
    """A dtype works, or is refused by name."""

    def run(work: Path) -> str:
        from safetensors.torch import load_file, save_file

        source = folder(work / "float")
        weights = source / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        changed = {n: t.to(dtype) if t.ndim == 2 and "attn1" in n else t for n, t in tensors.items()}
        save_file(changed, weights, metadata={"format": "pt"})
        try:
            path = quantized(work / "q", source)
        except tqdit.InputError as error:
            return refusal(error, str(dtype).removeprefix("torch."))
        return normal(output(load_float(resolve(source))), output(load(path)))

    return run


def variant_alone(work: Path) -> str:
    """Weights that exist as a variant only work, or are refused by a line that says so."""
    source = folder(work / "float")
    shutil.rmtree(source / "transformer")
    dit().half().save_pretrained(source / "transformer", variant="fp16")
    try:
        path = quantized(work / "q", source)
    except tqdit.InputError as error:
        return refusal(error, "fp16")
    return normal(output(dit()), output(load(path)))


def integers_as_classes(work: Path) -> str:
    images = tqdit.sample(artifact_of_pixels(work), [1, 2], 2, tqdit.Sampling("ddim", 2, 1.5), device="cpu")
    return f"{len(images)} images"


def artifact_of_pixels(work: Path) -> Path:
    return quantized(work / "q", folder(work / "float", dit(in_channels=1, out_channels=2)))


def scheduler_was_edited(work: Path) -> str:
    path = artifact(work, vae=True)
    config = path / "scheduler" / "scheduler_config.json"
    changed = json.loads(config.read_text(encoding="utf-8")) | {"beta_end": 0.9}
    config.write_text(json.dumps(changed), encoding="utf-8")
    return refused(lambda: load(path), "scheduler_config.json")


CASES: dict[str, Callable[[Path], str]] = {
    "a DiT in a flow-matching pipeline": flow_matching,
    "a SiT checkpoint": sit,
    "weights alone that are called a SiT's": doubtful_sit,
    "a pipeline with an unserved scheduler": unserved_scheduler,
    "a checkpoint without a null class": no_null_class,
    "a checkpoint with names of a compiled model": compiled_names,
    **{f"the folder {name} of a v-prediction pipeline": beside_its_pipeline(name)
       for name in ("transformer", "transformer_ema")},
    "a model without a scheduler": no_scheduler,
    **{f"step weights, {name}": weights_of_steps(name) for name in SCHEDULES},
    "zero terminal SNR uses HO": hessian_is_used,
    "zero terminal SNR with epsilon": epsilon_of_zero_snr,
    **{f"weights stored as {str(dtype).removeprefix('torch.')}": stored_dtype(dtype)
       for dtype in (torch.float8_e4m3fn, torch.float64, torch.int8)},
    "weights as a variant alone": variant_alone,
    "ints as classes": integers_as_classes,
    "an edited scheduler in an artifact": scheduler_was_edited,
}  # fmt: skip
