"""Diffusion Transformers in integers."""
