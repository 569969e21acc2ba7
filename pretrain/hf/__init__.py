"""Conversion to and from Hugging Face: model folders that stock classes load, and published models as our parameters.

Importing this loads no transformers.
"""

from .export import ExportReport, export_hf
from .import_model import import_hf
from .stock import choose_stock_class
from .tokenizer import convert_tokenizer

__all__ = ["ExportReport", "choose_stock_class", "convert_tokenizer", "export_hf", "import_hf"]
