"""Headrace: pretrain state-space and hybrid language models on any number of GPUs."""

from .errors import UserError

__all__ = ["UserError", "__version__"]
__version__ = "0.1.0"
