"""The page of a training run: `pyloss report`."""
