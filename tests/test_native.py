"""The host CPU as an oracle: known answers, faults, and that the worker outlives all of it."""

from __future__ import annotations

import os
import random
import signal
import struct
from dataclasses import fields

import pytest

from sandbox.native import (
    CODE,
    DATA,
    END,
    READONLY,
    REGION,
    REGION_SIZE,
    NativeCpu,
    NativeUnavailable,
    State,
    Trap,
    host_features,
)
from sandbox.registers import CF, DF, OF, RAX, RBX, RDI, RDX, RSP, ZF

reason = NativeCpu.available()
pytestmark = pytest.mark.skipif(reason is not None, reason=reason or "")


def needs(feature: str) -> pytest.MarkDecorator:
    missing = reason is not None or feature not in host_features()
    return pytest.mark.skipif(missing, reason=f"the host has no {feature}")


@pytest.fixture
def cpu() -> NativeCpu:
    return NativeCpu.shared()


def run(cpu: NativeCpu, code: str, state: State) -> State:
    result = cpu.run(bytes.fromhex(code), state)
    assert result.fault is None and not result.crashed
    return result.state


def trap(cpu: NativeCpu, code: str, state: State) -> Trap:
    result = cpu.run(bytes.fromhex(code), state)
    assert result.fault is not None and not result.crashed
    return result.fault


def random_state(seed: int) -> State:
    rng = random.Random(seed)
    return State(
        gpr=[rng.getrandbits(64) for _ in range(16)],
        rflags=0x202 | rng.getrandbits(12) & 0xCD5,
        mxcsr=rng.getrandbits(16),
        vectors=rng.randbytes(2048),
        opmask=[rng.getrandbits(64) for _ in range(8)],
        st=[rng.getrandbits(64) | 1 << 63 | rng.randrange(1, 0x7FFF) << 64 for _ in range(8)],
        fpcw=0x37F & ~0xC00 | rng.randrange(4) << 10,
        fpsw=rng.randrange(8) << 11,
        fptag=0,
        memory=rng.randbytes(REGION_SIZE),
    )


def test_a_full_state_goes_through_a_nop_unchanged(cpu: NativeCpu) -> None:
    states = [random_state(seed) for seed in range(100)]
    for before, result in zip(states, cpu.run_batch([(b"\x90", s) for s in states]), strict=True):
        assert result.fault is None
        wide = "AVX512F" in host_features()
        for name in [f.name for f in fields(State) if wide or f.name not in ("vectors", "opmask")]:
            assert getattr(result.state, name) == getattr(before, name), name


def test_a_case_does_not_leak_into_the_next(cpu: NativeCpu) -> None:
    cpu.run(b"\x90", random_state(1))
    assert cpu.run(b"\x90", State()).state == State()


def test_add_sets_flags(cpu: NativeCpu) -> None:
    state = State()
    state.gpr[RAX], state.gpr[RBX] = (1 << 64) - 1, 1
    after = run(cpu, "4801d8", state)  # add rax, rbx
    assert after.gpr[RAX] == 0
    assert after.rflags & (CF | ZF | OF) == CF | ZF


def test_every_register_is_loaded_also_rsp_and_the_direction_flag(cpu: NativeCpu) -> None:
    state = State(rflags=2 | DF)
    state.gpr[RSP], state.gpr[RAX], state.gpr[RDI] = DATA + 0x100, 0x1122, DATA + 0x200
    after = run(cpu, "50", state)  # push rax
    assert after.gpr[RSP] == DATA + 0xF8
    assert after.load(DATA + 0xF8, 8) == (0x1122).to_bytes(8, "little")
    after = run(cpu, "48ab", state)  # stosq
    assert after.gpr[RDI] == DATA + 0x1F8


def test_rip_relative_operands_count_from_the_code_address(cpu: NativeCpu) -> None:
    after = run(cpu, "488d0500010000", State())  # lea rax, [rip+0x100]
    assert after.gpr[RAX] == CODE + 7 + 0x100


