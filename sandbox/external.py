"""External interrupts: when the guest takes them, and what happens until then.

An interrupt waits until RFLAGS.IF is set and the instruction behind STI or a load of SS is through
(SDM Vol. 3, 6.8.1 and 6.8.3). How it gets into the guest is the engine's affair: with Unicorn the
machine delivers it itself, between two entries; Linux KVM does it (``engine/kvm_interrupts.py``).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final, Protocol

from sandbox import events
from sandbox.cpu import DB, SHADOW, Cpu
from sandbox.engine.protocol import Engine, Stop
from sandbox.engine.unicorn import UnicornEngine
from sandbox.exits import Hlt
from sandbox.registers import IF, TF

_INHIBIT_IRQ: Final = 1 << 3
"""In QEMU's hflags: the block that ran last ended in a load of SS or STI."""
_RING_AGAIN: Final = 0.001
_SLICE: Final = 20_000_000
"""Nanoseconds that a halted vCPU sleeps before it looks whether somebody wants it to stop."""


class Clock(Protocol):
    """Nanoseconds; ``sleep`` lets them pass while the guest is halted."""

    def now(self) -> int: ...
    def sleep(self, duration: int) -> None: ...


class InterruptSource(Protocol):
    """A machine's interrupt controllers and timers."""

    cr8: int
    """The task priority, which the guest may also change through CR8."""

    @property
    def clock(self) -> Clock: ...

    def pending(self) -> bool:
        """Whether there is an interrupt for the processor now."""
        ...

    def acknowledge(self) -> int:
        """The processor takes the pending interrupt: its vector."""
        ...

    def deadline(self) -> int | None:
        """The time of the clock at which a timer may raise an interrupt."""
        ...


class Alarm:
    """Calls ``ring`` from a thread of its own when it is time, and again until it is set anew:
    whoever was not listening at the first time hears it then."""

    def __init__(self, clock: Clock, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._changed = threading.Condition()
        self._at: int | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def set(self, at: int | None) -> None:
        """Ring at this time of the clock, or never."""
        if at == self._at:
            return
        with self._changed:
            sooner = at is not None and (self._at is None or at < self._at)
            self._at = at
            if at is not None and self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="alarm", daemon=True)
                self._thread.start()
            elif sooner:
                self._changed.notify()

    def close(self) -> None:
        """End the thread; ``ring`` is not called any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        with self._changed:
            while not self._closed:
                if self._at is None:
                    self._changed.wait()
                    continue
                left = self._at - self._clock.now()
                if left > 0:
                    self._changed.wait(left / 1e9)
                else:
                    self._ring()
                    self._changed.wait(_RING_AGAIN)


class Waiting(Protocol):
    """What the vCPU offers: ``attend`` makes it come here before the next instruction."""

    @property
    def finishing(self) -> bool: ...
    def attend(self) -> None: ...
    def kick(self) -> None: ...


class External(ABC):
    """The way of interrupts into one vCPU; :meth:`enter` takes the place of the engine's."""

    def __init__(self, source: InterruptSource, engine: Engine, vcpu: Waiting) -> None:
        self._source = source
        self._engine = engine
        self._vcpu = vcpu
        self._alarm = Alarm(source.clock, vcpu.kick)
        self._halted = False
        self._agreed = 0

    @property
    @abstractmethod
    def _cr8(self) -> int:
        """CR8 as the guest has it."""

    @_cr8.setter
    @abstractmethod
    def _cr8(self, value: int) -> None: ...

    @abstractmethod
    def enter(self) -> Stop:
        """As :meth:`Engine.enter`, with the interrupts that are due."""

    def halt(self) -> bool:
        """HLT: whether there is something to wait for. The next :meth:`enter` waits."""
        self._engine.sync()
        if not self._engine.registers.rflags & IF:
            return False
        self._halted = self._source.pending() or self._source.deadline() is not None
        if self._halted:
            self._vcpu.attend()
        return self._halted

    def close(self) -> None:
        self._alarm.close()

    def _wait(self) -> Stop | None:
        """Sleep until an interrupt is pending. A stop: it was asked for, or none can come."""
        source, clock = self._source, self._source.clock
        while not source.pending():
            if self._vcpu.finishing:
                return Stop.ASKED
            at = source.deadline()
            if at is None:
                self._halted = False
                left = self._engine.left = Hlt()
                left.to_run(self._engine.page)
                return Stop.EXIT
            clock.sleep(max(0, min(at - clock.now(), _SLICE)))
        self._halted = False
        return None

    def changed(self) -> None:
        """The guest wrote to CR8 or to an interrupt controller: look before the next instruction.

        The task priority is in both.
        """
        self._agree()
        self._vcpu.attend()

    def _agree(self) -> None:
        source, shown = self._source, self._cr8
        if shown != self._agreed:
            source.cr8 = shown
        elif source.cr8 != shown:
            self._cr8 = source.cr8
        self._agreed = source.cr8

    def _watch(self, pending: bool) -> None:
        """See to it that the vCPU comes back in time for the next interrupt."""
        if pending:
            self._vcpu.attend()
        self._alarm.set(None if pending else self._source.deadline())


class DeliveredInterrupts(External):
    """The machine delivers: for an engine that stops between any two instructions.

    What may set IF (STI, POPF, IRET) has to be trapped, so that this looks as soon as it is set.
    """

    def __init__(
        self, source: InterruptSource, engine: UnicornEngine, vcpu: Waiting, cpu: Cpu
    ) -> None:
        super().__init__(source, engine, vcpu)
        self._cpu = cpu
        cpu.services["task_priority_changed"] = self.changed
        self._hflags = engine.bank.words, engine.bank.hflags_index

    def enter(self) -> Stop:
        if self._halted and (stop := self._wait()) is not None:
            return stop
        source, cpu = self._source, self._cpu
        single = False
        while pending := source.pending():
            self._engine.sync()
            if not cpu.rflags & IF:
                break
            if single := cpu.services.get(SHADOW) == cpu.rip:
                break
            memory = self._engine.system_memory
            events.deliver(cpu, memory, source.acknowledge(), external=True)
        self._watch(pending)
        stop = self._step() if single else self._engine.enter()
        words, index = self._hflags
        if words[index] & _INHIBIT_IRQ:
            cpu.services[SHADOW] = cpu.rip
        elif stop is not Stop.ASKED or cpu.services.get(SHADOW) != cpu.rip:
            cpu.services[SHADOW] = None  # else it may have been stopped before it ran anything
        return stop

    @property
    def _cr8(self) -> int:
        return self._cpu.registers.bank.read("cr8")

    @_cr8.setter
    def _cr8(self, value: int) -> None:
        self._cpu.registers.bank.write("cr8", value)

    def _step(self) -> Stop:
        """Run the one instruction that interrupts have to wait for."""
        bank, engine = self._cpu.registers.bank, self._engine
        flags, status = bank.read("rflags"), bank.read("dr6")
        bank.write("rflags", flags | TF)
        stop = engine.enter()
        bank.write("rflags", bank.read("rflags") & ~TF | flags & TF)
        if stop is Stop.EXCEPTION and engine.vector == DB and not flags & TF:
            bank.write("dr6", status)
            self._cpu.services[SHADOW] = None
            return Stop.ASKED
        return stop
