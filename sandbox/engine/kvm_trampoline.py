"""How user code without a kernel of its own leaves a real processor: stubs that halt.

A program at CPL 3 runs natively, SYSCALL and exceptions included, so the machine gives it what a
kernel would: an IDT, a TSS and LSTAR, all leading to one HLT per reason in a page that only CPL 0
sees. HLT ends KVM_RUN; the state of the program is then put back as it was at its instruction, and
the handler tier sees no difference to an instruction that was trapped.
"""

from __future__ import annotations

import struct
from typing import Final

from sandbox.cpu import BP, ERROR_CODE_VECTORS, GP, OF_, UD
from sandbox.descriptors import INTERRUPT_GATE, Gate, serialise_gate
from sandbox.engine.kvm_state import KvmBank
from sandbox.engine.protocol import Stop
from sandbox.memory import PAGE_SIZE, PhysicalMemory
from sandbox.paging import AddressSpace
from sandbox.registers import RCX, RSP, DescriptorTable, Segment

PHYSICAL: Final = 0x41_0000_0000
"""Guest physical address of the page that holds stubs, tables and stack."""
LINEAR: Final = 0xFFFF_8000_0000_0000
"""Where the page is mapped: the kernel's half, which no program reaches."""

_STUB_BYTES = 16
_VECTORS = 32
_SYSCALL = _VECTORS
"""Number of the stub that SYSCALL leads to."""
_IDT, _TSS, _GDT, _STACK_TOP = 0x400, 0x600, 0x680, 0x1000
_CODE = 0x08
"""Selector of the stubs' code segment, the only one in this GDT but for the TSS."""
_CODE_DESCRIPTOR = 0x00AF_9B00_0000_FFFF
_HLT = b"\xf4"
_TSS_BYTES = 0x68
_TSS_SELECTOR = 0x38
_R11 = 11
_SOFTWARE = frozenset({BP, OF_})
"""What a program may raise by INT3 and INTO; INT n with any other vector is #GP."""
_INT_ERROR = 2
"""Bit of a #GP error code: it names a vector, so an INT n was refused."""
_FLAGS_CLEARED = 0x4_7700
"""By SYSCALL: AC, NT, DF, IF, TF, IOPL."""


class Trampoline:
    """Makes a vCPU that is about to run user code come out at CPL 0, and puts it back."""

    def __init__(self, memory: PhysicalMemory, space: AddressSpace) -> None:
        self._slot = memory.add_slot(PHYSICAL, PAGE_SIZE)
        space.map(LINEAR, PHYSICAL, PAGE_SIZE, write=True, execute=True, user=False)
        memory.load(PHYSICAL, b"".join(_HLT.ljust(_STUB_BYTES, b"\xcc") for _ in range(33)))
        for vector in range(_VECTORS):
            dpl = 3 if vector in _SOFTWARE else 0
            target = LINEAR + vector * _STUB_BYTES
            gate = Gate(_CODE, target, INTERRUPT_GATE, dpl=dpl)
            memory.load(PHYSICAL + _IDT + 16 * vector, serialise_gate(gate, wide=True))
        memory.load(PHYSICAL + _GDT + _CODE, _CODE_DESCRIPTOR.to_bytes(8, "little"))
        memory.load(PHYSICAL + _TSS + 4, (LINEAR + _STACK_TOP).to_bytes(8, "little"))
        memory.load(PHYSICAL + _TSS + 102, b"\xff\xff")  # no IO permission bitmap

    def install(self, bank: KvmBank) -> None:
        """Set GDTR, IDTR, TR and the MSRs of SYSCALL for a program whose CS and SS are set."""
        self._code, self._stack = bank.read_segment("cs"), bank.read_segment("ss")
        bank.write_table("gdtr", DescriptorTable(LINEAR + _GDT, 0x0F))
        bank.write_table("idtr", DescriptorTable(LINEAR + _IDT, 16 * _VECTORS - 1))
        bank.shown_idt = DescriptorTable(0, 0)
        bank.write_segment("tr", Segment(_TSS_SELECTOR, LINEAR + _TSS, _TSS_BYTES - 1, 11, s=0))
        bank.write("star", _CODE << 32)
        bank.write("lstar", LINEAR + _SYSCALL * _STUB_BYTES)
        bank.write("fmask", _FLAGS_CLEARED)

    def leave(self, bank: KvmBank) -> tuple[Stop, int, int] | None:
        """The program's state after a HLT: what stopped it, vector and error code. None if the HLT
        is not one of ours."""
        number, rest = divmod(bank.registers.rip - 1 - LINEAR, _STUB_BYTES)
        if rest or not 0 <= number <= _SYSCALL:
            return None
        if number == _SYSCALL:
            return self._system_call(bank)
        at = bank.registers.gpr[RSP] - LINEAR
        code = 0
        if number in ERROR_CODE_VECTORS:
            code = struct.unpack_from("<Q", self._slot.host, at)[0]
            at += 8
        rip, _cs, flags, rsp, _ss = struct.unpack_from("<5Q", self._slot.host, at)
        bank.registers.gpr[RSP] = rsp
        if rip == LINEAR + _SYSCALL * _STUB_BYTES:  # the module kvm_pvm leaves CPL at 3 there: #PF
            return self._system_call(bank)
        if number in _SOFTWARE:
            rip -= 1
        self._to_user(bank, rip, flags)
        trapped = number in _SOFTWARE or number == UD or (number == GP and code & _INT_ERROR)
        return (Stop.INSN if trapped else Stop.EXCEPTION), number, code

    def _system_call(self, bank: KvmBank) -> tuple[Stop, int, int]:
        self._to_user(bank, bank.registers.gpr[RCX] - 2, bank.registers.gpr[_R11])
        return Stop.INSN, 0, 0

    def _to_user(self, bank: KvmBank, rip: int, flags: int) -> None:
        bank.write_segment("cs", self._code)
        bank.write_segment("ss", self._stack)
        bank.registers.rip = rip
        bank.write("rflags", flags)
