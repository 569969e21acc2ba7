"""Writes a run's model as a folder that stock Hugging Face classes load, and checks it there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ... import __version__
from ...errors import UserError
from ...model.config import ModelConfig
from ..saved_run import find_run, load_tokenizer, load_weights, model_from_weights, parameter_shapes
from .mapping import joins
from .stock import StockClass, choose_stock_class
from .stock_folder import SHARD_BYTES, write_json, write_weights
from .tokenizer import convert_tokenizer
from .verify import compare_with_stock, require_transformers

MARK = "headrace.json"


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was written; `max_logit_difference` is None when nothing was checked."""

    folder: Path
    architecture: str
    num_tensors: int
    num_bytes: int
    max_logit_difference: float | None

    def __str__(self) -> str:
        checked = (
            "not checked with transformers"
            if self.max_logit_difference is None
            else f"loads in transformers; largest difference of its logits {self.max_logit_difference:.1e}"
        )
        return (
            f"{self.folder}: {self.architecture}, {self.num_tensors} tensors, {self.num_bytes / 1e6:.1f} MB ({checked})"
        )


def export_hf(
    source: str | Path, out_dir: str | Path | None = None, *, verify: bool = True, average: bool = False
) -> ExportReport:
    """Writes the model and tokenizer of a run, or of one of its checkpoints, as a Hugging Face model folder.

    `out_dir` is `hf/` in the run folder unless it is given. Float32 safetensors (files of up to 5 GB), config.json,
    generation_config.json and the tokenizer. The folder appears whole or not at all; an earlier export in its place
    is replaced. With `verify` it is first loaded with the stock classes: no tensor missing or left over, the same ids
    and, on a short text, the same logits. With `average`, the weights are the run's averaged ones.

    Raises:
        UserError: no stock class computes this model, the tokenizer has no exact equal or does not fit the model,
            `out_dir` holds something else than an export, transformers is not installed (with `verify`).
        RuntimeError: the stock class does not compute the same.
    """
    if verify:
        require_transformers()
    run = find_run(source, average)
    out_dir = run.folder / "hf" if out_dir is None else Path(out_dir)
    check_replaceable(out_dir)
    config = run.config.model
    tokenizer = load_tokenizer(run)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    stock = choose_stock_class(config)
    shapes = parameter_shapes(config)
    with _written_aside(out_dir) as folder:
        convert_tokenizer(run.tokenizer_path, folder)
        write_configs(folder, stock, config, special, context_length=run.config.data.seq_len)
        write_json(
            folder / MARK, {"headrace": __version__, "run": run.config.run.name, "checkpoint": run.checkpoint.name}
        )
        num_tensors, num_bytes = write_model(folder, stock, config, lambda names: load_weights(run, shapes, names))
        difference = None
        if verify:
            model = model_from_weights(config, load_weights(run, shapes))
            difference = compare_with_stock(folder, model, tokenizer)
    return ExportReport(
        folder=out_dir,
        architecture=stock.architecture,
        num_tensors=num_tensors,
        num_bytes=num_bytes,
        max_logit_difference=difference,
    )


def write_model(
    folder: Path,
    stock: StockClass,
    config: ModelConfig,
    weights: Callable[[list[str]], dict[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> tuple[int, int]:
    """Writes the weights under the stock class's names; `weights(names)` gives ours. Returns tensors and bytes."""
    shapes = parameter_shapes(config)
    by_name = {join.stock: join for join in joins(stock.names, config, shapes)}

    def tensors(names: list[str]) -> dict[str, Tensor]:
        ours = weights(list(dict.fromkeys(part for name in names for part in by_name[name].ours)))
        return {name: by_name[name].to_stock(ours) for name in names}

    stock_shapes = {name: join.shape for name, join in by_name.items()}
    return len(by_name), write_weights(folder, stock_shapes, tensors, shard_bytes)


def write_configs(
    folder: Path, stock: StockClass, config: ModelConfig, special: Mapping[str, int], *, context_length: int
) -> None:
    """Writes config.json and generation_config.json; `special` has bos_token_id, eos_token_id and pad_token_id."""
    fields = stock.fields(config)
    content = {
        "architectures": [stock.architecture],
        "model_type": stock.model_type,
        "vocab_size": config.vocab_size,
        **fields,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": context_length,
        **special,
        # A padding id here would leave its row of the embedding without gradient in some classes.
        "pad_token_id": None,
        "dtype": "float32",
    }
    write_json(folder / "config.json", content)
    write_json(folder / "generation_config.json", {**special, "use_cache": fields["use_cache"]})


def check_replaceable(out_dir: Path) -> None:
    """Raises `UserError` where `out_dir` is there and is neither empty nor an earlier export."""
    if not out_dir.exists():
        return
    if not out_dir.is_dir() or (any(out_dir.iterdir()) and not (out_dir / MARK).exists()):
        raise UserError(f"{out_dir} exists and is no earlier export; choose another folder, or remove it")


@contextmanager
def _written_aside(out_dir: Path) -> Iterator[Path]:
    """A new folder beside `out_dir` that takes its place at the end, or is removed on an error."""
    aside, old = (out_dir.with_name(f".{out_dir.name}.{word}") for word in ("new", "old"))
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
        aside.mkdir(parents=True)
        yield aside
        _put_in_place(aside, out_dir, old)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be written: {error.strerror or error}; nothing was changed") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, out_dir: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    try:
        aside.rename(out_dir)
    except OSError:
        if old.exists():
            old.rename(out_dir)
        raise
    shutil.rmtree(old, ignore_errors=True)
