"""The runtime: a solution becomes a model that runs on integers."""
