"""Calibration: states of the float model's sampling, and what the search needs of the model on them."""
