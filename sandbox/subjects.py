"""What conformance compares with the host CPU: the fast path alone, the handler tier alone, and
lowered code.

All work on a real machine: a vCPU on Unicorn in long mode at CPL 3, with the test memory of
:mod:`sandbox.native` under page tables of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from sandbox.boot import USER_CODE_64, USER_DATA, Machine, enter_long_mode, make_space, reset
from sandbox.cases import uses_x87
from sandbox.conformance import Outcome
from sandbox.cpu import ERROR_CODE_VECTORS, PF_, UD, Fault
from sandbox.decode import Insn
from sandbox.engine.allowlist import NEVER_RUN
from sandbox.engine.protocol import Stop
from sandbox.fallback import Bound, Tier
from sandbox.fault_details import corrected
from sandbox.handler import Decline, Inject, Pack
from sandbox.memory import PAGE_SIZE
from sandbox.native import CODE, DATA, READONLY, REGION, REGION_SIZE, State
from sandbox.policy import Policy
from sandbox.registers import Segment
from sandbox.vm import Vm

_END_MARK = b"\x06"  # no instruction in 64-bit mode: the engine stops there
_XCR0 = 0xE7
XCR0_AVX = 7
"""x87, SSE and AVX; nothing is lowered while there is AVX-512."""
_GPRS = struct.Struct("<16Q")


def _ignore(_name: str, _value: int) -> None: ...


class Stage:
    """A machine that takes a :class:`~sandbox.native.State` and gives one back."""

    def __init__(
        self, handlers: Iterable[str | Path | Pack] = (), policy: str | Policy = "nothing"
    ) -> None:
        self.vm = Vm(policy, handlers)
        self._memory = self.vm.add_memory(REGION, REGION_SIZE)
        self.vm.add_memory(CODE, PAGE_SIZE)
        machine = Machine(self.vm, reset(self.vm))
        space = make_space(machine)
        space.map(REGION, REGION, len(READONLY), write=False, execute=False)
        space.map(DATA, DATA, REGION_SIZE - len(READONLY), write=True, execute=False)
        space.map(CODE, CODE, PAGE_SIZE, write=False, execute=True)
        enter_long_mode(machine, space)
        self.engine, self.vcpu = self.vm.engine, machine.vcpu
        self.bank = self.engine.bank
        self.bank.write_segment("cs", USER_CODE_64)
        self.bank.write_segment("ss", USER_DATA)
        for name in ("ds", "es", "fs", "gs"):
            self.bank.write_segment(name, Segment(0, 0, 0xFFFF_FFFF, dpl=3, db=1, g=1))
        self.registers = self.vcpu.registers
        self.registers.xcr0 = _XCR0
        self.engine.on_float_control = _ignore  # what is trapped is the subject's choice
        self._gpr = self.registers.gpr.cast("B")
        self._opmask = self.registers.opmask.cast("B")
        self._x87 = True

    def load(self, insn: Insn, state: State) -> None:
        """Make the machine's state ``state``, about to run ``insn``."""
        write = self.bank.write
        self.registers.rip = CODE
        _GPRS.pack_into(self._gpr, 0, *state.gpr)
        struct.pack_into("<8Q", self._opmask, 0, *state.opmask)
        self.registers.vec.raw[:] = state.vectors
        self._memory.host[:] = state.memory
        write("rflags", state.rflags)
        if state.mxcsr != self.bank.read("mxcsr"):
            write("mxcsr", state.mxcsr)
        write("gs_base", state.gs_base)
        self._x87 = uses_x87(insn)
        if self._x87:
            write("fpcw", state.fpcw)
            write("fpsw", state.fpsw)
            for number, value in enumerate(state.st):
                write(f"st{number}", value)
            write("fptag", state.fptag)

    def store(self, before: State) -> State:
        """The machine's state as it is; what an instruction without x87 cannot touch is left."""
        read = self.bank.read
        memory: bytes = self._memory.host[:]
        state = State(
            gpr=list(_GPRS.unpack(self._gpr)),
            rflags=read("rflags"),
            mxcsr=read("mxcsr"),
            vectors=self.registers.vec.raw.tobytes(),
            opmask=self.registers.opmask.tolist(),
            st=before.st,
            fpcw=before.fpcw,
            fpsw=before.fpsw,
            fptag=before.fptag,
            gs_base=before.gs_base,
            memory=before.memory if memory == before.memory else memory,
        )
        if self._x87:
            state.st = [read(f"st{number}") for number in range(8)]
            state.fpcw, state.fpsw, state.fptag = read("fpcw"), read("fpsw"), read("fptag")
        return state


