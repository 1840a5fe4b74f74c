"""Training: model inputs, the pure train step and its parallel version, checkpoints, and the training loop."""
