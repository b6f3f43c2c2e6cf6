"""The results of ``sandbox bench`` as a picture: ratios on a logarithmic axis, suite by suite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from sandbox.bench.measure import Figure, Note, Result
from sandbox.bench.table import number
from sandbox.errors import SandboxError

FORMATS = (".png", ".svg", ".pdf")
COLUMNS = 3
_ROW_INCHES, _FRAME_ROWS, _WIDTH_INCHES = 0.21, 4.6, 18.0
_LEGEND_COLUMNS = 3
_MARGIN = 1.9
"""Room beside the outermost ratios, as a factor: for their numbers."""
_TITLES = {
    "fastpath": "Loops of allowed instructions",
    "fallback": "Instructions that Unicorn does not have",
    "operations": "Single instructions in handlers",
    "startup": "Starting up",
    "scaling": "Scaling",
    "kvm": "The engine kvm",
    "programs": "C programs",
}
_COLOURS = {
    "sandbox": "#d00000",
    "native": "#555555",
    "qemu-x86_64": "#0072b2",
    "bochs": "#e69f00",
    "unicorn": "#009e73",
    "unicorn-protected": "#8fd0b8",
    "unicorn, hook each": "#cc79a7",
    "hook that skips": "#cc79a7",
    "hook and emulate": "#d55e00",
    "hook, hard-coded": "#f0a070",
}
"""Peers that stand in several panels have one colour in all of them."""
_OTHERS = ("#56b4e9", "#a07000", "#7f7fbf", "#b0b000")


_EXPLANATION = (
    "Time of the peer divided by time of the sandbox, medians with their range. Right of 1x, on "
    "green: the sandbox is faster. Left: the peer."
)


@dataclass
class Panel:
    """One frame of the picture: ``rows`` are the names from top to bottom."""

    title: str
    rows: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def height(self) -> float:
        """In rows, with its frame."""
        return len(self.rows) + _FRAME_ROWS

    def row(self, name: str) -> str:
        """The row that a result of this name stands in."""
        return name if name in self.rows else name.rpartition(" ")[0]

    def peers(self) -> list[str]:
        """Those that have a ratio here, in the order they came."""
        return list(dict.fromkeys(figure.peer_name for figure in self.figures))


def check(path: Path) -> None:
    """Raise :class:`SandboxError` if no picture can be written there: before hours of measuring."""
    if path.suffix not in FORMATS:
        raise SandboxError(f"{path}: a picture is one of {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SandboxError(
            "--picture needs matplotlib: pip install matplotlib, or unicorn-fallback[bench]"
        ) from None


def panels(results: Iterable[Result]) -> list[Panel]:
    """A panel for each suite, or for each group of a suite whose names repeat (C programs)."""
    found: dict[tuple[str, str], Panel] = {}
    for result in results:
        if not result.name:
            continue
        group = result.group if result.suite == "programs" else ""
        title = _TITLES.get(result.suite, result.suite)
        if group:
            title += f" built for x86-64-{group}"
        panel = found.setdefault((result.suite, group), Panel(title))
        row = result.name.removesuffix(f" {group}") if group else result.name
        if row not in panel.rows:
            panel.rows.append(row)
        if isinstance(result, Figure):
            panel.figures.append(result)
        else:
            panel.notes.append(result)
    return list(found.values())


def columns(every: Sequence[Panel]) -> list[list[Panel]]:
    """The panels in their order over :data:`COLUMNS` columns, so that the tallest is lowest."""
    number = min(COLUMNS, len(every))

    def split(cuts: Sequence[int]) -> list[list[Panel]]:
        edges = (0, *cuts, len(every))
        return [list(every[start:end]) for start, end in pairwise(edges)]

    ways = (split(cuts) for cuts in combinations(range(1, len(every)), number - 1))
    return min(ways, key=lambda stacks: max(_height(stack) for stack in stacks))


def _height(stack: Iterable[Panel]) -> float:
    return sum(panel.height for panel in stack)


def draw(results: Sequence[Result], caption: str, path: Path) -> None:
    """Write the picture; its format is that of the suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stacks = columns(panels(results))
    height = max(_height(stack) for stack in stacks) * _ROW_INCHES + 1.0
    picture: Any = pyplot.figure(figsize=(_WIDTH_INCHES * len(stacks) / COLUMNS, height))
    for column, stack in enumerate(stacks):
        top = height - 0.85
        for panel in stack:
            rows = len(panel.rows) * _ROW_INCHES
            left, width = (column + 0.42) / len(stacks), 0.54 / len(stacks)
            place = (left, (top - rows - 0.6) / height, width, rows / height)
            _draw_panel(picture.add_axes(place), panel)
            top -= panel.height * _ROW_INCHES
    for text, inches, size, weight in (
        ("How many times faster the sandbox is", 0.25, 16, "bold"),
        (_EXPLANATION, 0.5, 10, "normal"),
        (caption, 0.7, 8, "normal"),
    ):
        picture.text(0.01, 1 - inches / height, text, fontsize=size, weight=weight, va="center")
    picture.savefig(path, dpi=110)
    pyplot.close(picture)


