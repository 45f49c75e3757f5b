"""Small pictures of numbers, as SVG files in data URIs, legible on light and on dark ground."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from jobs.metrics import half_width, name_of, percent

COLOURS = ("#3584e4", "#e66100", "#9141ac", "#2a9d76", "#d6336c", "#77767b")
AGAIN = (("o", "-"), ("s", ":"), ("^", "-."))  # mark and stroke of the first lines, and of those beyond the colours
GREY = "#8b8b90"
LONGEST = 44  # letters of a title that fit
LONGEST_STAGES = 8  # bars that fit
INK = "#010203"  # stands for the colour of the text around, which only the reader's browser knows
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "winnow", "font.family": "sans-serif", "font.size": 9, "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.linewidth": 0.6,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.frameon": False, "legend.fontsize": 8,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "text.parse_math": False,
}  # fmt: skip
# As an image the file has no parent to inherit from, so it brings both colours along.
SCHEME = "<style>svg{color:#3d3d42}@media(prefers-color-scheme:dark){svg{color:#c9c9ce}}</style>"


@dataclass(frozen=True)
class Line:
    """One arm's values over the rounds, and how far the band around each reaches (0 where that is unknown)."""

    name: str
    rounds: Sequence[int]
    values: Sequence[float]
    halves: Sequence[float]
    best: int | None = None


def _axes(title: str, subtitle: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.6, 2.5))
    axes = figure.add_axes((0.155, 0.175, 0.81, 0.605))
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_alpha(0)
    figure.text(0.02, 0.925, title if len(title) <= LONGEST else title[: LONGEST - 1] + "…", weight="bold", size=10)
    figure.text(0.02, 0.845, subtitle, size=8, alpha=0.75)
    return figure, axes


def _legend(figure: Figure) -> None:
    """Below the axes, where it hides nothing: in one row beside their name, or in rows of its own below it."""
    count = len(figure.axes[0].get_legend_handles_labels()[1])
    for columns in range(count, 0, -1):
        top, room = (0.11, 0.78) if columns == count else (0.05, 0.97)
        legend = figure.legend(
            loc="upper right", bbox_to_anchor=(0.98, top), ncols=columns, handlelength=1.2, columnspacing=1.2
        )
        if columns == 1 or _inches(figure, legend).width <= room * figure.get_figwidth():
            return
        legend.remove()


def _inches(figure: Figure, legend: Legend) -> Bbox:
    pixels = legend.get_window_extent(FigureCanvasAgg(figure).get_renderer())
    return Bbox(pixels.get_points() / figure.dpi)


def _uri(figure: Figure) -> str:
    out = io.StringIO()
    # A legend of many rows goes on below the figure, which then ends lower.
    bottom = min([0.0, *(_inches(figure, legend).y0 for legend in figure.legends)])
    whole = Bbox.from_extents(0, bottom, *figure.get_size_inches())
    with warnings.catch_warnings():
        # Text stays text: it is the browser's fonts that must have the letters, not Matplotlib's.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(out, format="svg", transparent=True, bbox_inches=whole, metadata={"Date": None, "Creator": None})
    text = out.getvalue().replace(INK, "currentColor")
    start = text.index(">", text.index("<svg")) + 1
    # The head names DTDs by their address: nothing fetches them, and nothing needs them.
    svg = text[text.index("<svg") : start] + SCHEME + text[start:]
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def curves(summary: dict[str, Any], metrics: Mapping[str, str]) -> list[tuple[str, str]]:
    """A chart for each metric (name: what it is) of a summary: its title and the picture, all arms in it."""
    charts = []
    for metric, role in metrics.items():
        lines = []
        for name, arm in summary["arms"].items():
            rows = [(row["round"], row["metrics"][metric]) for row in arm["rounds"] if metric in row["metrics"]]
            if rows:
                values = [figure["value"] for _, figure in rows]
                halves = [half_width(figure) or 0.0 for _, figure in rows]
                best = arm["best_round"] if arm["judged"] else None
                lines.append(Line(name, [number for number, _ in rows], values, halves, best))
        scale = 100.0 if percent(metric) else 1.0
        title = name_of(metric) + (", %" if percent(metric) else "")
        charts.append((title, curve(title, role, lines, summary["real"].get(metric), scale)))
    return charts


