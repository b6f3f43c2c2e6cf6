"""MMIO that the caller answers: reads asked for piece by piece, writes handed out one by one."""

from __future__ import annotations

from sandbox.exits import Mmio, RunPage
from sandbox.memory import MmioRead, PhysicalMemory

MMIO_BYTES = 8
"""The most that one KVM_EXIT_MMIO carries."""


class MmioCompletion:
    """What is open between the exits of one instruction."""

    def __init__(self, memory: PhysicalMemory, page: RunPage) -> None:
        self._memory = memory
        self._page = page
        self._parts: list[bytes] = []
        self._writes: list[Mmio] = []

    def ask(self, wanted: MmioRead) -> Mmio:
        """The exit for the next up to 8 bytes of a read."""
        done = sum(map(len, self._parts))
        return Mmio(wanted.address + done, min(MMIO_BYTES, wanted.size - done), False)

    def answer(self, left: Mmio, wanted: MmioRead) -> bool:
        """Take the caller's answer to ``left``; True once ``wanted`` is there as a whole."""
        left.complete(self._page)
        self._parts.append(bytes(self._page.run.mmio.data)[: left.len])
        whole = b"".join(self._parts)
        if len(whole) < wanted.size:
            return False
        self._parts.clear()
        self._memory.mmio_replies[wanted.address, wanted.size] = whole
        self._memory.mmio_used = True
        return True

    def abandon(self) -> None:
        """The instruction that asked is not run any further."""
        memory = self._memory
        memory.mmio_used = False
        memory.mmio_replies.clear()
        memory.mmio_writes.clear()
        self._parts.clear()

    def finish(self) -> None:
        """The instruction is through: its answers are used up, its writes become exits."""
        memory = self._memory
        memory.mmio_used = False
        memory.mmio_replies.clear()
        for address, data in memory.mmio_writes:
            for at in range(0, len(data), MMIO_BYTES):
                part = data[at : at + MMIO_BYTES]
                self._writes.append(Mmio(address + at, len(part), True, part))
        memory.mmio_writes.clear()

    def next_write(self) -> Mmio | None:
        """The next write to hand out."""
        return self._writes.pop(0) if self._writes else None
