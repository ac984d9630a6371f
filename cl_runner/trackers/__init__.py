"""Where a run's numbers go: its folder, the terminal, Weights & Biases."""
