"""Signatures of vector operations: the lane types of the sources and of the result.

``"u4,u4->u4"``; the notation is explained in :mod:`handlers.vector`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from handlers.operands import Place


@dataclass(frozen=True, slots=True)
class LaneType:
    """One item of a signature: NumPy kind, bytes per lane (0: as the operand), lanes per row."""

    kind: str
    size: int
    row: int

    @classmethod
    def parse(cls, text: str) -> LaneType:
        """``u4``, ``i*``, ``u1x16`` or ``b``; ValueError says what is wrong."""
        if text == "b":
            return cls("b", 1, 0)
        match = re.fullmatch(r"([uif])([1248]|\*)(?:x(\d+))?", text)
        if match is None:
            raise ValueError(f"lane type {text!r}: want such as u4, f8, i*, u1x16 or b")
        kind, size, row = match.groups()
        return cls(kind, 0 if size == "*" else int(size), int(row or 0))

    def width(self, place: Place) -> int:
        """Bytes per lane in ``place``."""
        return self.size or place.size

    def view(self, place: Place, count: int) -> Any:
        """The first ``count`` lanes of ``place``."""
        if self.kind == "b":
            return place.bytes(count)
        lanes = place.lanes(f"{self.kind}{self.width(place)}", count)
        return lanes.reshape(-1, self.row) if self.row else lanes


@dataclass(frozen=True, slots=True)
class Signature:
    """Lane types of the sources and of the destination; None: the status flags."""

    sources: tuple[LaneType, ...]
    destination: LaneType | None

    @classmethod
    def parse(cls, text: str) -> Signature:
        """``"u4,u4->u4"``, ``"f4,f4->flags"``."""
        left, arrow, right = text.replace(" ", "").partition("->")
        if not arrow:
            raise ValueError(f"signature {text!r}: want such as 'u4,u4->u4'")
        sources = tuple(LaneType.parse(item) for item in left.split(","))
        return cls(sources, None if right == "flags" else LaneType.parse(right))
