"""Quantize a whole PixArt pipeline, load the result with diffusers, and draw an image of every prompt.

    python examples/whole_pipeline.py PixArt-Sigma prompts.safetensors pixart-w8a8

The first argument is a folder that diffusers' `save_pretrained` wrote, the third the folder to write: the same pipeline
with an integer transformer. The second has the embeddings of prompts, which the pipeline's text encoder made:

    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    encoded = dict(zip(names, pipe.encode_prompt(["a red fox in snow", "a lighthouse at night"])))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in encoded.items()}, "prompts.safetensors")
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import tqdit

RECIPE = tqdit.Recipe("plus", "w8a8", samples=8, guidance=4.5)
STEPS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a PixArt pipeline")
    parser.add_argument("prompts", type=Path, help="embeddings of prompts, a safetensors file")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()

    summary = tqdit.quantize(args.model, args.out, RECIPE, conditions=tqdit.Prompts.read(args.prompts))
    print(f"{args.out}: {summary.size_bytes / 1e6:.1f} MB, {summary.size_ratio:.3f} of fp32")

    # The prompts are encoded already, so that the largest part of the pipeline may stay on the disk.
    pipe = DiffusionPipeline.from_pretrained(args.out, tokenizer=None, text_encoder=None)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    size = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    prompts = {name: tensor.to(pipe.device) for name, tensor in load_file(args.prompts).items()}
    images = pipe(
        **prompts,
        negative_prompt=None,
        guidance_scale=RECIPE.guidance,
        num_inference_steps=STEPS,
        height=size,
        width=size,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
    ).images
    for i, image in enumerate(images):
        image.save(args.out.parent / f"{args.out.name}-{i}.png")
    print(f"{args.out}-0.png and on: {len(images)} images")


if __name__ == "__main__":
    main()
