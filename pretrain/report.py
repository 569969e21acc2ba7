"""The page that shows a run: one HTML file that needs nothing beside it, and its pictures as PNG files."""

import base64
import json
import math
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .figures import Curves, Figure, draw_figures, last_finite, short_count, smoothed
from .goodput import Goodput, Start, measure_goodput, read_starts, steps_that_stay
from .routing_report import draw_routing, read_routing, routing_summary
from .run_clock import STARTS
from .run_folder import replace_file

_TRAIN_KEYS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds", "skipped")
_HELDOUT_KEYS = ("step", "tokens", "loss", "bits_per_byte")
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f8fa; --text: #24292f; --quiet: #57606a; --line: #d8dee4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --card: #161b22; --text: #e6edf3; --quiet: #9aa4ae; --line: #30363d; }
}
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.8rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
.quiet { color: var(--quiet); margin: .25rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.cards div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
.cards dt { color: var(--quiet); font-size: .85rem; }
.cards dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
figure { margin: 0 0 1.5rem; border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
figure img { display: block; width: 100%; height: auto; }
figcaption { padding: .5rem 1rem; color: var(--quiet); background: var(--card); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--quiet); width: 16rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; overflow-x: auto; }
summary { cursor: pointer; }
"""
# The page may show its own pictures and style, and load or run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` and `figures/*.png` into a run folder; returns the page's path.

    Reads `metrics.jsonl` and, where they exist, `starts.jsonl`, `manifest.json`, `config.toml` and `results.json`. Of a
    step that was trained twice the last record counts; a line cut short and values that are no numbers are passed over.
    Raises `UserError` when the folder has no metrics or matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    results = _read_json(run_dir / "results.json")
    starts = read_starts(run_dir / STARTS)
    curves = with_starts(read_curves(run_dir / "metrics.jsonl", results), starts)
    figures = draw_figures(curves)
    tokens = dict(zip(curves.train["step"].tolist(), curves.train["tokens"].tolist(), strict=True))
    records = (record for record in _records(run_dir / "metrics.jsonl") if record["kind"] == "routing")
    routing = read_routing(records, tokens)
    routing_figures = draw_routing(routing, curves.restarts) if routing else []
    folder = run_dir / "figures"
    folder.mkdir(exist_ok=True)
    for figure in figures + routing_figures:
        (folder / f"{figure.name}.png").write_bytes(figure.light)
    config = _read_text(run_dir / "config.toml")
    sections = ["<h2>Curves</h2>" + "".join(map(_figure, figures))]
    if routing:
        pictures = "".join(map(_figure, routing_figures))
        sections.append("<h2>Routing</h2>" + pictures + _table(routing_summary(routing)))
    sections.append("<h2>Summary</h2>" + _table(_summary(curves, results)))
    if goodput := measure_goodput(starts):
        sections.append("<h2>Time</h2>" + _table(_goodput_rows(goodput)))
    sections += _how_it_ran(_read_json(run_dir / "manifest.json"), config)
    page = _page(_name(run_dir, config), curves, results, sections)
    replace_file(run_dir / "report.html", page)
    return run_dir / "report.html"


def read_curves(metrics: Path, results: dict[str, Any]) -> Curves:
    """The curves of a `metrics.jsonl`, with the compressors' figures of `results`. Raises `UserError` without any.

    A restart is a record of kind `start` after step 0, or a step that does not follow the one before it.
    """
    train: dict[int, dict[str, Any]] = {}
    heldout: dict[int, dict[str, Any]] = {}
    restarts: list[float] = []
    last = 0
    for record in _records(metrics):
        step = record["step"]
        if record["kind"] == "eval":
            heldout[step] = record
        elif record["kind"] == "train":
            if step <= last:
                restarts.append(_number(record.get("tokens")))
            train[step], last = record, step
        elif record["kind"] == "start" and step:
            restarts.append(_number(record.get("tokens")))
            last = step
    if not train and not heldout:
        raise UserError(f"{metrics} has no metrics; give a run folder in which at least one step was trained")
    compressors = {f"{program} -9": _number(results.get(f"{program}_bits_per_byte")) for program in ("gzip", "xz")}
    return Curves(
        train=_columns(train, _TRAIN_KEYS),
        heldout=_columns(heldout, _HELDOUT_KEYS),
        restarts=[tokens for tokens in restarts if math.isfinite(tokens)],
        compressors={name: value for name, value in compressors.items() if math.isfinite(value)},
    )


def with_starts(curves: Curves, starts: list[Start]) -> Curves:
    """The curves with restarts, and what was lost at them, as `starts.jsonl` has them; unchanged without."""
    if not starts:
        return curves
    trained = [start for start in starts if start.points]
    lost = []
    for start, limit in zip(starts, steps_that_stay(starts), strict=True):
        again = [point.tokens for point in start.points if point.step > limit]
        if again:
            kept = [point.tokens for point in start.points if point.step <= limit]
            lost.append((max(kept, default=start.points[0].tokens), again[-1]))
    return replace(curves, restarts=[start.points[0].tokens for start in trained[1:]], lost=lost)


def _goodput_rows(goodput: Goodput) -> list[tuple[str, str]]:
    rows = [("since the first start", _duration(goodput.wall_s)), ("starts", str(goodput.starts))]
    rows += [(words, f"{_duration(seconds)} ({share:.1%})") for words, seconds, share in goodput.rows()]
    return [*rows, ("steps lost", f"{goodput.lost_steps:,}")]


def _records(metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines that are records, in file order."""
    for line in _read_text(metrics).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and "kind" in record:
            yield record


def _columns(records: dict[int, dict[str, Any]], keys: Iterable[str]) -> dict[str, np.ndarray]:
    rows = [records[step] for step in sorted(records)]
    return {key: np.array([_number(row.get(key)) for row in rows], dtype=np.float64) for key in keys}


def _number(value: Any) -> float:
    """`value` if it is a finite number, else NaN."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def _read_text(path: Path) -> str:
    """The file's text, empty where there is no file. Raises `UserError` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none."""
    try:
        found = json.loads(_read_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(run_dir: Path, config: str) -> str:
    """The run's name in its configuration, or its folder's."""
    try:
        return str(tomllib.loads(config)["run"]["name"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return run_dir.resolve().name


def _how_it_ran(manifest: dict[str, Any], config: str) -> list[str]:
    sections = []
    if manifest:
        sections.append("<h2>How it ran</h2>" + _table(_flat(manifest)))
    if config:
        sections.append(
            f"<h2>Configuration</h2><details open><summary>config.toml</summary><pre>{escape(config)}</pre></details>"
        )
    return sections


def _page(name: str, curves: Curves, results: dict[str, Any], sections: list[str]) -> str:
    cards = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in _headlines(curves, results))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}: headrace report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(name)}</h1><p class="quiet">{escape(_subtitle(curves))}</p></header>\n'
        f'<main>\n<dl class="cards">{cards}</dl>\n{"".join(f"<section>{s}</section>" for s in sections)}\n'
        "</main>\n</body>\n</html>\n"
    )


