"""External interrupts where Linux KVM runs the guest and the interrupt controllers are ours.

Source: api.rst, KVM_INTERRUPT and the fields ``request_interrupt_window``,
``ready_for_interrupt_injection`` and ``cr8`` of ``kvm_run``. The kernel knows when the guest can
take an interrupt, and leaves it as soon as that is so if asked to.
"""

from __future__ import annotations

from sandbox import abi
from sandbox.engine.kvm import KvmEngine
from sandbox.engine.protocol import Stop
from sandbox.external import External, InterruptSource, Waiting
from sandbox.registers import IF

_OWN = frozenset({abi.KVM_EXIT_IRQ_WINDOW_OPEN, abi.KVM_EXIT_SET_TPR})
"""Exits that are meant for us: the window is open, the guest has lowered CR8."""

_LOOK_AGAIN = 1_000_000
"""Nanoseconds."""


class KvmInterrupts(External):
    """Hands one interrupt after the other to the kernel."""

    def __init__(self, source: InterruptSource, engine: KvmEngine, vcpu: Waiting) -> None:
        super().__init__(source, engine, vcpu)
        self._kvm = engine
        self._run = engine.page.run

    def enter(self) -> Stop:
        if self._halted and (stop := self._wait()) is not None:
            return stop
        source, run = self._source, self._run
        while True:
            pending = source.pending()
            if pending and self._is_ready():
                self._kvm.interrupt(source.acknowledge())
                run.ready_for_interrupt_injection = 0  # until the kernel says so again
                pending = source.pending()
            run.request_interrupt_window = int(pending)
            self._watch(pending)
            if pending:  # not all kernels see the window open while they emulate (kvm_pvm at CPL 0)
                self._alarm.set(self._source.clock.now() + _LOOK_AGAIN)
            stop = self._kvm.enter()
            self._agree()  # before a device looks
            if stop is not Stop.EXIT or run.exit_reason not in _OWN:
                return stop

    @property
    def _cr8(self) -> int:
        return int(self._run.cr8)

    @_cr8.setter
    def _cr8(self, value: int) -> None:
        self._run.cr8 = value

    def _is_ready(self) -> bool:
        """Whether the guest takes an interrupt at once; what we wrote to RFLAGS counts as well."""
        flags = self._kvm.registers.rflags
        return bool(self._run.ready_for_interrupt_injection) and bool(flags & IF)
