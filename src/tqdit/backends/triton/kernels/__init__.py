"""Device code, which Triton compiles."""