def test_gs_base_and_32_bit_addresses_reach_the_memory(cpu: NativeCpu) -> None:
    state = State(gs_base=0x123000)
    state.gpr[RBX] = DATA + 0x10 - 0x123000
    state.store(DATA + 0x10, b"\x2a")
    assert run(cpu, "650fb603", state).gpr[RAX] == 0x2A  # movzx eax, byte ptr gs:[rbx]
    state.gpr[RBX] = DATA + 0x10 | 0xABCD << 32
    assert run(cpu, "670fb603", state).gpr[RAX] == 0x2A  # movzx eax, byte ptr [ebx]
    state.gs_base = 0
    assert trap(cpu, "650fb603", state).vector == 13


@needs("AVX2")
def test_a_vex_instruction_adds_lanes_and_clears_above(cpu: NativeCpu) -> None:
    state = State(vectors=b"\xff" * 2048)
    state.set_vector(1, struct.pack("<8I", *range(8)))
    state.set_vector(2, struct.pack("<8I", *range(10, 18)))
    after = run(cpu, "c5f5fec2", state)  # vpaddd ymm0, ymm1, ymm2
    assert after.vector(0) == struct.pack("<8I", *range(10, 26, 2)).ljust(64, b"\0")


@needs("AVX512F")
def test_high_vectors_and_masks_are_part_of_the_state(cpu: NativeCpu) -> None:
    state = State(vectors=bytes(n for n in range(32) for _ in range(64)))
    state.opmask[3] = 0b101
    after = run(cpu, "62a1fdcb6fca", state)  # vmovdqa64 zmm17{k3}{z}, zmm18
    lane = b"\x12" * 8
    assert after.vector(17) == (lane + bytes(8) + lane).ljust(64, b"\0")
    assert after.vector(18) == state.vector(18)
    after = run(cpu, "c5f892d8", State(gpr=[0xBEEF] + [0] * 15))  # kmovw k3, eax
    assert after.opmask[3] == 0xBEEF


def test_x87_registers_are_stack_relative(cpu: NativeCpu) -> None:
    after = run(cpu, "d9e8", State())  # fld1
    assert after.st[0] == 0x3FFF << 64 | 1 << 63
    assert after.fpsw >> 11 & 7 == 7
    assert after.fptag == 0x3FFF


def test_mxcsr_goes_in_and_exception_flags_come_out(cpu: NativeCpu) -> None:
    state = State()
    state.set_vector(0, struct.pack("<f", 1.0))
    state.set_vector(1, struct.pack("<f", 3.0))
    after = run(cpu, "f30f5ec1", state)  # divss xmm0, xmm1
    assert after.mxcsr == 0x1F80 | 0x20
    assert after.vector(0, 4) == struct.pack("<I", 0x3EAAAAAB)
    state.mxcsr = 0x1F80 | 0x6000  # round towards zero
    assert run(cpu, "f30f5ec1", state).vector(0, 4) == struct.pack("<I", 0x3EAAAAAA)


