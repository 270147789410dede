"""The speed and the memory of quantized models, measured beside float baselines."""
