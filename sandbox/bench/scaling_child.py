"""Processes that the suite ``scaling`` starts.

``work COUNT`` says that it is ready, waits for a line and prints the wall seconds of a loop.
``memory ENGINE SIZE TOUCHED`` makes a machine with SIZE MB of memory, runs a guest that writes one
byte in each page of the first TOUCHED MB, and prints the CPU seconds and the resident MB gained.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import time
from collections.abc import Sequence

from sandbox.bench import bare
from sandbox.boot import boot_flat
from sandbox.exits import Hlt
from sandbox.vm import Vm

_WORK = "b9 {} 48 01 c3 48 31 d8 89 84 24 00 f0 ff ff ff c9 75 ef f4"
"""mov ecx, N; again: add rbx, rax; xor rax, rbx; mov [rsp - 4096], eax; dec ecx; jnz again; hlt"""
_TOUCH = "48 b8 {} b9 {} e3 0d c6 00 01 48 05 00 10 00 00 ff c9 eb f1 f4"
"""mov rax, BASE; mov ecx, PAGES; again: jrcxz done; mov byte [rax], 1; add rax, 4096; dec ecx;
jmp again; done: hlt"""
_HIGH = 1 << 32
"""Physical and linear address of the memory that is measured."""
_PAGE = 4096


def work(count: int) -> None:
    """One process of many."""
    code = bytes.fromhex(_WORK.format(struct.pack("<I", count).hex()))
    with Vm("baseline") as vm:
        vcpu = boot_flat(vm, code).vcpu
        print("ready", flush=True)
        sys.stdin.readline()
        start = time.perf_counter()
        vcpu.run()
        print(time.perf_counter() - start)


def memory(engine: str, size: int, touched: int) -> None:
    """One machine of many sizes."""
    pages = (touched << 20) // _PAGE
    base, count = struct.pack("<Q", _HIGH).hex(), struct.pack("<I", pages).hex()
    code = bytes.fromhex(_TOUCH.format(base, count))
    before = _resident()
    start = time.process_time()
    machine = _sandbox(code, size) if engine == "sandbox" else _unicorn(code, size)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "resident": (_resident() - before) / (1 << 20)}))
    del machine


def _sandbox(code: bytes, size: int) -> object:
    vm = Vm("baseline")
    machine = boot_flat(vm, code)
    vm.add_memory(_HIGH, size << 20)
    assert machine.space is not None
    machine.space.map(_HIGH, _HIGH, size << 20, write=True, execute=False)
    left = machine.vcpu.run()
    assert isinstance(left, Hlt), left
    return machine


def _unicorn(code: bytes, size: int) -> object:
    uc = bare.make(code, protect=True)
    uc.mem_map(_HIGH, size << 20)
    uc.emu_start(bare.BASE, 0)
    return uc


def _resident() -> int:
    """Bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main(arguments: Sequence[str]) -> None:
    """Command line: see the module."""
    what, *rest = arguments
    if what == "work":
        work(int(rest[0]))
    else:
        memory(rest[0], int(rest[1]), int(rest[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
