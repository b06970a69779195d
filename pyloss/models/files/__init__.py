"""Model files: tensors under one set of names, layouts of quantized folders, writing GGUF."""
