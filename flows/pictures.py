"""The pictures of a report: each as SVG for the page, where CSS colours it, and as a PNG file."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# On white, as in the PNG files; and on a dark page. The SVG has names (CSS variables) instead.
PALETTE = {
    "ink": ("#1f2421", "#e4e8e2"),
    "muted": ("#5f6862", "#9aa59d"),
    "grid": ("#dfe3dd", "#363d38"),
    "plain": ("#64748c", "#93a4bd"),  # models that were not taught
    "taught": ("#5f7d12", "#b4cf63"),
}
INK, MUTED, GRID, PLAIN, TAUGHT = (light for light, _ in PALETTE.values())
WIDTH = 4.0  # inches, of 72 units in the SVG: about a phone's width, so text keeps its size there
DPI = 200
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "olivepress",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
}


@dataclass(frozen=True)
class About:
    """What a picture shows, in words."""

    name: str
    """Of its PNG file, without the ending."""
    title: str
    caption: str


@dataclass(frozen=True)
class Picture:
    """One picture in both forms."""

    about: About
    svg: str
    """An <svg> element whose ids begin with the picture's name."""
    png: bytes


Point = tuple[str, float, bool]
"""A label, its figure, and whether it is of a taught model."""


def bars(about: About, points: Sequence[Point]) -> Picture:
    """Perplexities, as bars as long as their logarithms: the losses, in nats a token."""

    def draw(axes: Axes) -> None:
        _rows(axes, points, [math.log(max(value, 1)) for _, value, _ in points])
        axes.set_xlabel("loss, nats a token")

    return _picture(about, draw, height=0.7 + 0.31 * len(points))


def _rows(axes: Axes, points: Sequence[Point], lengths: Sequence[float]) -> None:
    """A bar for each point, with its figure beside it."""
    colors = [TAUGHT if taught else PLAIN for *_, taught in points]
    axes.barh([label for label, *_ in points], lengths, color=colors, height=0.55)
    for at, (_, value, _) in enumerate(points):
        axes.annotate(
            _figure(value), (lengths[at], at), (4, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.set_xlim(0, max(*lengths, 1e-9) * 1.3)  # room for the figures
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="x")


def sizes(about: About, points: Sequence[tuple[str, float, float, bool]]) -> Picture:
    """(label, MB, perplexity, taught) of each model, in the order of the pipeline.

    Upwards is the logarithm of perplexity, as in `bars`.
    """

    def draw(axes: Axes) -> None:
        x = [size for _, size, _, _ in points]
        y = [math.log(max(value, 1)) for _, _, value, _ in points]
        axes.plot(x, y, color=GRID, zorder=1)
        for at, (label, _, value, taught) in enumerate(points):
            axes.plot(x[at], y[at], "o", color=TAUGHT if taught else PLAIN, markersize=7)
            up = -14 if label.startswith("ONNX") else 8  # it is where quantized is
            axes.annotate(
                f"{label} {_figure(value)}",
                (x[at], y[at]),
                (0, up),
                textcoords="offset points",
                ha="center",
            )
        axes.set_xlim(0, max(x) * 1.25)
        axes.margins(y=0.25)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("MB on disk")
        axes.set_ylabel("loss, nats a token")
        axes.grid()

    return _picture(about, draw)


def line(
    about: About,
    points: Sequence[tuple[float, float]],
    labels: tuple[str, str],
    taught: bool = False,
) -> Picture:
    """(x, y) joined by a line, with a mark on each where they are few; `labels` of both axes."""

    def draw(axes: Axes) -> None:
        x, y = zip(*points, strict=True)
        mark = "o" if len(points) <= 40 else ""
        axes.plot(x, y, mark + "-", color=TAUGHT if taught else PLAIN, markersize=4, linewidth=1.4)
        axes.set_ylim(0, max(*y, 1e-9) * 1.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.annotate(
            _figure(y[-1]), (x[-1], y[-1]), (0, 7), textcoords="offset points", ha="right"
        )
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid()

    return _picture(about, draw)


def scatter(
    about: About, points: Sequence[tuple[float, float, str, str]], labels: tuple[str, str]
) -> Picture:
    """(x, y, label, kind): points of kind `front` are joined, others stand alone."""

    def draw(axes: Axes) -> None:
        front = sorted((x, y) for x, y, _, kind in points if kind == "front")
        axes.plot([x for x, _ in front], [y for _, y in front], color=TAUGHT, linewidth=1.2)
        for x, y, label, kind in points:
            color = TAUGHT if kind == "front" else PLAIN
            mark = "o" if kind in ("front", "met") else "x"
            axes.plot(x, y, mark, color=color, markersize=6)
            axes.annotate(label, (x, y), (5, 4), textcoords="offset points", fontsize=7)
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid()

    return _picture(about, draw, height=2.8)


def speed(about: About, parts: Sequence[tuple[str, Sequence[Point]]]) -> Picture:
    """Bars from 0, a group for each quantity: (its name with the unit, its points)."""

    def draw(*axes: Axes) -> None:
        for own, (quantity, points) in zip(axes, parts, strict=True):
            _rows(own, points, [value for _, value, _ in points])
            own.set_xlabel(quantity)

    return _picture(about, draw, rows=len(parts), height=1.15 * len(parts))


def _figure(value: float) -> str:
    """Four digits, or all of those before the point of fewer than seven."""
    if value < 1 or value >= 1e6:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - int(math.log10(value)))}f}"


def _picture(
    about: About,
    draw: Callable[..., None],
    rows: int = 1,
    height: float = 2.4,
) -> Picture:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(*figure.subplots(rows, squeeze=False)[:, 0])
        svg, png = io.StringIO(), io.BytesIO()
        # Without any of these fields there is no block of them, which names hosts.
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(svg, format="svg", metadata=nothing)
        figure.suptitle(about.title, fontsize=10)
        figure.savefig(png, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return Picture(about, inline(svg.getvalue(), about), png.getvalue())


def inline(svg: str, about: About) -> str:
    """The <svg> element alone, as wide as its place, with CSS variables for colours.

    Name and title go into the markup as they are: they are adapters' names and words of ours.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{about.title}"', 1)
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{about.name}-", svg)
    for variable, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg


def finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def markdown(pictures: Sequence[Picture]) -> str:
    """The pictures themselves as Markdown, for an artifact of a run."""
    data = [(one.about.title, base64.b64encode(one.png).decode()) for one in pictures]
    return "\n\n".join(f"![{title}](data:image/png;base64,{png})" for title, png in data)


def write(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write the PNG files."""
    paths = [folder / f"{picture.about.name}.png" for picture in pictures]
    for path, picture in zip(paths, pictures, strict=True):
        path.write_bytes(picture.png)
    return paths
