"""Optimizers over sharded parameters, all behind one small interface."""
