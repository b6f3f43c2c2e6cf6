"""FXSAVE and the XSAVE family against the host CPU and the rules of SDM Vol. 1, chapter 13."""

from __future__ import annotations

import random
import struct

import pytest

from handlers import xstate
from sandbox.cpu import GP, NM, PF_, UD, Cpu, Fault
from sandbox.decode import decode
from sandbox.handler import Pack
from sandbox.native import DATA, REGION, REGION_SIZE, NativeCpu, State
from sandbox.registers import RAX, RBX, RDX, Registers
from sandbox.xsave import (
    AVX,
    COMPONENTS,
    HI16_ZMM,
    OPMASK,
    PKRU,
    SSE,
    X87,
    ZMM_HI256,
    compacted_offsets,
    compacted_size,
    full_tags,
    in_use,
    standard_size,
)
from tests.doubles import DictBank, FlatMemory

CODE = {
    "fxsave": "0fae03", "fxsave64": "480fae03", "fxrstor": "0fae0b", "fxrstor64": "480fae0b",
    "xsave": "0fae23", "xsave64": "480fae23", "xsaveopt": "0fae33", "xsaveopt64": "480fae33",
    "xsavec": "0fc723", "xsavec64": "480fc723", "xrstor": "0fae2b", "xrstor64": "480fae2b",
}  # fmt: skip
"""Each with the operand [rbx]."""
PRIVILEGED = {
    "xsaves": "0fc72b", "xsaves64": "480fc72b", "xrstors": "0fc71b", "xrstors64": "480fc71b",
}  # fmt: skip
HANDLERS = {m: h for h in Pack.of("xstate", xstate).handlers for m in h.mnemonics}
ALL = 0x2E7

needs_host = pytest.mark.skipif(
    NativeCpu.available() is not None, reason=f"no native oracle: {NativeCpu.available()}"
)


def cpu_of(state: State, bitness: int = 64) -> Cpu:
    """The double of the machine in the state that the host starts from."""
    bank = DictBank(bitness)
    memory = FlatMemory(REGION, REGION_SIZE)
    memory.data[:] = state.memory
    gpr, rip = (memoryview(bytearray(n)).cast("Q") for n in (128, 8))
    registers = Registers(gpr, rip, memoryview(bytearray(state.vectors)), bank)
    for number, value in enumerate(state.gpr):
        gpr[number] = value
    for number, value in enumerate(state.opmask):
        registers.opmask[number] = value
    for number, value in enumerate(state.st):
        bank.write(f"st{number}", value)
    for name in ("mxcsr", "fpcw", "fpsw", "fptag"):
        bank.write(name, getattr(state, name))
    registers.xcr0 = ALL
    return Cpu(registers, memory)


def run(cpu: Cpu, name: str) -> None:
    insn = decode(bytes.fromhex((CODE | PRIVILEGED)[name]), cpu.bitness)
    assert insn.mnemonic == name
    action = HANDLERS[name].bind(cpu, insn)
    assert action is not None
    action()


def data_of(cpu: Cpu) -> bytes:
    memory = cpu.memory
    assert isinstance(memory, FlatMemory)
    return bytes(memory.data)


def random_state(seed: int) -> State:
    """Everything in use, x87 too, and a save area full of noise but for a sound header."""
    source = random.Random(seed)
    state = State(vectors=source.randbytes(2048), mxcsr=0x1F80 | source.choice([0, 0x3F, 0x6000]))
    state.opmask = [source.getrandbits(64) for _ in range(8)]
    state.fpcw = source.choice([0x37F, 0x27F, 0xF7F])
    top = source.randrange(8)
    state.fpsw = top << 11 | source.choice([0, 0x4700])
    state.st = [
        source.choice([0, 0x3FFF << 64 | 1 << 63, source.getrandbits(80)]) for _ in range(8)
    ]
    used = source.getrandbits(8)
    state.fptag = full_tags(used, top, state.st)
    state.store(DATA, source.randbytes(4096))
    state.store(DATA + 512, source.getrandbits(3).to_bytes(64, "little"))
    state.gpr[RBX] = DATA
    return state


# The host CPU


