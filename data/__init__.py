"""Text to token shards (`prepare`), and token shards to batches (`TokenDataset`, `TokenRows`, `BatchLoader`)."""

from .config import DataConfig, PrepareConfig, TokenizerConfig
from .dataset import TokenDataset, check_tokenizer
from .loader import Batch, BatchLoader
from .order import RowOrder
from .prepare import PrepareReport, prepare
from .rows import Row, TokenRows
from .skipped import SkippedRows
from .tokenizer import Tokenizer

__all__ = [
    "Batch",
    "BatchLoader",
    "DataConfig",
    "PrepareConfig",
    "PrepareReport",
    "Row",
    "RowOrder",
    "SkippedRows",
    "TokenDataset",
    "TokenRows",
    "Tokenizer",
    "TokenizerConfig",
    "check_tokenizer",
    "prepare",
]
