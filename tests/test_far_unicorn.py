"""Segment loads and far transfers: the handlers and Unicorn, an implementation that is not ours.

Random descriptors, selectors and privilege levels; both must end in the same state or raise the
same fault with the same error code. What Unicorn is known to do otherwise than the SDM says is not
generated (gates to conforming or absent code, segments both 64- and 32-bit, null SS with a foreign
RPL, an absent SS under RETF and IRET, limit violations) or not looked at (the accessed bit of CS).
"""

from __future__ import annotations

import random
import struct
from typing import Any, TypeAlias

import pytest

from handlers.system import PACK
from sandbox.boot import boot_flat
from sandbox.cpu import Cpu, Fault
from sandbox.decode import decode
from sandbox.descriptors import Gate, null_segment, serialise_gate, serialise_segment
from sandbox.engine.protocol import Stop
from sandbox.registers import (
    IF,
    IOPL,
    RAX,
    RBX,
    RSP,
    SEGMENT_NAMES,
    DescriptorTable,
    Segment,
)
from sandbox.vm import Vm

Outcome: TypeAlias = tuple[Any, ...]
GDT, TSS, OPERAND, INNER, STACK, CODE, TARGET = (
    0x20000, 0x21000, 0x22000, 0x30000, 0x31000, 0x4000, 0x5000,
)  # fmt: skip
OWN_CODE, OWN_DATA, KERNEL_DATA, ENTRIES = 14, 15, 16, range(2, 14)
"""GDT indices: the running code's segments, ring 0's stack, and the random ones."""

FORMS = {
    32: {"iretd": "cf", "retf": "cb", "retf 8": "ca0800", "jmp": "ff2b", "call": "ff1b",
         "mov ds": "8ed8", "mov ss": "8ed0", "pop fs": "0fa1", "les": "c403", "lss": "0fb203",
         "lar": "0f02c3", "lsl": "0f03c3", "verr": "0f00e3", "verw": "0f00eb"},
    64: {"iretq": "48cf", "retfq": "48cb", "jmp": "48ff2b", "call": "48ff1b", "mov ds": "8ed8",
         "mov ss": "8ed0", "pop fs": "0fa1", "lar": "480f02c3", "lsl": "480f03c3",
         "verr": "0f00e3", "verw": "0f00eb"},
}  # fmt: skip


