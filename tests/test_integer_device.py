"""What a device sees of an instruction: each access once, in order, of the operand's size."""

from __future__ import annotations

import pytest

from sandbox.decode import decode
from sandbox.registers import RAX, RBX, RCX, RDI, RDX, RSI, RSP
from tests.doubles import FlatMemory, make_cpu
from tests.integer_cases import bind

DEVICE = range(0x11000, 0x12000)


class LoggedMemory(FlatMemory):
    """Memory that notes every read and write of :data:`DEVICE`."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def read(self, address: int, size: int) -> bytes:
        if address in DEVICE:
            self.log.append(f"r{size}+{address - DEVICE.start:x}")
        return super().read(address, size)

    def write(self, address: int, data: bytes) -> None:
        if address in DEVICE:
            self.log.append(f"w{len(data)}+{address - DEVICE.start:x}")
        super().write(address, data)


@pytest.mark.parametrize(
    ("code", "accesses"),
    [
        ("8b03", "r4+0"),  # mov eax, [rbx]
        ("668903", "w2+0"),
        ("c60301", "w1+0"),
        ("480fb603", "r1+0"),  # movzx rax, byte [rbx]
        ("0fb703", "r2+0"),
        ("0103", "r4+0 w4+0"),  # add [rbx], eax
        ("0303", "r4+0"),
        ("3b03", "r4+0"),
        ("8403", "r1+0"),
        ("f70300000000", "r4+0"),
        ("48f71b", "r8+0 w8+0"),
        ("d123", "r4+0 w4+0"),
        ("8703", "r4+0 w4+0"),  # xchg
        ("f00fb113", "r4+0 w4+0"),  # lock cmpxchg, whether equal or not
        ("0fc70b", "r8+0 w8+0"),  # cmpxchg8b
        ("0f4403", "r4+0"),  # cmove reads also if the condition is false
        ("0fab0b", "r4+4 w4+4"),  # bts [rbx], ecx with ecx = 40: the second word
        ("0fba2b28", "r4+0 w4+0"),  # bts [rbx], 40: modulo 32
        ("0f38f003", "r4+0"),  # movbe
        ("ff33", "r8+0"),  # push
        ("8f03", "w8+0"),  # pop
        ("0f9403", "w1+0"),
        ("a4", "r1+100 w1+200"),
        ("f3a5", "r4+100 w4+200 r4+104 w4+204 r4+108 w4+208"),
        ("f366ab", "w2+200 w2+202 w2+204"),
        ("f2ae", "r1+200"),  # repne scasb finds it at once
        ("f3a6", "r1+100 r1+200 r1+101 r1+201 r1+102 r1+202"),
    ],
)
def test_accesses(code: str, accesses: str) -> None:
    memory = LoggedMemory()
    cpu = make_cpu(64, 0, memory)
    cpu.gpr[RBX], cpu.gpr[RSP] = DEVICE.start, 0x13000
    cpu.gpr[RSI], cpu.gpr[RDI] = DEVICE.start + 0x100, DEVICE.start + 0x200
    cpu.gpr[RAX], cpu.gpr[RDX] = 0, 7
    cpu.gpr[RCX] = 40 if code.startswith("0fab") else 3
    bind(cpu, decode(bytes.fromhex(code), 64))()
    assert " ".join(memory.log) == accesses