FAULTS = {
    "ud2": ("0f0b", {}, 6, 0, None, signal.SIGILL),
    "divide by zero": ("48f7f3", {}, 0, 0, None, signal.SIGFPE),
    "read before the region": ("8b03", {RBX: REGION - 4}, 14, 4, REGION - 4, signal.SIGSEGV),
    "read across the end": ("488b03", {RBX: END - 4}, 14, 4, END, signal.SIGSEGV),
    "write past the end": ("8903", {RBX: END}, 14, 6, END, signal.SIGSEGV),
    "write to the read-only page": (
        "8903", {RBX: READONLY.start}, 14, 7, READONLY.start, signal.SIGSEGV,
    ),
    "non-canonical": ("8b03", {RBX: 1 << 63}, 13, 0, None, signal.SIGSEGV),
    "misaligned movaps": ("0f2803", {RBX: DATA + 8}, 13, 0, None, signal.SIGSEGV),
    "privileged": ("0f20c0", {}, 13, 0, None, signal.SIGSEGV),  # mov rax, cr0
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_with_the_state_unchanged(cpu: NativeCpu, name: str) -> None:
    code, registers, vector, error_code, address, number = FAULTS[name]
    state = random_state(7)
    for register, value in {RDX: 0, RBX: 0, **registers}.items():
        state.gpr[register] = value
    result = cpu.run(bytes.fromhex(code), state)
    assert result.fault is not None
    assert (result.fault.vector, result.fault.error_code) == (vector, error_code)
    assert (result.fault.address, result.fault.signal) == (address, number)
    assert result.state.gpr == state.gpr
    assert result.state.memory == state.memory


def test_an_unmasked_float_exception_traps_and_leaves_its_flag(cpu: NativeCpu) -> None:
    state = State(mxcsr=0x1F80 & ~0x200)  # divide by zero not masked
    state.set_vector(0, struct.pack("<f", 1.0))
    result = cpu.run(bytes.fromhex("f30f5ec1"), state)
    assert result.fault is not None and result.fault.vector == 19
    assert result.state.mxcsr == state.mxcsr | 4
    assert result.state.vectors == state.vectors


def test_undecodable_bytes_raise_invalid_opcode(cpu: NativeCpu) -> None:
    assert trap(cpu, "c5f028c1", State()).vector == 6  # vmovaps with VEX.vvvv in use


@pytest.mark.parametrize(
    "code",
    ["eb00", "e800000000", "c3", "ffe0", "0f05", "cd80", "cc", "f4", "8ed8", "f3480faed0", "0f01ef",
     "480fae2b", "7400", "c7f800000000", "9090", "48", ""],
)  # fmt: skip
def test_what_would_leave_the_cage_is_refused(cpu: NativeCpu, code: str) -> None:
    with pytest.raises(ValueError):
        cpu.run(bytes.fromhex(code), State())


def test_memory_is_refused_outside_of_the_region() -> None:
    with pytest.raises(ValueError, match="not in the test memory"):
        State().store(END - 1, b"12")
    with pytest.raises(ValueError, match="not in the test memory"):
        State().load(REGION - 1, 1)


def test_the_worker_is_replaced_when_it_dies(cpu: NativeCpu) -> None:
    own = NativeCpu()
    try:
        assert own._process is not None
        os.kill(own._process.pid, signal.SIGKILL)
        own._process.wait()
        first, second = own.run_batch([(b"\x90", State()), (b"\x90", random_state(3))])
        assert first.crashed  # nobody else to blame
        assert second.state == random_state(3)
    finally:
        own.close()


def test_a_worker_that_hangs_counts_as_a_crash(
    cpu: NativeCpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.native.TIMEOUT", 0.3)
    own = NativeCpu()
    try:
        assert own._process is not None
        os.kill(own._process.pid, signal.SIGSTOP)
        assert own.run(b"\x90", State()).crashed
        assert own.run(b"\x90", State()).state == State()
    finally:
        own.close()


def test_another_machine_is_told_apart_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(NativeUnavailable, match="needs Linux on x86-64, this is linux on aarch64"):
        NativeCpu()


def test_a_host_that_starts_no_process_is_told_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    with pytest.raises(NativeUnavailable, match="No such file"):
        NativeCpu()


def test_a_batch_keeps_the_order_over_several_rounds(cpu: NativeCpu) -> None:
    cases = []
    for n in range(200):
        state = State()
        state.gpr[RAX] = n
        cases.append((bytes.fromhex("48ffc0") if n % 3 else b"\x0f\x0b", state))  # inc rax / ud2
    for n, result in enumerate(cpu.run_batch(cases)):
        assert result.state.gpr[RAX] == n + (n % 3 != 0)
        assert (result.fault is None) == (n % 3 != 0)
