"""Per-sample gradients, summed as squares at about the price of an ordinary backward pass."""
