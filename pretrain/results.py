"""The figures a run ends with: held-out bits per byte beside what gzip and xz make of the same bytes."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..data import TokenDataset, check_tokenizer
from ..parallel.mesh import World
from .evaluate import WholeModel, evaluate
from .run_folder import replace_file
from .saved_run import find_run, load_run


def evaluate_run(path: Path, world: World, average: bool = False) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run (or the checkpoint at `path`) on the whole held-out split.

    Kept in `results.json` of the run folder with the step and the compressors' figures.

    Raises:
        UserError: no held-out documents, data that changed since training, or a damaged checkpoint.
    """
    run = find_run(path, average)
    model, tokenizer, config = load_run(run.checkpoint, device=world.device, average=average)
    dataset = TokenDataset(config.data.folder, "heldout")
    check_tokenizer(dataset, tokenizer)
    scorer = WholeModel(model, world.device, world.rank, world.size)
    found = evaluate(scorer, dataset, replace(config.eval, max_tokens=0))
    results = {
        "checkpoint": run.checkpoint.name,
        "average": average,
        **asdict(found),
        "parameters": config.model.num_params(),
        **{
            f"{program}_bits_per_byte": None if size is None else 8 * size / dataset.text_bytes
            for program, size in dataset.baselines.items()
        },
    }
    if world.is_first:
        replace_file(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def format_results(results: dict[str, Any]) -> str:
    """A table for the terminal: bits per byte of the model, gzip -9 and xz -9."""
    rows = [(f"this model ({results['parameters'] / 1e6:.2f} M parameters)", results["bits_per_byte"])]
    rows += [(f"{name} -9", results[f"{name}_bits_per_byte"]) for name in ("gzip", "xz")]
    lines = [
        f"held out: {results['documents']} documents, {results['text_bytes']:,} bytes, {results['tokens']:,} tokens",
        f"{'':32} bits per byte",
    ]
    lines += [f"{name:32} {'not measured' if value is None else f'{value:.4f}':>13}" for name, value in rows]
    beaten = [name for name, value in rows[1:] if value is not None and rows[0][1] < value]
    lines.append(f"the model is below {' and '.join(beaten)}" if beaten else "the model is below neither gzip nor xz")
    return "\n".join(lines)
