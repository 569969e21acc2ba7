"""The pictures of a run, drawn by matplotlib (no display needed), each for light and for dark pages."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Curves:
    """The metrics of a run as columns of float64, one value a record, NaN where a record has none.

    Attributes:
        train: `step`, `tokens`, `loss`, `lr`, `grad_norm`, `tokens_per_s`, `seconds`, `skipped` by update.
        heldout: `step`, `tokens`, `loss`, `bits_per_byte` by evaluation.
        restarts: tokens seen when the run was started again.
        lost: stretches of tokens that a start had trained on when it ended, and that were trained on again.
        compressors: bits per byte of the held-out text by program name.
    """

    train: Columns
    heldout: Columns
    restarts: Sequence[float] = ()
    lost: Sequence[tuple[float, float]] = ()
    compressors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """One picture: file name without ending, title, what it shows in words, and the PNG for either kind of page."""

    name: str
    title: str
    description: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Theme:
    """Colours of a kind of page: its own, those of words and lines, and four that curves are told apart by."""

    page: str
    text: str
    grid: str
    first: str
    second: str
    third: str
    fourth: str


# Blue, orange, green and purple of Okabe and Ito's palette, which colour-blind readers can tell apart.
LIGHT = Theme("#ffffff", "#24292f", "#d8dee4", "#0072b2", "#d55e00", "#009e73", "#8250a8")
DARK = Theme("#161b22", "#e6edf3", "#30363d", "#56b4e9", "#e69f00", "#2bc49a", "#cc9be0")


def draw_figures(curves: Curves) -> list[Figure]:
    """Every picture that the metrics have values for. Raises `UserError` where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError('the report draws with matplotlib; pip install "headrace[report]"') from None
    wanted: list[tuple[str, str, Callable[[Any, Curves, Theme], str], bool]] = [
        ("loss", "Loss", _draw_loss, _has(curves.train, "loss") or _has(curves.heldout, "loss")),
        ("bits_per_byte", "Held-out bits per byte", _draw_bits_per_byte, _has(curves.heldout, "bits_per_byte")),
        ("learning_rate", "Learning rate", _draw_learning_rate, _has(curves.train, "lr")),
        ("gradient_norm", "Gradient norm", _draw_gradient_norm, _has(curves.train, "grad_norm")),
        ("tokens_per_second", "Tokens per second", _draw_speed, _has(curves.train, "tokens_per_s")),
    ]
    figures = []
    for name, title, draw, there in wanted:
        if there:
            bound = lambda axes, theme, draw=draw: draw(axes, curves, theme)
            light, description = render(bound, LIGHT, curves.restarts)
            dark, _ = render(bound, DARK, curves.restarts)
            figures.append(Figure(name, title, description, light, dark))
    return figures


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over a window of 2% of the values around each, the NaN among them left out.

    The window shrinks towards the start, evenly on both sides, so that the steep beginning is not drawn too high.
    """
    count, half = len(values), len(values) // 100
    place = np.arange(count)
    before = np.minimum(half, place)
    first, last = place - before, np.minimum(place + before, count - 1)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    with np.errstate(invalid="ignore"):
        return (sums[last + 1] - sums[first]) / (counts[last + 1] - counts[first])


def last_finite(values: np.ndarray) -> float:
    """The last value that is a number, NaN where there is none."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def short_count(value: float) -> str:
    """A count in three digits: 950, 1.5 K, 12.3 M, 4 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def _has(columns: Columns, key: str) -> bool:
    return bool(np.isfinite(columns[key]).any())


def render(draw: Callable[[Any, Theme], str], theme: Theme, restarts: Sequence[float] | None = ()) -> tuple[bytes, str]:
    """One PNG of 1280 × 608 pixels, and what `draw` says it shows; None for `restarts` where x is not tokens."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.page,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "xtick.labelcolor": theme.text,
        "ytick.labelcolor": theme.text,
        "grid.color": theme.grid,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(8, 3.8), dpi=160, facecolor=theme.page, layout="constrained")
        axes = canvas.add_subplot()
        description = draw(axes, theme)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
        if restarts is not None:
            _over_tokens(axes, theme, restarts)
        picture = io.BytesIO()
        canvas.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue(), description


