"""Linux programs as guests: long mode, CPL 3, no IDT; system calls go to the pack ``linux``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guests.load import load_elf
from handlers.linux import Files, ProcessExit, start_process
from handlers.linux import Machine as Processor
from sandbox.boot import USER_CODE_64, USER_DATA, Machine, enter_long_mode, make_space, reset
from sandbox.memory import PAGE_MASK
from sandbox.paging import FrameAllocator
from sandbox.registers import RSP, DescriptorTable, Segment
from sandbox.sources import seeded_entropy
from sandbox.vm import Vm

PROCESS_RAM_BYTES = 1 << 30
HWCAP2_FSGSBASE = 2


def boot_process(
    vm: Vm,
    program: str | Path,
    argv: Sequence[str | bytes] = (),
    env: Mapping[str, str] | None = None,
    *,
    files: Files | None = None,
    ram: int = PROCESS_RAM_BYTES,
    seed: int | None = 0,
) -> Machine:
    """Load a static x86-64 ELF ``program`` and make it ready to run.

    ``vm`` needs the pack ``linux``. ``argv`` includes the program's name; ``files`` are its
    descriptors (the host's standard streams by default). Memory of the host is used as the guest
    touches it, up to ``ram`` bytes. ``seed`` makes the guest's random numbers reproducible; None
    takes the host's. Raises :class:`~sandbox.errors.GuestImageError`.
    """
    image = load_elf(program)
    ram = (ram + PAGE_MASK) & ~PAGE_MASK
    vm.add_memory(0, ram)
    machine = Machine(vm, reset(vm))
    cpu = machine.vcpu.cpu
    space = make_space(machine)
    enter_long_mode(machine, space)
    bank = vm.engine.bank
    bank.write_table("idtr", DescriptorTable(0, 0))
    bank.write_segment("cs", USER_CODE_64)
    bank.write_segment("ss", USER_DATA)
    for name in ("ds", "es", "fs", "gs"):
        bank.write_segment(name, Segment(0, 0, 0xFFFF_FFFF, dpl=3, db=1, g=1))
    vm.engine.run_user_code(space)
    cpuid = cpu.services["cpuid"]
    processor = Processor(hwcap=cpuid(1, 0)[3], hwcap2=HWCAP2_FSGSBASE if cpuid(7, 0)[1] & 1 else 0)
    started = start_process(
        cpu,
        image,
        argv or [str(program)],
        env,
        space=space,
        frames=FrameAllocator(vm.memory, 0, ram),
        files=files,
        machine=processor,
        seed=seed,
    )
    machine.status_of = process_status
    if seed is not None:
        cpu.services["entropy"] = seeded_entropy(seed)
    machine.vcpu.registers.rip = started.entry
    machine.vcpu.registers.gpr[RSP] = started.rsp
    return machine


def process_status(left: Any) -> tuple[int, str] | None:
    """Exit status and reason of a program that ended; None for any other end of a run."""
    return (left.status, left.reason) if isinstance(left, ProcessExit) else None
