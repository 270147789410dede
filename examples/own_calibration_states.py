"""Calibrate a DiT on states of your own, stage by stage, and write artifacts of two bit-widths.

    python examples/own_calibration_states.py src/tqdit/data/fashion-dit build/own

The states are what your pipeline shows the model: here those of DPM-Solver, a sampler that `tqdit` does not have. The
first argument is a diffusers pipeline of a DiT: a folder, or owner/name on the Hugging Face Hub. The script writes the
artifacts build/own-w8a8 and build/own-w6a6.
"""

import argparse

import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler

import tqdit

RECIPE = tqdit.Recipe("plus", "w8a8", samples=8)  # in each of 10 time groups
IMAGES, STEPS = 8, 20


@torch.no_grad()
def own_states(transformer: DiTTransformer2DModel, scheduler: DPMSolverMultistepScheduler) -> tqdit.CalibrationSet:
    """Draw images with guidance, and keep what the model was given: latents, timesteps and classes."""
    config, kept = transformer.config, []
    labels = torch.arange(IMAGES) % config.num_embeds_ada_norm
    both = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])  # and the null class
    x = torch.randn(IMAGES, config.in_channels, config.sample_size, config.sample_size)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        kept.append((x, t.expand(IMAGES), labels))
        output = transformer(torch.cat([x, x]), timestep=t.expand(2 * IMAGES), class_labels=both).sample
        cond, uncond = output[:, : config.in_channels].chunk(2)  # further channels are a learned variance
        x = scheduler.step(torch.lerp(uncond, cond, RECIPE.guidance), t, x).prev_sample
    latents, timesteps, classes = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return tqdit.CalibrationSet(latents, timesteps, classes, scheduler=scheduler, groups=RECIPE.groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="diffusers pipeline of a DiT: folder, or owner/name on the Hub")
    parser.add_argument("out", help="start of the artifacts' names")
    args = parser.parse_args()
    transformer = DiTTransformer2DModel.from_pretrained(args.model, subfolder="transformer")
    scheduler = DPMSolverMultistepScheduler.from_pretrained(args.model, subfolder="scheduler", variance_type=None)

    records = tqdit.calibrate(transformer, own_states(transformer, scheduler), RECIPE)
    for bits in (8, 6):  # one calibration serves every bit-width
        recipe = tqdit.Recipe(**{**RECIPE.model_dump(), "weight_bits": bits, "activation_bits": bits})
        solution = tqdit.solve(transformer, records, recipe)
        integer = tqdit.convert(solution)  # a diffusers transformer that runs on codes
        tqdit.save(solution, f"{args.out}-{recipe.bits}", scheduler=scheduler)
        print(f"{args.out}-{recipe.bits}: {type(integer).__name__} on the backend {integer.quantization_backend}")


if __name__ == "__main__":
    main()
