"""Checks a model folder with the stock transformers classes: everything loads, and the numbers are ours."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...data import Tokenizer
from ...errors import UserError
from ...model.lm import HybridLM

SAMPLE = "def main() -> None:\n    print('Grüße, 世界 🙂', 1 + 1)\n\n\nOnce upon a time there was a mill. <s>"
TOLERANCE = 1e-3  # relative to the largest logit: float32 through many layers, in another order of sums


def require_transformers() -> Any:
    """The transformers package. Raises `UserError` with the command that installs it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            "transformers is not installed, so the export cannot be checked; "
            "pip install 'headrace[hf]', or export unchecked with verify=False"
        ) from error


def load_stock_model(folder: Path) -> Any:
    """The stock model of a folder, float32, in evaluation mode, loaded with no remote code.

    Raises:
        RuntimeError: a tensor is missing, left over or of another shape.
    """
    transformers = require_transformers()
    with _quiet(transformers):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise RuntimeError(f"{type(model).__name__} does not load the export exactly: {wrong}")
    return model.eval()


def load_stock_tokenizer(folder: Path) -> Any:
    """The stock tokenizer of a folder, loaded with no remote code."""
    return require_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@torch.no_grad()
def compare_with_stock(folder: Path, model: HybridLM, tokenizer: Tokenizer) -> float:
    """Largest absolute difference, on a short text, between the logits of `model` and of the folder's stock model.

    Raises:
        RuntimeError: a tensor does not load, the ids are not the tokenizer's, or the logits differ beyond rounding.
    """
    stock_model = load_stock_model(folder)
    ids = [tokenizer.bos_id, *tokenizer.encode(SAMPLE)]
    stock_ids = load_stock_tokenizer(folder)(SAMPLE)["input_ids"]
    if stock_ids != ids:
        raise RuntimeError(f"the exported tokenizer gives {stock_ids[:10]}..., sentencepiece {ids[:10]}...")
    tokens_BL = torch.tensor([ids])
    ours = model(tokens_BL)
    with _quiet(require_transformers()):
        theirs = stock_model(tokens_BL).logits
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(ours.abs().max())):
        raise RuntimeError(f"{type(stock_model).__name__} computes other logits: the difference is {difference:.3g}")
    return difference


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice on kernels; what matters of loading is checked."""
    logging = transformers.utils.logging
    level, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a shared expert of width 0
            yield
    finally:
        logging.set_verbosity(level)
        if shows_progress:
            logging.enable_progress_bar()
