"""The artifact: a quantized model as a folder in diffusers' style."""
