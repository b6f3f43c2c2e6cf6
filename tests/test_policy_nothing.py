"""The guest collection under the policy ``nothing``: the handler tier alone is a whole processor.

The C samples that run long are built smaller here, and two runs of each are enough; ``python -m
tests.test_programs --policy nothing`` runs everything at full size (an hour).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guests.assemble import assemble_file
from guests.header import read_header
from guests.samples import PREBUILTS, SAMPLES, SMALL, Run, build
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE as CAP
from sandbox.boot import boot_flat
from sandbox.exits import Hlt, Io
from sandbox.registers import AF, OF, PF, SF, ZF
from sandbox.vm import DEFAULT_POLICY, Vm
from tests.test_guests_asm import GUESTS, MODES
from tests.test_guests_c import static_libc
from tests.test_programs import check, needs_v3

HANDLERS = ("integer", "avx2", "x87", "mmx", "system")
FLAGS = 0xCD5
"""Status flags and DF."""
UNDEFINED = {"hello": OF | SF | ZF | AF | PF}
"""Flags that a guest's last instructions leave undefined: there, IMUL and BTR."""


def end_of(path: Path, policy: str) -> tuple[dict[str, Any], int]:
    """What a guest leaves behind at its HLT, and how many instructions the tier ran."""
    header = read_header(path.read_text(), str(path))
    code = assemble_file(path, header.base, header.bitness)
    ports: dict[int, bytes] = {}
    with Vm(policy, HANDLERS) as vm:
        vm.enable_cap(CAP)
        vcpu = boot_flat(vm, code, header.base, MODES[header.mode]).vcpu
        vcpu.registers.xcr0 = 7
        while not isinstance(left := vcpu.run(timeout=60), Hlt):
            assert isinstance(left, Io), left
            ports[left.port] = ports.get(left.port, b"") + left.data
        registers = vcpu.registers
        state = {
            "rip": registers.rip,
            "gpr": list(registers.gpr),
            "flags": registers.rflags & FLAGS & ~UNDEFINED.get(path.stem, 0),
            "vectors": [registers.vec.read(number) for number in range(16)],
            "mxcsr": registers.mxcsr,
            "memory": vm.memory.read(0, 0x40_0000 if header.bitness > 16 else 0x10_0000),
            "ports": ports,
        }
        return state, vcpu.stats.fallback_count


@pytest.mark.parametrize("path", GUESTS, ids=lambda path: path.stem)
def test_assembly_guest_ends_as_on_the_fast_path(path: Path) -> None:
    alone, emulated = end_of(path, "nothing")
    mixed, trapped = end_of(path, DEFAULT_POLICY)
    assert emulated > trapped
    assert alone == mixed


@needs_v3
@pytest.mark.parametrize("name", SAMPLES)
def test_c_sample_prints_what_it_prints_natively(name: str, tmp_path: Path) -> None:
    if not static_libc("gcc"):
        pytest.skip("gcc is not installed, or has no static libc")
    program = build(name, "x86-64-v3", "O3", tmp_path, options=SMALL.get(name, ()))
    for run in SAMPLES[name][:2]:
        check(program, run, "--policy", "nothing")


@needs_v3
@pytest.mark.skipif(static_libc("gcc"), reason="it is built and run above")
def test_prebuilt_program_prints_what_it_prints_natively() -> None:
    check(PREBUILTS["demo"], Run(), "--policy", "nothing")
