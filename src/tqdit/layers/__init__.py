"""The layers that integer models are assembled from."""
