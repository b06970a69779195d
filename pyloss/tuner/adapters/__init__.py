"""Adapters: what they share, how they are put into a model, and their files."""
