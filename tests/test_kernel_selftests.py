"""The kernel's own tests of emulation failures, re-created from their description, on both engines.

tools/testing/selftests/kvm/x86: exit_on_emulation_failure_test.c, emulator_error_test.c and its
successor smaller_maxphyaddr_emulation_test.c, vmx_exception_with_invalid_guest_state.c. Each test
asserts what its original asserts; where both engines can run it, the exits are compared too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guests.assemble import assemble
from sandbox import abi
from sandbox.boot import Machine
from sandbox.engine.kvm_device import open_device
from sandbox.exits import EmulationFailure, Exit, Hlt, Io
from sandbox.memory import PHYSICAL_BITS
from sandbox.paging import PRESENT, USER, WRITE
from sandbox.registers import RSP
from sandbox.vm import ENGINES
from tests.guest import BASE, add_idt, enter_user_mode, policy
from tests.kvm_guest import FLDS, KVM, Left, guest, seen

KVM_CAP_SMALLER_MAXPHYADDR = 185
MMIO_ADDRESS = 0x7_0000_0000
"""Linear and physical, as in flds_emulation.h: mapped, with no memory behind."""
HIGH_LINEAR = 0x1234_5678_9000
"""In smaller_maxphyaddr_emulation_test.c: mapped to a page at MMIO_ADDRESS that is in a slot."""
DONE = 0x10
"""The port that the guest reads when it is done, in place of a ucall."""
GP_, PF = 13, 14
HANDLERS = BASE + 0x100
"""Where the IDT leads: one HLT per vector."""
NO_X87 = policy("fld")
"""For Unicorn, what holds for KVM's emulator in any case."""

engines = pytest.mark.parametrize(
    "engine",
    [pytest.param(name, marks=KVM if name == "kvm" else ()) for name in ENGINES],
)


def guest_code(address: int, access: bytes = FLDS) -> bytes:
    """Load RAX, make the access, say that all is done; then one HLT per vector."""
    code = assemble(f"movabs rax, {address}") + access + assemble(f"in al, {DONE}\nhlt")
    return code.ljust(HANDLERS - BASE, b"\xcc") + b"\xf4" * 256


def check_flds_failure(found: Machine, left: Exit) -> None:
    """handle_flds_emulation_failure_exit(): its assertions, then step over the instruction."""
    assert isinstance(left, EmulationFailure)
    run = found.vcpu.page.run
    assert run.exit_reason == abi.KVM_EXIT_INTERNAL_ERROR
    assert run.emulation_failure.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
    assert run.emulation_failure.ndata >= 3
    flag = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    assert run.emulation_failure.flags & flag
    assert 2 <= run.emulation_failure.insn_size <= 15
    opcode, modrm = run.emulation_failure.insn_bytes[:2]
    assert opcode == 0xD9
    mod, reg, rm = modrm >> 6, modrm >> 3 & 7, modrm & 7
    assert (mod, reg) == (0, 0) and rm not in (4, 5)  # flds, without SIB and displacement
    found.vcpu.registers.rip += 2


def story(engine: str, prepare: Callable[[Machine], None], address: int) -> list[Left]:
    """Run the guest, checking and stepping over each failure; what was seen at each exit."""
    exits: list[Left] = []
    with guest(engine, guest_code(address), policy=NO_X87) as found:
        prepare(found)
        while True:
            left = found.vcpu.run(5)
            exits.append(seen(found, left))
            if isinstance(left, (Io, Hlt)):
                return exits
            check_flds_failure(found, left)


def map_mmio(found: Machine) -> None:
    assert found.space is not None
    found.space.map(MMIO_ADDRESS, MMIO_ADDRESS, 0x1000, write=True, execute=False)


def map_mmio_for_user_code(found: Machine) -> None:
    map_mmio(found)
    add_idt(found, {vector: HANDLERS + vector for vector in range(32)})
    enter_user_mode(found)


@engines
def test_exit_on_emulation_failure(engine: str) -> None:
    exits = story(engine, map_mmio, MMIO_ADDRESS)
    assert [exit[0] for exit in exits] == [EmulationFailure.exit_reason, Io.exit_reason]


@engines
def test_exit_on_emulation_failure_in_user_code(engine: str) -> None:
    """Not in the kernel's: the same at CPL 3, where IN then is #GP."""
    exits = story(engine, map_mmio_for_user_code, MMIO_ADDRESS)
    assert [exit[0] for exit in exits] == [EmulationFailure.exit_reason, Hlt.exit_reason]
    assert exits[-1][2] == HANDLERS + GP_ + 1


