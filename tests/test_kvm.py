"""The engine ``kvm`` beside ``unicorn``: exits, capability, memory, devices, vectors."""

from __future__ import annotations

import pytest

from guests.assemble import assemble
from sandbox import abi
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE as CAP
from sandbox.boot import Machine, Mode
from sandbox.engine.kvm_device import KvmFile
from sandbox.exits import EmulationFailure, Exit, Hlt, Io, Mmio
from sandbox.registers import RAX, RBX, RCX
from sandbox.vm import ENGINES
from tests.guest import BASE, MODES, add_idt, enter_user_mode, policy
from tests.kvm_guest import (
    FLDS,
    HOLE,
    KVM,
    LOCAL,
    VADDPS,
    compare,
    guest,
    map_hole,
    skip,
)

pytestmark = KVM


def user_code_at_a_hole(found: Machine) -> None:
    map_hole(found)
    add_idt(found, {6: BASE + 0x40})
    enter_user_mode(found)
    found.vcpu.registers.gpr[RAX] = HOLE


def test_the_kernels_own_test_of_the_capability() -> None:
    """tools/testing/selftests/kvm/x86/exit_on_emulation_failure_test.c"""
    code = assemble(f"mov rax, {HOLE}") + FLDS + assemble("out 0x80, al\n hlt")
    with guest("kvm", code) as found:
        map_hole(found)
        failure = found.vcpu.run(5)
        assert isinstance(failure, EmulationFailure)
        assert failure.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
        assert failure.ndata >= 3 and failure.flags & 1
        assert failure.insn_size >= 2 and failure.insn_bytes[:2] == FLDS
        found.vcpu.registers.rip += 2
        assert isinstance(found.vcpu.run(5), Io)


def test_an_x87_load_from_a_hole_is_the_same_failure_on_both_engines() -> None:
    code = assemble(f"mov rax, {HOLE}") + FLDS + assemble("out 0x80, al\n hlt")

    def answer(found: Machine, left: Exit) -> None:
        if isinstance(left, EmulationFailure):
            found.vcpu.registers.rip += 2

    left = compare(code, prepare=map_hole, answer=answer)
    assert [type(each) for each in left] == [EmulationFailure, Io, Hlt]


@pytest.mark.parametrize("mode", MODES)
def test_ports_and_hlt(mode: Mode) -> None:
    def answer(_found: Machine, left: Exit) -> None:
        if isinstance(left, Io) and left.is_in:
            left.value = 0x1234

    left = compare(
        "mov eax, 0x55\n out 0x80, al\n mov dx, 0x1f0\n in ax, dx\n out dx, ax\n inc eax\n hlt",
        mode,
        answer=answer,
    )
    assert [type(each) for each in left] == [Io, Io, Io, Hlt]


def test_registers_written_while_an_answer_is_awaited_stand() -> None:
    def answer(found: Machine, left: Exit) -> None:
        assert isinstance(left, Io)
        left.value = 0x77
        found.vcpu.registers.gpr[RBX] = 0x1111
        found.vcpu.registers.gpr[RCX] += 1

    compare("mov ecx, 5\n in al, 0x60\n hlt", answer=answer)


def test_nobody_waits_for_the_answer_once_rip_has_moved() -> None:
    def answer(found: Machine, left: Exit) -> None:
        assert isinstance(left, Io)
        left.value = 0x77
        found.vcpu.registers.rip += 2
        found.vcpu.registers.gpr[RAX] = 0x4242

    compare("in al, 0x60\n hlt", answer=answer)


@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize(
    "text",
    ["mov eax, [ebx]", "mov [ebx], ecx", "mov byte ptr [ebx], 3", "add ecx, [ebx]",
     "movzx edx, word ptr [ebx + 2]", "cmp byte ptr [ebx], 7", "xchg [ebx], ecx",
     "push dword ptr [ebx]", "inc dword ptr [ebx + 8]"],
)  # fmt: skip
def test_mmio_by_instructions_that_the_emulator_takes(text: str, mode: Mode) -> None:
    if mode == "long":
        text = text.replace("ebx", "rbx").replace("push dword", "push qword")

    def answer(_found: Machine, left: Exit) -> None:
        if isinstance(left, Mmio) and not left.is_write:
            left.value = 0x0102030405060708 & ((1 << 8 * left.len) - 1)

    left = compare(
        f"mov ebx, {HOLE}\n mov ecx, 0x99887766\n {text}\n hlt",
        mode,
        prepare=map_hole,
        answer=answer,
    )
    assert isinstance(left[0], Mmio) and isinstance(left[-1], Hlt)


