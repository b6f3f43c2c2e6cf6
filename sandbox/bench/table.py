"""The results of ``sandbox bench`` as text."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from sandbox.bench.measure import Figure, Result


def number(value: float) -> str:
    """``value`` with three significant digits at least, never as a power of ten."""
    return f"{value:.{max(0, 2 - _magnitude(value))}f}"


def _magnitude(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


_NAME, _OURS = 40, 64
HEADER = (
    f"{'':<{_NAME}} {'sandbox':>8}".ljust(_OURS)
    + f" {'peer':<20} {'its time':>8} {'ratio':>8}    (lowest .. highest)"
)
"""Above the lines; the ratio is the peer's time divided by ours."""


class Table:
    """Lines of results, in the order they come: what is compared stands once, its peers below."""

    def __init__(self) -> None:
        self._last = ("", "")

    def line(self, result: Result) -> str:
        """The line of one result."""
        key = (result.suite, result.name)
        heading = ""
        if key != self._last:
            self._last = key
            heading = f"{result.suite} {result.name}"
            if isinstance(result, Figure):
                heading = f"{heading:<{_NAME}} {number(result.ours):>8} {result.unit}"
        if not isinstance(result, Figure):
            return f"{heading:<{_OURS}} {result.peer_name:<20} {result.text}"
        ratios = (result.ratio, result.ratio_low, result.ratio_high)
        middle, low, high = (number(ratio) for ratio in ratios)
        peer = f"{result.peer_name:<20} {number(result.peer):>8}"
        return f"{heading:<{_OURS}} {peer} {middle:>8} x  ({low} .. {high})"


def summary(results: Iterable[Result]) -> list[str]:
    """For each group of figures and each peer: the median ratio, the lowest and the highest."""
    ratios: dict[tuple[str, str, str], list[tuple[float, str]]] = {}
    for result in results:
        if isinstance(result, Figure) and result.group:
            key = (result.suite, result.group, result.peer_name)
            ratios.setdefault(key, []).append((result.ratio, result.name))
    lines = []
    for (suite, group, peer), pairs in ratios.items():
        (low, lowest), (high, highest) = min(pairs), max(pairs)
        middle = median(ratio for ratio, _name in pairs)
        lines.append(
            f"{suite} {group} against {peer}: median {number(middle)} x of {len(pairs)}, "
            f"lowest {number(low)} ({lowest}), highest {number(high)} ({highest})"
        )
    return lines
