"""The part of a run's page that shows where mixture-of-experts layers sent its tokens."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import DARK, LIGHT, Figure, Theme, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Records at the end of a run over which the load is averaged.
LAST_RECORDS = 10
# More layers than this get a legend of the first and last alone; more cells than this, no figures in them.
_LEGEND, _CELLS = 8, 200


@dataclass(frozen=True)
class RoutingCurves:
    """The `routing` records of a run: S records of n layers with X experts each.

    Attributes:
        layers: their numbers.
        tokens: seen by each record `(S,)`, NaN where that is not known.
        max_violation, entropy: `(S, n)`.
        load: over the mean of the layer's experts, averaged over the last records `(n, X)`.
        bias: at the end `(n, X)`.
        dropped: tokens, over all records.
    """

    layers: Sequence[int]
    tokens: np.ndarray
    max_violation: np.ndarray
    entropy: np.ndarray
    load: np.ndarray
    bias: np.ndarray
    dropped: int


def read_routing(records: Iterable[Mapping[str, Any]], tokens: Mapping[int, float]) -> RoutingCurves | None:
    """The curves of records of a run, with the tokens seen by step; None without any that can be read.

    Of a step that was trained twice the last record counts; records unlike the last one are passed over.
    """
    by_step: dict[int, tuple[Mapping[str, Any], list[np.ndarray]]] = {}
    for record in records:
        try:
            columns = [np.array(record[key], np.float64) for key in ("max_violation", "entropy", "load", "bias")]
        except (KeyError, TypeError, ValueError):
            continue
        if record.get("layers") and columns[2].ndim == 2 and columns[2].shape[0] == len(record["layers"]):
            by_step[record["step"]] = record, columns
    if not by_step:
        return None
    newest = by_step[max(by_step)]
    shapes = [column.shape for column in newest[1]]
    steps = [step for step in sorted(by_step) if [column.shape for column in by_step[step][1]] == shapes]
    violation, entropy, load, bias = (
        np.stack(columns) for columns in zip(*(by_step[s][1] for s in steps), strict=True)
    )
    return RoutingCurves(
        layers=newest[0]["layers"],
        tokens=np.array([tokens.get(step, math.nan) for step in steps]),
        max_violation=violation,
        entropy=entropy,
        load=load[-LAST_RECORDS:].mean(0) * load.shape[2],
        bias=bias[-1],
        dropped=sum(int(by_step[step][0].get("dropped", 0)) for step in steps),
    )


def draw_routing(curves: RoutingCurves, restarts: Sequence[float]) -> list[Figure]:
    """The pictures of a run's routing."""
    wanted = [
        ("routing_load", "Load of experts", _draw_load, False),
        ("routing_max_violation", "Uneven load", _draw_violation, True),
        ("routing_entropy", "Entropy of routing", _draw_entropy, True),
    ]
    figures = []
    for name, title, draw, over_tokens in wanted:
        bound = lambda axes, theme, draw=draw: draw(axes, curves, theme)
        (light, words), (dark, _) = (render(bound, theme, restarts if over_tokens else None) for theme in (LIGHT, DARK))
        figures.append(Figure(name, title, words, light, dark))
    return figures


def routing_summary(curves: RoutingCurves) -> list[tuple[str, str]]:
    """What is worth saying in words."""
    worst, (layer, expert) = _largest(curves.load)
    dead = [f"layer {curves.layers[i]}: expert {x}" for i, x in np.argwhere(curves.load == 0)]
    rows = [
        ("tokens dropped", f"{curves.dropped:,}"),
        ("largest load", f"{worst:.2f} times the mean (layer {curves.layers[layer]}, expert {expert})"),
        ("experts without a token at the end", ", ".join(dead) or "none"),
    ]
    if curves.bias.any():
        _, (layer, expert) = _largest(np.abs(curves.bias))
        value = curves.bias[layer, expert]
        rows.append(("largest balance bias", f"{value:+.4g} (layer {curves.layers[layer]}, expert {expert})"))
    return rows


def _largest(values: np.ndarray) -> tuple[float, tuple[int, int]]:
    row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return float(values[row, column]), (int(row), int(column))


def _draw_load(axes: "Axes", curves: RoutingCurves, theme: Theme) -> str:
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.ticker import MaxNLocator

    load = curves.load
    # The colour of the page is the mean: what stands out is uneven.
    colours = LinearSegmentedColormap.from_list("load", [theme.first, theme.page, theme.second])
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=max(2.0, float(np.nanmax(load))))
    image = axes.imshow(load, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    layers, experts = load.shape
    if load.size <= _CELLS:
        for (row, column), value in np.ndenumerate(load):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=theme.text)
    axes.set_yticks(range(layers), [str(layer) for layer in curves.layers])
    if layers > 24:
        axes.yaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.yaxis.set_major_formatter(lambda place, _: str(curves.layers[min(max(round(place), 0), layers - 1)]))
    axes.xaxis.set_major_locator(MaxNLocator(min(experts, 16), integer=True))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = axes.figure.colorbar(image, ax=axes, label="load over the mean", pad=0.02)
    bar.outline.set_visible(False)
    worst, (layer, expert) = _largest(load)
    return (
        f"Load of each expert over the mean of its layer, in the last {LAST_RECORDS} records at most: from "
        f"{np.nanmin(load):.2f} to {worst:.2f} (layer {curves.layers[layer]}, expert {expert}); 1 is even."
    )


def _draw_violation(axes: "Axes", curves: RoutingCurves, theme: Theme) -> str:
    _draw_by_layer(axes, curves, curves.max_violation, theme)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("largest load over mean, less 1")
    at_end = curves.max_violation[-1]
    return (
        "Largest load of an expert over the mean, less one, by layer, against tokens: at the end "
        f"{np.nanmin(at_end):.2f} to {np.nanmax(at_end):.2f}; 0 is even."
    )


def _draw_entropy(axes: "Axes", curves: RoutingCurves, theme: Theme) -> str:
    _draw_by_layer(axes, curves, curves.entropy, theme)
    most = math.log(curves.load.shape[1])
    axes.axhline(most, color=theme.text, linewidth=1.2, linestyle="--", label="all experts alike")
    axes.set_ylabel("nats per token")
    if np.isfinite(curves.entropy).any():  # room for the legend
        height = max(most - float(np.nanmin(curves.entropy)), 0.05 * most)
        axes.set_ylim(most - 1.5 * height, most + 0.1 * height)
    at_end = curves.entropy[-1]
    return (
        "Entropy of the router's distribution over experts, by layer, against tokens: at the end "
        f"{np.nanmin(at_end):.2f} to {np.nanmax(at_end):.2f} nats, of {most:.2f} at most."
    )


def _draw_by_layer(axes: "Axes", curves: RoutingCurves, values: np.ndarray, theme: Theme) -> None:
    from matplotlib import colormaps

    count = len(curves.layers)
    # By depth along a scale that colour-blind readers see too, without the end that the page would swallow.
    low, high = (0.0, 0.8) if theme is LIGHT else (0.35, 1.0)
    for place, layer in enumerate(curves.layers):
        colour = colormaps["cividis"](low + (high - low) * place / max(1, count - 1))
        named = count <= _LEGEND or place in (0, count - 1)
        marker = "o" if len(values) <= 40 else None
        style: dict[str, Any] = {"color": colour, "linewidth": 1.4, "marker": marker, "markersize": 3}
        axes.plot(curves.tokens, values[:, place], label=f"layer {layer}" if named else None, **style)