@pytest.mark.parametrize("text", ["addps xmm0, [rbx]", "fld dword ptr [rbx]", "paddd xmm0, [rbx]"])
def test_mmio_by_instructions_that_the_emulator_does_not_take(text: str) -> None:
    size = len(assemble(text))
    left = compare(f"mov ebx, {HOLE}\n {text}\n hlt", prepare=map_hole, answer=skip(size), exits=2)
    assert isinstance(left[0], EmulationFailure) and left[0].bytes is not None


def test_an_unhandled_exit_comes_again_if_it_is_run_again() -> None:
    code = assemble(f"mov rax, {HOLE}") + FLDS + b"\xf4"
    left = compare(code, prepare=map_hole, exits=3)
    assert len({str(each) for each in left}) == 1 and isinstance(left[0], EmulationFailure)


def test_a_fetch_from_nowhere_has_no_bytes() -> None:
    left = compare(f"mov rax, {HOLE}\n jmp rax", prepare=map_hole, exits=2)
    assert isinstance(left[0], EmulationFailure)
    assert (left[0].ndata, left[0].flags, left[0].bytes) == (6, 0, None)


@LOCAL
@pytest.mark.parametrize("room", [1, 2, 3, 4, 8, 14, 15])
def test_bytes_end_with_the_page_unless_the_decoder_needed_more(room: int) -> None:
    base = 0x2000 - room
    left = compare(VADDPS + bytes(20), base=base, exits=1)
    assert isinstance(left[0], EmulationFailure)


@LOCAL
@pytest.mark.parametrize("mode", ["protected", "long"])
@pytest.mark.parametrize("cap", [True, False])
def test_the_capability_at_cpl_0(mode: Mode, cap: bool) -> None:
    left = compare(VADDPS + b"\xf4", mode, cap=cap, answer=skip(4), exits=2)
    assert [type(each) for each in left] == [EmulationFailure, Hlt]


def toggle(found: Machine, left: Exit) -> None:
    found.vm.enable_cap(CAP, int(not found.vm.settings.exit_on_emulation_failure))
    if isinstance(left, EmulationFailure) and not found.vcpu.cpu.cpl:
        found.vcpu.registers.rip += 4


@LOCAL
@pytest.mark.parametrize("cap", [True, False])
def test_the_capability_toggled_at_cpl_0(cap: bool) -> None:
    left = compare(VADDPS * 4 + b"\xf4", cap=cap, answer=toggle)
    assert [type(each) for each in left] == [EmulationFailure] * 4 + [Hlt]


def test_the_capability_toggled_at_cpl_3() -> None:
    """The exit leaves the guest where it was; with the capability off, it gets its #UD."""
    code = (FLDS + b"\x90").ljust(0x40, b"\xcc") + b"\xf4"
    left = compare(code, prepare=user_code_at_a_hole, answer=toggle)
    assert [type(each) for each in left] == [EmulationFailure, Hlt]


@pytest.mark.parametrize("cap", [True, False])
def test_the_capability_in_real_mode(cap: bool) -> None:
    """A load from a hole: above the megabyte that a guest in real mode has."""
    code = bytes.fromhex("b8ffff 8ed8 bbf000 d907 f4")  # mov ax, -1; mov ds, ax; flds [bx]; hlt
    left = compare(code, "real", cap=cap, answer=skip(2), exits=2)
    assert isinstance(left[0], EmulationFailure)


@LOCAL
def test_the_tier_handles_what_the_kernel_cannot_emulate() -> None:
    code = "vpaddd ymm0, ymm1, ymm2\n vpmulld ymm3, ymm0, ymm0\n vmovd eax, xmm3\n hlt"
    values = {}
    for engine in ENGINES:
        with guest(engine, code, handlers=["avx2"]) as found:
            vcpu = found.vcpu
            vcpu.registers.xcr0 = 7
            vcpu.registers.vec.write(1, b"\1\0\0\0" * 8)
            vcpu.registers.vec.write(2, b"\2\0\0\0" * 8)
            assert isinstance(vcpu.run(5), Hlt)
            stats = vcpu.stats
            assert stats.fallback_count + sum(stats.lowered_sites.values()) >= 3
            values[engine] = vcpu.registers.gpr[RAX], vcpu.registers.vec.read(3)
    assert values["kvm"] == values["unicorn"]
    assert values["kvm"][0] == 9


