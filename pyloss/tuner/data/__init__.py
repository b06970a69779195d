"""Training data: records, their targets, and batches."""
