"""Training data: records, the targets in them, batches."""
