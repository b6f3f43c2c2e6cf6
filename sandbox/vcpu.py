"""One virtual CPU: the loop between the engine, the handler tier and the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sandbox import abi, events
from sandbox.cpu import ERROR_CODE_VECTORS, PF_, UD, Cpu, Fault
from sandbox.decode import MAX_LENGTH, Insn
from sandbox.engine.protocol import Engine, Stop
from sandbox.errors import SandboxError
from sandbox.exits import (
    EmulationFailure,
    Exit,
    GuestException,
    Intr,
    Io,
    Mmio,
    RunPage,
    Shutdown,
    emulation_failure_page,
)
from sandbox.fallback import Bound, HandlerTimeout, Tier, handler_error, timeout_error
from sandbox.fetch import insn_fetch_size
from sandbox.handler import Action, Decline, Inject, Resume, Verdict
from sandbox.handler import Exit as ExitVerdict
from sandbox.intercepts import Intercepts
from sandbox.memory import PAGE_SIZE, MmioRead
from sandbox.registers import CS
from sandbox.settings import Settings
from sandbox.watchdog import WATCHDOG

MMIO_BYTES = 8
"""The most that one KVM_EXIT_MMIO carries."""


@dataclass(slots=True)
class Stats:
    """Where the time went. Seconds by ``time.perf_counter``."""

    fast_seconds: float = 0.0
    fallback_seconds: float = 0.0
    fallback_count: int = 0
    by_mnemonic: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One trapped instruction, for people: what it was, who took it, how long that took."""

    rip: int
    raw: bytes
    text: str
    reason: str
    handler: str
    seconds: float


class _Site:
    """A trapped instruction at an address, found once and looked at again only if it changed."""

    __slots__ = ("at", "bound", "end", "generation", "host", "length", "page", "raw", "run")

    def __init__(self, bound: Bound, page: bytes) -> None:
        self.bound = bound
        self.run: Action = bound.run
        self.length = bound.insn.length
        self.raw = bound.insn.raw
        self.page = page
        self.host: Any = b""
        self.at = self.end = 0
        self.generation = -1


