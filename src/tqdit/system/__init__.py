"""The operating system's side: files, locks, processes, CUDA graphs and torch's own state."""
