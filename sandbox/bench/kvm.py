"""Suite ``kvm``: the engine ``kvm`` beside Unicorn, the same guests and the same handlers.

The round trip of an emulation failure: a guest at CPL 0 loads from memory that is not there by an
x87 instruction, which no kernel emulates; from one such instruction to the next, with the loop
around it. Programs: CPU time of the whole run as in the suite ``programs``, repeated more often.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from guests.assemble import assemble
from sandbox import abi
from sandbox.bench.loops import WARM_UP
from sandbox.bench.measure import Effort, Note, Result, compare_all
from sandbox.bench.programs import Program, make_programs, run_once
from sandbox.boot import Machine, boot_flat
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.engine.kvm import KvmEngine
from sandbox.engine.kvm_device import unavailable
from sandbox.exits import EmulationFailure, Hlt, Io
from sandbox.handler import FunctionHandler, Pack
from sandbox.policy import Policy
from sandbox.vm import Vm

SUITE = "kvm"
KVM, IOCTLS, UNICORN = "kvm", "kvm, GET/SET_REGS", "unicorn"
"""The engine with shared registers (KVM_CAP_SYNC_REGS), without, and the other engine."""
ROUNDS = 7
PROGRAMS = "programs (demo|nbody|sort) v3"
"""Those of the suite ``programs`` that are run, by name."""
MORE = 15
"""Times the repetitions that the emulators get there: enough to see past the start."""

_HOLE = 0x7000_0000
_POLICY = Policy.parse(
    'extends = "baseline"\n[[rule]]\naction = "trap"\nmnemonic = ["fld"]\n', "bench"
)
_FLD = "fld dword ptr [rbx]"


def _nothing(_cpu: Cpu, _insn: Insn) -> None:
    """Does nothing: what is left is the cost of the way to a handler and back."""


HANDLER = Pack.of("nothing", FunctionHandler(_nothing, mnemonics=("fld",), restartable=True))


def kvm(effort: Effort) -> Iterator[Result]:
    """Exits to a handler, to the caller, and for port IO; then whole programs."""
    if reason := unavailable():
        yield Note(SUITE, "", KVM, f"left out: {reason}")
        return
    for name, body, packs in (
        ("failure to a handler", _FLD, (HANDLER,)),
        ("failure to the caller", _FLD, ()),
        ("out to the caller", "out 0x80, al", ()),
    ):
        if effort.wants(SUITE, name):
            yield from _round_trip(name, body, packs, effort)
    yield from _programs(effort)


def _round_trip(name: str, body: str, packs: tuple[Pack, ...], effort: Effort) -> Iterator[Result]:
    def timed(engine: str, shared: bool = True) -> Callable[[], float]:
        return effort.per_iteration(lambda count: seconds(engine, body, packs, count, shared))

    peers = {IOCTLS: timed(KVM, False), UNICORN: timed(UNICORN)}
    rounds = effort.rounds or ROUNDS
    return compare_all(SUITE, name, "us/exit", 1e6, timed(KVM), peers, rounds)


def seconds(
    engine: str, body: str, packs: tuple[Pack, ...], count: int, shared: bool = True
) -> float:
    """CPU time of ``count`` iterations of a loop over ``body``, after a few that bring everything
    into place; ``shared``: with SYNC_REGS."""
    code = (
        f"mov ebx, {_HOLE}\nmov ecx, {WARM_UP}\nagain:\n{body}\ndec ecx\njnz again\nhlt\n"
        f"mov ecx, {count}\njmp again"
    )
    with _registers(shared), Vm(_POLICY, packs, engine=engine) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        machine = boot_flat(vm, assemble(code))
        assert machine.space is not None
        machine.space.map(_HOLE, _HOLE, 0x1000, write=True, execute=False)
        length = len(assemble(_FLD))
        _run(machine, length)
        start = time.process_time()
        _run(machine, length)
        return time.process_time() - start


def _run(machine: Machine, length: int) -> None:
    """Up to the next HLT; a failure of ``length`` bytes is stepped over."""
    vcpu = machine.vcpu
    while not isinstance(left := vcpu.run(), Hlt):
        if isinstance(left, EmulationFailure):
            vcpu.registers.rip += length
        elif not isinstance(left, Io):
            raise RuntimeError(f"a benchmark guest ended with {left}")


@contextmanager
def _registers(shared: bool) -> Iterator[None]:
    """Engines made in here share their registers through ``kvm_run``, or not."""
    before, KvmEngine.share_registers = KvmEngine.share_registers, shared
    try:
        yield
    finally:
        KvmEngine.share_registers = before


def _programs(effort: Effort) -> Iterator[Result]:
    wanted = Effort(effort.rounds, effort.scale * MORE, PROGRAMS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for program in make_programs(folder, wanted):
            if effort.wants(SUITE, _name(program)):
                yield from _program(program, folder, effort)


def _name(program: Program) -> str:
    return f"program {program.name} {program.level}"


def _program(program: Program, folder: Path, effort: Effort) -> Iterator[Result]:
    def timed(runner: str) -> Callable[[], float]:
        return lambda: _checked(runner, program, folder)

    rounds, peers = effort.rounds or ROUNDS, {"native": timed("native")}
    return compare_all(SUITE, _name(program), "ms", 1e3, timed(KVM), peers, rounds, "programs")


def _checked(runner: str, program: Program, folder: Path) -> float:
    run = run_once(runner, program, folder)
    if run.trouble or run.status:
        raise RuntimeError(f"{program.name} in {runner}: {run.trouble or run.status}")
    return run.seconds
