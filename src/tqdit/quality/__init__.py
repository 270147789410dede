"""The quality of quantized models."""
