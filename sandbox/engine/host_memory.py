"""Memory of the host's for host runs: their machine code, and what their ways out need to know."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Final

from sandbox.engine import host_code as hc
from sandbox.engine.hidden import HOST_ENTRIES, PER_PAGE, HiddenMemory
from sandbox.engine.machine_code import address_of
from sandbox.engine.unicorn_layout import Layout
from sandbox.engine.unicorn_tlb import TlbLayout

MAX_INSNS: Final = 100
"""So many instructions a run has at most."""
_CODE_BYTES: Final = 16 << 20
_WORDS_BYTES: Final = 4 << 20
_WORDS: Final = 4
"""Of 8 bytes, for each way out: where to go on in hidden code, or 0; the guest's address; how
often the run was left there; how often hidden code went on."""
_BAILED, _EXECUTED = 0, 1
"""Indices of words that are no way out's."""
_MOST_CODE: Final = MAX_INSNS * 512
"""More bytes than a run ever takes."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where things are: offsets in the CPU state, and what Unicorn's library is called with."""

    layout: Layout
    tlb: TlbLayout
    state: int
    handle: int
    stop: int


class HostMemory:
    """The machine code of one engine's host runs, and the words of their ways out."""

    def __init__(self, where: Where, hidden: HiddenMemory) -> None:
        self._where = where
        self._code = mmap.mmap(-1, _CODE_BYTES, prot=mmap.PROT_READ | mmap.PROT_WRITE | _EXEC)
        self._words = mmap.mmap(-1, _WORDS_BYTES)
        self._offsets = mmap.mmap(-1, 4 * HOST_ENTRIES)
        self.words = memoryview(self._words).cast("Q")
        self.words_address, self.offsets_address = map(address_of, (self._words, self._offsets))
        self.entry = address_of(self._code)
        """Host address of what Unicorn is to call."""
        entry = hc.dispatcher(
            hidden.host_base, HOST_ENTRIES, hidden.code_host - hidden.linear, where.state,
            hidden.state_host, self.entry,
        )  # fmt: skip
        self.executed_address = self.words_address + 8 * _EXECUTED
        bailed = self.words_address + 8 * _BAILED
        bail = hc.bail(self.executed_address, bailed, where.handle, where.stop)
        back = hc.clear_note(self.executed_address)
        self.bail = len(entry)
        """Offset of the common end of all that bail out."""
        self._back = len(entry) + len(bail)
        self._first = self._back + len(back)
        self._code[: self._first] = entry + bail + back
        self._used = self._used_words = 0
        self.clear()

    @property
    def executed(self) -> bool:
        """Whether a host run has been called and the jump back from it has not been done."""
        return self.words[_EXECUTED] != 0

    @executed.setter
    def executed(self, value: bool) -> None:
        self.words[_EXECUTED] = value

    @property
    def bailed(self) -> int:
        """Host address of the words of the host run that stopped the guest, or 0."""
        return self.words[_BAILED]

    @bailed.setter
    def bailed(self, value: int) -> None:
        self.words[_BAILED] = value

    @property
    def is_full(self) -> bool:
        """Whether a run may find no room."""
        words = 8 * (self._used_words + _WORDS * MAX_INSNS)
        return self._used + _MOST_CODE > _CODE_BYTES or words > _WORDS_BYTES

    def take_words(self, rip: int) -> int:
        """The index of the words of a new way out."""
        index = self._used_words
        self._used_words += _WORDS
        self.words[index : index + _WORDS] = memoryview(_pack(0, rip, 0, 0)).cast("Q")
        return index

    def write(self, entry: int, code: bytes) -> int:
        """Have ``code`` run at an entry of hidden code; where it is from now on, an offset."""
        assert len(code) <= _MOST_CODE
        at = self._used
        self._code[at : at + len(code)] = code
        self._used = at + len(code) + 15 & -16
        self._offsets[4 * entry : 4 * entry + 4] = at.to_bytes(4, "little")
        return at

    def distance(self, at: int, to: int) -> int:
        """From ``at`` bytes behind where the next code will be to the code at an offset."""
        return to - (self._used + at)

    def clear(self) -> None:
        """Forget all runs; Unicorn must have forgotten their hidden code."""
        self._used = self._first + 15 & -16
        self._used_words = _WORDS  # the first are those above
        page = bytes(4 * PER_PAGE - 4) + self._back.to_bytes(4, "little")
        self._offsets[:] = page * (HOST_ENTRIES // PER_PAGE)


_EXEC: Final = mmap.PROT_EXEC


def _pack(*words: int) -> bytes:
    return b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in words)
