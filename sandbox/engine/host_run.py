"""Host runs: vector instructions of the guest, one after the other, on the host's own CPU.

What Unicorn has no instruction for, the host may have. A *host run* is machine code that loads the
YMM registers that some instructions of the guest name, contains these instructions themselves,
with their memory operands looked up in Unicorn's TLB, and stores what they have changed. Unicorn
calls it before a jump in hidden code that leads to another, ``jmp [next]``; the run says where
``next`` is.

An instruction that cannot be done like this *bails out*: its page is not in the TLB, or needs more
than a move (code, a device), its operand is misaligned or reaches into the next page, or an
exception is not masked in MXCSR. Then all before it is done and it has not begun. A sequence of
the fast path's own instructions does it instead, or its handler.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Final

from iced_x86 import Instruction, Mnemonic, Register, RegisterExt

from sandbox.engine import host_code as hc
from sandbox.engine.hidden import HOST_ENTRIES, PER_PAGE, HiddenMemory
from sandbox.engine.host_operands import Operands
from sandbox.engine.unicorn_layout import SEGMENT_BYTES, Layout
from sandbox.engine.unicorn_tlb import TlbLayout
from sandbox.lowering import (
    BAILED_OFFSET,
    EXECUTED_OFFSET,
    NEXT_OFFSET,
    SPILL_OFFSET,
    UPPER_OFFSET,
    signed,
)

MAX_INSNS: Final = 64
_CODE_BYTES: Final = 16 << 20
_WORDS_BYTES: Final = 4 << 20
_WORDS: Final = 4
"""Of 8 bytes, for each way out: where to go on in hidden code, or 0; the guest's address; how
often it was taken; how often hidden code went on."""
_MOST_CODE: Final = MAX_INSNS * 512
"""More bytes than a run ever takes."""
_SEGMENT_BASES: Final = {Register.FS: 4, Register.GS: 5}
_VECTOR_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class HostInsn:
    """An instruction of a run. ``spilled``: its memory operand has been copied into the state
    page."""

    insn: Instruction
    operands: Operands
    spilled: bool = False


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
        self.words_address, self.offsets_address = map(_address, (self._words, self._offsets))
        self.entry = _address(self._code)
        """Host address of what Unicorn is to call."""
        entry = hc.dispatcher(
            hidden.host_base, HOST_ENTRIES, where.state, hidden.state_host, self.entry
        )
        bail = hc.bail(NEXT_OFFSET, EXECUTED_OFFSET, BAILED_OFFSET, where.handle, where.stop)
        back = hc.clear_note(EXECUTED_OFFSET)
        self.bail = self.entry + len(entry)
        self._back = len(entry) + len(bail)
        self._first = self._back + len(back)
        self._code[: self._first] = entry + bail + back
        self._used = self._used_words = 0
        self.clear()

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

    def write(self, entry: int, code: bytes) -> None:
        """Have ``code`` run at an entry of hidden code."""
        at = self._used
        self._code[at : at + len(code)] = code
        self._used = at + len(code) + 15 & -16
        self._offsets[4 * entry : 4 * entry + 4] = at.to_bytes(4, "little")

    def distance_to_bail(self, at: int) -> int:
        """From ``at`` bytes behind the beginning of a new run to the common end of ways out."""
        return self.bail - (self.entry + self._used + at)

    def clear(self) -> None:
        """Forget all runs; Unicorn must have forgotten their hidden code."""
        self._used = self._first + 15 & -16
        self._used_words = _WORDS  # the words at 0 are nobody's
        page = bytes(4 * PER_PAGE - 4) + self._back.to_bytes(4, "little")
        self._offsets[:] = page * (HOST_ENTRIES // PER_PAGE)


_EXEC: Final = mmap.PROT_EXEC


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _pack(*words: int) -> bytes:
    return b"".join((word & (1 << 64) - 1).to_bytes(8, "little") for word in words)


class HostRun:
    """Puts one run together: its machine code and its ways out."""

    def __init__(self, memory: HostMemory, where: Where, insns: Sequence[HostInsn]) -> None:
        self._memory = memory
        self._where = where
        self._insns = insns
        self._parts: list[bytes] = []
        self._size = 0
        self._low: set[int] = set()
        """Vector registers whose low half is loaded."""
        self._whole: set[int] = set()
        """Those whose upper half is loaded too."""
        self._dirty: set[int] = set()
        self._ways_out: list[tuple[int, int, frozenset[int], frozenset[int], bool]] = []
        """Where a jump is (an index of parts, and the size up to its end), what is dirty there,
        what of this is whole, whether MXCSR is the guest's."""
        self.bails: list[tuple[int, int]] = []
        """Of each way out: the index of its words, the number of its instruction."""
        self._uses_mxcsr = any(i.operands.uses_mxcsr for i in insns)
        self._in_mxcsr = False

    def assemble(self, following: int, counter: int) -> bytes:
        """The code; ``following``: the guest's address behind the run; ``counter``: offset of what
        counts in the state page, or 0."""
        if counter:
            self._emit(hc.count(counter))
        if self._uses_mxcsr:
            self._emit(hc.check_masks(self._where.layout.mxcsr))
            self._bail_if_not_zero(0)
            self._emit(hc.enter_mxcsr())
            self._in_mxcsr = True
        if any(i.operands.memory and not i.spilled for i in self._insns):
            self._emit(hc.choose_tlb(self._where.layout.hflags, self._where.tlb))
        for number, item in enumerate(self._insns):
            self._run(number, item)
        self._emit(self._epilogue(self._dirty, self._whole, self._in_mxcsr))
        self._emit(hc.set_rax(following))
        self._emit(hc.set_next(NEXT_OFFSET, EXECUTED_OFFSET) + hc.RETURN)
        self._end_ways_out()
        return b"".join(self._parts)

    def _emit(self, code: bytes) -> None:
        self._parts.append(code)
        self._size += len(code)

    # -- instructions ---------------------------------------------------------------------------

    def _run(self, number: int, item: HostInsn) -> None:
        if item.insn.mnemonic == Mnemonic.VZEROUPPER:
            self._zero_uppers()
            return
        if item.insn.mnemonic == Mnemonic.VZEROALL:
            self._zero_all()
            return
        operands, layout = item.operands, self._where.layout
        if operands.memory:
            self._point_to_memory(number, item)
        for vector in operands.vectors:
            if vector.read or not vector.written:
                self._load(vector.number, vector.whole)
        general = operands.general
        if general and general.read:
            self._emit(hc.load_state("r10", layout.gpr + 8 * general.number))
        self._emit(operands.code)
        for vector in operands.vectors:
            if vector.written:  # VEX: what is beyond the result becomes 0
                self._low.add(vector.number)
                self._whole.add(vector.number)
                self._dirty.add(vector.number)
        if general and general.written:
            self._emit(hc.store_state("r10", layout.gpr + 8 * general.number))

    def _load(self, n: int, whole: bool) -> None:
        if n not in self._low:
            self._emit(hc.load_low(n, self._vector(n)))
            self._low.add(n)
        if whole and n not in self._whole:
            self._emit(hc.load_upper(n, UPPER_OFFSET + 16 * n))
            self._whole.add(n)

    def _vector(self, n: int) -> int:
        return self._where.layout.vectors + _VECTOR_BYTES * n

    def _point_to_memory(self, number: int, item: HostInsn) -> None:
        """RSI becomes the host's address of the memory operand, or the run ends here."""
        memory, tlb = item.operands.memory, self._where.tlb
        assert memory is not None
        if item.spilled:
            self._emit(hc.point_to_state_page(SPILL_OFFSET))
            return
        self._emit(self._linear_address(item.insn))
        if memory.alignment > 1:
            self._emit(hc.test_alignment(memory.alignment))
            self._bail_if_not_zero(number)
        self._emit(hc.look_up(memory.size, tlb.write if memory.written else tlb.read, tlb))
        self._bail_if_not_zero(number)
        self._emit(hc.to_host(tlb))

    def _linear_address(self, insn: Instruction) -> bytes:
        """RSI becomes the linear address of the memory operand."""
        layout = self._where.layout
        if insn.is_ip_rel_memory_operand:
            parts = [hc.set_rsi(insn.ip_rel_memory_address)]
        else:
            parts = [*self._base_and_index(insn)]
        segment = _SEGMENT_BASES.get(insn.segment_prefix)
        if segment is not None:
            parts.append(hc.add_state_to_rsi(layout.segments + segment * SEGMENT_BYTES + 8))
        return b"".join(parts)

    def _base_and_index(self, insn: Instruction) -> Sequence[bytes]:
        layout = self._where.layout
        base, index = insn.memory_base, insn.memory_index
        displacement = signed(insn.memory_displacement)

        def load(name: str, register: int) -> bytes:
            return hc.load_state(name, layout.gpr + 8 * RegisterExt.number(register))  # type: ignore[arg-type]

        if base == Register.NONE and index == Register.NONE:
            return (hc.set_rsi(displacement),)
        if index == Register.NONE:
            return load("rsi", base), hc.add_displacement(displacement)
        if base == Register.NONE:
            scaled = hc.scaled_alone(insn.memory_index_scale)
            return load("rsi", index), scaled, hc.add_displacement(displacement)
        scaled = hc.scaled_address(insn.memory_index_scale, displacement)
        return load("rsi", base), load("rdi", index), scaled

    def _zero_uppers(self) -> None:
        for n in sorted(self._dirty):
            self._emit(hc.store_low(n, self._vector(n)))
        self._emit(hc.clear_uppers(UPPER_OFFSET))
        self._forget()

    def _zero_all(self) -> None:
        self._emit(hc.clear_uppers(UPPER_OFFSET))  # by YMM0, which is 0 then
        for n in range(16):
            self._emit(hc.store_low(0, self._vector(n)))
        self._forget()

    def _forget(self) -> None:
        """All vector registers are in the CPU state and the state page."""
        self._low.clear()
        self._whole.clear()
        self._dirty.clear()

    # -- ways out -------------------------------------------------------------------------------

    def _bail_if_not_zero(self, number: int) -> None:
        self._emit(hc.jump_if_not_zero(0))
        dirty, whole = frozenset(self._dirty), frozenset(self._whole)
        self._ways_out.append((len(self._parts) - 1, self._size, dirty, whole, self._in_mxcsr))
        index = next((words for words, at in self.bails if at == number), 0)
        if not index:
            index = self._memory.take_words(self._insns[number].insn.ip)
        self.bails.append((index, number))

    def _end_ways_out(self) -> None:
        memory = self._memory
        for (part, size, dirty, whole, in_mxcsr), (words, _number) in zip(
            self._ways_out, self.bails, strict=True
        ):
            self._parts[part] = hc.jump_if_not_zero(self._size - size)
            self._emit(self._epilogue(dirty, whole, in_mxcsr))
            self._emit(hc.set_rcx(memory.words_address + 8 * words))
            self._emit(hc.jump(memory.distance_to_bail(self._size + hc.JUMP_BYTES)))

    def _epilogue(self, dirty: Set[int], whole: Set[int], in_mxcsr: bool) -> bytes:
        """Store what has changed, and give the host its own MXCSR back."""
        parts = []
        for n in sorted(dirty):
            parts.append(hc.store_low(n, self._vector(n)))
            if n in whole:
                parts.append(hc.store_upper(n, UPPER_OFFSET + 16 * n))
        if in_mxcsr:
            parts.append(hc.leave_mxcsr(self._where.layout.mxcsr))
        return b"".join((*parts, hc.ZERO_UPPERS))
