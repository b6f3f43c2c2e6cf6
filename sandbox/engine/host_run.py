"""Host runs: vector instructions of the guest, one after the other, on the host's own CPU.

What Unicorn has no instruction for, the host may have. A *host run* is machine code that loads the
YMM registers that some instructions of the guest name, contains these instructions themselves,
with their memory operands looked up in Unicorn's TLB, and stores what they have changed. Unicorn
calls it before a jump in hidden code that leads to another, ``jmp [next]``; the run says where
``next`` is.

Moves, simple arithmetic and jumps between vector instructions are done on the way, and a run
that leads back to its beginning is a loop.

An instruction that cannot be done like this *bails out*: its page is not in the TLB, or needs more
than a move (code, a device), its operand is misaligned or reaches into the next page, or an
exception is not masked in MXCSR. Then all before it is done and it has not begun. A sequence of
the fast path's own instructions does it instead, or its handler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Final

from iced_x86 import Instruction, Register, RegisterExt

from sandbox.decode import Insn
from sandbox.engine import host_code as hc
from sandbox.engine.host_memory import HostMemory, Where
from sandbox.engine.host_operands import HOST_GENERAL, STATUS_FLAGS, Flags, Kind, Operands
from sandbox.engine.host_x87 import X87, point
from sandbox.engine.unicorn_layout import SEGMENT_BYTES
from sandbox.lowering import (
    SPILL_OFFSET,
    UPPER_OFFSET,
    signed,
)

_ROUNDS: Final = 200
"""A loop comes back to Unicorn after so many: somebody may want the guest to stop."""
_SEGMENT_BASES: Final = {Register.FS: 4, Register.GS: 5}
_VECTOR_BYTES: Final = 64
_RSP: Final = 4
_STACK_CHANGE: Final = {Kind.PUSH: -8, Kind.POP: 8}


@dataclass(frozen=True, slots=True)
class HostInsn:
    """An instruction of a run."""

    insn: Instruction
    operands: Operands
    raw: Insn
    lowered: bool
    """Whether it is trapped; what is allowed is done on the way."""
    spilled: bool = False
    """Whether its memory operand has been copied into the state page."""
    x87: X87 | None = None
    """How it is done, if it is an x87 instruction."""


@dataclass(frozen=True, slots=True)
class WayOut:
    """Where a run is left before its end: the index of its words, the number of the first
    instruction that is not done, and whether hidden code may do that."""

    words: int
    number: int
    bails: bool


@dataclass(frozen=True, slots=True)
class _Point:
    """What is so before an instruction: where it is in the code, which vector registers are loaded
    (and their upper halves), and whose MXCSR it is."""

    offset: int
    loaded: dict[int, bool]
    in_mxcsr: bool


@dataclass(frozen=True, slots=True)
class _Exit:
    """A jump out of the run: which of the parts it is, what it ends at, and what is to be done
    there."""

    part: int
    end: int
    condition: int
    dirty: frozenset[int]
    in_mxcsr: bool
    flags: bool
    """Whether the host's status flags are the guest's."""
    words: int
    target: int | None
    """The guest's address to go on at; None: the words have it."""


