"""From guest code to host runs: which instructions go into one, and where it is called from."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from iced_x86 import Decoder, Instruction

from sandbox.decode import Insn, decode
from sandbox.engine.hidden import HiddenMemory, Place
from sandbox.engine.host_operands import host_features, operands_of
from sandbox.engine.host_run import MAX_INSNS, HostInsn, HostMemory, HostRun, Where
from sandbox.engine.unicorn_layout import layout, state_address
from sandbox.engine.unicorn_library import UC_HOOK_CODE, library
from sandbox.engine.unicorn_tlb import tlb_layout

_NEEDED: Final = frozenset(("avx", "avx2"))


@dataclass(frozen=True, slots=True)
class Bail:
    """A way out of a host run: the index of its words, the number of its instruction."""

    words: int
    number: int


class HostBuilder:
    """Makes the host runs of one engine. ``wanted``: whether a trapped instruction may be done by
    the host."""

    def __init__(
        self, handle: ctypes.c_void_p, hidden: HiddenMemory, where: Where,
        wanted: Callable[[Insn], bool],
    ) -> None:  # fmt: skip
        self._hidden = hidden
        self._where = where
        self._wanted = wanted
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
        handle: ctypes.c_void_p, hidden: HiddenMemory, wanted: Callable[[Insn], bool]
    ) -> HostBuilder | None:
        """None where the host's CPU cannot be used: another one, or another Unicorn."""
        if not host_features() >= _NEEDED:
            return None
        tlb = tlb_layout()
        if tlb is None:
            return None
        stop = ctypes.cast(library().call.uc_emu_stop, ctypes.c_void_p).value or 0
        where = Where(layout(), tlb, state_address(handle), handle.value or 0, stop)
        return HostBuilder(handle, hidden, where, wanted)

    @property
    def is_full(self) -> bool:
        """Whether a run may find no room."""
        return self.memory.is_full

    def accepts(self, insn: Insn) -> bool:
        """Whether the host does a trapped instruction."""
        return self._item(insn.iced, insn) is not None

    def collect(self, linear: int, code: bytes) -> list[HostInsn]:
        """The instructions from the beginning of ``code`` on that one host run can do."""
        found: list[HostInsn] = []
        decoder = Decoder(64, code, ip=linear)
        while len(found) < MAX_INSNS and decoder.can_decode:
            at = decoder.position
            insn = decoder.decode()
            raw = decode(code[at : decoder.position], 64) if not insn.is_invalid else None
            item = raw and self._item(insn, raw)
            if not item:
                break
            found.append(item)
        return found

    def _item(self, insn: Instruction, raw: Insn) -> HostInsn | None:
        operands = operands_of(insn, raw.raw)
        return HostInsn(insn, operands) if operands and self._wanted(raw) else None

    def write(
        self, insns: list[HostInsn], following: int, counter: int
    ) -> tuple[int, tuple[Bail, ...]] | None:
        """Write the run, and the hidden code that it is called from: where the address of that
        stands, and the ways out. None without room."""
        there = None if self.is_full else self._hidden.call_host()
        if there is None:
            return None
        number, pointer = there
        run = HostRun(self.memory, self._where, insns)
        self.memory.write(number, run.assemble(following, counter and counter - self._hidden.state))
        first = insns[0].insn.ip
        entry = pointer + 8
        self._hidden.places[entry] = Place(first, True, (), True, ())
        self._hidden.places[self._hidden.back_of(entry)] = Place(None, True, (), False, ())
        return pointer, tuple(Bail(words, at) for words, at in sorted(set(run.bails)))

    def spilled(self, item: HostInsn) -> int | None:
        """The entry of a run of one instruction whose operand has been copied to the state page."""
        insn = item.insn
        alone = [HostInsn(insn, item.operands, spilled=True)]
        made = self.write(alone, insn.ip + insn.len, 0)
        return None if made is None else made[0] + 8
