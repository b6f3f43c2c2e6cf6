"""From guest code to host runs: which instructions go into one, and where it is called from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeAlias

from iced_x86 import Decoder, Instruction

from sandbox.decode import Insn, decode
from sandbox.engine.hidden import HiddenMemory, Place
from sandbox.engine.host_memory import MAX_INSNS, HostMemory, Where
from sandbox.engine.host_operands import (
    Flags,
    Kind,
    host_features,
    operands_instead,
    operands_on_the_way,
)
from sandbox.engine.host_run import HostInsn, HostRun
from sandbox.engine.host_x87 import x87_on_host
from sandbox.engine.machine_code import function_address
from sandbox.engine.unicorn_layout import layout, state_address
from sandbox.engine.unicorn_library import UC_HOOK_CODE, library
from sandbox.engine.unicorn_tlb import tlb_layout

Asks: TypeAlias = Callable[[Insn], bool]

MAX_ON_THE_WAY: Final = 8
"""So many instructions behind a vector instruction are worth it, if there is another, or a jump."""
_POINTER_BYTES: Final = 8
_NEEDED: Final = frozenset(("avx", "avx2"))


class HostBuilder:
    """Makes the host runs of one engine. ``traps``: whether an instruction is trapped;
    ``wanted``: whether one that is may be done by the host."""

    def __init__(
        self, handle: ctypes.c_void_p, hidden: HiddenMemory, where: Where, traps: Asks,
        wanted: Asks,
    ) -> None:  # fmt: skip
        self._hidden = hidden
        self._where = where
        self._traps = traps
        self._wanted = wanted
        self.bails: dict[int, tuple[HostRun, int]] = {}
        """By index of words: the run, and the number of the instruction."""
        self.memory = HostMemory(where, hidden)
        lib, hook = library(), ctypes.c_size_t()
        error = lib.call.uc_hook_add(
            handle, ctypes.byref(hook), UC_HOOK_CODE, ctypes.c_void_p(self.memory.entry),
            ctypes.c_void_p(self.memory.offsets_address),
            ctypes.c_uint64(hidden.host_base), ctypes.c_uint64(hidden.state - 1),
        )  # fmt: skip
        lib.check(error, "uc_hook_add")

    @staticmethod
    def make(
        handle: ctypes.c_void_p, hidden: HiddenMemory, traps: Asks, wanted: Asks
    ) -> HostBuilder | None:
        """None where the host's CPU cannot be used: another one, another Unicorn, a kernel that
        lets nobody make code."""
        if not host_features() >= _NEEDED:
            return None
        tlb = tlb_layout()
        if tlb is None:
            return None
        stop = function_address(library().call.uc_emu_stop)
        where = Where(layout(), tlb, state_address(handle), handle.value or 0, stop)
        try:
            return HostBuilder(handle, hidden, where, traps, wanted)
        except PermissionError:  # from mmap
            return None

    @property
    def is_full(self) -> bool:
        """Whether a run may find no room."""
        return self.memory.is_full

    def accepts(self, insn: Insn) -> bool:
        """Whether the host does a trapped instruction."""
        return self._wanted(insn) and _instead(insn.iced, insn) is not None

    def collect(self, linear: int, code: bytes) -> list[HostInsn]:
        """The instructions from the beginning of ``code`` on that one host run can do: up to the
        last that is trapped, and a jump not far behind it."""
        found: list[HostInsn] = []
        decoder = Decoder(64, code, ip=linear)
        knows_flags = has_jump = False
        end = 0
        while len(found) < MAX_INSNS and decoder.can_decode:
            at = decoder.position
            insn = decoder.decode()
            if insn.is_invalid:
                break
            item = self._item(insn, decode(code[at : decoder.position], 64))
            if item is None or not (found or item.lowered):
                break
            if item.operands.flags is Flags.USED and not knows_flags:
                break
            knows_flags = knows_flags or item.operands.flags is Flags.SET
            found.append(item)
            jumps = item.operands.ends or item.operands.kind is Kind.BRANCH
            if item.lowered or (jumps and not has_jump):
                end, has_jump = len(found), not item.lowered
            if item.operands.ends or len(found) - end > MAX_ON_THE_WAY:
                break
        return found[:end]

    def _item(self, insn: Instruction, raw: Insn) -> HostInsn | None:
        if self._traps(raw):
            return _instead(insn, raw) if self._wanted(raw) else None
        operands = operands_on_the_way(insn, raw.raw)
        return HostInsn(insn, operands, raw, lowered=False) if operands else None

    def write(
        self, insns: list[HostInsn], counter: int, following: int = 0
    ) -> tuple[int, HostRun] | None:
        """Write the run, and the hidden code that it is called from: where the address of that
        stands, and the run. None without room. ``following``: where to go on, if not at what
        follows in the guest."""
        offset = counter and counter - self._hidden.state
        run = HostRun(self.memory, self._where, insns, offset)
        there = None if self.is_full else self._call(insns[0], ())
        if there is None:
            return None
        number, pointer = there
        run.at = self.memory.write(number, run.assemble(following))
        for way in run.ways_out:
            if way.bails:
                self.bails[way.words] = run, way.number
        return pointer, run

    def _call(self, item: HostInsn, left: tuple[str, ...]) -> tuple[int, int] | None:
        """Hidden code that calls the host before ``item``; its number and where its address is."""
        there = self._hidden.call_host()
        if there is not None:
            entry = there[1] + _POINTER_BYTES
            back = self._hidden.back_of(entry)
            self._hidden.places[entry] = Place(item.insn.ip, True, (), item.lowered, left)
            self._hidden.places[back] = Place(None, True, (), False, ())
        return there

    def reenter(self, run: HostRun, number: int, left: tuple[str, ...]) -> int | None:
        """The entry of hidden code that goes on with an instruction of ``run``, if there is one;
        ``left``: the mnemonics of what is lowered from there on."""
        if number == len(run.insns) or self.is_full:
            return None
        code = run.reenter(number)
        there = None if code is None else self._call(run.insns[number], left)
        if code is None or there is None:
            return None
        self.memory.write(there[0], code)
        return there[1] + _POINTER_BYTES

    def clear(self) -> None:
        """Forget all runs; see :meth:`HostMemory.clear`."""
        self.memory.clear()
        self.bails.clear()

    def spilled(self, item: HostInsn, following: int) -> int | None:
        """The entry of a run of one instruction that reads its memory operand from the state page,
        and goes on at ``following``; None without room, or if it does not read one, or only one
        that is aligned."""
        memory = item.operands.memory
        if memory is None or memory.written or memory.alignment > 1:
            return None
        made = self.write([replace(item, spilled=True)], 0, following)
        return None if made is None else made[0] + _POINTER_BYTES


def _instead(insn: Instruction, raw: Insn) -> HostInsn | None:
    """How the host does a trapped instruction, if it can."""
    operands = operands_instead(insn, raw.raw)
    if operands is not None:
        return HostInsn(insn, operands, raw, lowered=True)
    x87 = x87_on_host(insn)
    return HostInsn(insn, x87[0], raw, lowered=True, x87=x87[1]) if x87 else None
