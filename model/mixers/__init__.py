"""Sequence mixers: one file each, registered by one line in `model/registry.py`."""
