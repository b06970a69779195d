"""MLX's modules `core`, `nn`, `optimizers` and `utils` over pyloss, for training scripts.

`import pyloss.mlx.core as mx` in place of `import mlx.core as mx`, and so on. Arrays are NumPy's,
gradients are those of pyloss's tape, layers, losses and optimizers compute with its kernels.
docs/coming_from_mlx.md lists what is the same, what differs and what is not there.
"""
