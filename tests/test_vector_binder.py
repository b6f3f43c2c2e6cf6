"""The mechanism that serves all forms of a vector instruction from one declaration."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from handlers.operands import Form, Lanes, Step
from handlers.signature import Signature
from handlers.vector import Extent, lanewise, operation, scalar, whole
from sandbox.cpu import GP, NM, PF_, UD, Cpu, Fault
from sandbox.decode import decode
from sandbox.handler import Handler
from tests.differential import sweep
from tests.doubles import make_cpu

PADDD = lanewise("paddd", "u4,u4->u4", np.add)
MEMORY = 0x10100


def avx_cpu() -> Cpu:
    cpu = make_cpu()
    cpu.registers.xcr0 = 7
    cpu.gpr[0] = MEMORY
    for number in range(16):
        cpu.vec.write(number, bytes((number * 16 + i) & 0xFF for i in range(64)))
    return cpu


def run(cpu: Cpu, handler: Handler, code: str) -> None:
    action = handler.bind(cpu, decode(bytes.fromhex(code), 64))
    assert action is not None
    assert action() is None


def added(a: bytes, b: bytes) -> bytes:
    total: bytes = (np.frombuffer(a, "u4") + np.frombuffer(b, "u4")).tobytes()
    return total


def test_vex_form_zeroes_up_to_bit_511() -> None:
    cpu = avx_cpu()
    want = added(cpu.vec.read(2, 32), cpu.vec.read(3, 32))
    run(cpu, PADDD, "c5edfecb")  # vpaddd ymm1, ymm2, ymm3
    assert cpu.vec.read(1) == want + bytes(32)
    run(cpu, PADDD, "c5e9fecb")  # vpaddd xmm1, xmm2, xmm3
    assert cpu.vec.read(1) == want[:16] + bytes(48)


def test_legacy_form_keeps_what_lies_above() -> None:
    cpu = avx_cpu()
    before = cpu.vec.read(1)
    run(cpu, PADDD, "660ffecb")  # paddd xmm1, xmm3
    assert cpu.vec.read(1) == added(before[:16], cpu.vec.read(3, 16)) + before[16:]


def test_memory_operand_is_read_with_its_own_size() -> None:
    cpu = avx_cpu()
    cpu.gpr[0] = 0x14000 - 32  # the last bytes there are
    cpu.write(cpu.gpr[0], bytes(range(32)))
    run(cpu, PADDD, "c5edfe08")  # vpaddd ymm1, ymm2, [rax]
    assert cpu.vec.read(1, 32) == added(cpu.vec.read(2, 32), bytes(range(32)))
    cpu.gpr[0] += 1
    with pytest.raises(Fault) as fault:
        run(cpu, PADDD, "c5edfe08")
    assert fault.value.vector == PF_


def test_legacy_memory_operand_must_be_aligned() -> None:
    cpu = avx_cpu()
    cpu.gpr[0] = MEMORY + 8
    before = cpu.vec.read(1)
    with pytest.raises(Fault) as fault:
        run(cpu, PADDD, "660ffe08")  # paddd xmm1, [rax]
    assert (fault.value.vector, fault.value.error_code) == (GP, 0)
    assert cpu.vec.read(1) == before
    run(cpu, PADDD, "c5e9fe08")  # vpaddd xmm1, xmm2, [rax]


@pytest.mark.parametrize(
    ("code", "register", "value", "vector"),
    [
        ("c5e9fecb", "cr4", 0x200, UD),  # no OSXSAVE
        ("c5e9fecb", "cr0", 0x80000010, UD),  # real mode
        ("c5e9fecb", "cr0", 0x80000019, NM),
        ("660ffecb", "cr4", 0x40000, UD),  # no OSFXSR
        ("660ffecb", "cr0", 0x80000015, UD),  # EM
        ("660ffecb", "cr0", 0x8000001D, UD),  # EM and TS
        ("660ffecb", "cr0", 0x80000019, NM),
    ],
)
@pytest.mark.parametrize("viewed", [False, True])
def test_disabled_vector_state_faults(
    code: str, register: str, value: int, vector: int, viewed: bool
) -> None:
    cpu = avx_cpu()
    cpu.registers.bank.write(register, value)
    if viewed:  # an engine that shows its control registers
        bank = cpu.registers.bank
        controls = (bank.read(f"cr{n}") for n in range(5))
        cpu.registers.controls = memoryview(array("Q", controls))
    before = cpu.vec.read(1)
    with pytest.raises(Fault) as fault:
        run(cpu, PADDD, code)
    assert fault.value.vector == vector
    assert cpu.vec.read(1) == before


def test_vex_form_needs_ymm_state_in_xcr0() -> None:
    cpu = avx_cpu()
    cpu.registers.xcr0 = 3
    with pytest.raises(Fault) as fault:
        run(cpu, PADDD, "c5e9fecb")
    assert fault.value.vector == UD


def test_mmx_and_evex_forms_are_declined() -> None:
    cpu = avx_cpu()
    assert PADDD.bind(cpu, decode(bytes.fromhex("0ffecb"), 64)) is None
    assert PADDD.bind(cpu, decode(bytes.fromhex("62f16d48fecb"), 64)) is None


def test_scalar_keeps_the_rest_of_the_first_source() -> None:
    cpu = avx_cpu()
    addsd = scalar("addsd", "f8,f8->f8", np.add)
    cpu.vec.lanes(2, "f8")[:2] = 1.5, 7
    cpu.vec.lanes(3, "f8")[:2] = 2.5, 8
    run(cpu, addsd, "c5eb58cb")  # vaddsd xmm1, xmm2, xmm3
    assert list(cpu.vec.lanes(1, "f8")) == [4, 7, 0, 0, 0, 0, 0, 0]
    before = cpu.vec.read(2)
    run(cpu, addsd, "f20f58d3")  # addsd xmm2, xmm3
    assert cpu.vec.lanes(2, "f8")[0] == 4
    assert cpu.vec.read(2)[8:] == before[8:]


def test_scalar_of_one_source_in_the_legacy_form_keeps_the_destination() -> None:
    cpu = avx_cpu()
    sqrtsd = scalar("sqrtsd", "f8->f8", np.sqrt, staged=True)
    cpu.vec.lanes(3, "f8")[:2] = 16, 8
    before = [cpu.vec.read(n) for n in range(4)]
    run(cpu, sqrtsd, "f20f51cb")  # sqrtsd xmm1, xmm3
    four = np.float64(4).tobytes()
    assert cpu.vec.read(1) == four + before[1][8:]
    run(cpu, sqrtsd, "c5eb51cb")  # vsqrtsd xmm1, xmm2, xmm3
    assert cpu.vec.read(1) == four + before[2][8:16] + bytes(48)


def test_narrowing_result_is_zeroed_above_in_both_encodings() -> None:
    cpu = avx_cpu()
    narrow = lanewise("cvtpd2ps", "f8->f4", lambda a, out: np.copyto(out, a, "same_kind"))
    cpu.vec.lanes(3, "f8")[:4] = 1, 2, 3, 4
    before = cpu.vec.read(1)
    run(cpu, narrow, "660f5acb")  # cvtpd2ps xmm1, xmm3
    assert list(cpu.vec.lanes(1, "f4", 16)) == [1, 2, 0, 0]
    assert cpu.vec.read(1)[16:] == before[16:]
    run(cpu, narrow, "c5fd5acb")  # vcvtpd2ps xmm1, ymm3
    assert list(cpu.vec.lanes(1, "f4")) == [1, 2, 3, 4] + [0] * 12


def test_general_register_destination_is_zero_extended() -> None:
    cpu = avx_cpu()
    truncate = lanewise(
        "cvttsd2si", "f8->i*", lambda a, out: np.copyto(out, a, "unsafe"), staged=True
    )
    cpu.vec.lanes(3, "f8")[0] = -2.5
    run(cpu, truncate, "c5fb2ccb")  # vcvttsd2si ecx, xmm3
    assert cpu.gpr[1] == 0xFFFFFFFE
    run(cpu, truncate, "c4e1fb2ccb")  # vcvttsd2si rcx, xmm3
    assert cpu.gpr[1] == 0xFFFFFFFFFFFFFFFE


def test_flags_destination_replaces_the_status_flags_only() -> None:
    cpu = avx_cpu()
    test = whole("ptest", "b,b->flags", lambda a, b: 0x41)
    cpu.rflags = 0xA96
    run(cpu, test, "c4e27d17cb")  # vptest ymm1, ymm3
    assert cpu.rflags == 0xA96 & ~0x8D5 | 0x41


def test_nothing_is_written_when_the_function_raises() -> None:
    cpu = avx_cpu()

    @operation("addps", "f4,f4->f4", staged=True)
    def failing(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        def step() -> None:
            out[:] = 1
            raise Fault(19)

        return step

    before = cpu.vec.read(1)
    with pytest.raises(Fault):
        run(cpu, failing, "c5ec58cb")  # vaddps ymm1, ymm2, ymm3
    assert cpu.vec.read(1) == before


def test_store_writes_exactly_the_memory_size_after_a_check() -> None:
    cpu = avx_cpu()
    store = lanewise("movlps", "u8->u8", lambda a, out: np.copyto(out, a))
    run(cpu, store, "c5f81308")  # vmovlps [rax], xmm1
    assert cpu.read(MEMORY, 16) == cpu.vec.read(1, 8) + bytes(8)
    cpu.gpr[0] = 0x14000 - 7
    with pytest.raises(Fault) as fault:
        run(cpu, store, "c5f81308")
    assert (fault.value.vector, fault.value.error_code) == (PF_, 2)


def test_signature_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="signature 'u4'"):
        Signature.parse("u4")
    with pytest.raises(ValueError, match="lane type 'x4'"):
        Signature.parse("x4->u4")
    assert Extent.WHOLE is whole("pshufb", "u1,u1->u1", np.add).extent


def test_the_example_of_the_documentation_is_the_instruction() -> None:
    @operation("vpdpbusd", "i4,u1,i1->i4", Extent.WHOLE)
    def vpdpbusd(form: Form, total: Lanes, a: Lanes, b: Lanes, out: Lanes) -> Step:
        def step() -> None:
            products = a.astype("i4") * b
            np.add(total, products.reshape(-1, 4).sum(1), out)

        return step

    cpu = avx_cpu()
    cpu.vec.lanes(1, "i4")[:2] = 5, -1
    cpu.vec.write(2, bytes((255, 255, 1, 0, 1, 2, 3, 4)))
    cpu.vec.write(3, bytes((127, 127, 0x80, 9, 1, 1, 1, 0xFF)))
    run(cpu, vpdpbusd, "c4e26950cb")  # vpdpbusd xmm1, xmm2, xmm3
    assert list(cpu.vec.lanes(1, "i4", 8)) == [5 + 2 * 255 * 127 - 128, -1 + 6 - 4]
    assert cpu.vec.read(1)[16:] == bytes(48)
    sweep(vpdpbusd, "vpdpbusd", features=["AVX_VNNI"])
