"""Measurements taken in turn, and their ratios with the spread."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

TARGET_SECONDS = 0.03
"""How long one run of a loop takes. On a busy machine many short rounds tell more than a few long
ones: what disturbs one run then mostly disturbs its neighbours too. With 40 rounds, the same loop
measured against itself gives 1.000 within 0.5 % beside five busy neighbours on two cores."""
MOST_ITERATIONS = 0x7FFF_FFFF


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure: ``rounds`` of each comparison (None: as many as each suite needs),
    ``scale`` for the length of the runs (1 for figures that are worth keeping), and a pattern that
    a figure's "suite name" must match.
    """

    rounds: int | None = None
    scale: float = 1.0
    only: str = ""

    def wants(self, suite: str, name: str) -> bool:
        """Whether the figures ``name`` of ``suite`` are asked for."""
        return re.search(self.only, f"{suite} {name}") is not None

    def per_iteration(self, run: Callable[[int], float]) -> Callable[[], float]:
        """``run(count)`` gives the seconds of ``count`` iterations: the same for one iteration,
        with a count that takes :data:`TARGET_SECONDS`, scaled."""
        count, target = 16, TARGET_SECONDS * self.scale
        while (seconds := run(count)) < target and count < MOST_ITERATIONS:
            more = 1.2 * target / max(seconds, target / 16)
            count = min(round(count * max(2, more)), MOST_ITERATIONS)
        return lambda: run(count) / count

    def count(self, reference: int) -> int:
        """``reference`` repetitions, scaled; at least one."""
        return max(1, round(reference * self.scale))


@dataclass(frozen=True, slots=True)
class Figure:
    """Ours beside one peer. ``ours`` and ``peer`` are medians in ``unit``; the ratio is
    ``peer / ours`` (above 1: we are faster): the median over the rounds, the lowest and the
    highest. ``group`` names the figures that are summed up together within a suite."""

    suite: str
    name: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    ratio_low: float
    ratio_high: float
    group: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """A peer that has no figure under this name, and why. ``name`` is empty where the whole suite
    does without it."""

    suite: str
    name: str
    peer_name: str
    text: str
    group: str = ""


Result = Figure | Note


def compare(
    suite: str,
    name: str,
    unit: str,
    scale: float,
    ours: Callable[[], float],
    peer: Callable[[], float],
    peer_name: str,
    rounds: int,
) -> Figure:
    """Time ours and one peer in turn ``rounds`` times; ``scale`` turns seconds into ``unit``."""
    return next(compare_all(suite, name, unit, scale, ours, {peer_name: peer}, rounds))


def compare_all(
    suite: str,
    name: str,
    unit: str,
    scale: float,
    ours: Callable[[], float],
    peers: Mapping[str, Callable[[], float]],
    rounds: int,
    group: str = "",
) -> Iterator[Figure]:
    """Time ours and each peer in turn, once to warm up and then ``rounds`` times; every second
    round goes the other way round."""
    progress(f"{suite} {name}")
    runs = [ours, *peers.values()]
    for run in runs:
        run()
    samples = []
    for number in range(rounds):
        step = -1 if number % 2 else 1
        samples.append([run() for run in runs[::step]][::step])
    for place, peer_name in enumerate(peers, 1):
        pairs = [(sample[0], sample[place]) for sample in samples]
        yield figure(suite, name, unit, scale, pairs, peer_name, group)


def figure(
    suite: str,
    name: str,
    unit: str,
    scale: float,
    pairs: list[tuple[float, float]],
    peer_name: str,
    group: str = "",
) -> Figure:
    """The figure of ``pairs``: our time and the peer's in each round, in seconds."""
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
        group,
    )


def progress(text: str) -> None:
    """Say on a terminal what is being measured; the next line overwrites it."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text} ...", end="\r", file=sys.stderr, flush=True)