@needs_host
@pytest.mark.parametrize("name", ["fxsave", "fxsave64", "xsave", "xsave64", "xsavec", "xsavec64"])
def test_what_is_saved_is_what_the_host_saves(name: str) -> None:
    host = NativeCpu.shared()
    wide = host.xcr0 & 0xE0 if name.startswith("xsavec") else 0  # offsets are the vendor's own
    for seed in range(40):
        state = random_state(seed)
        state.gpr[RAX] = random.Random(seed).getrandbits(8) & (host.xcr0 & 7 | wide)
        state.gpr[RDX] = 0
        result = host.run(bytes.fromhex(CODE[name]), state)
        assert result.fault is None and not result.crashed
        cpu = cpu_of(state)
        cpu.registers.xcr0 = host.xcr0
        run(cpu, name)
        ours, theirs = bytearray(data_of(cpu)), bytearray(result.state.memory)
        for memory in (ours, theirs):
            at = DATA - REGION
            memory[at + 28 : at + 32] = bytes(4)  # MXCSR_MASK: bit 17 is AMD's
            memory[at + 416 : at + 464] = bytes(48)  # reserved: hosts differ in whether they write
            if name in ("fxsave", "xsave", "xsavec"):
                memory[at + 12 : at + 16] = memory[at + 20 : at + 24] = bytes(4)  # FCS, FDS
        assert ours == theirs, f"seed {seed}"


@needs_host
@pytest.mark.parametrize("name", ["xsave64", "xsaveopt64", "xsavec64"])
@pytest.mark.parametrize("mask", range(8))
def test_initial_components_are_reported_as_the_host_does(name: str, mask: int) -> None:
    state = State()
    state.gpr[RBX], state.gpr[RAX] = DATA, mask
    state.store(DATA, bytes([0xEE]) * 512)
    result = NativeCpu.shared().run(bytes.fromhex(CODE[name]), state)
    cpu = cpu_of(state)
    run(cpu, name)
    # Whether an initial SSE component is in use is the processor's choice (SDM Vol. 1, 13.6).
    header = bytearray(result.state.load(DATA + 512, 64))
    header[0] &= ~2
    assert cpu.read(DATA + 512, 64) == header


@needs_host
def test_fxrstor_loads_what_the_host_loads() -> None:
    host = NativeCpu.shared()
    for seed in range(30):
        image, state = random_state(seed), random_state(seed + 1000)
        cpu = cpu_of(image)
        run(cpu, "fxsave64")
        state.store(DATA, cpu.read(DATA, 512))
        result = host.run(bytes.fromhex(CODE["fxrstor64"]), state).state
        cpu = cpu_of(state)
        run(cpu, "fxrstor64")
        bank = cpu.registers.bank
        for name in ("mxcsr", "fpcw", "fpsw", "fptag"):
            assert bank.read(name) == getattr(result, name), (seed, name)
        assert [bank.read(f"st{n}") for n in range(8)] == result.st
        assert bytes(cpu.vec.raw) == result.vectors


@needs_host
def test_component_sizes_are_the_hosts() -> None:
    host = NativeCpu.shared()
    for number, component in COMPONENTS.items():
        if host.xcr0 >> number & 1:
            assert component.size == host.cpuid[0xD, number][0]
    assert COMPONENTS[AVX].offset == host.cpuid[0xD, 2][1]


# The layout


def test_components_do_not_overlap_and_sizes_follow_the_mask() -> None:
    at = 576
    for component in sorted(COMPONENTS.values(), key=lambda c: c.offset):
        assert component.offset >= at
        at = component.offset + component.size
    assert [standard_size(m) for m in (1, 3, 7, 0xE7, 0x2E7)] == [576, 576, 832, 2688, 2696]
    assert [compacted_size(m) for m in (3, 7, 0xE7, 0x2E7, 0x203)] == [576, 832, 2432, 2440, 584]
    assert compacted_offsets(0xE3) == {5: 576, 6: 640, 7: 1152}


def test_abridged_tags_expand_by_value_and_top() -> None:
    one, infinity, denormal = 0x3FFF << 64 | 1 << 63, 0x7FFF << 64 | 1 << 63, 1
    stack = [one, 0, infinity, denormal, 0, 0, 0, 0]
    assert full_tags(0, 0, stack) == 0xFFFF
    assert full_tags(0x0F, 0, stack) == 0b11111111_10_10_01_00
    # TOP = 6: ST(0) is physical register 6, ST(2) is 0
    assert full_tags(0b1100_0001, 6, stack) == 0b01_00_1111111111_10


# Round trips


