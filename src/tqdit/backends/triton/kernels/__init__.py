"""Device code: what Triton compiles."""
