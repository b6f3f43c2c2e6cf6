"""No-operations change nothing; instructions that fault by definition do; LOCK where allowed."""

from __future__ import annotations

import pytest

from sandbox.cpu import BR, GP, PF_, UD, Fault
from sandbox.decode import DecodeError, decode
from sandbox.registers import CF, RAX, RBX
from tests.doubles import FlatMemory, make_cpu
from tests.integer_cases import bind

HINTS = ["90", "f390", "0f1f00", "660f1f440000", "f30f1efa", "f30f1efb", "0fae e8", "0faef0"]
HINTS += ["0faef8", "0f0d08", "0f1808", "0f1838", "0f1e00", "0f01e8"]


@pytest.mark.parametrize("code", HINTS)
def test_hints_touch_neither_registers_nor_memory(code: str) -> None:
    """Also where their memory operand is not mapped."""
    cpu = make_cpu()
    cpu.gpr[:] = memoryview(bytes(range(128))).cast("Q")
    before = list(cpu.gpr), cpu.rflags
    assert bind(cpu, decode(bytes.fromhex(code), 64))() is None
    assert (list(cpu.gpr), cpu.rflags) == before


@pytest.mark.parametrize("code", ["0fae38", "660fae38", "660fae30"])
def test_cache_line_instructions_fault_like_loads(code: str) -> None:
    cpu = make_cpu()
    action = bind(cpu, decode(bytes.fromhex(code), 64))
    cpu.gpr[RAX] = 0x10000
    action()
    cpu.gpr[RAX] = 0x8000
    with pytest.raises(Fault) as caught:
        action()
    assert (caught.value.vector, caught.value.error_code) == (PF_, 0)


@pytest.mark.parametrize("code", ["0f0b", "0fb9c0", "0fffc0"])
def test_undefined_instructions(code: str) -> None:
    with pytest.raises(Fault) as caught:
        bind(make_cpu(), decode(bytes.fromhex(code), 64))()
    assert caught.value.vector == UD


@pytest.mark.parametrize(
    ("index", "fine"), [(-5, True), (-6, False), (7, True), (8, False), (0, True)]
)
def test_bound(index: int, fine: bool) -> None:
    cpu = make_cpu(32)
    cpu.gpr[RAX], cpu.gpr[RBX] = index & 0xFFFF_FFFF, 0x10000
    cpu.write(0x10000, (-5 & 0xFFFF_FFFF).to_bytes(4, "little") + (7).to_bytes(4, "little"))
    action = bind(cpu, decode(b"\x62\x03", 32))
    if fine:
        assert action() is None
        return
    with pytest.raises(Fault) as caught:
        action()
    assert caught.value.vector == BR


@pytest.mark.parametrize("code", ["f089c8", "f001d8", "f08b00", "f039 08", "f00fa308", "f0d108"])
def test_lock_is_an_invalid_instruction_without_a_modified_memory_operand(code: str) -> None:
    """SDM Vol. 2, LOCK: everything else is #UD, so it never reaches a handler."""
    with pytest.raises(DecodeError):
        decode(bytes.fromhex(code), 64)


LOCKED = ["f00108", "f01108", "f02908", "f01908", "f02108", "f00908", "f03108", "f0ff00", "f0ff08"]
LOCKED += ["f0f710", "f0f718", "f08708", "f00fc108", "f00fb108", "f00fc70e", "f00fab08", "f00fbb08"]


@pytest.mark.parametrize("code", LOCKED)
def test_locked_instructions_run(code: str) -> None:
    cpu = make_cpu(64, 0, FlatMemory())
    for number in range(16):
        cpu.gpr[number] = 0x10000
    assert bind(cpu, decode(bytes.fromhex(code), 64))() is None


def test_cmpxchg16b_wants_its_memory_aligned() -> None:
    cpu = make_cpu()
    cpu.gpr[RAX] = 0x10008
    action = bind(cpu, decode(bytes.fromhex("480fc708"), 64))
    with pytest.raises(Fault) as caught:
        action()
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)


def test_salc_spreads_the_carry() -> None:
    cpu = make_cpu(32)
    action = bind(cpu, decode(b"\xd6", 32))
    cpu.gpr[RAX] = 0x1234
    cpu.rflags = 2 | CF
    action()
    assert cpu.gpr[RAX] == 0x12FF
    cpu.rflags = 2
    action()
    assert cpu.gpr[RAX] == 0x1200
