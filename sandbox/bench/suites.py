"""The suites of ``sandbox bench``: each yields results as they are measured.

A ratio is the peer's time divided by ours, of neighbouring runs; above 1 we are faster.
docs/benchmarks.md defines each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from sandbox import abi
from sandbox.bench import bare
from sandbox.bench.kvm import kvm
from sandbox.bench.loops import (
    FASTPATH,
    NEW_INSTRUCTION,
    OPERATIONS,
    RUN,
    RUN_OF_TRAPS,
    RUN_OF_VECTORS,
    TRAP,
    VECTOR,
    Loop,
    run_of,
)
from sandbox.bench.measure import Effort, Result, compare_all
from sandbox.bench.programs import QEMU, missing, programs
from sandbox.bench.scaling import scaling
from sandbox.boot import boot_flat
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.exits import Hlt
from sandbox.handler import FunctionHandler, Pack, handler
from sandbox.vm import Vm

BINDING = "unicorn"
PROTECTED = "unicorn-protected"
HOOKED = "unicorn, hook each"


@handler(pattern=NEW_INSTRUCTION)
def trivial(_cpu: Cpu, _insn: Insn) -> None:
    """Does nothing: what is left is the cost of the way to a handler and back."""


TRIVIAL = Pack.of("trivial", trivial)
RESTARTABLE = Pack.of(
    "restartable", FunctionHandler(trivial.function, patterns=(NEW_INSTRUCTION,), restartable=True)
)
"""The same, promising to write nothing before its last check: its state is not saved for undo."""


def ours(loop: Loop, *packs: Pack | str) -> Callable[[int], float]:
    """CPU seconds of so many iterations of ``loop`` in the sandbox, under ``baseline``."""

    def run(count: int) -> float:
        with Vm("baseline", packs) as vm:
            vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
            vcpu = boot_flat(vm, loop.code(count)).vcpu
            vcpu.run()
            start = time.process_time()
            left = vcpu.run()
            taken = time.process_time() - start
        if not isinstance(left, Hlt):
            raise RuntimeError(f"a benchmark guest ended with {left}")
        return taken

    return run


def theirs(
    loop: Loop, hook: bare.Prepare | None = None, *, protect: bool = False
) -> Callable[[int], float]:
    """The same in Unicorn through its binding; see :func:`sandbox.bench.bare.rerun`."""
    return lambda count: bare.rerun(loop.code(count), hook, protect=protect)


def fastpath(effort: Effort) -> Iterator[Result]:
    """Allowed loops, against Unicorn through its binding: with the default protection of memory,
    with data not executable, and with a Python hook on each instruction."""
    for loop in FASTPATH:
        if effort.wants("fastpath", loop.name):
            yield from _fastpath(loop, effort)


def _fastpath(loop: Loop, effort: Effort) -> Iterator[Result]:
    timed = effort.per_iteration
    peers = {
        BINDING: timed(theirs(loop)),
        PROTECTED: timed(theirs(loop, protect=True)),
        HOOKED: timed(theirs(loop, bare.per_instruction)),
    }
    return compare_all(
        "fastpath", loop.name, "ns/iteration", 1e9, timed(ours(loop)), peers,
        effort.rounds or 41, "stores" if loop.stores else "others",
    )  # fmt: skip


def fallback(effort: Effort) -> Iterator[Result]:
    """Instructions that Unicorn does not have: ours against hooks on the binding."""
    skip = bare.skip(len(bytes.fromhex(NEW_INSTRUCTION)))
    for loop, traps in ((TRAP, 1), (RUN_OF_TRAPS, RUN)):
        for pack in (TRIVIAL, RESTARTABLE):
            name = f"{loop.name}, {pack.name}"
            if effort.wants("fallback", name):
                hooks = {"hook that skips": skip}
                yield from _fallback(name, loop, traps, (pack,), hooks, effort)
    for loop, traps in ((VECTOR, 1), (RUN_OF_VECTORS, RUN)):
        if effort.wants("fallback", loop.name):
            hooks = {
                "hook, hard-coded": bare.emulate_known,
                "hook and emulate": bare.emulate_decoded,
            }
            yield from _fallback(loop.name, loop, traps, ("integer", "avx2"), hooks, effort)


def _fallback(
    name: str,
    loop: Loop,
    traps: int,
    packs: tuple[Pack | str, ...],
    hooks: dict[str, bare.Prepare],
    effort: Effort,
) -> Iterator[Result]:
    timed = effort.per_iteration
    peers = {peer: timed(theirs(loop, hook)) for peer, hook in hooks.items()}
    return compare_all(
        "fallback", name, "ns/trap", 1e9 / traps, timed(ours(loop, *packs)), peers,
        effort.rounds or 21,
    )  # fmt: skip


def operations(effort: Effort) -> Iterator[Result]:
    """One trapped instruction of each kind, in runs of ten, against the trivial handler."""
    for name in OPERATIONS:
        if effort.wants("operations", name):
            yield from _operation(name, effort)


def _operation(name: str, effort: Effort) -> Iterator[Result]:
    timed = effort.per_iteration
    peers = {"trivial handler": timed(ours(RUN_OF_TRAPS, TRIVIAL))}
    return compare_all(
        "operations", name, "ns/trap", 1e9 / RUN,
        timed(ours(run_of(name, name), "integer", "avx2")), peers, effort.rounds or 11,
    )  # fmt: skip


def startup(effort: Effort) -> Iterator[Result]:
    """``sandbox run`` from the shell on a guest that ends at once: wall time of the process, with
    compiled bytecode."""
    with tempfile.TemporaryDirectory() as folder:
        halt = Path(folder, "halt.bin")
        halt.write_bytes(b"\xf4")
        guests = {"trivial guest": halt}
        if program := _static_program(Path(folder)):
            guests["static glibc program"] = program
        for name, guest in guests.items():
            if effort.wants("startup", name):
                yield from _startup(name, guest, effort)


def _startup(name: str, guest: Path, effort: Effort) -> Iterator[Result]:
    command = [sys.executable, "-m", "sandbox", "run", str(guest)]
    peers = {"python -c pass": partial(_process, [sys.executable, "-c", "pass"])}
    if guest.suffix != ".bin" and not missing(QEMU):
        peers[QEMU] = partial(_process, [QEMU, "-cpu", "max", str(guest)])
    return compare_all("startup", name, "ms", 1e3, partial(_process, command), peers,
                       effort.rounds or 9)  # fmt: skip


def _static_program(folder: Path) -> Path | None:
    """A program that only prints a line, linked with the compiler's own static C library."""
    target = folder / "hello"
    source = b'#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n'
    command = ["gcc", "-O2", "-static", "-o", str(target), "-x", "c", "-"]
    try:
        done = subprocess.run(command, input=source, stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        return None
    return None if done.returncode else target


def _process(command: list[str]) -> float:
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - start


SUITES: dict[str, Callable[[Effort], Iterator[Result]]] = {
    "fastpath": fastpath,
    "fallback": fallback,
    "operations": operations,
    "startup": startup,
    "scaling": scaling,
    "programs": programs,
    "kvm": kvm,
}
