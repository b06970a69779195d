"""Files and the terminal: paths, whole files, locks, outputs, readers of tensor files."""