def _over_tokens(axes: "Axes", theme: Theme, restarts: Sequence[float]) -> None:
    """What all pictures of curves over tokens have."""
    from matplotlib.ticker import FuncFormatter

    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("tokens trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    for number, tokens in enumerate(restarts):
        label = None if number else "restart"
        axes.axvline(tokens, color=theme.text, alpha=0.55, linewidth=0.9, linestyle=(0, (1, 2)), label=label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _line(axes: "Axes", columns: Columns, key: str, **style: Any) -> None:
    """A curve over tokens; a gap where there is no number, dots where there are few."""
    marker = "o" if len(columns[key]) <= 40 else None
    axes.plot(columns["tokens"], columns[key], **({"linewidth": 1.8, "marker": marker, "markersize": 4} | style))


def _draw_loss(axes: "Axes", curves: Curves, theme: Theme) -> str:
    train, words = curves.train, []
    if _has(train, "loss"):
        _line(axes, train, "loss", color=theme.first, linewidth=0.7, alpha=0.4, marker=None)
        smooth = smoothed(train["loss"])
        axes.plot(train["tokens"], smooth, color=theme.first, linewidth=1.8, label="training, smoothed")
        words.append(f"training loss from {_first_finite(train['loss']):.3f} to {last_finite(smooth):.3f}")
    if _has(curves.heldout, "loss"):
        _line(axes, curves.heldout, "loss", color=theme.second, label="held out")
        words.append(f"held-out loss ends at {last_finite(curves.heldout['loss']):.3f}")
    for number, (first, last) in enumerate(curves.lost):
        label = None if number else "trained again"
        axes.axvspan(first, last, color=theme.fourth, alpha=0.25, linewidth=0, label=label)
    if curves.restarts:
        again = len(curves.restarts)
        words.append(f"started again {'once' if again == 1 else f'{again} times'}")
    axes.set_ylabel("nats per token")
    return f"Loss in nats per token against tokens: {', '.join(words)}."


def _draw_bits_per_byte(axes: "Axes", curves: Curves, theme: Theme) -> str:
    _line(axes, curves.heldout, "bits_per_byte", color=theme.second, label="this model")
    for (name, value), colour in zip(curves.compressors.items(), (theme.third, theme.fourth), strict=False):
        axes.axhline(value, color=colour, linewidth=1.4, linestyle="--", label=f"{name}: {value:.3f}")
    axes.set_ylabel("bits per byte")
    beside = "".join(f"; {name} needs {value:.3f}" for name, value in curves.compressors.items())
    last = last_finite(curves.heldout["bits_per_byte"])
    return f"Held-out bits per byte against tokens, ending at {last:.3f}{beside}."


def _draw_learning_rate(axes: "Axes", curves: Curves, theme: Theme) -> str:
    _line(axes, curves.train, "lr", color=theme.first, marker=None)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate")
    peak, last = np.nanmax(curves.train["lr"]), last_finite(curves.train["lr"])
    return f"Learning rate against tokens: at most {peak:.3g}, at the end {last:.3g}."


def _draw_gradient_norm(axes: "Axes", curves: Curves, theme: Theme) -> str:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    norm = curves.train["grad_norm"]
    _line(axes, curves.train, "grad_norm", color=theme.first, linewidth=0.7, alpha=0.4, marker=None)
    smooth = smoothed(norm)
    axes.plot(curves.train["tokens"], smooth, color=theme.first, linewidth=1.8, label="smoothed")
    if np.nanmin(norm) > 0 and np.nanmax(norm) / np.nanmin(norm) > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("global norm of the gradient")
    return f"Gradient norm against tokens: median {np.nanmedian(norm):.3g}, largest {np.nanmax(norm):.3g}."


def _draw_speed(axes: "Axes", curves: Curves, theme: Theme) -> str:
    from matplotlib.ticker import FuncFormatter

    speed = curves.train["tokens_per_s"]
    median = float(np.nanmedian(speed))
    _line(axes, curves.train, "tokens_per_s", color=theme.first, linewidth=1.0, marker=None)
    axes.axhline(median, color=theme.second, linewidth=1.4, linestyle="--", label=f"median: {short_count(median)}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    return f"Tokens per second against tokens: median {short_count(median)}."


def _first_finite(values: np.ndarray) -> float:
    return last_finite(values[::-1])
