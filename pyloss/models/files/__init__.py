"""Model files: names of tensors in each format, tensors under one set of names, layouts of quantized folders, GGUF."""
