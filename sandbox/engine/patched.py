"""Where blocks with a patch lie: what tells one from the others when it has to be forgotten.

To have a block translated again, Unicorn is told to forget all that overlaps some byte of it. If
other patched blocks held that byte, they would be thrown away too, and throw this one away in
turn when they come back: at each turn of a loop.
"""

from __future__ import annotations

from sandbox.memory import PAGE_SIZE


class PatchedBlocks:
    """The bytes that patched blocks cover, by linear address."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}
        self._own: dict[int, int] = {}

    def own_byte(self, start: int, end: int, patched_end: int) -> int:
        """Address of a byte of the block from ``start`` to ``end``, one that no other patched block
        covered when this was first asked if there is such, else its first. With its patch the block
        will cover all to ``patched_end``."""
        found = self._own.get(start)
        if found is None or found >= end:
            found = self._own[start] = self._free(start, end)
            self._cover(start, patched_end)
        return found

    def clear(self) -> None:
        """Forget all blocks."""
        self._pages.clear()
        self._own.clear()

    def _free(self, start: int, end: int) -> int:
        page = self._pages.get(start // PAGE_SIZE)
        first = start % PAGE_SIZE
        at = first if page is None else page.find(0, first, first + end - start)
        return start if at < 0 else start - first + at

    def _cover(self, start: int, end: int) -> None:
        while start < end:
            page = self._pages.setdefault(start // PAGE_SIZE, bytearray(PAGE_SIZE))
            first = start % PAGE_SIZE
            last = min(PAGE_SIZE, first + end - start)
            page[first:last] = b"\1" * (last - first)
            start += last - first
