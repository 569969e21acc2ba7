"""Rows of a table by token number, with gradients that are the same bits every time."""

from .operator import embedding
from .reference import embedding_reference

__all__ = ["embedding", "embedding_reference"]