class Vcpu:
    """Made by :meth:`sandbox.vm.Vm.create_vcpu`. ``cpu`` is what handlers see of it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.registers = engine.registers
        self.cpu = Cpu(engine.registers, engine.memory)
        self.cpu.services["system_memory"] = engine.system_memory
        self.page = RunPage()
        self.stats = Stats()
        self.on_trap: Callable[[TraceRecord], None] | None = None
        """Called after each trapped instruction."""
        self.max_exits: int | None = None
        """How many trapped instructions :meth:`run` may see in all before it comes back."""
        self.deadline: float | None = None
        self.thread = 0
        self._settings = settings
        self._intercepts = Intercepts(self.cpu, settings.ports)
        self._kernel = Tier(self.cpu, settings.kernel)
        self._emulator = Tier(self.cpu, settings.emulator)
        self._tier = Tier(self.cpu, settings.handlers)
        self._sites: dict[int, _Site] = {}
        self._answer: Callable[[], Any] | None = None
        self._mmio_queue: list[Mmio] = []
        self._mmio_parts: list[bytes] = []
        self._pending_ud: int | None = None
        self._asked = False

    # -- what the user calls ----------------------------------------------------------------------

    def run(self, timeout: float | None = None) -> Any:
        """Run the guest until there is something for the caller: an :class:`~sandbox.exits.Exit`,
        or whatever a handler's ``Exit`` verdict holds.

        ``timeout`` in seconds ends in :class:`~sandbox.exits.Intr`. To answer an ``Io`` or
        ``Mmio`` read, set its data and call again. Raises :class:`~sandbox.errors.HandlerError`
        for a broken handler, KeyboardInterrupt on Ctrl-C.
        """
        self._check_capability()
        self._asked = False
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
            self._count()

    def request_stop(self) -> None:
        """Make :meth:`run` return :class:`~sandbox.exits.Intr` soon; from any thread."""
        self._asked = True
        self.engine.stop()

    def interrupt(self) -> None:
        """Called by the watchdog: see whether the deadline has passed."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self._asked = True
        self.engine.stop()

    def instruction(self) -> Insn:
        """The instruction at RIP (undefined if the bytes are none). May raise :class:`Fault`."""
        data, _here, _fault = self._fetch(self.registers.rip)
        bitness = self.cpu.bitness
        return self._tier.decode(data, bitness) or Insn.undefined(data, bitness)

    def invalidate(self) -> None:
        """The policy or the handlers changed: forget what was bound."""
        self._sites.clear()
        self._kernel = Tier(self.cpu, self._settings.kernel, self._kernel.tallies)
        self._emulator = Tier(self.cpu, self._settings.emulator, self._emulator.tallies)
        self._tier = Tier(self.cpu, self._settings.handlers, self._tier.tallies)

    # -- the loop -----------------------------------------------------------------------------

    def _check_capability(self) -> None:
        settings = self._settings
        if settings.handlers.packs and not settings.exit_on_emulation_failure:
            raise SandboxError(
                "handlers are installed, but KVM_CAP_EXIT_ON_EMULATION_FAILURE is off: call "
                "vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE) first"
            )

    def _run(self) -> Any:
        left = self._complete()
        enter, clock, stats = self.engine.enter, time.perf_counter, self.stats
        start = clock()
        while left is None:
            stop = enter()
            middle = clock()
            stats.fast_seconds += middle - start
            left = self._trapped() if stop is Stop.INSN else self._stopped(stop)
            start = clock()
            stats.fallback_seconds += start - middle
        return left

    def _complete(self) -> Any:
        """Finish what the last exit left open; an exit if that leads to the next one at once."""
        answer, self._answer = self._answer, None
        if answer is not None:
            return answer()
        if self._mmio_queue:
            return self._deliver_exit(self._mmio_queue.pop(0))
        if self._pending_ud is not None:
            at, self._pending_ud = self._pending_ud, None
            if at == self.registers.rip:  # the caller did not move on: it gets the #UD
                return self._inject(Fault(UD))
        return None

    def _trapped(self) -> Any:
        """Handle the instruction at RIP, and those after it as long as they are trapped too."""
        self.engine.sync()
        rip_view, sites, engine = self.registers.rip_view, self._sites, self.engine
        run_bytes = self.page.bytes
        while True:
            rip = rip_view[0]
            site = sites.get(rip)
            if (
                site is None
                or site.generation != engine.generation
                or site.host[site.at : site.end] != site.raw
            ):
                try:
                    site = self._look(rip)
                except Fault as fault:
                    return self._inject(fault)
                except MmioRead:
                    return self._fetch_failure()
            run_bytes[8:12] = _INTERNAL_ERROR
            run_bytes[32 : 32 + len(site.page)] = site.page
            self.stats.fallback_count += 1
            left = self._step(site) if self.on_trap is None else self._traced_step(site, rip)
            if left is not None:
                return left
            if rip_view[0] not in sites or self._asked:
                return None

    def _step(self, site: _Site) -> Any:
        """Run one instruction in the tier; what :meth:`run` returns, or None to go on."""
        try:
            verdict = site.run()
        except Fault as fault:
            left = self._inject(fault)
        except MmioRead as wanted:
            left = self._mmio_read(wanted)
        except (SandboxError, events.TripleFault):
            raise
        except Exception as error:
            raise handler_error(site.bound.handlers, site.bound.insn, error) from error
        except HandlerTimeout as error:
            raise timeout_error(site.bound.handlers, site.bound.insn) from error
        else:
            site.bound.tally.count += 1
            if verdict is None:
                rip = self.registers.rip_view
                rip[0] = (rip[0] + site.length) & site.bound.rip_mask
                left = None
            else:
                left = self._verdict(site, verdict)
            memory = self._settings.memory
            if memory.mmio_replies or memory.mmio_writes:
                left = self._mmio_done(left)
        if left is None and self.max_exits is not None:
            left = self._exits_left()
        return left

    def _verdict(self, site: _Site, verdict: Verdict) -> Any:
        if isinstance(verdict, Resume):
            if verdict.rip is not None:
                self.registers.rip = verdict.rip
            else:
                self.registers.rip = (self.registers.rip + site.length) & site.bound.rip_mask
            return None
        if isinstance(verdict, Inject):
            return self._inject(Fault(verdict.vector, verdict.error_code))
        if isinstance(verdict, Decline):
            return self._unhandled(site)
        return self._exit_verdict(site, verdict)

    def _exit_verdict(self, site: _Site, verdict: ExitVerdict) -> Any:
        left = verdict.exit
        if left is None:
            return self._failure(site)
        if isinstance(left, Io) and left.is_in:
            self._answer = lambda: self._io_answer(left)
        return self._deliver_exit(left) if isinstance(left, Exit) else left

    def _exits_left(self) -> Any:
        assert self.max_exits is not None
        if self.stats.fallback_count >= self.max_exits:
            return self._deliver_exit(Intr())
        return None

    def _stopped(self, stop: Stop) -> Any:
        """Anything but a trapped instruction."""
        if stop is Stop.ASKED:
            self.engine.tick()
            return self._deliver_exit(Intr()) if self._asked else None
        self.engine.sync()
        if stop is Stop.EXCEPTION:
            engine = self.engine
            address = self.registers.bank.read("cr2") if engine.vector == PF_ else None
            code = engine.error_code if engine.vector in ERROR_CODE_VECTORS else None
            return self._inject(Fault(engine.vector, code, address))
        if stop is Stop.MMIO:
            return self._emulate()
        return self._fetch_failure()

    # -- finding the instruction ----------------------------------------------------------------

    def _fetch(self, rip: int) -> tuple[bytes, int, Fault | None]:
        """Up to 15 bytes at RIP, how many of them are in RIP's page, the fault that cut them."""
        bitness = self.cpu.bitness
        linear = rip
        if bitness != 64:
            linear = (self.registers.bank.segment_base(CS) + rip) & 0xFFFF_FFFF
        here = min(MAX_LENGTH, PAGE_SIZE - linear % PAGE_SIZE)
        data = self.cpu.fetch(linear, here)
        try:
            with suppress(MmioRead):
                data += self.cpu.fetch(linear + here, MAX_LENGTH - here)
        except Fault as fault:
            return data, here, fault
        return data, here, None

    def _look(self, rip: int) -> _Site:
        """The site at RIP, new or looked at again. Raises the :class:`Fault` of a bad fetch."""
        data, here, fault = self._fetch(rip)
        bitness = self.cpu.bitness
        insn = self._tier.decode(data, bitness)
        if insn is None:
            if fault is not None:
                raise fault
            insn = Insn.undefined(data, bitness)
        site = self._sites.get(rip)
        if site is None or site.raw != insn.raw or site.bound.insn.bitness != bitness:
            size = insn_fetch_size(data, here, bitness)
            site = _Site(self._bind(insn), emulation_failure_page(data[:size]))
            self._sites[rip] = site
        if insn.length <= here:
            linear = rip
            if bitness != 64:
                linear = (self.registers.bank.segment_base(CS) + rip) & 0xFFFF_FFFF
            slot, page = self.engine.memory.code_page(linear)
            site.host, site.at = slot.host, page + linear % PAGE_SIZE
            site.end = site.at + site.length
            site.generation = self.engine.generation
        return site

    def _bind(self, insn: Insn) -> Bound:
        """Who takes ``insn``: the user's handlers, or the machine if it intercepts it."""
        bound = self._tier.bind(insn)
        if bound.handlers or not self._settings.intercepted[insn.code] or not insn.code:
            return bound
        action = self._intercepts.bind(insn)
        if action is None:
            return self._kernel.bind(insn)
        return replace(bound, run=action)

    # -- emulation failures -----------------------------------------------------------------------

    def _unhandled(self, site: _Site) -> Any:
        """Nobody took the instruction: the capability's table, or the policy's word."""
        settings = self._settings
        if not settings.handlers.packs:
            return self._raw_failure(site)
        if settings.policy.unhandled == "skip" and site.bound.insn.code:
            self.registers.rip = (self.registers.rip + site.length) & site.bound.rip_mask
            return None
        if settings.policy.unhandled == "inject" and events.can_deliver(self.cpu):
            return self._inject(Fault(UD))
        return self._failure(site)

    def _raw_failure(self, site: _Site) -> Any:
        """As the kernel without a handler tier: see the table of ``handle_emulation_failure``."""
        if self._settings.exit_on_emulation_failure:
            return self._failure(site)
        if self.cpu.cpl:
            return self._inject(Fault(UD))
        self._pending_ud = self.registers.rip
        return self._failure(site)

    def _failure(self, site: _Site) -> Exit:
        data, here, _fault = self._fetch(self.registers.rip)
        size = insn_fetch_size(data, here, site.bound.insn.bitness)
        return self._deliver_exit(EmulationFailure.of(data[:size]))

    def _fetch_failure(self) -> Any:
        """RIP is in no slot: an emulation failure without bytes."""
        settings = self._settings
        if not settings.exit_on_emulation_failure and self.cpu.cpl:
            return self._inject(Fault(UD))
        return self._deliver_exit(EmulationFailure.of(None))

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

    # -- MMIO ---------------------------------------------------------------------------------

    def _emulate(self) -> Any:
        """The instruction at RIP touches memory that is in no slot: emulate it, as KVM does."""
        rip = self.registers.rip
        try:
            data, here, _fault = self._fetch(rip)
        except Fault as fault:
            return self._inject(fault)
        insn = self._tier.decode(data, self.cpu.bitness)
        if insn is None:
            insn = Insn.undefined(data, self.cpu.bitness)
        bound = self._emulator.bind(insn)
        if not bound.handlers:
            bound = self._bind(insn)
        size = insn_fetch_size(data, here, insn.bitness)
        return self._step(_Site(bound, emulation_failure_page(data[:size])))

    def _mmio_read(self, wanted: MmioRead) -> Exit:
        """Ask the caller for the next up to 8 bytes of a read."""
        done = sum(map(len, self._mmio_parts))
        size = min(MMIO_BYTES, wanted.size - done)
        left = Mmio(wanted.address + done, size, False)
        self._answer = lambda: self._mmio_answer(left, wanted)
        return self._deliver_exit(left)

    def _mmio_answer(self, left: Mmio, wanted: MmioRead) -> Any:
        left.complete(self.page)
        self._mmio_parts.append(bytes(self.page.run.mmio.data)[: left.len])
        whole = b"".join(self._mmio_parts)
        if len(whole) < wanted.size:
            return self._mmio_read(wanted)
        self._mmio_parts.clear()
        self._settings.memory.mmio_replies[wanted.address, wanted.size] = whole
        return self._trapped() if self.registers.rip in self._sites else self._emulate()

    def _mmio_done(self, left: Any) -> Any:
        """The instruction is through: its reads are answered, its writes become exits."""
        memory = self._settings.memory
        memory.mmio_replies.clear()
        for address, data in memory.mmio_writes:
            for at in range(0, len(data), MMIO_BYTES):
                part = data[at : at + MMIO_BYTES]
                self._mmio_queue.append(Mmio(address + at, len(part), True, part))
        memory.mmio_writes.clear()
        if left is None and self._mmio_queue:
            return self._deliver_exit(self._mmio_queue.pop(0))
        return left

    def _io_answer(self, left: Io) -> Any:
        left.complete(self.page)
        offset = self.page.run.io.data_offset
        self._intercepts.io_reply = bytes(self.page.bytes[offset : offset + left.size])
        return self._trapped()

    # -- for people -----------------------------------------------------------------------------

    def _traced_step(self, site: _Site, rip: int) -> Any:
        start = time.perf_counter()
        left = self._step(site)
        seconds = time.perf_counter() - start
        insn, handlers = site.bound.insn, site.bound.handlers
        reason = "intercept" if self._settings.intercepted[insn.code] else "emulation_failure"
        name = handlers[0].name if handlers else "-"
        assert self.on_trap is not None
        self.on_trap(TraceRecord(rip, insn.raw, insn.text(rip), reason, name, seconds))
        return left

    def _count(self) -> None:
        """Bring ``stats.by_mnemonic`` up to date."""
        for tier in (self._kernel, self._emulator, self._tier):
            for name, tally in tier.tallies.items():
                if tally.count:
                    self.stats.by_mnemonic[name] = tally.count


_INTERNAL_ERROR = abi.KVM_EXIT_INTERNAL_ERROR.to_bytes(4, "little")
