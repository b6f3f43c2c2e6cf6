"""RAO-INT and CMPccXADD against the older instructions that they are made of, run on the host."""

from __future__ import annotations

import random

import pytest

from handlers.integer_pack import PACK
from sandbox.cpu import GP, PF_, UD, Cpu, Fault
from sandbox.decode import decode
from sandbox.encodings import Memory, encode, form, forms_of
from sandbox.native import NativeCpu, State
from sandbox.registers import AF, CF, OF, PF, RAX, RCX, RDX, SF, ZF
from tests.doubles import FlatMemory, make_cpu
from tests.integer_cases import SPECIAL, bind, needs_native

AT = 0x10040
STATUS = CF | PF | AF | ZF | SF | OF
CONDITIONS = "O NO B NB Z NZ BE NBE S NS P NP L NL LE NLE".split()


def run(code: bytes, cpu: Cpu) -> None:
    action = bind(cpu, decode(code, 64))
    assert action() is None


def prepared(memory: int, first: int, second: int) -> Cpu:
    cpu = make_cpu()
    cpu.gpr[RAX], cpu.gpr[RCX], cpu.gpr[RDX] = AT, first, second
    cpu.rflags = 0x202 | STATUS
    cpu.write_int(AT, memory, 8)
    return cpu


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("AADD", lambda a, b: a + b),
        ("AAND", lambda a, b: a & b),
        ("AOR", lambda a, b: a | b),
        ("AXOR", lambda a, b: a ^ b),
    ],
)
@pytest.mark.parametrize("bits", [32, 64])
def test_remote_operations_change_memory_and_no_flags(name: str, want: object, bits: int) -> None:
    code = encode(form(f"{name}_M{bits}_R{bits}"), (1,), Memory(0))
    low = (1 << bits) - 1
    for a in SPECIAL:
        for b in SPECIAL[::5]:
            cpu = prepared(a, b, 0)
            run(code, cpu)
            assert callable(want)
            assert cpu.read_int(AT, 8) == a & ~low | want(a & low, b & low) & low
            assert (cpu.gpr[RCX], cpu.rflags) == (b, 0x202 | STATUS)


def native_flags(bits: int, a: int, b: int) -> int:
    """The flags of CMP on the host."""
    state = State()
    state.gpr[RCX], state.gpr[RDX] = a, b
    code = encode(form(f"CMP_RM{bits}_R{bits}"), (1, 2))
    return NativeCpu.shared().run(code, state).state.rflags & STATUS


@needs_native
@pytest.mark.parametrize("bits", [32, 64])
def test_compare_and_add_is_cmp_then_a_conditional_addition(bits: int) -> None:
    source, low = random.Random(bits), (1 << bits) - 1
    for _ in range(12):
        memory, compared, added = (source.choice((*SPECIAL, 7)) for _ in range(3))
        if source.random() < 0.3:
            compared = memory
        flags = native_flags(bits, memory, compared)
        signs = bool(flags & SF) != bool(flags & OF)
        holds = {
            "O": flags & OF, "B": flags & CF, "Z": flags & ZF, "BE": flags & (CF | ZF),
            "S": flags & SF, "P": flags & PF, "L": signs, "LE": flags & ZF or signs,
        }  # fmt: skip
        for name in CONDITIONS:
            wanted = bool(holds[name.removeprefix("N")]) != name.startswith("N")
            cpu = prepared(memory, compared, added)
            code = encode(form(f"VEX_CMP{name}XADD_M{bits}_R{bits}_R{bits}"), (1, 2), Memory(0))
            run(code, cpu)
            total = memory & low
            if wanted:
                total = total + (added & low) & low
            assert cpu.read_int(AT, 8) == memory & ~low & (1 << 64) - 1 | total, name
            assert cpu.gpr[RCX] == memory & low and cpu.gpr[RDX] == added
            assert cpu.rflags == 0x202 | flags


def codes() -> list[bytes]:
    names = [f"cmp{name.lower()}xadd" for name in CONDITIONS]
    chosen = forms_of("aadd", "aand", "aor", "axor", *names)
    return [encode(code, (1, 2), Memory(0)) for code in chosen]


@pytest.mark.parametrize("code", codes(), ids=bytes.hex)
def test_misaligned_is_gp_and_a_readonly_page_is_pf(code: bytes) -> None:
    cpu = prepared(5, 6, 7)
    cpu.gpr[RAX] = AT + 2
    with pytest.raises(Fault) as caught:
        run(code, cpu)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    assert isinstance(cpu.memory, FlatMemory)
    cpu.memory.readonly = range(0x10000, 0x11000)
    cpu.gpr[RAX] = AT
    with pytest.raises(Fault) as caught:
        run(code, cpu)
    assert (caught.value.vector, caught.value.address) == (PF_, AT)
    assert (cpu.gpr[RCX], cpu.gpr[RDX], cpu.rflags) == (6, 7, 0x202 | STATUS)


def test_one_register_may_be_both() -> None:
    cpu = prepared(100, 100, 0)
    run(encode(form("VEX_CMPZXADD_M64_R64_R64"), (1, 1), Memory(0)), cpu)
    assert (cpu.read_int(AT, 8), cpu.gpr[RCX]) == (200, 100)


def test_the_pack_has_them() -> None:
    names = {name for handler in PACK.handlers for name in handler.mnemonics}
    assert {"aadd", "cmpzxadd", "movdir64b", "tpause", "xbegin"} <= names


def test_shadow_stack_is_not_there() -> None:
    assert bind(make_cpu(), decode(bytes.fromhex("f3480f1ec8"), 64))() is None  # rdsspq
    with pytest.raises(Fault) as caught:
        bind(make_cpu(), decode(bytes.fromhex("f3480faee8"), 64))()  # incsspq rax
    assert caught.value.vector == UD