def _draw_panel(axes: Any, panel: Panel) -> None:
    from matplotlib.transforms import ScaledTranslation

    def above(points: float) -> Any:
        return ScaledTranslation(0, points / 72, axes.figure.dpi_scale_trans)

    peers = panel.peers()
    low, high = _range(panel.figures)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.axvspan(1, high, color="#eef6ee", zorder=0)
    axes.axvline(1, color="black", linewidth=1.2, zorder=1)
    axes.grid(axis="x", which="major", color="#dddddd", zorder=0.5)
    axes.text(
        -0.69, 1, panel.title, fontsize=11, weight="bold", transform=axes.transAxes + above(31)
    )
    axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:g}x")
    axes.xaxis.minorticks_off()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    for place, peer in enumerate(peers):  # the legend has each peer once, drawn in any row
        axes.plot((), (), "o", color=_colour(peer, place), markersize=5, label=peer)
    for row, name in enumerate(panel.rows):
        figures = [figure for figure in panel.figures if panel.row(figure.name) == name]
        for place, figure in enumerate(figures):
            colour = _colour(figure.peer_name, peers.index(figure.peer_name))
            y = row + (place - (len(figures) - 1) / 2) * min(0.22, 0.7 / len(figures))
            _draw_figure(axes, figure, y, colour, with_number=len(figures) == 1)
    for note in panel.notes:
        if note.peer_name in _COLOURS:
            y = panel.rows.index(panel.row(note.name))
            axes.plot(
                low, y, "x", color=_COLOURS[note.peer_name], markersize=5, clip_on=False, zorder=5
            )
    if any(note.peer_name in _COLOURS for note in panel.notes):
        axes.plot((), (), "x", color="#666666", markersize=5, label="refuses, or is wrong")
    axes.legend(
        loc="upper left", bbox_to_anchor=(-0.72, 1.0), bbox_transform=axes.transAxes + above(30),
        ncols=_LEGEND_COLUMNS, fontsize=8, frameon=False, handletextpad=0.2, columnspacing=1.0,
        borderaxespad=0, labelspacing=0.2,
    )  # fmt: skip


def _range(figures: Sequence[Figure]) -> tuple[float, float]:
    """Thirds of a decade that hold every ratio, and 1."""
    if not figures:
        return 0.1, 10.0
    low = min(1.0, *(figure.ratio_low for figure in figures)) / _MARGIN
    high = max(1.0, *(figure.ratio_high for figure in figures)) * _MARGIN
    return 10 ** (math.floor(math.log10(low) * 3) / 3), 10 ** (math.ceil(math.log10(high) * 3) / 3)


def _colour(peer: str, place: int) -> str:
    return _COLOURS.get(peer) or _OTHERS[place % len(_OTHERS)]


def _draw_figure(axes: Any, figure: Figure, y: float, colour: str, *, with_number: bool) -> None:
    low, ratio, high = figure.ratio_low, figure.ratio, figure.ratio_high
    axes.plot((1, ratio), (y, y), color=colour, linewidth=2.2, alpha=0.45, zorder=2)
    axes.plot((low, high), (y, y), color=colour, linewidth=0.9, zorder=3)
    axes.plot(ratio, y, "o", color=colour, markersize=4.5, zorder=4)
    if with_number:
        at, side, align = (high, 5, "left") if ratio >= 1 else (low, -5, "right")
        axes.annotate(
            number(ratio), (at, y), (side, 0), textcoords="offset points", ha=align, va="center",
            fontsize=7, zorder=6,
        )  # fmt: skip
