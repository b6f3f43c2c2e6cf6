"""Pairs of measurements, taken in turn, and their ratio with its spread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a suite. ``ours`` and ``peer`` are medians in ``unit``; the ratio is
    ``peer / ours`` (above 1: we are faster), by pairs of neighbouring runs."""

    suite: str
    name: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    ratio_low: float
    ratio_high: float

    def __str__(self) -> str:
        spread = f"({self.ratio_low:.2f} .. {self.ratio_high:.2f})"
        return (
            f"{self.suite:<10} {self.name:<34} {self.ours:>10.1f} {self.unit:<9} "
            f"{self.peer_name} {self.peer:>10.1f}   {self.ratio:6.2f} x {spread}"
        )


def compare(
    suite: str,
    name: str,
    unit: str,
    scale: float,
    ours: Callable[[], float],
    peer: Callable[[], float],
    peer_name: str,
) -> Figure:
    """Time both in turn :data:`ROUNDS` times; ``scale`` turns seconds into ``unit``."""
    ours(), peer()
    pairs = [(ours(), peer()) for _round in range(ROUNDS)]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    return Figure(
        suite,
        name,
        unit,
        median(mine for mine, _theirs in pairs) * scale,
        median(theirs for _mine, theirs in pairs) * scale,
        peer_name,
        median(ratios),
        ratios[0],
        ratios[-1],
    )