class FastPath:
    """Unicorn under a policy that allows one form, the instruction's own.

    #UD stands for an instruction that Unicorn cannot run.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._insn = b""
        self._code = -1

    def accepts(self, insn: Insn) -> bool:
        return insn.code not in NEVER_RUN

    def run(self, insn: Insn, state: State) -> Outcome:
        stage, engine = self.stage, self.stage.engine
        if insn.raw != self._insn:
            self._put(insn)
        stage.load(insn, state)
        stop = engine.enter()
        engine.sync()
        return Outcome(stage.store(state), self._fault(insn, stop))

    def _put(self, insn: Insn) -> None:
        if insn.code != self._code:
            traps = bytearray(b"\1" * len(self.stage.vm.settings.intercepted))
            traps[insn.code] = 0
            self.stage.engine.set_traps(bytes(traps))
            self._code = insn.code
        self.stage.vm.memory.load(CODE, insn.raw + _END_MARK)
        self._insn = insn.raw

    def _fault(self, insn: Insn, stop: Stop) -> Fault | None:
        engine, rip = self.stage.engine, self.stage.registers.rip
        if stop is Stop.EXCEPTION:
            vector = engine.vector
            code = engine.error_code if vector in ERROR_CODE_VECTORS else None
            address = self.stage.bank.read("cr2") if vector == PF_ else None
            return corrected(self.stage.vcpu.cpu, insn, Fault(vector, code, address))
        if stop is Stop.INSN and rip == CODE + insn.length:
            return None
        if stop is Stop.INSN and rip == CODE:
            return Fault(UD)
        raise LookupError(f"the fast path stopped ({stop.name}) at {rip:#x}")


class HandlerTier:
    """The handlers of some packs, bound as the vCPU binds them."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        settings = stage.vm.settings
        self._tiers = [Tier(stage.vcpu.cpu, t) for t in (settings.handlers, settings.kernel)]
        self._bound: dict[bytes, Bound | None] = {}

    def _find(self, insn: Insn) -> Bound | None:
        if insn.raw not in self._bound:
            found = (tier.bind(insn) for tier in self._tiers)
            self._bound[insn.raw] = next((bound for bound in found if bound.handlers), None)
        return self._bound[insn.raw]

    def accepts(self, insn: Insn) -> bool:
        return self._find(insn) is not None

    def run(self, insn: Insn, state: State) -> Outcome:
        bound = self._find(insn)
        if bound is None:
            raise LookupError(f"no handler takes {insn!r}")
        self.stage.load(insn, state)
        fault = self._fault(insn, bound)
        return Outcome(self.stage.store(state), fault)

    def emulate(self, insn: Insn) -> Fault | None:
        """Run the handler of ``insn`` on the machine as it stands; what it raised."""
        bound = self._find(insn)
        if bound is None:
            raise LookupError(f"no handler takes {insn!r}")
        return self._fault(insn, bound)

    def _fault(self, insn: Insn, bound: Bound) -> Fault | None:
        try:
            verdict = bound.run()
        except Fault as raised:
            return raised
        if isinstance(verdict, Decline):
            raise LookupError(f"{bound.tally.handler} declined {insn!r} while it ran")
        if isinstance(verdict, Inject):
            return Fault(verdict.vector, verdict.error_code)
        return None


def without_avx512(state: State) -> State:
    """The state with zeros above the YMM registers: what a machine without AVX-512 knows of it."""
    vectors = np.frombuffer(state.vectors, "u1").reshape(32, 64).copy()
    vectors[16:] = vectors[:, 32:] = 0
    return replace(state, vectors=vectors.tobytes())


class Lowered:
    """Unicorn with lowered code, on a stage of its own whose policy traps what is to be lowered.

    What a sequence faults at, the handler does, as on a vCPU.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        stage.registers.xcr0 = XCR0_AVX
        stage.engine.on_float_control = stage.vcpu.side_effects.float_control
        self._handlers = HandlerTier(stage)
        self._insn = b""
        self._code = -1
        self._built: dict[bytes, bool] = {}

    def accepts(self, insn: Insn) -> bool:
        """Whether ``insn`` is trapped and the engine has made lowered code for it."""
        if insn.raw not in self._built:
            self._built[insn.raw] = self._build(insn)
        return self._built[insn.raw]

    def run(self, insn: Insn, state: State) -> Outcome:
        stage, engine = self.stage, self.stage.engine
        if insn.raw != self._insn:
            self._put(insn)
        stage.load(insn, state)
        stop = engine.enter()
        engine.sync()
        rip, fault = stage.registers.rip, None
        if stop is not Stop.INSN or rip not in (CODE, CODE + insn.length):
            raise LookupError(f"lowered code stopped ({stop.name}) at {rip:#x}")
        if rip == CODE:
            fault = self._handlers.emulate(insn)
        return Outcome(stage.store(state), fault)

    def _put(self, insn: Insn) -> None:
        if insn.code != self._code:  # what other forms left in hidden memory is not needed
            self.stage.vcpu.side_effects.apply()
            self._code = insn.code
        self.stage.vm.memory.load(CODE, insn.raw + _END_MARK)
        self._insn = insn.raw

    def _build(self, insn: Insn) -> bool:
        stage, engine = self.stage, self.stage.engine
        if not engine.traps(insn):
            return False
        self._put(insn)
        before = sum(engine.lowered()[0].values())
        stage.load(insn, State())
        engine.enter()
        engine.sync()
        return sum(engine.lowered()[0].values()) > before