@pytest.mark.parametrize("save", ["xsave64", "xsaveopt64", "xsavec64"])
@pytest.mark.parametrize("mask", [0, 1, 2, 3, 4, 7, 0xE7, 0x200, 0x2E7, 0xA2])
def test_a_saved_state_comes_back_and_the_rest_stays(save: str, mask: int) -> None:
    state = random_state(mask)
    state.store(DATA, bytes(4096))
    state.gpr[RAX] = mask
    cpu = cpu_of(state)
    cpu.registers.pkru = 0x5555_5554
    before = snapshot(cpu)
    run(cpu, save)
    area = data_of(cpu)
    other = random_state(99)
    other.gpr[RAX], other.gpr[RBX] = mask, DATA
    other.memory = area
    cpu = cpu_of(other)
    unrelated = snapshot(cpu)
    run(cpu, "xrstor64")
    after = snapshot(cpu)
    for number in after:
        assert after[number] == (before if mask >> number & 1 else unrelated)[number], number
    loads_mxcsr = mask & 2 or (mask & 4 and save != "xsavec64")
    assert cpu.mxcsr == (state if loads_mxcsr else other).mxcsr


def snapshot(cpu: Cpu) -> dict[int, object]:
    """The state by component number, taken without the code under test."""
    vectors = cpu.vec.view("u1")
    names = ("fpcw", "fpsw", "fptag", *(f"st{n}" for n in range(8)))
    return {
        X87: [cpu.registers.bank.read(n) for n in names],
        SSE: vectors[:16, :16].tobytes(),
        AVX: vectors[:16, 16:32].tobytes(),
        OPMASK: list(cpu.opmask),
        ZMM_HI256: vectors[:16, 32:].tobytes(),
        HI16_ZMM: vectors[16:].tobytes(),
        PKRU: cpu.registers.pkru,
    }


def test_xrstor_initialises_what_the_area_marks_as_initial() -> None:
    state = random_state(5)
    state.store(DATA, bytes(4096))
    state.store(DATA + 24, struct.pack("<I", 0x1F81))
    state.gpr[RAX] = ALL
    cpu = cpu_of(state)
    cpu.registers.pkru = 4
    run(cpu, "xrstor64")
    assert in_use(cpu, ALL) == 0
    assert cpu.mxcsr == 0x1F81, "the standard format takes MXCSR from the area all the same"
    assert cpu.registers.bank.read("fpcw") == 0x37F
    assert not any(cpu.vec.raw) and not any(cpu.opmask) and cpu.registers.pkru == 0


def test_compacted_xrstor_initialises_mxcsr_with_sse() -> None:
    state = random_state(6)
    state.mxcsr = 0x1FBF
    state.store(DATA, bytes(4096))
    state.store(DATA + 520, struct.pack("<Q", 1 << 63 | 7))
    state.gpr[RAX] = 7
    cpu = cpu_of(state)
    run(cpu, "xrstor64")
    assert cpu.mxcsr == 0x1F80


def test_outside_64_bit_mode_only_eight_registers_take_part() -> None:
    state = random_state(7)
    state.gpr[RAX] = ALL
    cpu = cpu_of(state, 32)
    area = 0x10000
    assert isinstance(cpu.memory, FlatMemory)
    cpu.memory.base = cpu.gpr[RBX] = area
    cpu.write(area + 512, bytes(64))
    noise = cpu.read(area, 4096)
    run(cpu, "xsave")
    saved = cpu.read(area, 4096)
    assert saved[160:288] == cpu.vec.view("u1")[:8, :16].tobytes()
    assert saved[288:416] == noise[288:416]
    hi16 = COMPONENTS[HI16_ZMM]
    assert saved[hi16.offset : hi16.offset + 1024] == noise[hi16.offset : hi16.offset + 1024]
    assert not saved[512] & 1 << HI16_ZMM, "Hi16_ZMM is initial by definition there"
    before = bytes(cpu.vec.raw[8 * 64 :])
    cpu.write(area + 512, bytes(64))
    run(cpu, "xrstor")
    assert not any(cpu.vec.raw[: 8 * 64]) and bytes(cpu.vec.raw[8 * 64 :]) == before


# Without supervisor components XSAVES and XRSTORS do what XSAVEC and XRSTOR do


