"""Low-rank and reduced-state optimizers for matrices, one short file for each method."""