@KVM
@pytest.mark.parametrize("prepare", [map_mmio, map_mmio_for_user_code])
def test_both_engines_tell_the_same_story(prepare: Callable[[Machine], None]) -> None:
    kvm, unicorn = (story(engine, prepare, MMIO_ADDRESS) for engine in ("kvm", "unicorn"))
    assert kvm == unicorn


# smaller_maxphyaddr_emulation_test.c


def map_reserved(found: Machine) -> None:
    """A page whose entry has the first address bit that this guest's processor does not have, and
    that a wider one has. The original has 36 bits; here it is what Unicorn's guests have."""
    vm = found.vm
    if vm.engine_name == "kvm":
        narrow(vm.engine)  # type: ignore[arg-type]
    vm.add_memory(MMIO_ADDRESS, 0x1000)
    assert found.space is not None
    found.space.map(HIGH_LINEAR, MMIO_ADDRESS, 0x1000, write=True, execute=False)
    table = found.space.root
    for shift in (39, 30, 21):
        entry = int.from_bytes(
            vm.memory.read(table + (HIGH_LINEAR >> shift & 511) * 8, 8), "little"
        )
        table = entry & 0xF_FFFF_FFFF_F000
    entry = MMIO_ADDRESS | PRESENT | WRITE | USER | 1 << PHYSICAL_BITS
    vm.memory.load(table + (HIGH_LINEAR >> 12 & 511) * 8, entry.to_bytes(8, "little"))
    add_idt(found, {vector: HANDLERS + vector for vector in range(32)})


def narrow(engine: object) -> None:
    """Tell the guest of PHYSICAL_BITS address bits, of more that the processor has."""
    device = open_device()
    try:
        if not device.has(KVM_CAP_SMALLER_MAXPHYADDR):
            pytest.skip("this kernel lacks KVM_CAP_SMALLER_MAXPHYADDR (allow_smaller_maxphyaddr=0)")
    finally:
        device.close()
    leaves = engine.supported.leaves  # type: ignore[attr-defined]
    sizes, *rest = leaves[0x80000008, 0]
    if sizes & 0xFF <= PHYSICAL_BITS:
        pytest.skip(f"this processor has {sizes & 0xFF} physical address bits, no more")
    leaves[0x80000008, 0] = (sizes & ~0xFF | PHYSICAL_BITS, *rest)


@engines
def test_smaller_maxphyaddr_flds_is_an_emulation_failure(engine: str) -> None:
    """The instruction fails before its operand is looked at: no exception in the guest. A processor
    that runs it natively under shadow page tables raises the guest's #PF instead."""
    exits = story(engine, map_reserved, HIGH_LINEAR)
    if engine == "kvm" and exits[0][0] == Hlt.exit_reason:
        assert exits[0][2] == HANDLERS + PF + 1
    else:
        assert [exit[0] for exit in exits] == [EmulationFailure.exit_reason, Io.exit_reason]


@engines
@pytest.mark.parametrize("access", ["mov rcx, [rax]", "mov [rax], cl"])
def test_smaller_maxphyaddr_is_a_page_fault_with_the_reserved_bit(engine: str, access: str) -> None:
    with guest(engine, guest_code(HIGH_LINEAR, assemble(access))) as found:
        map_reserved(found)
        assert isinstance(found.vcpu.run(5), Hlt)
        registers = found.vcpu.registers
        assert registers.rip == HANDLERS + PF + 1
        assert registers.bank.read("cr2") == HIGH_LINEAR
        error = int.from_bytes(found.vm.memory.read(registers.gpr[RSP], 8), "little")
        assert error == (0xB if access.startswith("mov [") else 0x9)  # reserved, present


# vmx_exception_with_invalid_guest_state.c


@engines
def test_a_failure_that_userspace_ignores_comes_again(engine: str) -> None:
    """The original enters twice with a guest state that is not fixed: no harm must come of it."""
    with guest(engine, guest_code(MMIO_ADDRESS), policy=NO_X87) as found:
        map_mmio(found)
        first = seen(found, found.vcpu.run(5))
        assert seen(found, found.vcpu.run(5)) == first
        check_flds_failure(found, found.vcpu.run(5))
        assert isinstance(found.vcpu.run(5), Io)
