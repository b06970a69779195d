"""A training run: its settings, plan, checkpoints, folder and evaluation."""
