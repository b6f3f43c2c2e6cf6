"""The suites of ``sandbox bench``: each yields figures as they are measured."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from guests.assemble import assemble
from sandbox import abi
from sandbox.bench import bare
from sandbox.bench.loops import FASTPATH, NEW_INSTRUCTION, OPERATIONS, RUN_OF_TRAPS, TRAP, Loop
from sandbox.bench.measure import Effort, Figure, Result, compare
from sandbox.bench.programs import programs
from sandbox.boot import boot_flat
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.exits import Hlt
from sandbox.handler import FunctionHandler, Pack, handler
from sandbox.vm import Vm

BINDING = "unicorn binding"


@handler(pattern=NEW_INSTRUCTION)
def trivial(_cpu: Cpu, _insn: Insn) -> None:
    """Does nothing: what is left is the cost of the way to a handler and back."""


TRIVIAL = Pack.of("trivial", trivial)
RESTARTABLE = Pack.of(
    "restartable", FunctionHandler(trivial.function, patterns=(NEW_INSTRUCTION,), restartable=True)
)
"""The same, promising to write nothing before its last check: its state is not saved for undo."""


def seconds(code: bytes, *packs: Pack | str) -> float:
    """Time of ``code`` in the sandbox under the policy ``baseline``."""
    with Vm("baseline", packs) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        vcpu = boot_flat(vm, code).vcpu
        start = time.perf_counter()
        left = vcpu.run()
        taken = time.perf_counter() - start
    if not isinstance(left, Hlt):
        raise RuntimeError(f"a benchmark guest ended with {left}")
    return taken


def fastpath(effort: Effort) -> Iterator[Result]:
    """Allowed loops: ours against bare Unicorn. The ratio is how many times faster we are."""
    for loop in FASTPATH:
        if effort.wants("fastpath", loop.name):
            yield _fastpath(loop.scaled(effort), effort)


def _fastpath(loop: Loop, effort: Effort) -> Figure:
    code = assemble(loop.source)
    return compare(
        "fastpath", loop.name, "ns/iter", 1e9 / loop.count,
        lambda: seconds(code), lambda: bare.seconds(code), BINDING, effort.rounds,
    )  # fmt: skip


def fallback(effort: Effort) -> Iterator[Result]:
    """Trap, exit filled, trivial Python handler, resume: ours against the binding's hook."""
    for loop, traps in ((TRAP, 1), (RUN_OF_TRAPS, 10)):
        for pack in (TRIVIAL, RESTARTABLE):
            if effort.wants("fallback", f"{loop.name}, {pack.name}"):
                yield _fallback(loop.scaled(effort), traps, pack, effort)


def _fallback(loop: Loop, traps: int, pack: Pack, effort: Effort) -> Figure:
    code = assemble(loop.source)
    length = len(bytes.fromhex(NEW_INSTRUCTION))
    return compare(
        "fallback", f"{loop.name}, {pack.name}", "ns/trap", 1e9 / loop.count / traps,
        lambda: seconds(code, pack), lambda: bare.fallback_seconds(code, length), BINDING,
        effort.rounds,
    )  # fmt: skip


def operations(effort: Effort) -> Iterator[Result]:
    """One trapped instruction of each kind, in runs of ten, against the trivial handler."""
    trivial_run = RUN_OF_TRAPS.scaled(effort)
    for name in OPERATIONS:
        if effort.wants("operations", name):
            yield _operation(name, trivial_run, effort)


def _operation(name: str, trivial_run: Loop, effort: Effort) -> Figure:
    loop = Loop(name, "\n".join([name] * 10), trivial_run.count)
    code, trivial_code = assemble(loop.source), assemble(trivial_run.source)
    traps = 10 * loop.count
    return compare(
        "operations", name, "ns/trap", 1e9 / traps,
        lambda: seconds(code, "integer", "avx2"), lambda: seconds(trivial_code, TRIVIAL),
        "trivial handler", effort.rounds,
    )  # fmt: skip


def startup(effort: Effort) -> Iterator[Result]:
    """``sandbox run`` on a guest that halts at once, against an empty Python process."""
    if not effort.wants("startup", "trivial guest"):
        return
    with tempfile.TemporaryDirectory() as folder:
        guest = Path(folder, "halt.bin")
        guest.write_bytes(b"\xf4")
        ours = [sys.executable, "-m", "sandbox", "run", str(guest)]
        yield compare(
            "startup", "trivial guest", "ms", 1e3,
            lambda: _process(ours), lambda: _process([sys.executable, "-c", "pass"]), "python",
            effort.rounds,
        )  # fmt: skip


def _process(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


SUITES: dict[str, Callable[[Effort], Iterator[Result]]] = {
    "fastpath": fastpath,
    "fallback": fallback,
    "operations": operations,
    "startup": startup,
    "programs": programs,
}
