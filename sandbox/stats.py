"""What a run tells about itself: totals, and a record per trapped instruction."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the run does not do exactly, met at ``rip``."""

    rip: int
    text: str

    def __str__(self) -> str:
        return f"{self.rip:#x}: {self.text}"


@dataclass(slots=True)
class Stats:
    """Where the time went. Seconds by ``time.perf_counter``; of a run with many stops the share of
    the handler tier is estimated from a sample."""

    fast_seconds: float = 0.0
    fallback_seconds: float = 0.0
    fallback_count: int = 0
    by_mnemonic: dict[str, int] = field(default_factory=dict)
    lowered_sites: dict[str, int] = field(default_factory=dict)
    """How many trapped instructions run as sequences of allowed ones, by mnemonic."""
    lowered: dict[str, int] = field(default_factory=dict)
    """How often these ran, if ``Settings.count_lowered`` was set; not part of the fallback."""
    notices: list[Notice] = field(default_factory=list)
    """What the user should know about this run's exactness."""


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One trapped instruction, for people: what it was, who took it, how long that took."""

    rip: int
    raw: bytes
    text: str
    reason: str
    handler: str
    seconds: float