def test_what_was_written_to_vectors_is_there_when_the_guest_runs() -> None:
    code = "mov ebx, 0x8000\n movups [rbx], xmm1\n movups xmm2, [rbx]\n"
    code += "movups [rbx + 16], xmm3\n hlt"
    for engine in ENGINES:
        with guest(engine, code) as found:
            vectors = found.vcpu.registers.vec
            vectors.write(1, bytes(range(16)))
            vectors.write(3, bytes(range(16, 32)))
            assert isinstance(found.vcpu.run(5), Hlt)
            assert found.vm.memory.read(0x8000, 32) == bytes(range(32))
            assert vectors.read(2, 16) == bytes(range(16))


def test_a_handler_takes_a_load_from_a_hole_and_asks_the_caller_for_the_data() -> None:
    def answer(_found: Machine, left: Exit) -> None:
        assert isinstance(left, Mmio)
        left.data = b"\0\0\x80\x3f"

    code = (
        f"mov ebx, {HOLE}\n fld dword ptr [rbx]\n mov ebx, 0x8000\n"
        "fstp dword ptr [rbx]\n mov eax, [rbx]\n hlt"
    )
    left = compare(
        code, prepare=map_hole, answer=answer, handlers=["x87"], policy=policy("fld", "fstp")
    )
    assert [type(each) for each in left] == [Mmio, Hlt]


@pytest.mark.parametrize("cap", [True, False])
def test_the_capability_at_cpl_3(cap: bool) -> None:
    """A load from a hole that the kernel cannot emulate: an exit, or #UD in the guest."""

    code = (FLDS + b"\x90").ljust(0x40, b"\xcc") + b"\xf4"
    left = compare(code, prepare=user_code_at_a_hole, cap=cap, exits=1)
    assert isinstance(left[0], EmulationFailure if cap else Hlt)


def test_a_slot_taken_away_is_gone_and_rom_cannot_be_written() -> None:
    def prepare(found: Machine) -> None:
        found.vm.add_memory(0x100_0000 + 0x7000_0000, 0x1000, readonly=True)
        found.vm.memory.load(0x7100_0000, b"\x77\x66\x55\x44")
        if found.space is not None:
            found.space.map(0x7100_0000, 0x7100_0000, 0x1000, write=True, execute=False)

    left = compare(
        "mov ebx, 0x71000000\n mov eax, [rbx]\n mov [rbx], ecx\n mov edx, [rbx]\n hlt",
        prepare=prepare,
    )
    assert isinstance(left[0], Mmio) and left[0].is_write and isinstance(left[1], Hlt)


def test_handlers_run_in_real_and_protected_mode() -> None:
    compare("mov al, 0x19\n add al, 0x28\n daa\n hlt", "protected", handlers=["integer"],
            policy=policy("daa"))  # fmt: skip
    compare("mov al, 0x19\n add al, 0x28\n daa\n hlt", "real", handlers=["integer"],
            policy=policy("daa"))  # fmt: skip


class Port:
    """A device that counts: what it was told, and what it answers."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0xA0 + offset + len(self.told)

    def write(self, offset: int, size: int, value: int) -> None:
        self.told.append((offset, size, value))


def test_devices_are_asked_at_ports_and_in_memory() -> None:
    code = (
        f"mov ebx, {HOLE}\n mov eax, 0x4142\n out 0x80, ax\n in al, 0x81\n mov [rbx + 4], eax\n"
        "mov ecx, [rbx + 8]\n mov edx, 0x80\n mov esi, 0x8000\n mov dword ptr [rsi], 0x44332211\n"
        "mov rdi, rcx\n mov ecx, 4\n cld\n rep outsb\n hlt"
    )
    told = {}
    for engine in ENGINES:
        with guest(engine, code) as found:
            ports, memory = Port(), Port()
            found.vm.add_ports(0x80, 2, ports)
            found.vm.add_mmio(HOLE, 0x1000, memory)
            map_hole(found)
            assert isinstance(found.vcpu.run(5), Hlt)
            told[engine] = ports.told, memory.told, list(found.vcpu.registers.gpr)
    assert told["kvm"] == told["unicorn"]
    assert told["kvm"][0][1:] == [(0, 1, byte) for byte in (0x11, 0x22, 0x33, 0x44)]


def test_registers_go_by_their_own_ioctls_where_the_kernel_does_not_share_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has = KvmFile.has
    monkeypatch.setattr(
        KvmFile, "has", lambda file, cap: 0 if cap == abi.KVM_CAP_SYNC_REGS else has(file, cap)
    )
    test_ports_and_hlt("real")
    test_ports_and_hlt("long")
    test_registers_written_while_an_answer_is_awaited_stand()
    test_an_x87_load_from_a_hole_is_the_same_failure_on_both_engines()
