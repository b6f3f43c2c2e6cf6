"""The binary contract equals the kernel's header, and known offsets hold where no header is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import abi

STRUCTS = (
    abi.kvm_run, abi.kvm_regs, abi.kvm_segment, abi.kvm_dtable, abi.kvm_sregs, abi.kvm_vcpu_events,
    abi.kvm_enable_cap, abi.kvm_userspace_memory_region, abi.kvm_debug_exit_arch, abi.kvm_sync_regs,
)  # fmt: skip
NEWER = {"memory_fault": "KVM_EXIT_MEMORY_FAULT"}
"""Union members that older headers lack, and the number that came with them."""
RENAMED = {"hypercall.flags": "hypercall.longmode"}

EXIT_MEMBERS = {  # offset of each field in kvm_run, from the kernel's header
    "hw.hardware_exit_reason": 32,
    "fail_entry.hardware_entry_failure_reason": 32, "fail_entry.cpu": 40,
    "ex.exception": 32, "ex.error_code": 36,
    "io.direction": 32, "io.size": 33, "io.port": 34, "io.count": 36, "io.data_offset": 40,
    "debug.arch.exception": 32, "debug.arch.pc": 40, "debug.arch.dr6": 48, "debug.arch.dr7": 56,
    "mmio.phys_addr": 32, "mmio.data": 40, "mmio.len": 48, "mmio.is_write": 52,
    "hypercall.nr": 32, "hypercall.args": 40, "hypercall.ret": 88, "hypercall.flags": 96,
    "internal.suberror": 32, "internal.ndata": 36, "internal.data": 40,
    "emulation_failure.suberror": 32, "emulation_failure.ndata": 36,
    "emulation_failure.flags": 40, "emulation_failure.insn_size": 48,
    "emulation_failure.insn_bytes": 49,
    "system_event.type": 32, "system_event.ndata": 36, "system_event.data": 40,
    "msr.error": 32, "msr.reason": 40, "msr.index": 44, "msr.data": 48,
    "memory_fault.flags": 32, "memory_fault.gpa": 40, "memory_fault.size": 48,
}  # fmt: skip
RUN_FIELDS = {
    "request_interrupt_window": 0, "immediate_exit": 1, "exit_reason": 8, "if_flag": 13,
    "flags": 14, "cr8": 16, "apic_base": 24, "kvm_valid_regs": 288, "kvm_dirty_regs": 296, "s": 304,
}  # fmt: skip
SIZES = {
    abi.kvm_run: 2352, abi.kvm_regs: 144, abi.kvm_segment: 24, abi.kvm_dtable: 16,
    abi.kvm_sregs: 312, abi.kvm_vcpu_events: 64, abi.kvm_enable_cap: 104,
    abi.kvm_userspace_memory_region: 32,
}  # fmt: skip


def offsets(struct: type[ctypes.Structure | ctypes.Union]) -> Iterator[tuple[str, int]]:
    """Every field of ``struct``, nested ones too, as (C member designator, offset)."""
    for field in struct._fields_:
        name, kind = field[0], field[1]
        at = getattr(struct, name).offset
        hidden = name in getattr(struct, "_anonymous_", ())
        if not hidden:
            yield name, at
        if issubclass(kind, (ctypes.Structure, ctypes.Union)):
            for inner, more in offsets(kind):
                yield inner if hidden else f"{name}.{inner}", at + more


def numbers() -> dict[str, int]:
    return {n: v for n, v in vars(abi).items() if n.startswith("KVM_")}


def test_exit_fields_lie_where_the_kernel_puts_them() -> None:
    ours = dict(offsets(abi.kvm_run))
    assert {name: ours[name] for name in EXIT_MEMBERS} == EXIT_MEMBERS
    assert {name: ours[name] for name in RUN_FIELDS} == RUN_FIELDS
    assert RUN_FIELDS["exit_reason"] == abi.EXIT_REASON_OFFSET
    assert EXIT_MEMBERS["internal.suberror"] == abi.UNION_OFFSET


def test_sizes_are_the_kernels() -> None:
    assert {s: ctypes.sizeof(s) for s in SIZES} == SIZES
    assert ctypes.sizeof(abi.kvm_run().emulation_failure) == 32


def test_numbers_a_user_of_the_api_relies_on() -> None:
    assert abi.KVM_EXIT_INTERNAL_ERROR == 17
    assert abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE == 204
    assert abi.KVM_ENABLE_CAP == 0x4068AEA3
    assert abi.KVM_RUN == 0xAE80


def c_program() -> str:
    lines = [
        "#include <stdio.h>",
        "#include <stddef.h>",
        "#include <linux/kvm.h>",
        '#define D(s, m) printf(#s "." #m " %llu\\n", (unsigned long long)offsetof(struct s, m))',
        '#define Z(s) printf(#s " %llu\\n", (unsigned long long)sizeof(struct s))',
        "int main(void) {",
    ]
    for name in numbers():  # all of them are macros
        lines += [f"#ifdef {name}", f'printf("{name} %llu\\n", (unsigned long long)({name}));']
        lines += ["#endif"]
    for struct in STRUCTS:
        lines.append(f"Z({struct.__name__});")
        for member, _ in offsets(struct):
            guard = NEWER.get(member.partition(".")[0], "KVM_EXIT_IO")
            lines += [f"#ifdef {guard}"]
            lines += [f"D({struct.__name__}, {RENAMED.get(member, member)});", "#endif"]
    return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("needs a C compiler and linux/kvm.h")
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text(c_program())
    subprocess.run([compiler, "-o", folder / "abi", folder / "abi.c"], check=True)
    output = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_every_offset_size_and_number_equals_the_compilers(compiled: dict[str, int]) -> None:
    ours = {name: value for name, value in numbers().items() if name in compiled}
    for struct in STRUCTS:
        ours[struct.__name__] = ctypes.sizeof(struct)
        for member, at in offsets(struct):
            ours[f"{struct.__name__}.{RENAMED.get(member, member)}"] = at
    ours = {name: value for name, value in ours.items() if name in compiled}
    assert ours == compiled
    assert len(compiled) > 250
    assert {"KVM_ENABLE_CAP", "KVM_EXIT_INTERNAL_ERROR", "kvm_run.msr.data"} <= compiled.keys()
