"""A run: configuration, training loop, optimizers, checkpoints, evaluation, conversion, report."""
