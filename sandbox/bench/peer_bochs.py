"""The peer: a static Linux program in Bochs, through the package ``bochscpu-python``.

Long mode, CPL 3, identity page tables; no hook per instruction. SYSCALL enters a stub of HLT and
SYSRET, so that the loop stops once per system call.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from sandbox.bench.flat_process import PAGE, SIZE, FlatProcess
from sandbox.bench.outcome import Outcome

_PML4, _PDPT, _PD, _STUB = 0x1000, 0x2000, 0x3000, 0x4000
_USER, _LARGE = 0b111, 0b1000_0111
"""Bits of page table entries: present, writable, user; and those of a page of 2 MiB."""
_HLT_SYSRET = bytes.fromhex("f4 48 0f 07")
_AFTER_HLT = _STUB + 1
_CR0 = 0x8001_0033  # PG, WP, NE, ET, MP, PE
_CR4 = 0x4_0620  # OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
_XCR0 = 0x7
_EFER = 0xD01  # NXE, LMA, LME, SCE
_STAR = 0x13 << 48 | 0x08 << 32
_CODE, _DATA = (0x23, 0xA0FB), (0x1B, 0xC0F3)
"""Selector and attributes of the user's 64-bit code and of its data."""


def run(program: str, argv: Sequence[str], env: Mapping[str, str]) -> Outcome:
    """Run ``program``; Bochs cannot be torn down, so end the process afterwards."""
    import bochscpu
    import bochscpu.memory

    session: Any = bochscpu.Session()
    fs_bases: list[int] = []
    process = FlatProcess(program, argv, env, fs_bases.append)
    _make_tables(process)
    for page in range(0, SIZE, PAGE):
        bochscpu.memory.page_insert(page, process.host_address + page)
    session.cpu.state = _state(bochscpu, process)
    faults: list[int] = []

    def on_exception(session: Any, _cpu: int, vector: int, _error: int) -> None:
        faults.append(vector)
        session.stop()

    hook = bochscpu.Hook()
    hook.hlt = lambda session, _cpu: session.stop()
    hook.exception = on_exception
    hooks = [hook]
    cpu = session.cpu
    while True:
        session.run(hooks)
        if faults or cpu.rip != _AFTER_HLT:
            return Outcome(refused=f"exception {faults} at {cpu.rip:#x}")
        cpu.rax = process.system_call(cpu.rax, cpu.rdi, cpu.rsi, cpu.rdx) % (1 << 64)
        if process.status is not None:
            return Outcome(status=process.status)
        if fs_bases:
            cpu.fs = _segment(bochscpu, _DATA, fs_bases.pop())


def _make_tables(process: FlatProcess) -> None:
    entries = [page | _LARGE for page in range(0, SIZE, 2 << 20)]
    process.write(_PML4, struct.pack("<Q", _PDPT | _USER))
    process.write(_PDPT, struct.pack("<Q", _PD | _USER))
    process.write(_PD, struct.pack(f"<{len(entries)}Q", *entries))
    process.write(_STUB, _HLT_SYSRET)


def _segment(bochscpu: Any, kind: tuple[int, int], base: int = 0) -> Any:
    segment = bochscpu.Segment()
    segment.present, segment.base, segment.limit = True, base, 0xFFFF_FFFF
    segment.selector, segment.attr = kind
    return segment


def _state(bochscpu: Any, process: FlatProcess) -> Any:
    state = bochscpu.State()
    state.cr0, state.cr3, state.cr4, state.xcr0, state.efer = _CR0, _PML4, _CR4, _XCR0, _EFER
    state.cs = _segment(bochscpu, _CODE)
    state.ss = state.ds = state.es = state.fs = state.gs = _segment(bochscpu, _DATA)
    state.star, state.lstar, state.sfmask = _STAR, _STUB, 0x300
    state.fpcw, state.fptw, state.mxcsr, state.mxcsr_mask = 0x37F, 0xFFFF, 0x1F80, 0xFFFF
    state.rip, state.rsp, state.rflags = process.entry, process.rsp, 2
    return state
