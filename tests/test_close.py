"""What is left of a machine that was closed."""

from __future__ import annotations

from sandbox.boot import boot_flat
from sandbox.vm import Vm


def test_registers_keep_their_values_when_the_vm_is_closed() -> None:
    """Nothing that a user can reach is left in memory that Unicorn has freed."""
    with Vm() as vm:
        machine = boot_flat(vm, b"\xf4")
        vcpu = machine.vcpu
        vcpu.registers.gpr[3] = 0x1234
        vcpu.registers.vec.write(5, b"\x77" * 64)
        vcpu.registers.bank.write("st0", 1 << 79 | 5)
        vcpu.registers.bank.write("lstar", 0x5678)
        lanes = vcpu.registers.vec.lanes(5, "u1")
        assert lanes[0] == 0x77
        vcpu.run()
    registers = vcpu.registers
    for _ in range(3):  # others take the memory that was freed
        with Vm() as other:
            boot_flat(other, b"\xf4").vcpu.run()
    assert (registers.gpr[3], vcpu.cpu.gpr[3], registers.rip) == (0x1234, 0x1234, 0x1001)
    assert registers.vec.read(5) == b"\x77" * 64 and registers.vec.lanes(5, "u1")[63] == 0x77
    assert registers.bank.read("st0") == 1 << 79 | 5
    assert registers.bank.read("lstar") == 0x5678
    assert registers.bank.read_segment("cs").selector == 8
    registers.bank.write("st0", 7)
    registers.bank.write("cr2", 9)
    registers.bank.write("mxcsr", 0x1FA0)
    registers.rflags = 0x46
    assert (registers.bank.read("st0"), registers.rflags) == (7, 0x46)
    assert (registers.bank.read("cr2"), registers.mxcsr) == (9, 0x1FA0)