def curve(
    title: str, subtitle: str, lines: Sequence[Line], ceiling: float | None = None, scale: float = 1.0,
    axis: str = "round", tens: bool = False,
) -> str:  # fmt: skip
    """Values over the rounds, or what ``axis`` says, a line an arm, its best round ringed; ``ceiling`` is what real
    images reach. ``tens``: both on scales of tens, for what grows in proportion."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, subtitle)
        for i, line in enumerate(lines):
            again, turn = divmod(i, len(COLOURS))
            colour, (mark, stroke) = COLOURS[turn], AGAIN[again % len(AGAIN)]
            x, y, half = np.asarray(line.rounds), scale * np.asarray(line.values), scale * np.asarray(line.halves)
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.18, linewidth=0)
            axes.plot(x, y, stroke, color=colour, marker=mark, markersize=3.5, linewidth=1.6, label=line.name)
            if len(x) == 1:  # a band over one round has no area
                axes.errorbar(x, y, yerr=half, color=colour, linewidth=1, capsize=3)
            best = x == line.best
            if best.any() and len(x) > 1:
                axes.plot(x[best], y[best], "o", markersize=9, markerfacecolor="none", markeredgecolor=colour)
                spot = float(x[best][0]), float(y[best][0])
                axes.annotate("best", spot, (0, 8), textcoords="offset points", ha="center", size=7.5)
        if ceiling is not None:
            axes.axhline(scale * ceiling, color=GREY, linestyle="--", linewidth=1, label="real images")
        if tens:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for side in (axes.xaxis, axes.yaxis):
                side.set_major_formatter("{x:,.9g}")  # no formula, which is not set in this style
                side.set_minor_formatter("")
        else:
            last = max((max(line.rounds) for line in lines), default=0)
            edge = max(0.25, last / 50)  # room for the marks at both ends
            axes.set_xlim(-edge, max(1, last) + edge)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(axis, loc="left", labelpad=1)
        axes.margins(y=0.14)
        if len(lines) > 1 or ceiling is not None:
            _legend(figure)
        return _uri(figure)


def histogram(
    title: str, subtitle: str, groups: Sequence[tuple[str, np.ndarray]], mark: tuple[str, float] | None = None
) -> str:
    """Shares over common bins, the first group in the strong colour; ``mark`` is a line with its name."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, subtitle)
        finite = [(name, values[np.isfinite(values)]) for name, values in groups]
        pooled = np.concatenate([values for _, values in finite])
        edges = np.histogram_bin_edges(pooled if len(pooled) else np.zeros(1), bins=30).tolist()
        for (name, values), colour in zip(finite, (COLOURS[0], GREY, COLOURS[1]), strict=False):
            if len(values):
                share = np.full(len(values), 100 / len(values))
                label = f"{name} ({len(values):,})"
                axes.hist(values, edges, weights=share, color=colour, alpha=0.35, linewidth=0)
                axes.hist(values, edges, weights=share, color=colour, histtype="step", linewidth=1.2, label=label)
        if mark is not None:
            axes.axvline(mark[1], color=INK, linestyle="--", linewidth=1, label=mark[0])
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_ylabel("% of samples", labelpad=2)
        _legend(figure)
        return _uri(figure)


def bars(title: str, subtitle: str, stages: Mapping[str, Mapping[str, float]], arms: Sequence[str]) -> str:
    """Seconds by stage, the longest first, a piece an arm in the colour of its curves."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(title, subtitle)
        axes.set_position((0.335, 0.175, 0.63, 0.605))
        names = list(stages)[:LONGEST_STAGES]
        colours = dict(zip(arms, COLOURS * len(arms), strict=False))
        spenders = {arm for name in names for arm in stages[name]}
        found = [*(arm for arm in arms if arm in spenders), *sorted(spenders.difference(arms))]
        left = np.zeros(len(names))
        for arm in found:
            seconds = np.asarray([stages[name].get(arm, 0.0) for name in names])
            axes.barh(range(len(names)), seconds, left=left, color=colours.get(arm, GREY), alpha=0.8, label=arm)
            left += seconds
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        _legend(figure)
        return _uri(figure)
