"""One virtual CPU: the loop between the engine, the handler tier and the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from sandbox import events
from sandbox.cpu import DB, ERROR_CODE_VECTORS, PF_, UD, Cpu, Fault
from sandbox.decode import Insn
from sandbox.devices import answer
from sandbox.engine.protocol import Engine, Entry, Stop
from sandbox.errors import SandboxError
from sandbox.exits import (
    EmulationFailure,
    Exit,
    GuestException,
    Hlt,
    Intr,
    Io,
    Mmio,
    Shutdown,
)
from sandbox.external import External
from sandbox.fallback import HandlerTimeout, handler_error, timeout_error
from sandbox.fault_details import corrected
from sandbox.handler import Decline, Inject, Resume, Verdict
from sandbox.handler import Exit as ExitVerdict
from sandbox.memory import MmioRead
from sandbox.mmio import MmioCompletion
from sandbox.registers import IF, TF
from sandbox.settings import Settings
from sandbox.side_effects import SideEffects
from sandbox.sites import EXIT_SPAN, Site, Sites
from sandbox.stats import Stats, TraceRecord
from sandbox.watchdog import WATCHDOG

DR6_BS = 1 << 14
"""In DR6: the debug exception is a single step."""
TIMED, SAMPLE = 1000, 16
"""So many stops of a run are timed, then one of 16: reading the clock takes a tenth of a short
stay in the handler tier."""
_POP_FLAGS = ("popf", "iret")


class Vcpu:
    """Made by :meth:`sandbox.vm.Vm.create_vcpu`. ``cpu`` is what handlers see of it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.registers = engine.registers
        self.cpu = Cpu(engine.registers, engine.memory)
        self.cpu.services["system_memory"] = engine.system_memory
        self.page = engine.page
        self.stats = Stats()
        self.on_trap: Callable[[TraceRecord], None] | None = None
        """Called after each trapped instruction."""
        self.max_exits: int | None = None
        """How many trapped instructions :meth:`run` may see in all before it comes back."""
        self.deadline: float | None = None
        self.thread = 0
        """The thread inside :meth:`run`, or 0."""
        self.closed = False
        """Whether the Vm was closed: then this cannot run any more."""
        self._settings = settings
        self._sites = Sites(self.cpu, engine, settings)
        self.side_effects = SideEffects(engine, settings, self.stats, self._sites.invalidate)
        self.cpu.services["mxcsr_shown"] = self.side_effects.mxcsr_shown
        self._mmio = MmioCompletion(settings.memory, self.page)
        self._answer: Callable[[], Any] | None = None
        self._answer_rip = 0
        self._pending_ud: int | None = None
        self._asked = False
        """Somebody wants the loop to look up before the next instruction."""
        self._end: Any = None
        """What :meth:`run` shall return then, if anything; :class:`Intr` if ``_stopping``."""
        self._stopping = False
        self.external: External | None = None
        """The way of external interrupts, if the machine has them."""
        self._trapped = self._bind_trapped()
        self._entry = engine.entry

    # -- what the user calls ----------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> Any:
        """Run the guest until there is something for the caller: an :class:`~sandbox.exits.Exit`,
        or whatever a handler's ``Exit`` verdict holds.

        ``timeout`` in seconds ends in :class:`~sandbox.exits.Intr`. To answer an ``Io`` or
        ``Mmio`` read, set its data and call again. Raises :class:`~sandbox.errors.HandlerError`
        for a broken handler, KeyboardInterrupt on Ctrl-C.
        """
        self._check()
        self.thread = threading.get_ident()
        self.deadline = None if timeout is None else time.monotonic() + timeout
        WATCHDOG.add(self)
        try:
            return self._run()
        except events.TripleFault:
            return self._deliver_exit(Shutdown())
        except HandlerTimeout:  # it came just after the handler had returned
            return self._deliver_exit(Intr())
        finally:
            WATCHDOG.remove(self)
            self.thread = 0
            self._asked, self._stopping, self._end = False, False, None
            self.engine.sync()
            self.stats.by_mnemonic = self._sites.counts()
            self.stats.lowered_sites, self.stats.lowered = map(dict, self.engine.lowered())

    def request_stop(self) -> None:
        """Make :meth:`run` (or the next) return :class:`~sandbox.exits.Intr`; from any thread."""
        self._stopping = self._asked = True
        self.engine.stop()

    def finish(self, left: Any) -> None:
        """Make :meth:`run` return ``left`` before the next instruction; for devices."""
        self._end, self._asked = left, True

    @property
    def finishing(self) -> bool:
        """Whether :meth:`run` is about to return because it was asked to."""
        return self._stopping or self._end is not None

    def attend(self) -> None:
        """Look for interrupts before the next instruction."""
        self._asked = True

    def kick(self) -> None:
        """The same from another thread, while the engine may be running."""
        self._asked = True
        self.engine.stop()

    def interrupt(self) -> None:
        """Called by the watchdog: see whether the deadline has passed."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self._stopping = self._asked = True
        self.engine.stop()

    def instruction(self) -> Insn:
        """The instruction at RIP, undefined if the bytes are none; may raise :class:`Fault`."""
        return self._sites.instruction(self.registers.rip)

    def invalidate(self) -> None:
        """The policy or the handlers changed: forget what was bound."""
        self._sites.invalidate()

    # -- the loop -----------------------------------------------------------------------------

    def _check(self) -> None:
        settings = self._settings
        if self.closed:
            raise SandboxError("this Vm is closed: its vCPU cannot run any more")
        if self.thread:
            raise SandboxError("this vCPU is running already, here or in another thread")
        if settings.handlers and not settings.exit_on_emulation_failure:
            raise SandboxError(
                "handlers are installed, but KVM_CAP_EXIT_ON_EMULATION_FAILURE is off: call "
                "vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE) first"
            )

    def _run(self) -> Any:
        self._trapped = self._bind_trapped()
        left = self._complete()
        if left is None and self._asked:
            left = self._look_up()
        external = self.external
        self._entry = entry = self.engine.entry if external is None else Entry.of(external.enter)
        enter, trap, trapped = entry.enter, entry.trapped, self._trapped
        clock = time.perf_counter
        slow, stops, weight, untimed = 0.0, 0, 1, range(0)
        start = clock()
        try:
            while left is None:
                code = enter()
                middle = clock()
                left = trapped() if code == trap else self._stopped(code)
                slow += (clock() - middle) * weight
                stops += 1
                if stops == TIMED:
                    weight, untimed = SAMPLE, range(SAMPLE - 1)
                for _ in untimed:
                    if left is not None:
                        break
                    code = enter()
                    left = trapped() if code == trap else self._stopped(code)
        finally:
            self.stats.fast_seconds += clock() - start - slow
            self.stats.fallback_seconds += slow
        return left

    def _look_up(self) -> Any:
        """Somebody asked: for the end of the run, or for a look at the interrupts."""
        self._asked = False  # first: what comes now is not lost
        left = Intr() if self._stopping and self._end is None else self._end
        if left is not None:
            self._asked = True
        return self._deliver_exit(left) if isinstance(left, Exit) else left

    def _complete(self) -> Any:
        """Finish what the last exit left open; an exit if that leads to the next one at once."""
        answer, self._answer = self._answer, None
        if answer is not None:
            if self._answer_rip == self.registers.rip:
                return answer()
            self._mmio.abandon()  # the caller went elsewhere: nobody waits for the answer
        write = self._mmio.next_write()
        if write is not None:
            return self._deliver_exit(write)
        if self._pending_ud is not None:
            at, self._pending_ud = self._pending_ud, None
            if at == self.registers.rip:  # the caller did not move on: it gets the #UD
                return self._inject(Fault(UD))
        return None

    def _bind_trapped(self) -> Callable[[], Any]:
        """Compile the handling of trapped instructions: what it needs is looked up once a run."""
        engine, look = self.engine, self._sites.look
        rip_view, sites = self.registers.rip_view, self._sites.by_rip
        flags_view, stepping = self.registers.rflags_view, TF
        not_trapped, traps_ahead = self._sites.not_trapped, self._sites.traps_ahead
        run_bytes, stats, memory = self.page.bytes, self.stats, self._settings.memory
        span, plain = EXIT_SPAN, self.on_trap is None and self.max_exits is None

        def trapped() -> Any:
            """Handle the instruction at RIP, and those after it as long as they are trapped."""
            first = True
            rip = rip_view[0]
            while True:
                site = sites.get(rip)
                if (
                    site is None
                    or site.generation != engine.generation
                    or site.host[site.span] != site.raw
                ):
                    if not first:
                        return None  # other bytes, perhaps allowed ones: the engine decides
                    try:
                        site = look(rip)
                    except Fault as fault:
                        return self._inject(fault)
                    except MmioRead:
                        return self._fetch_failure()
                run_bytes[span] = site.page
                stats.fallback_count += 1
                if plain and not flags_view[0] & stepping:
                    try:
                        verdict = site.run()
                    except BaseException as error:  # noqa: BLE001 - sorted out, or raised again
                        left = self._failed(site, error)
                        rip = rip_view[0]
                    else:
                        site.tally.count += 1
                        if verdict is None and not memory.mmio_used:
                            if rip_view[0] == rip:
                                rip = rip_view[0] = site.behind
                            else:  # the handler moved it
                                rip = rip_view[0] = (rip_view[0] + site.length) & site.rip_mask
                            left = None
                        else:
                            left = self._done(site, verdict)
                            rip = rip_view[0]
                else:
                    left = self._watched_step(site, rip)
                    rip = rip_view[0]
                if left is not None:
                    return left
                if self._asked and (flags_view[0] & IF or self.finishing):
                    return self._look_up()
                if rip in not_trapped:
                    return None
                first = rip not in sites
                if first and not traps_ahead(rip):
                    return None

        return trapped

    def _step(self, site: Site) -> Any:
        """Run one instruction in the tier; what :meth:`run` returns, or None to go on."""
        try:
            verdict = site.run()
        except BaseException as error:  # noqa: BLE001 - sorted out, or raised again
            return self._failed(site, error)
        site.tally.count += 1
        return self._done(site, verdict)

    def _done(self, site: Site, verdict: Verdict | None) -> Any:
        """An instruction came to a verdict."""
        if verdict is None:
            self._advance(site)
            left = None
        else:
            left = self._verdict(site, verdict)
        return self._mmio_done(left) if self._settings.memory.mmio_used else left

    def _failed(self, site: Site, error: BaseException) -> Any:
        """An instruction raised: a fault of the guest, a wish of ours, or a bug of a handler."""
        if isinstance(error, Fault):
            return self._inject(error)
        if isinstance(error, MmioRead):
            return self._mmio_read(error)
        handlers, insn = site.handlers, site.insn
        if isinstance(error, HandlerTimeout):
            raise timeout_error(handlers, insn) from error
        if isinstance(error, (SandboxError, events.TripleFault)) or not isinstance(
            error, (Exception, SystemExit)
        ):
            raise error
        raise handler_error(handlers, insn, error) from error

    def _advance(self, site: Site) -> None:
        rip = self.registers.rip_view
        rip[0] = (rip[0] + site.length) & site.rip_mask

    def _verdict(self, site: Site, verdict: Verdict) -> Any:
        if isinstance(verdict, Resume):
            if verdict.rip is not None:
                self.registers.rip = verdict.rip
            else:
                self._advance(site)
            return None
        if isinstance(verdict, Inject):
            return self._inject(Fault(verdict.vector, verdict.error_code))
        if isinstance(verdict, Decline):
            return self._unhandled(site)
        if not isinstance(verdict, ExitVerdict):
            wrong = TypeError(f"it returned {verdict!r}, which is no verdict")
            raise handler_error(site.handlers, site.insn, wrong)
        return self._exit_verdict(verdict)

    def _exit_verdict(self, verdict: ExitVerdict) -> Any:
        left = verdict.exit
        if left is None:
            return self._failure()
        if self._waits(left):
            return None
        if isinstance(left, Io) and left.is_in:
            self._await(lambda: self._io_answer(left))
        return self._deliver_exit(left) if isinstance(left, Exit) else left

    def _await(self, answer: Callable[[], Any]) -> None:
        """Call ``answer`` at the next entry, if RIP is still where it is now."""
        self._answer, self._answer_rip = answer, self.registers.rip

    def _exits_left(self) -> Any:
        assert self.max_exits is not None
        if self.stats.fallback_count >= self.max_exits:
            return self._deliver_exit(Intr())
        return None

    def _stopped(self, code: int) -> Any:
        """Anything but a trap and nothing else."""
        stop = self._entry.classify(code)
        if stop is None:
            return None
        if stop is Stop.INSN:
            self.engine.sync()
            return self._trapped()
        if stop is Stop.ASKED:
            self.engine.tick()
            return self._look_up() if self._asked else None
        if stop is Stop.EXIT:
            return self._engine_exit()
        self.engine.sync()
        if stop is Stop.EXCEPTION:
            engine = self.engine
            address = self.registers.bank.read("cr2") if engine.vector == PF_ else None
            error = engine.error_code if engine.vector in ERROR_CODE_VECTORS else None
            return self._inject(self._corrected(Fault(engine.vector, error, address)))
        if stop is Stop.MMIO:
            return self._emulate()
        return self._fetch_failure()

    def _corrected(self, fault: Fault) -> Fault:
        """What the fast path raised, with the details that a processor reports."""
        try:
            return corrected(self.cpu, self.instruction(), fault)
        except (Fault, MmioRead):  # the fetch itself faulted
            return fault

    # -- emulation failures -----------------------------------------------------------------------

    def _unhandled(self, site: Site) -> Any:
        """Nobody took the instruction: the capability's table, or the policy's word."""
        settings = self._settings
        if settings.policy.unhandled == "skip" and site.insn.code:
            self._advance(site)
            return None
        if not settings.handlers:
            return self._raw_failure()
        if settings.policy.unhandled == "inject" and events.can_deliver(self.cpu):
            return self._inject(Fault(UD))
        return self._failure()

    def _raw_failure(self) -> Any:
        """As the kernel without a handler tier: see the table of ``handle_emulation_failure``."""
        if self._settings.exit_on_emulation_failure:
            return self._failure()
        if self.cpu.cpl:
            return self._inject(Fault(UD))
        self._pending_ud = self.registers.rip
        return self._failure()

    def _failure(self) -> Exit:
        left = self.engine.failure()
        if left is None:
            left = EmulationFailure.of(self._sites.fetched(self.registers.rip))
        return self._deliver_exit(left)

    def _fetch_failure(self) -> Any:
        """RIP is in no slot: an emulation failure without bytes."""
        settings = self._settings
        if not settings.exit_on_emulation_failure and self.cpu.cpl:
            return self._inject(Fault(UD))
        return self._deliver_exit(self.engine.failure() or EmulationFailure.of(None))

    def _engine_exit(self) -> Any:
        """An exit of the engine's own: a device answers it, or the caller."""
        left = self.engine.left
        assert left is not None
        if self._waits(left):
            return None
        if answer(left, self._settings.ports, self._settings.memory):
            left.complete(self.page)
            return self._look_up() if self._asked else None
        self._await(lambda: left.complete(self.page))
        return left

    def _waits(self, left: Any) -> bool:
        """Whether the guest halted until an interrupt comes; it does so at the next entry."""
        return isinstance(left, Hlt) and self.external is not None and self.external.halt()

    def _deliver_exit(self, left: Exit) -> Exit:
        left.to_run(self.page)
        return left

    # -- events -------------------------------------------------------------------------------

    def _inject(self, fault: Fault) -> Any:
        """Deliver an exception; a guest without a usable IDT leaves it to the caller."""
        if fault.address is not None:
            self.registers.bank.write("cr2", fault.address)
        if not events.can_deliver(self.cpu, fault.vector):
            return self._deliver_exit(GuestException(fault.vector, fault.error_code or 0))
        events.deliver(
            self.cpu,
            self.engine.system_memory,
            fault.vector,
            fault.error_code,
            address=fault.address,
        )
        return None

    def _io_answer(self, left: Io) -> Any:
        left.complete(self.page)
        offset = self.page.run.io.data_offset
        self._sites.intercepts.io_reply = bytes(
            self.page.bytes[offset : offset + left.size * left.count]
        )
        return self._trapped()

    # -- MMIO ---------------------------------------------------------------------------------

    def _emulate(self) -> Any:
        """The instruction at RIP touches memory that is in no slot: emulate it, as KVM does."""
        try:
            site = self._sites.look_mmio(self.registers.rip)
        except Fault as fault:
            return self._inject(fault)
        except MmioRead:
            return self._fetch_failure()
        return self._step(site)

    def _mmio_read(self, wanted: MmioRead) -> Exit:
        left = self._mmio.ask(wanted)
        self._await(lambda: self._mmio_answer(left, wanted))
        return self._deliver_exit(left)

    def _mmio_answer(self, left: Mmio, wanted: MmioRead) -> Any:
        if not self._mmio.answer(left, wanted):
            return self._mmio_read(wanted)
        trapped = self.registers.rip in self._sites.by_rip
        return self._trapped() if trapped else self._emulate()

    def _mmio_done(self, left: Any) -> Any:
        self._mmio.finish()
        if left is None:
            write = self._mmio.next_write()
            return None if write is None else self._deliver_exit(write)
        return left

    # -- for people -----------------------------------------------------------------------------

    def _watched_step(self, site: Site, rip: int) -> Any:
        """:meth:`_step` for a caller who counts or traces, or a guest that steps itself by TF."""
        stepping = self.registers.rflags_view[0] & TF
        start = time.perf_counter()
        left = self._step(site)
        if stepping and left is None:
            left = self._single_step(site)
        if self.on_trap is not None:
            self.on_trap(self._record(site, rip, time.perf_counter() - start))
        if left is None and self.max_exits is not None:
            return self._exits_left()
        return left

    def _single_step(self, site: Site) -> Any:
        """#DB after an instruction that began with TF set; an event that came instead clears TF."""
        if not self.registers.rflags_view[0] & TF and not site.insn.mnemonic.startswith(_POP_FLAGS):
            return None
        bank = self.registers.bank
        bank.write("dr6", bank.read("dr6") | DR6_BS)
        return self._inject(Fault(DB))

    def _record(self, site: Site, rip: int, seconds: float) -> TraceRecord:
        insn, handlers = site.insn, site.handlers
        intercepted = self._settings.intercepted[insn.code] and insn.code
        reason = "intercept" if intercepted else "emulation_failure"
        name = handlers[0].name if handlers else "-"
        return TraceRecord(rip, insn.raw, insn.text(rip), reason, name, seconds)