class HostRun:
    """Puts one run together: its machine code, its ways out and back in.

    ``counter``: offset of what counts its executions in the state page; 0 if they are not counted.
    """

    def __init__(
        self, memory: HostMemory, where: Where, insns: Sequence[HostInsn], counter: int = 0
    ) -> None:
        self._memory = memory
        self._where = where
        self.insns = insns
        self._counter = counter
        self._parts: list[bytes] = []
        self._size = 0
        self.at = 0
        """The offset of the code, once it is written."""
        self._points: list[_Point] = []
        self._loaded: dict[int, bool] = {}
        """Vector registers that are loaded, and whether their upper half is."""
        self._dirty: set[int] = set()
        self._in_mxcsr = False
        self._has_flags = False
        """Whether the host's status flags are the guest's, which do not have them yet."""
        self._exits: list[_Exit] = []
        self.ways_out: list[WayOut] = []
        self._start = insns[0].insn.ip
        self._loops = self._start in map(_target, insns) and not any(map(_zeroes, insns))
        self._top = 0

    def assemble(self, following: int = 0) -> bytes:
        """The code; ``following``: where to go on, if not at what follows in the guest."""
        self._begin()
        for number, item in enumerate(self.insns):
            self._points.append(_Point(self._size, dict(self._loaded), self._in_mxcsr))
            match item.operands.kind:
                case Kind.BRANCH:
                    self._branch(number, item)
                case Kind.ZERO_UPPERS | Kind.ZERO_ALL:
                    self._zero(keep_low=item.operands.kind is Kind.ZERO_UPPERS)
                case Kind.CALL | Kind.RETURN:
                    self._point_to_memory(number, item)
                case Kind.PLAIN | Kind.PUSH | Kind.POP:
                    self._run(number, item)
        self._end(self.insns[-1], following)
        self._end_exits()
        return b"".join(self._parts)

    def reenter(self, number: int) -> bytes | None:
        """Code that goes on with an instruction of the written run, because hidden code has done
        the one before; None if that one changes flags, or stores: it may have changed code."""
        point, done = self._points[number], self.insns[number - 1].operands
        if done.flags is not Flags.KEPT or (done.memory and done.memory.written):
            return None  # Unicorn has the flags in a form of its own
        self._parts, self._size, self._exits = [], 0, []
        self._dirty, self._loaded, self._in_mxcsr, self._has_flags = set(), {}, False, False
        self._prepare()
        if point.in_mxcsr:
            self._emit(hc.check_masks(self._where.layout.mxcsr))
            self._exit_if(hc.NOT_ZERO, self._count_way_out(number), self.insns[number].insn.ip)
            self._emit(hc.enter_mxcsr())
        for n, whole in point.loaded.items():
            self._load(n, whole)
        to = self._memory.distance(self._size + hc.JUMP_BYTES, self.at + point.offset)
        self._emit(hc.jump(to))
        self._end_exits()
        return b"".join(self._parts)

    def _emit(self, *parts: bytes) -> None:
        for part in parts:
            self._parts.append(part)
            self._size += len(part)

    def _begin(self) -> None:
        layout = self._where.layout
        self._prepare()
        self._emit(hc.test_task_switched(layout.hflags))
        self._bail_if_not_zero(0)
        if any(item.operands.uses_mxcsr for item in self.insns):
            self._emit(hc.check_masks(layout.mxcsr))
            self._bail_if_not_zero(0)
            self._emit(hc.enter_mxcsr())
            self._in_mxcsr = True
        if self._loops:
            self._load_all()
        self._top = self._size
        if self._counter:
            self._emit(hc.count(self._counter))

    def _prepare(self) -> None:
        if self._loops:
            self._emit(hc.set_rounds(_ROUNDS))
        if any(i.operands.memory and i.operands.memory.size for i in self.insns):
            self._emit(hc.choose_tlb(self._where.layout.hflags, self._where.tlb))

    def _load_all(self) -> None:
        """What a loop changes is loaded before, and stored wherever it is left."""
        for item in self.insns:
            for vector in item.operands.vectors:
                self._load(vector.number, whole=True)
                if vector.written:
                    self._dirty.add(vector.number)

    def _end(self, last: HostInsn, following: int) -> None:
        """Go on behind the last instruction, or where it jumps to."""
        stack = self._where.layout.gpr + 8 * _RSP
        if last.operands.kind is Kind.CALL:
            self._emit(hc.set_r10(last.insn.next_ip), hc.STORE_R10, hc.add_to_state(stack, -8))
        if last.operands.kind is Kind.RETURN:
            self._emit(hc.LOAD_R10, hc.add_to_state(stack, 8))
            self._emit(*self._stores(self._dirty, self._in_mxcsr), hc.RAX_FROM_R10)
            self._emit(hc.set_next(self._memory.executed_address), hc.RETURN)
            return
        ends = last.operands.kind in (Kind.JUMP, Kind.CALL)
        self._leave(following or (_target(last) if ends else None) or last.insn.next_ip)

    # -- instructions ---------------------------------------------------------------------------

    def _run(self, number: int, item: HostInsn) -> None:
        if item.x87:
            self._run_x87(number, item, item.x87)
            return
        operands, layout = item.operands, self._where.layout
        if operands.memory:
            self._point_to_memory(number, item)
        for vector in operands.vectors:
            if vector.read or not vector.written:
                self._load(vector.number, vector.whole)
        generals = [*zip(operands.generals, HOST_GENERAL, strict=False)]
        for general, name in generals:
            if general.read:
                self._emit(hc.load_state(name, layout.gpr + 8 * general.number))
        if operands.flags is Flags.USED and not self._has_flags:
            self._emit(hc.take_flags(layout.cc_source))
        self._emit(operands.code)
        for vector in operands.vectors:
            if vector.written:  # VEX: what is beyond the result becomes 0
                self._loaded[vector.number] = True
                self._dirty.add(vector.number)
        for general, name in generals:
            if general.written:
                self._emit(hc.store_state(name, layout.gpr + 8 * general.number))
        if operands.kind in _STACK_CHANGE:
            self._emit(hc.add_to_state(layout.gpr + 8 * _RSP, _STACK_CHANGE[operands.kind]))
        if operands.flags is not Flags.KEPT:
            self._has_flags = operands.kept == STATUS_FLAGS
            if not self._has_flags:
                self._emit(self._kept_flags(operands.kept))

    def _run_x87(self, number: int, item: HostInsn, x87: X87) -> None:
        self._keep_flags()
        if item.operands.memory:
            self._point_to_memory(number, item)
        self._emit(x87.check)
        self._bail_if_not_zero(number)
        if x87.points:
            operand = self._base_and_index(item.insn) if item.operands.memory else ()
            self._emit(*point(item.insn.ip, operand))
        self._emit(x87.code)
        self._has_flags = item.operands.flags is Flags.SET

    def _load(self, n: int, whole: bool) -> None:
        if n not in self._loaded:
            self._emit(hc.load_low(n, self._vector(n)))
            self._loaded[n] = False
        if whole and not self._loaded[n]:
            self._emit(hc.load_upper(n, UPPER_OFFSET + 16 * n))
            self._loaded[n] = True

    def _vector(self, n: int) -> int:
        return self._where.layout.vectors + _VECTOR_BYTES * n

    def _point_to_memory(self, number: int, item: HostInsn) -> None:
        """RSI becomes the host's address of the memory operand, or the run ends here."""
        memory, tlb = item.operands.memory, self._where.tlb
        assert memory is not None
        if item.spilled:
            self._emit(hc.point_to_state_page(SPILL_OFFSET))
            return
        if not memory.size:
            self._emit(*self._base_and_index(item.insn))
            return
        self._keep_flags()
        self._emit(*self._linear_address(item.insn))
        if memory.alignment > 1:
            self._emit(hc.test_alignment(memory.alignment))
            self._bail_if_not_zero(number)
        self._emit(hc.look_up(memory.size, tlb.write if memory.written else tlb.read, tlb))
        self._bail_if_not_zero(number)
        self._emit(hc.to_host(tlb))

    def _linear_address(self, insn: Instruction) -> Iterator[bytes]:
        """RSI becomes the linear address of the memory operand."""
        if insn.is_stack_instruction:
            yield hc.load_state("rsi", self._where.layout.gpr + 8 * _RSP)
            if insn.stack_pointer_increment < 0:
                yield hc.add_displacement(insn.stack_pointer_increment)
            return
        yield from self._base_and_index(insn)
        segment = _SEGMENT_BASES.get(insn.segment_prefix)
        if segment is not None:
            yield hc.add_state_to_rsi(self._where.layout.segments + segment * SEGMENT_BYTES + 8)

    def _base_and_index(self, insn: Instruction) -> Sequence[bytes]:
        """RSI becomes the offset of the memory operand in its segment. Flags stay."""
        layout = self._where.layout
        base, index = insn.memory_base, insn.memory_index
        if insn.is_ip_rel_memory_operand:
            return (hc.set_rsi(insn.ip_rel_memory_address),)
        displacement = signed(insn.memory_displacement)

        def load(name: str, register: int) -> bytes:
            number = RegisterExt.number(register)  # type: ignore[arg-type]
            return hc.load_state(name, layout.gpr + 8 * number)

        if base == Register.NONE and index == Register.NONE:
            return (hc.set_rsi(displacement),)
        if index == Register.NONE:
            return load("rsi", base), hc.add_displacement(displacement)
        scale = insn.memory_index_scale
        if base == Register.NONE:
            return load("rdi", index), hc.scaled_alone(scale, displacement)
        return load("rsi", base), load("rdi", index), hc.scaled_address(scale, displacement)

    def _zero(self, *, keep_low: bool) -> None:
        """VZEROUPPER and VZEROALL: afterwards all registers are where they were at the start."""
        self._keep_flags()
        for n in sorted(self._dirty) if keep_low else ():
            self._emit(hc.store_low(n, self._vector(n)))
        self._emit(hc.clear_uppers(UPPER_OFFSET))  # by YMM0, which is 0 then
        for n in () if keep_low else range(16):
            self._emit(hc.store_low(0, self._vector(n)))
        self._loaded.clear()
        self._dirty.clear()

    def _keep_flags(self) -> None:
        if self._has_flags:
            self._emit(self._kept_flags(STATUS_FLAGS))
            self._has_flags = False

    def _kept_flags(self, flags: int) -> bytes:
        return hc.keep_flags(flags, self._where.layout.cc_source, self._where.layout.cc_operation)

    # -- ways out -------------------------------------------------------------------------------

    def _bail_if_not_zero(self, number: int) -> None:
        words = next((w.words for w in self.ways_out if w.bails and w.number == number), 0)
        if not words:
            words = self._memory.take_words(self.insns[number].insn.ip)
            self.ways_out.append(WayOut(words, number, bails=True))
        self._exit_if(hc.NOT_ZERO, words, None)

    def _branch(self, number: int, item: HostInsn) -> None:
        if not self._has_flags:
            self._emit(hc.take_flags(self._where.layout.cc_source))
            self._has_flags = True
        words = self._count_way_out(number + 1)
        self._exit_if(item.operands.condition, words, _target(item))

    def _count_way_out(self, number: int) -> int:
        """The index of words that count how often the run is left before an instruction; 0 if
        nobody wants to know."""
        if not self._counter or not any(item.lowered for item in self.insns[number:]):
            return 0
        words = self._memory.take_words(0)
        self.ways_out.append(WayOut(words, number, bails=False))
        return words

    def _exit_if(self, condition: int, words: int, target: int | None) -> None:
        self._emit(hc.jump_if(condition, 0))
        self._exits.append(
            _Exit(
                len(self._parts) - 1, self._size, condition, frozenset(self._dirty),
                self._in_mxcsr, self._has_flags, words, target,
            )
        )  # fmt: skip

    def _end_exits(self) -> None:
        bails: dict[tuple[frozenset[int], bool], list[_Exit]] = {}
        for exit_ in self._exits:
            if exit_.target is None:
                bails.setdefault((exit_.dirty, exit_.in_mxcsr), []).append(exit_)
                continue
            self._here(exit_)
            self._has_flags, self._in_mxcsr = exit_.flags, exit_.in_mxcsr
            self._dirty = set(exit_.dirty)
            self._leave(exit_.target, exit_.words)
        for (dirty, in_mxcsr), exits in bails.items():
            self._end_bails(dirty, in_mxcsr, exits)

    def _here(self, exit_: _Exit) -> None:
        """Let an exit's jump lead here."""
        self._parts[exit_.part] = hc.jump_if(exit_.condition, self._size - exit_.end)

    def _end_bails(self, dirty: frozenset[int], in_mxcsr: bool, exits: list[_Exit]) -> None:
        """One end for all that have the same to store."""
        jumps: list[tuple[int, int]] = []
        for exit_ in exits:
            self._here(exit_)
            words = self._memory.words_address + 8 * exit_.words
            self._emit(hc.set_rcx(words), hc.jump(0))
            jumps.append((len(self._parts) - 1, self._size))
        for part, end in jumps:
            self._parts[part] = hc.jump(self._size - end)
        self._emit(*self._stores(dirty, in_mxcsr))
        to = self._memory.distance(self._size + hc.JUMP_BYTES, self._memory.bail)
        self._emit(hc.jump(to))

    def _leave(self, target: int, words: int = 0) -> None:
        """Go on at the guest's address ``target``: here, if it is that of the run itself."""
        self._keep_flags()
        if words:
            self._emit(hc.count_words(self._memory.words_address + 8 * words))
        if self._loops and target == self._start:
            self._emit(hc.count_round())
            end = self._size + hc.JUMP_IF_BYTES
            self._emit(hc.jump_if(hc.NOT_ZERO, self._top - end))
        self._emit(*self._stores(self._dirty, self._in_mxcsr))
        self._emit(hc.set_rax(target))
        self._emit(hc.set_next(self._memory.executed_address), hc.RETURN)

    def _stores(self, dirty: Set[int], in_mxcsr: bool) -> Iterator[bytes]:
        """Store what has changed, and give the host its own MXCSR back."""
        for n in sorted(dirty):
            yield hc.store_low(n, self._vector(n))
            yield hc.store_upper(n, UPPER_OFFSET + 16 * n)
        if in_mxcsr:
            yield hc.leave_mxcsr(self._where.layout.mxcsr)
        yield hc.ZERO_UPPERS


def _target(item: HostInsn) -> int | None:
    """Where a jump leads."""
    jumps = item.operands.kind in (Kind.BRANCH, Kind.JUMP, Kind.CALL)
    return item.insn.near_branch_target if jumps else None


def _zeroes(item: HostInsn) -> bool:
    return item.operands.kind in (Kind.ZERO_UPPERS, Kind.ZERO_ALL)
