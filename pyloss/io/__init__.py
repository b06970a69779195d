"""Files and the terminal: paths, whole files, locks, earlier outputs kept, and the readers of tensor files."""
