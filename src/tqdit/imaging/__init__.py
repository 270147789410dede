"""The images that models draw, and the files that hold them."""
