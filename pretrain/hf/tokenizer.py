"""Writes a sentencepiece BPE model as a `tokenizer.json` that stock `AutoTokenizer` loads with identical ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError
from .spm_model import Piece, PieceType, SpmModel, read_spm_model
from .stock_folder import write_json

SPACE = "\u2581"  # sentencepiece writes a space as this character


def convert_tokenizer(spm_path: str | Path, out_dir: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json into `out_dir`.

    For any text, `AutoTokenizer.from_pretrained(out_dir)(text, add_special_tokens=False)` gives sentencepiece's ids;
    with special tokens (the default) it is BOS and those ids, as training documents start. Text that looks like a
    special token (`<s>`) stays text. Needs no sentencepiece. Raises `UserError` for a model that has no exact equal.
    """
    model = read_spm_model(spm_path)
    problems = conversion_problems(model)
    if problems:
        raise UserError(f"{spm_path}: cannot become an exact tokenizer.json: " + "; ".join(problems))
    bos, eos, unk = (model.pieces[i].text for i in (model.bos_id, model.eos_id, model.unk_id))
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
    special["pad_token"] = model.pieces[model.pad_id].text if model.pad_id >= 0 else eos
    settings = {
        # Without this field the Mamba classes' own tokenizer (GPTNeoX) is loaded.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        # token_type_ids would be refused by generate().
        "model_input_names": ["input_ids", "attention_mask"],
        **special,
    }
    out_dir = Path(out_dir)
    write_json(out_dir / "tokenizer.json", tokenizer_json(model))
    write_json(out_dir / "tokenizer_config.json", settings)
    write_json(out_dir / "special_tokens_map.json", special)


def conversion_problems(model: SpmModel) -> list[str]:
    """Every reason why `model` has no `tokenizer.json` with identical ids; empty when it has one."""
    problems = []
    if model.algorithm != "bpe":
        problems.append(f"model type {model.algorithm} differs from Hugging Face's on some texts; train type bpe")
    if model.has_charsmap or model.normalizer not in ("", "identity"):
        problems.append(f"normalisation {model.normalizer or 'custom'} changes text; train with identity")
    if not model.byte_fallback:
        problems.append("without byte fallback unknown characters are lost; train with byte_fallback=true")
    if model.add_dummy_prefix:
        problems.append("a dummy prefix adds a space to every text; train with add_dummy_prefix=false")
    if model.remove_extra_whitespaces:
        problems.append("spaces are removed from text; train with remove_extra_whitespaces=false")
    if not model.escape_whitespaces:
        problems.append("spaces are not escaped; train with escape_whitespaces=true")
    for name, piece_id in (("unk", model.unk_id), ("bos", model.bos_id), ("eos", model.eos_id)):
        if not 0 <= piece_id < len(model.pieces):
            problems.append(f"it has no {name} piece; train with {name}_id >= 0")
    if any(piece.type == PieceType.UNUSED for piece in model.pieces):
        problems.append("it has unused pieces, which are split again after merging; train without them")
    problems += _user_defined_problems(model)
    return problems


def _user_defined_problems(model: SpmModel) -> list[str]:
    """User-defined symbols are cut out of the raw text first, so they may not depend on how spaces are written."""
    problems = []
    specials = [piece.text for piece in model.pieces if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)]
    for piece in model.pieces:
        if piece.type != PieceType.USER_DEFINED:
            continue
        if SPACE in piece.text or " " in piece.text:
            problems.append(f"user-defined symbol {piece.text!r} holds a space; leave it to be learned")
        elif any(_overlap(piece.text, special) for special in specials):
            problems.append(f"user-defined symbol {piece.text!r} overlaps a special token; leave it out")
    return problems


def _overlap(a: str, b: str) -> bool:
    """Whether an occurrence of `a` and one of `b` can share a character."""
    ends = range(1, min(len(a), len(b)) + 1)
    return a in b or b in a or any(a[-n:] == b[:n] or b[-n:] == a[:n] for n in ends)


def tokenizer_json(model: SpmModel) -> dict[str, Any]:
    """The content of `tokenizer.json` (the `tokenizers` library's format, version 1.0) for an exact BPE model."""
    bos = model.pieces[model.bos_id].text
    bos_item = {"SpecialToken": {"id": bos, "type_id": 0}}
    template = [bos_item, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, piece) for i, piece in enumerate(model.pieces) if piece.type in _ADDED_PIECES],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [*template, bos_item, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [model.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
            "merges": merges(model),
        },
    }


_ADDED_PIECES = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.USER_DEFINED)


def _added_token(piece_id: int, piece: Piece) -> dict[str, Any]:
    return {
        "id": piece_id,
        "content": piece.text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": piece.type != PieceType.USER_DEFINED,
    }


def merges(model: SpmModel) -> list[tuple[str, str]]:
    """All pairs of pieces whose join is a piece, best score first: sentencepiece's BPE as a merge list.

    sentencepiece joins the neighbours whose join has the best score, leftmost first. A merge list ranks pairs, so of
    two ways to split one piece one comes first; the two never compete in a text (fuzzed over made-up vocabularies).
    """
    normal = {piece.text: piece.score for piece in model.pieces if piece.type == PieceType.NORMAL}
    pairs = []
    for text in sorted(normal, key=normal.__getitem__, reverse=True):
        for at in range(1, len(text)):
            if text[:at] in normal and text[at:] in normal:
                pairs.append((text[:at], text[at:]))
    return pairs
