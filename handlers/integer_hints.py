"""Instructions without a visible result here, and those that always or sometimes fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import OpKind

from handlers.integer import bind_operand
from handlers.integer_shift import signed
from sandbox.cpu import BR, UD, Fault, bind_address
from sandbox.handler import Action, Handler

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn


def _nothing() -> None:
    return None


class Hint(Handler):
    """No operation: hints, reserved no-operations, and fences, as memory is always in order."""

    name = f"{__name__}.nop"
    mnemonics = (
        *("nop", "reservednop", "pause", "endbr32", "endbr64"),
        *("lfence", "mfence", "sfence", "serialize", "cldemote"),
        *("prefetch", "prefetchw", "prefetchwt1", "prefetchnta"),
        *("prefetcht0", "prefetcht1", "prefetcht2", "prefetchit0", "prefetchit1"),
        *("rdsspd", "rdsspq"),  # no operation where there is no shadow stack
        "xabort",  # as there never is a transaction
    )
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        return _nothing


class CacheLine(Handler):
    """Cache line write-backs: nothing to do, but they fault as a load of a byte does."""

    name = f"{__name__}.cache_line"
    mnemonics = ("clflush", "clflushopt", "clwb")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        address, load = bind_address(cpu, insn), cpu.read

        def action() -> None:
            load(address(), 1)

        return action


class TraceWrite(Handler):
    """PTWRITE while nothing is traced: the operand is read, and that is all."""

    name = f"{__name__}.ptwrite"
    mnemonics = ("ptwrite",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        source = bind_operand(cpu, insn, 0)
        if source is None:
            return None
        read = source.read

        def action() -> None:
            read()

        return action


class Undefined(Handler):
    """UD0, UD1, UD2: #UD by definition; the shadow stack's instructions while CR4.CET is 0."""

    name = f"{__name__}.ud"
    mnemonics = (
        *("ud0", "ud1", "ud2"),
        *("incsspd", "incsspq", "saveprevssp", "rstorssp", "setssbsy", "clrssbsy"),
        *("wrssd", "wrssq", "wrussd", "wrussq"),
    )
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        def action() -> None:
            raise Fault(UD)

        return action


class Bound(Handler):
    """BOUND: #BR unless lower <= index <= upper, signed."""

    name = f"{__name__}.bound"
    mnemonics = ("bound",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        index = bind_operand(cpu, insn, 0)
        if index is None or insn.iced.op1_kind != OpKind.MEMORY:
            return None
        read, bits, size = index.read, index.bits, index.bits // 8
        address = bind_address(cpu, insn)

        def action() -> None:
            limits = cpu.read(address(), 2 * size)
            lower = int.from_bytes(limits[:size], "little", signed=True)
            upper = int.from_bytes(limits[size:], "little", signed=True)
            if not lower <= signed(bits, read()) <= upper:
                raise Fault(BR)

        return action


HANDLERS = [Hint(), CacheLine(), TraceWrite(), Undefined(), Bound()]
