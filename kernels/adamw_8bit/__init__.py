"""AdamW with both moments in 8 bits: dynamic code books, one scale for each block of a row."""

from .code_books import CodeBook, code_book
from .grid import BlockGrid
from .operator import adamw_8bit_, block_maxima
from .reference import adamw_8bit_reference, dequantise, quantise
from .update import Moments, Rounding, Update

__all__ = [
    "BlockGrid",
    "CodeBook",
    "Moments",
    "Rounding",
    "Update",
    "adamw_8bit_",
    "adamw_8bit_reference",
    "block_maxima",
    "code_book",
    "dequantise",
    "quantise",
]
