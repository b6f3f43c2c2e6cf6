"""The allowlist of the fast path: which instruction of a new block has to be trapped.

A block is decoded when Unicorn reports it, before it first runs. The same decoding is the
cross-check that no instruction is smuggled past the policy: where our decoder and Unicorn's
disagree about a block, it is not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from iced_x86 import Code, Decoder

from sandbox.cpu import Fault
from sandbox.decode import MAX_LENGTH, Insn, decode
from sandbox.engine.misread import MAY_BE_MISREAD, MISREAD
from sandbox.engine.plain import PlainCode
from sandbox.engine.unicorn_state import UnicornBank
from sandbox.memory import PAGE_SIZE, MmioRead, PhysicalMemory, Slot
from sandbox.paging import PagedMemory
from sandbox.policy import ASK, TRAP

NEVER_RUN = frozenset(
    {
        Code.PCMPESTRM_XMM_XMMM128_IMM8,
        Code.PCMPESTRM64_XMM_XMMM128_IMM8,
        Code.PCMPESTRI_XMM_XMMM128_IMM8,
        Code.PCMPESTRI64_XMM_XMMM128_IMM8,
        Code.VEX_VPCMPESTRM_XMM_XMMM128_IMM8,
        Code.VEX_VPCMPESTRI_XMM_XMMM128_IMM8,
        Code.VEX_VPCMPESTRM64_XMM_XMMM128_IMM8,
        Code.VEX_VPCMPESTRI64_XMM_XMMM128_IMM8,
    }
)
"""Forms that crash Unicorn 2.1.4, and with it the process: trapped whatever the policy says."""

_INVALID_64 = b"\x06"  # push es
_INVALID_LEGACY = b"\x0f\x0b"  # ud2: 16- and 32-bit code has no invalid opcode of one byte
_INT3 = b"\xcc"  # where a page ends: real INT3s are trapped, so this one can only be the patch


@dataclass(frozen=True, slots=True)
class Patch:
    """A trap to be translated into the block at linear ``block``, over the bytes at ``linear``."""

    block: int
    linear: int
    count: int
    """Instructions in the block, the trap included."""
    slot: Slot
    offset: int
    original: bytes
    trap: bytes
    size: int
    """Bytes of the block as Unicorn had it before, so far as that is known."""
    plain: Patch | None = None
    """The trap that stands in for it if Unicorn does not end the block where it should."""

    def apply(self) -> None:
        """Put the trap in place, where Unicorn does not see the write."""
        self.slot.host[self.offset : self.offset + len(self.trap)] = self.trap

    def restore(self) -> None:
        """Give the guest its bytes back."""
        self.slot.host[self.offset : self.offset + len(self.original)] = self.original


def _never(_insn: Insn) -> bool:
    return False


class Allowlist:
    """Decides about blocks. Empty until :meth:`set_traps` was called."""

    def __init__(self, bank: UnicornBank, physical: PhysicalMemory, *views: PagedMemory) -> None:
        self._bank = bank
        self._physical = physical
        self._views = views
        """The first is memory as the running code sees it."""
        self._traps = b""
        self._asked: Callable[[Insn], bool] = _never
        self.plain = PlainCode()

    def __bool__(self) -> bool:
        return bool(self._traps)

    def set_traps(self, traps: bytes, asked: Callable[[Insn], bool] | None) -> None:
        """Which forms are trapped: see :meth:`sandbox.engine.protocol.Engine.set_traps`."""
        table = bytearray(traps)
        for code in NEVER_RUN:
            table[code] = TRAP
        self._traps = bytes(table)
        self._asked = asked or _never
        self.plain.set_marks(self._traps)

    def traps(self, insn: Insn) -> bool:
        """Whether ``insn`` is trapped, going by its form and its bytes."""
        mark = self._traps[insn.code]
        return mark == TRAP or (mark == ASK and self._asked(insn))

    def check(self, start: int, size: int, count: int) -> Patch | None:
        """The patch that the first trapped instruction of a new block needs, if any.

        ``count``: how many instructions Unicorn found in the ``size`` bytes at linear ``start``.
        """
        bitness = self._bank.bitness
        code = self._code(start, size)
        traps, asked = self._traps, self._asked
        misread = MISREAD[bitness].match if MAY_BE_MISREAD(code) else None
        at = last = seen = 0
        for instruction in Decoder(bitness, code):
            seen += 1
            last, at = at, at + instruction.len
            mark = traps[instruction.code]
            if (mark or misread) and (
                mark == TRAP
                or (misread and misread(code, last))
                or (mark and asked(decode(code[last:at], bitness)))
            ):
                return self._patch(start, start + last, seen, size)
            if at >= size:
                break
        if at == size and seen == count:
            if bitness == 64:
                self._note(start)
            return None
        # Unicorn and our decoder disagree. If only about the last instruction, trap that one.
        if seen == count:
            return self._patch(start, start + last, seen, size)
        return self._patch(start, start, 1, size)

    def _note(self, start: int) -> None:
        """Other blocks on this page need not be decoded, if they are plain."""
        slot, page = self._views[0].code_page(start)
        self.plain.saw(start, slot.host, page)

    def check_trapped(self, patch: Patch, size: int, count: int) -> Patch | None:
        """A block that ends in a trap: none, unless Unicorn went another way to its end."""
        if patch.block + size == patch.linear + len(patch.trap) and count == patch.count:
            return None
        return patch.plain or self._patch(patch.block, patch.block, 1, size)

    def _code(self, start: int, size: int) -> bytes:
        """The block's bytes, and up to 15 more for the instruction that Unicorn cut short."""
        want = size + MAX_LENGTH
        at = start % PAGE_SIZE
        if at + want <= PAGE_SIZE:
            slot, page = self._views[0].code_page(start)
            self._note_code_page((slot.base + page) >> 12, start >> 12)
            return slot.host[page + at : page + at + want]
        mask = (1 << 64) - 1 if self._bank.bitness == 64 else 0xFFFF_FFFF
        code = b""
        while len(code) < want:
            address = (start + len(code)) & mask
            try:
                slot, page = self._views[0].code_page(address)
            except (Fault, MmioRead):
                if len(code) >= size:
                    break
                raise
            at = address % PAGE_SIZE
            end = min(PAGE_SIZE, at + want - len(code))
            self._note_code_page((slot.base + page) >> 12, address >> 12)
            code += slot.host[page + at : page + end]
        return code

    def _note_code_page(self, physical: int, linear: int) -> None:
        runs_at = self._physical.code_pages.get(physical)
        if runs_at is None:
            runs_at = self._physical.code_pages[physical] = set()
            for view in self._views:
                view.flush_writable()
        runs_at.add(linear)

    def _patch(self, block: int, linear: int, count: int, size: int) -> Patch:
        if self._bank.bitness == 64:
            trap = _INVALID_64
        elif linear % PAGE_SIZE == PAGE_SIZE - 1:
            trap = _INT3
        else:
            trap = _INVALID_LEGACY
        slot, page = self._views[0].code_page(linear)
        at = page + linear % PAGE_SIZE
        original = slot.host[at : at + len(trap)]
        return Patch(block, linear, count, slot, at, original, trap, size)