def _subtitle(curves: Curves) -> str:
    steps, tokens = last_finite(curves.train["step"]), last_finite(curves.train["tokens"])
    words = "held-out evaluations only"
    if math.isfinite(steps):
        seconds = float(np.nansum(curves.train["seconds"]))
        words = f"{steps:,.0f} steps, {short_count(tokens)} tokens, {_duration(seconds)} of training"
    count = len(curves.restarts)
    return words + (f", {count} restart{'s' * (count > 1)}" if count else "")


def _headlines(curves: Curves, results: dict[str, Any]) -> list[tuple[str, str]]:
    """The few figures that matter most."""
    bits = _number(results.get("bits_per_byte"))
    if not math.isfinite(bits):
        bits = last_finite(curves.heldout["bits_per_byte"])
    loss = last_finite(smoothed(curves.train["loss"]))
    speed = curves.train["tokens_per_s"]
    figures = [("held-out bits per byte", _digits(bits))]
    figures += [(f"{name} of the same bytes", _digits(value)) for name, value in curves.compressors.items()]
    figures.append(("training loss, smoothed", _digits(loss)))
    figures.append(("tokens per second", short_count(float(np.nanmedian(speed))) if np.isfinite(speed).any() else "–"))
    return figures


def _summary(curves: Curves, results: dict[str, Any]) -> list[tuple[str, str]]:
    train, heldout = curves.train, curves.heldout
    best = heldout["bits_per_byte"]
    rows = [
        ("steps", f"{len(train['step']):,}"),
        ("tokens trained on", f"{last_finite(train['tokens']):,.0f}"),
        ("updates skipped (non-finite gradient)", f"{last_finite(train['skipped']):,.0f}"),
        ("restarts", str(len(curves.restarts))),
        ("time in training", _duration(float(np.nansum(train["seconds"])))),
        ("last training loss", _digits(last_finite(train["loss"]))),
        ("last held-out loss", _digits(last_finite(heldout["loss"]))),
        (
            "best held-out bits per byte during the run",
            _digits(np.nanmin(best) if np.isfinite(best).any() else math.nan),
        ),
    ]
    rows += [(f"results: {key.replace('_', ' ')}", value) for key, value in _flat(results)]
    return [(key, "–" if value == "nan" else value) for key, value in rows]


def _figure(figure: Figure) -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (figure.light, figure.dark))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(figure.description)}" width="1280" height="608"></picture>'
        f"<figcaption>{escape(figure.title)}. {escape(figure.description)}</figcaption></figure>"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
    return f"<table><tbody>{body}</tbody></table>"


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON as rows, `a.b` for b in a."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _flat(entry, f"{prefix}{key}.")
        elif isinstance(entry, float):
            yield f"{prefix}{key}", f"{entry:.6g}"
        elif isinstance(entry, list):
            yield f"{prefix}{key}", ", ".join(map(str, entry))
        else:
            yield f"{prefix}{key}", "–" if entry is None else str(entry)


def _digits(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