class Bench:
    """One vCPU on which an instruction runs natively, then by its handler, from the same state."""

    def __init__(self, bitness: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.bitness = bitness
        self.size = bitness // 8
        self.vm = Vm("everything", handlers=())
        self.vcpu = boot_flat(
            self.vm, b"\xcc" * 16, CODE, "long" if bitness == 64 else "protected"
        ).vcpu
        self.cpu: Cpu = self.vcpu.cpu
        self.engine = self.vcpu.engine
        self.bank = self.cpu.registers.bank
        self.bank.write_table("gdtr", DescriptorTable(GDT, (KERNEL_DATA + 1) * 8 - 1))
        self.bank.write_segment("ldtr", null_segment(0))
        self.bank.write_segment("tr", Segment(0x100, TSS, 0x67, type=11, s=0))
        self.store(TARGET, b"\x0f\x0b" * 8)

    def store(self, address: int, data: bytes) -> None:
        self.engine.system_memory.write(address, data)

    def _flat(self, kind: int, dpl: int, index: int) -> Segment:
        code64 = int(self.bitness == 64 and bool(kind & 8))
        segment = Segment(
            index * 8 | dpl, 0, 0xFFFF_FFFF, kind, 1, dpl, l=code64, db=1 - code64, g=1
        )
        self.store(GDT + index * 8, serialise_segment(segment))
        return segment

    def _descriptor(self) -> bytes:
        pick, wide = self.random, self.bitness == 64
        kind, dpl = pick.random(), pick.choice((0, 0, 3, 3, 1, 2))
        present = int(pick.random() < 0.9)
        if kind < 0.35:
            l = int(wide and pick.random() < 0.7)  # noqa: E741
            type_ = 8 | pick.choice((0, 2, 3, 4, 6, 7))
            code = Segment(0, 0, 0xFFFF_FFFF, type_, 1, dpl, present, l=l, db=1 - l, g=1)
            return serialise_segment(code)
        if kind < 0.7:
            db, type_ = pick.getrandbits(1), pick.choice((0, 1, 2, 3, 3, 3))
            data = Segment(0, 0, 0xFFFF_FFFF, type_, 1, dpl, db=db, g=1)
            return serialise_segment(data)
        if kind < 0.85 and not wide:
            count, type_ = pick.choice((0, 2)), pick.choice((4, 12, 12))
            selector = pick.choice((OWN_CODE, OWN_DATA)) * 8
            return serialise_gate(Gate(selector, TARGET, type_, dpl, present, count=count))
        system = Segment(0, TSS, 0x67, pick.choice((0, 2, 10, 14)), 0, dpl, present)
        return serialise_segment(system)

    def _selector(self) -> int:
        if self.random.random() < 0.1:
            return self.random.choice((0, 0x200, 0x204, 0x1F3))
        return self.random.choice(ENTRIES) * 8 | self.random.choice((0, 3))

    def prepare(self, name: str) -> None:
        """Draw everything that one case starts from."""
        pick, size = self.random, self.size
        for index in ENTRIES:
            self.store(GDT + index * 8, self._descriptor())
        cpl = pick.choice((0, 3))
        self.segments = dict.fromkeys(SEGMENT_NAMES, self._flat(3, cpl, OWN_DATA))
        self.segments["cs"] = self._flat(11, cpl, OWN_CODE)
        kernel = self._flat(3, 0, KERNEL_DATA)
        if cpl == 0:
            self.segments["es"] = self.segments["gs"] = kernel
        self.store(TSS + 4, struct.pack("<IHH", INNER, kernel.selector if size == 4 else 0, 0))
        self.flags = 2 | pick.choice((0, IF)) | pick.choice((0, IOPL, 0x1000)) | pick.getrandbits(1)
        first = self._selector()
        second = self._selector() & ~3 | first & 3
        if name == "mov ss" and not first & ~3:
            first = 0x200
        image = 2 | pick.getrandbits(22) & 0x43AD5
        frame = [
            TARGET,
            first,
            *([image] if name.startswith("iret") else []),
            STACK + 0x500,
            second,
        ]
        if name == "retf 8":
            frame[2:2] = [7, 8]
        if name == "pop fs":
            frame = [first]
        self.store(STACK, b"".join(value.to_bytes(size, "little") for value in frame))
        self.store(OPERAND, TARGET.to_bytes(size, "little") + struct.pack("<H", first))
        self.selector = first
        self.store(CODE, bytes.fromhex(FORMS[self.bitness][name]) + b"\x0f\x0b")

    def reset(self) -> None:
        self.bank.write("rflags", self.flags)
        for name, segment in self.segments.items():
            self.bank.write_segment(name, segment)
        for number in range(16):
            self.cpu.gpr[number] = 0x1111 * number
        self.cpu.gpr[RSP], self.cpu.gpr[RBX], self.cpu.gpr[RAX] = STACK, OPERAND, self.selector
        if self.name[:3] in ("lar", "lsl", "ver"):
            self.cpu.gpr[RBX] = self.selector
        self.cpu.registers.rip = CODE

    def state(self, rip: int) -> Outcome:
        read = self.engine.system_memory.read
        segments = []
        for name in SEGMENT_NAMES:
            s = self.bank.read_segment(name)
            hidden = (s.base, s.limit, s.type | 1, s.dpl, s.l, s.db) if s.selector & 0xFFFC else ()
            segments.append((name, s.selector, hidden))
        stacks = read(INNER - 0x100, 0x100), read(STACK - 0x100, 0x200)
        return rip, segments, list(self.cpu.gpr), self.cpu.rflags, self.cpu.cpl, stacks

    def native(self) -> Outcome:
        self.reset()
        self.engine.sync()
        stop, rip = self.engine.enter(), self.cpu.rip
        if stop is Stop.EXCEPTION and rip == CODE:
            return "fault", self.engine.vector, self.engine.error_code
        return self.state(rip)

    def handled(self, code: bytes) -> Outcome:
        self.reset()
        insn = decode(code, self.bitness)
        handlers = [
            h for h in PACK.handlers if insn.mnemonic in h.mnemonics or insn.form in h.forms
        ]
        action = handlers[0].bind(self.cpu, insn)
        assert action is not None
        try:
            verdict: Any = action()
        except Fault as fault:
            return "fault", fault.vector, fault.error_code
        return self.state(verdict.rip if verdict else CODE + insn.length)

    def compare(self, name: str) -> bool:
        """Run one case both ways; whether it came through without a fault."""
        self.name = name
        self.prepare(name)
        tables = self.engine.system_memory.read(GDT, 0x100)
        stacks = self.engine.system_memory.read(INNER - 0x100, 0x1200)
        native = self.native()
        self.store(GDT, tables)
        self.store(INNER - 0x100, stacks)
        handled = self.handled(bytes.fromhex(FORMS[self.bitness][name]))
        assert handled == native, name
        return bool(native[0] != "fault")


CASES = [(bitness, name) for bitness, forms in FORMS.items() for name in forms]


@pytest.mark.parametrize(("bitness", "name"), CASES)
def test_handler_and_unicorn_agree(bitness: int, name: str) -> None:
    bench = Bench(bitness, seed=len(name) + bitness)
    good = sum([bench.compare(name) for _ in range(200)])
    assert good, "no case came through"
