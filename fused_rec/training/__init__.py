"""Training: a pure step, its one parallel wrapper, checkpoints, curves and the loop."""
