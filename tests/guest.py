"""Small guests on the whole machine, for tests of the fast path and the run loop."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guests.assemble import assemble
from sandbox import abi
from sandbox.boot import CODE_64, USER_CODE_64, USER_DATA, Machine, Mode, boot_flat
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.descriptors import Gate, serialise_gate
from sandbox.exits import Hlt
from sandbox.handler import FunctionHandler, Pack
from sandbox.paging import AddressSpace, FrameAllocator
from sandbox.policy import Policy
from sandbox.registers import DescriptorTable, Segment
from sandbox.vm import Vm

BITNESS: dict[Mode, int] = {"real": 16, "protected": 32, "long": 64}
MODES: tuple[Mode, ...] = ("real", "protected", "long")
BASE = 0x1000


def policy(*trapped: str, allowed: tuple[str, ...] = (), extra: str = "") -> Policy:
    """The baseline less the mnemonics ``trapped``; or nothing but the mnemonics ``allowed``."""
    text = f'extends = "{"nothing" if allowed else "baseline"}"\n'
    for action, names in (("allow", allowed), ("trap", trapped)):
        if names:
            text += f'[[rule]]\naction = "{action}"\nmnemonic = {list(names)}\n'
    return Policy.parse(text + extra)


class Recorder:
    """Handlers that do nothing but note where they were asked: ``rips``, ``texts``."""

    def __init__(self, *mnemonics: str, patterns: tuple[str, ...] = ()) -> None:
        self.rips: list[int] = []
        self.texts: list[str] = []
        self.pack = Pack("recorder", (FunctionHandler(self._note, mnemonics, (), patterns),))

    def _note(self, cpu: Cpu, insn: Insn) -> None:
        self.rips.append(cpu.rip)
        self.texts.append(str(insn.iced))


@contextmanager
def machine(
    code: bytes | str,
    mode: Mode = "long",
    *,
    base: int = BASE,
    policy: str | Policy = "baseline",
    handlers: Iterable[str | Path | Pack] = (),
    cap: bool = True,
) -> Iterator[Machine]:
    """A flat guest, ready to run; ``code`` is assembled if it is text."""
    if isinstance(code, str):
        code = assemble(code, base, BITNESS[mode])
    with Vm(policy, handlers) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, int(cap))
        yield boot_flat(vm, code, base, mode)


def run_to_hlt(found: Machine, timeout: float = 10) -> None:
    """Run; anything but HLT is a failure."""
    left: Any = found.vcpu.run(timeout)
    assert isinstance(left, Hlt), f"{left} at {found.vcpu.registers.rip:#x}"


IDT, TSS, KERNEL_STACK, IST1 = 0x10_0000, 0x10_2000, 0x11_0000, 0x12_0000


def add_idt(
    found: Machine, targets: Mapping[int, int], ist: Mapping[int, int] | None = None
) -> None:
    """A 64-bit IDT that leads vectors to addresses (DPL 3), and a TSS with RSP0 and IST1."""
    bank, memory = found.vm.engine.bank, found.vm.memory
    for vector, target in targets.items():
        gate = Gate(CODE_64.selector, target, 14, dpl=3, ist=(ist or {}).get(vector, 0))
        memory.load(IDT + 16 * vector, serialise_gate(gate, wide=True))
    memory.load(TSS + 4, KERNEL_STACK.to_bytes(8, "little"))
    memory.load(TSS + 36, IST1.to_bytes(8, "little"))
    memory.load(TSS + 102, b"\xff\xff")  # no IO permission bitmap
    bank.write_table("idtr", DescriptorTable(IDT, 0xFFF))
    bank.write_segment("tr", Segment(0x38, TSS, 0x67, type=11, s=0))


def enter_user_mode(found: Machine) -> None:
    """CPL 3, in 64-bit code, at the same place."""
    bank = found.vm.engine.bank
    bank.write_segment("cs", USER_CODE_64)
    bank.write_segment("ss", USER_DATA)


def quads(found: Machine, address: int, count: int) -> list[int]:
    """``count`` little-endian 64-bit words of guest physical memory."""
    return list(struct.unpack(f"<{count}Q", found.vm.memory.read(address, 8 * count)))


def own_tables(found: Machine, *, at: int = 0x10_0000) -> AddressSpace:
    """Page tables in the guest's own RAM, mapped there: the first 2 MiB, all rights."""
    space = AddressSpace(
        found.vm.memory, FrameAllocator(found.vm.memory, at, 0x10_0000), lambda: None
    )
    space.map(0, 0, 0x20_0000, write=True, execute=True)
    space.map(0x8000_0000 - 0x1000, 0x8000_0000 - 0x1000, 0x2000, write=True, execute=False)
    return space
