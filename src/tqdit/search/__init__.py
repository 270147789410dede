"""The search for quantizer parameters."""
