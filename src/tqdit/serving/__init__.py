"""The page that draws images with several models side by side, and what it does without a browser."""