@pytest.mark.parametrize("suffix", ["", "64"])
def test_xsaves_saves_what_xsavec_saves(suffix: str) -> None:
    state = random_state(8)
    state.gpr[RAX] = ALL
    cpus = {name: cpu_of(state) for name in ("xsavec", "xsaves")}
    for name, cpu in cpus.items():
        run(cpu, name + suffix)
    assert data_of(cpus["xsaves"]) == data_of(cpus["xsavec"]) != state.memory
    cpu = cpus["xsaves"]
    want = snapshot(cpu)
    cpu.vec.raw[:] = bytes(2048)
    cpu.opmask[:] = memoryview(bytes(64)).cast("Q")
    run(cpu, "xrstors" + suffix)
    assert snapshot(cpu) == want


def test_xrstors_takes_no_standard_area() -> None:
    state = random_state(9)
    state.store(DATA, bytes(4096))
    state.store(DATA + 24, struct.pack("<I", 0x1F80))
    state.gpr[RAX] = ALL
    run(cpu_of(state), "xrstor64")
    assert fault_of(cpu_of(state), "xrstors64") == (GP, 0)


@pytest.mark.parametrize("name", PRIVILEGED)
def test_supervisor_forms_are_privileged(name: str) -> None:
    cpu = cpu_of(random_state(10))
    bank = cpu.registers.bank
    assert isinstance(bank, DictBank)
    bank.cpl = 3
    assert fault_of(cpu, name) == (GP, 0)


# Faults


def fault_of(cpu: Cpu, name: str) -> tuple[int, int | None]:
    before = snapshot(cpu), cpu.mxcsr, data_of(cpu)
    with pytest.raises(Fault) as caught:
        run(cpu, name)
    assert (snapshot(cpu), cpu.mxcsr, data_of(cpu)) == before, "a fault changes nothing"
    return caught.value.vector, caught.value.error_code


@pytest.mark.parametrize("name", CODE | PRIVILEGED)
def test_misaligned_areas_are_gp(name: str) -> None:
    state = random_state(1)
    state.gpr[RAX] = 7
    state.gpr[RBX] = DATA + (8 if name.startswith("fx") else 16)
    assert fault_of(cpu_of(state), name) == (GP, 0)


@pytest.mark.parametrize("name", CODE | PRIVILEGED)
def test_ts_is_nm_and_a_missing_osxsave_is_ud(name: str) -> None:
    cpu = cpu_of(random_state(1))
    bank = cpu.registers.bank
    bank.write("cr0", bank.read("cr0") | 8)
    assert fault_of(cpu, name) == (NM, None)
    if not name.startswith("fx"):
        bank.write("cr4", 0x600)
        assert fault_of(cpu, name) == (UD, None)


@pytest.mark.parametrize("name", [n for n in CODE if "save" in n])
def test_a_read_only_area_is_left_alone(name: str) -> None:
    state = random_state(1)
    state.gpr[RAX] = 7
    cpu = cpu_of(state)
    memory = cpu.memory
    assert isinstance(memory, FlatMemory)
    memory.readonly = range(DATA, DATA + 24 if name.startswith("fx") else DATA + 1024)
    assert fault_of(cpu, name)[0] == PF_


HEADERS = {
    "XSTATE_BV names what XCR0 lacks": (1 << 3, 0, b""),
    "standard format with a reserved XCOMP_BV bit": (1, 2, b""),
    "standard format with reserved header bytes": (1, 0, b"\1"),
    "XCOMP_BV names what XCR0 lacks": (1, 1 << 63 | 9, b""),
    "XSTATE_BV names what XCOMP_BV lacks": (3, 1 << 63 | 1, b""),
    "compacted format with reserved header bytes": (1, 1 << 63 | 1, bytes(40) + b"\1"),
}


@pytest.mark.parametrize("why", HEADERS)
def test_bad_headers_are_gp(why: str) -> None:
    xstate_bv, xcomp_bv, rest = HEADERS[why]
    state = random_state(2)
    state.store(DATA + 512, struct.pack("<QQ48s", xstate_bv, xcomp_bv, rest))
    state.store(DATA + 24, struct.pack("<I", 0x1F80))
    state.gpr[RAX] = ALL
    assert fault_of(cpu_of(state), "xrstor64") == (GP, 0)


@pytest.mark.parametrize("name", ["fxrstor64", "xrstor64"])
def test_reserved_mxcsr_bits_are_gp(name: str) -> None:
    state = random_state(3)
    state.store(DATA + 24, struct.pack("<I", 0x11F80))
    state.store(DATA + 512, bytes(64))
    state.gpr[RAX] = 2
    assert fault_of(cpu_of(state), name) == (GP, 0)
    if name == "xrstor64":
        state.gpr[RAX] = 1
        run(cpu_of(state), name)
