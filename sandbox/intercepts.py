"""Instructions that the machine takes itself, whatever the policy says, as VMX and SVM intercept.

They leave the guest (HLT, port IO), concern state that only the machine knows whole (CPUID, XSAVE,
MXCSR, control registers, MSRs, FS and GS base) or are events (INT n). No emulation failure is
reported for them: in KVM they never reach the emulator's limits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from iced_x86 import Code, Mnemonic, OpCodeInfo

from sandbox import events
from sandbox.abi import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT
from sandbox.cpu import BP, DB, GP, OF_, Cpu, Fault
from sandbox.decode import FORM_NAMES, MNEMONIC_NAMES, Insn
from sandbox.exits import GuestException, Hlt, Io
from sandbox.handler import Action, Exit, Resume
from sandbox.memory import PAGE_SIZE, DeviceRange
from sandbox.registers import DF, ES, OF, RAX, RCX, RDI, RDX, RSI

MNEMONICS = frozenset(
    "ldmxcsr stmxcsr vldmxcsr vstmxcsr fxsave fxsave64 fxrstor fxrstor64 "
    "hlt in out insb insw insd outsb outsw outsd int int1 int3 into "
    "cpuid xgetbv xsetbv xsave xsave64 xsavec xsavec64 xsaveopt xsaveopt64 xsaves xsaves64 "
    "xrstor xrstor64 xrstors xrstors64 rdmsr wrmsr rdpmc rdtsc rdtscp rdpid rdrand rdseed "
    "syscall sysret sysretq sysenter sysexit sysexitq clts lmsw invlpg invpcid monitor mwait rsm "
    "ltr rdfsbase rdgsbase wrfsbase wrgsbase "
    "vmcall vmmcall vmlaunch vmresume vmxoff vmxon vmrun vmload vmsave stgi clgi skinit".split()
)
"""Mnemonics intercepted in every policy."""
UNMASKING = frozenset("sti popf popfd popfq iret iretd iretq pushf pushfd pushfq".split())
"""What sets RFLAGS.IF, intercepted where there are external interrupts; and PUSHF, which would show
TF where the machine steps over the instruction that interrupts wait for."""
BOUND_MNEMONICS = frozenset(
    "hlt in out insb insw insd outsb outsw outsd int int1 int3 into".split()
)
"""Those that :class:`Intercepts` runs itself; the others go to handlers."""


def _moves_control_register(code: int) -> bool:
    return FORM_NAMES[code].startswith(
        ("MOV_CR_", "MOV_DR_", "MOV_R32_CR", "MOV_R64_CR", "MOV_R32_DR", "MOV_R64_DR")
    )


@lru_cache(maxsize=2)
def intercepted_forms(interruptible: bool = False) -> bytes:
    """1 for each iced-x86 ``Code`` that the machine intercepts; ``interruptible``: also what lets
    interrupts in."""
    names = MNEMONICS | UNMASKING if interruptible else MNEMONICS
    table = bytearray(max(FORM_NAMES) + 1)
    for code in FORM_NAMES:
        name = MNEMONIC_NAMES[OpCodeInfo(code).mnemonic]  # type: ignore[arg-type]
        table[code] = name in names or _moves_control_register(code)
    table[Code.INVALID] = 1
    return bytes(table)


class Ports:
    """The IO port space: devices by port range."""

    def __init__(self) -> None:
        self.ranges: list[DeviceRange] = []
        self.others: DeviceRange | None = None
        """What answers for the ports of no device; without it they are exits."""

    def find(self, port: int) -> DeviceRange | None:
        for found in self.ranges:
            if found.base <= port < found.end:
                return found
        return self.others


class Intercepts:
    """Binds the intercepts that are events or exits: HLT, port IO, INT n."""

    def __init__(self, cpu: Cpu, ports: Ports) -> None:
        self._cpu = cpu
        self._ports = ports
        self.io_reply: bytes | None = None
        """The answer to the last :class:`~sandbox.exits.Io` read: set before it is run again."""
        self._binders: dict[int, Callable[[Insn], Action]] = {
            Mnemonic.HLT: self._hlt,
            Mnemonic.IN: self._in,
            Mnemonic.OUT: self._out,
            Mnemonic.INT: lambda insn: self._interrupt(insn, insn.iced.immediate8),
            Mnemonic.INT3: lambda insn: self._interrupt(insn, BP),
            Mnemonic.INTO: self._into,
            Mnemonic.INT1: lambda insn: self._interrupt(insn, DB, software=False),
        }
        for size, letter in ((1, "B"), (2, "W"), (4, "D")):
            self._binders[getattr(Mnemonic, f"INS{letter}")] = self._string_binder(size, True)
            self._binders[getattr(Mnemonic, f"OUTS{letter}")] = self._string_binder(size, False)

    def bind(self, insn: Insn) -> Action | None:
        """What to run for ``insn``, or None if it is none of these."""
        binder = self._binders.get(insn.iced.mnemonic)
        return binder(insn) if binder else None

    # -- events

    def _hlt(self, insn: Insn) -> Action:
        cpu = self._cpu

        def run() -> Exit:
            if cpu.cpl:
                raise Fault(GP, 0)
            cpu.registers.rip += insn.length
            return Exit(Hlt())

        return run

    def _interrupt(self, insn: Insn, vector: int, *, software: bool = True) -> Action:
        cpu = self._cpu

        def run() -> Exit | Resume:
            if not (events.can_deliver(cpu, vector) or events.can_deliver(cpu, GP)):
                return Exit(GuestException(vector))  # no table at all: it is the caller's
            after = cpu.rip + insn.length
            system = cpu.services["system_memory"]
            events.deliver(cpu, system, vector, software=software, next_rip=after)
            return Resume(cpu.rip)

        return run

    def _into(self, insn: Insn) -> Action:
        overflow = self._interrupt(insn, OF_)
        cpu = self._cpu
        return lambda: overflow() if cpu.rflags & OF else None

    # -- port IO

    def _check_port(self, port: int, size: int) -> None:
        """#GP unless IOPL or the TSS's IO permission bitmap allows it (SDM Vol. 1, 19.5)."""
        cpu = self._cpu
        bank = cpu.registers.bank
        if not bank.read("cr0") & 1 or cpu.cpl <= cpu.rflags >> 12 & 3:
            return
        tss = bank.read_segment("tr")
        system = cpu.services["system_memory"]
        if tss.limit < 103:
            raise Fault(GP, 0)
        at = int.from_bytes(system.read(tss.base + 102, 2), "little") + port // 8
        if at + 1 > tss.limit:
            raise Fault(GP, 0)
        bits = int.from_bytes(system.read(tss.base + at, 2), "little") >> port % 8
        if bits & ((1 << size) - 1):
            raise Fault(GP, 0)

    def _read_port(self, port: int, size: int, count: int = 1) -> bytes | Exit:
        """One item of a device, or ``count`` of the caller."""
        found = self._ports.find(port)
        if found is not None:
            value = found.device.read(port - found.base, size)
            return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if self.io_reply is None:
            return Exit(Io(KVM_EXIT_IO_IN, port, size, count))
        reply, self.io_reply = self.io_reply, None
        return reply

    def _write_port(self, port: int, data: bytes) -> Exit | None:
        found = self._ports.find(port)
        if found is None:
            return Exit(Io(KVM_EXIT_IO_OUT, port, len(data), data=data))
        found.device.write(port - found.base, len(data), int.from_bytes(data, "little"))
        return None

    def _port(self, insn: Insn, operand: int) -> Callable[[], int]:
        iced, gpr = insn.iced, self._cpu.gpr
        if iced.op_kind(operand) != 0:  # an immediate, not DX
            fixed = iced.immediate8
            return lambda: fixed
        return lambda: gpr[RDX] & 0xFFFF

    def _in(self, insn: Insn) -> Action:
        gpr, port = self._cpu.gpr, self._port(insn, 1)
        size = _SIZES[insn.form.split("_")[1]]
        keep = 0 if size == 4 else ~((1 << 8 * size) - 1) & 0xFFFF_FFFF_FFFF_FFFF

        def run() -> Exit | None:
            self._check_port(port(), size)
            data = self._read_port(port(), size)
            if isinstance(data, Exit):
                return data
            gpr[RAX] = (gpr[RAX] & keep) | int.from_bytes(data, "little")
            return None

        return run

    def _out(self, insn: Insn) -> Action:
        cpu, gpr, port = self._cpu, self._cpu.gpr, self._port(insn, 0)
        size = _SIZES[insn.form.split("_")[2]]

        def run() -> Exit | None:
            self._check_port(port(), size)
            data = (gpr[RAX] & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            left = self._write_port(port(), data)
            if left is not None:
                cpu.registers.rip += insn.length
            return left

        return run

    def _string_binder(self, size: int, inward: bool) -> Callable[[Insn], Action]:
        return lambda insn: self._string(insn, size, inward)

    def _string(self, insn: Insn, size: int, inward: bool) -> Action:
        """INS and OUTS as KVM's emulator has them: REP INS asks for several items at once, OUTS is
        an exit per item, and RIP stays at a repeated one until it is entered with RCX at 0."""
        cpu, gpr, iced = self._cpu, self._cpu.gpr, insn.iced
        index = RDI if inward else RSI
        width = _address_bits(insn)
        mask = (1 << width) - 1
        segment = ES if inward else _SEGMENT_OF[iced.memory_segment]
        repeated = iced.has_rep_prefix or iced.has_repne_prefix
        base = cpu.registers.bank.segment_base

        def advance() -> None:
            step = -size if cpu.rflags & DF else size
            _set(gpr, index, (gpr[index] + step) & mask, width)
            if repeated:
                _set(gpr, RCX, (gpr[RCX] - 1) & mask, width)

        def read_ahead() -> int:
            """How many items to ask for (``emulator_pio_in_emulated``, ``pio_in_emulated``)."""
            if not repeated:
                return 1
            offset = gpr[RDI] % PAGE_SIZE
            room = offset if cpu.rflags & DF else PAGE_SIZE - offset
            return max(1, min(room, _READ_AHEAD // size, gpr[RCX] & mask))

        def run() -> Exit | Resume | None:
            port = gpr[RDX] & 0xFFFF
            items = b""
            while not repeated or gpr[RCX] & mask:
                self._check_port(port, size)
                at = gpr[index] & mask
                if insn.bitness != 64 or segment > 3:
                    at += base(segment)
                if inward:
                    cpu.check_write(at, size)
                    if not items:
                        data = self._read_port(port, size, read_ahead())
                        if isinstance(data, Exit):
                            return data
                        items = data
                    cpu.write(at, items[:size])
                    items = items[size:]
                    advance()
                else:
                    left = self._write_port(port, cpu.read(at, size))
                    advance()
                    if left is not None:
                        if not repeated:
                            cpu.registers.rip += insn.length
                        return left
                if not repeated:
                    break
            return None

        return run


_READ_AHEAD = 1024
"""Bytes of KVM's buffer for string input."""
_SIZES = {"AL": 1, "AX": 2, "EAX": 4}
_SEGMENT_OF = {71 + n: n for n in range(6)}


def _address_bits(insn: Insn) -> int:
    """Address size of a string instruction: the 67 prefix toggles the mode's."""
    prefixes = insn.raw[: insn.length - 1]
    toggled = {64: 32, 32: 16, 16: 32}[insn.bitness]
    return toggled if 0x67 in prefixes else insn.bitness


def _set(gpr: memoryview, index: int, value: int, width: int) -> None:
    """Write a counter or pointer of ``width`` bits: 16 keep the rest, 32 clear it."""
    gpr[index] = (gpr[index] & ~0xFFFF) | value if width == 16 else value
