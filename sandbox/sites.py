"""Trapped instructions by address: fetched, decoded and bound once, looked at again if changed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sandbox import abi
from sandbox.cpu import Cpu, Fault
from sandbox.decode import MAX_LENGTH, Insn
from sandbox.engine.protocol import Engine
from sandbox.exits import emulation_failure_page
from sandbox.fallback import Bound, Tier
from sandbox.fetch import insn_fetch_size
from sandbox.handler import Action
from sandbox.intercepts import Intercepts
from sandbox.kernel_emulator import mmio_forms
from sandbox.memory import PAGE_SIZE, MmioRead
from sandbox.registers import CS
from sandbox.settings import Settings

_EXIT_HEAD = abi.KVM_EXIT_INTERNAL_ERROR.to_bytes(4, "little") + bytes(abi.UNION_OFFSET - 12)
EXIT_SPAN = slice(8, abi.UNION_OFFSET + len(emulation_failure_page(b"\x90")))
"""Where an emulation failure with bytes stands in ``kvm_run``, from ``exit_reason`` on."""


class Site:
    """A trapped instruction at an address, found once and looked at again only if it changed."""

    __slots__ = (
        "behind",
        "generation",
        "handlers",
        "host",
        "insn",
        "length",
        "page",
        "raw",
        "rip_mask",
        "run",
        "span",
        "tally",
    )

    def __init__(self, bound: Bound, fetched: bytes, rip: int) -> None:
        self.insn = bound.insn
        self.run: Action = bound.run
        self.handlers = bound.handlers
        self.tally = bound.tally
        self.length = bound.insn.length
        self.raw = bound.insn.raw
        self.rip_mask = bound.rip_mask
        self.behind = (rip + self.length) & self.rip_mask
        self.page = _EXIT_HEAD + emulation_failure_page(fetched)
        self.host: Any = b""
        self.span = slice(0)
        self.generation = -1


class Sites:
    """The sites of one vCPU, and who takes the instructions there.

    ``by_rip`` holds every trapped instruction met so far; whether one is still as it was, the
    caller sees by its ``generation`` and bytes, and calls :meth:`look` if not.
    """

    def __init__(self, cpu: Cpu, engine: Engine, settings: Settings) -> None:
        self.by_rip: dict[int, Site] = {}
        self.not_trapped: set[int] = set()
        """Addresses behind a trapped instruction at which the engine goes on: a hint only."""
        self.intercepts = Intercepts(cpu, settings.ports)
        self._cpu = cpu
        self._engine = engine
        self._settings = settings
        self._kernel = Tier(cpu, settings.kernel)
        self._emulator = Tier(cpu, settings.emulator)
        self._tier = Tier(cpu, settings.handlers)

    def invalidate(self) -> None:
        """The policy or the handlers changed: forget what was bound."""
        cpu, settings = self._cpu, self._settings
        self.by_rip.clear()
        self.not_trapped.clear()
        self._kernel = Tier(cpu, settings.kernel, self._kernel.tallies)
        self._emulator = Tier(cpu, settings.emulator, self._emulator.tallies)
        self._tier = Tier(cpu, settings.handlers, self._tier.tallies)

    def counts(self) -> dict[str, int]:
        """How often each mnemonic was emulated."""
        found: dict[str, int] = {}
        for tier in (self._kernel, self._emulator, self._tier):
            for name, tally in tier.tallies.items():
                if tally.count:
                    found[name] = found.get(name, 0) + tally.count
        return found

    def _linear(self, rip: int) -> int:
        if self._cpu.bitness == 64:
            return rip
        return (self._cpu.registers.bank.segment_base(CS) + rip) & 0xFFFF_FFFF

    def fetch(self, rip: int) -> tuple[bytes, int, Fault | None]:
        """Up to 15 bytes at RIP, how many of them are in RIP's page, the fault that cut them.

        Raises :class:`Fault` or :class:`MmioRead` if not even the first byte can be fetched.
        """
        linear = self._linear(rip)
        here = min(MAX_LENGTH, PAGE_SIZE - linear % PAGE_SIZE)
        data = self._cpu.fetch(linear, here)
        try:
            with suppress(MmioRead):
                data += self._cpu.fetch(linear + here, MAX_LENGTH - here)
        except Fault as fault:
            return data, here, fault
        return data, here, None

    def fetched(self, rip: int) -> bytes:
        """The bytes that an emulation failure at RIP reports."""
        data, here, _fault = self.fetch(rip)
        return data[: insn_fetch_size(data, here, self._cpu.bitness)]

    def instruction(self, rip: int) -> Insn:
        """The instruction at RIP, undefined if the bytes are none; raises as :meth:`fetch`."""
        data, _here, fault = self.fetch(rip)
        bitness = self._cpu.bitness
        insn = self._tier.decode(data, bitness)
        if insn is None and fault is not None:
            raise fault
        return insn or Insn.undefined(data, bitness)

    def look(self, rip: int) -> Site:
        """The site at RIP, new or looked at again; raises as :meth:`fetch`."""
        insn = self.instruction(rip)
        site = self.by_rip.get(rip)
        if site is None or site.raw != insn.raw or site.insn.bitness != insn.bitness:
            site = Site(self._bind(insn), self.fetched(rip), rip)
            self.by_rip[rip] = site
            self.not_trapped.discard(rip)
        linear = self._linear(rip)
        if linear % PAGE_SIZE + insn.length <= PAGE_SIZE:
            slot, page = self._engine.memory.code_page(linear)
            at = page + linear % PAGE_SIZE
            site.host, site.span = slot.host, slice(at, at + site.length)
            site.generation = self._engine.generation
        return site

    def traps_ahead(self, rip: int) -> bool:
        """Whether the engine need not be entered at RIP, because it would only trap there.

        To find that out by entering it costs two translations of the block.
        """
        try:
            insn = self.instruction(rip)
        except (Fault, MmioRead):
            return False
        if insn.code and self._engine.traps(insn) and not self._engine.lowers(insn):
            return True
        self.not_trapped.add(rip)
        return False

    def look_mmio(self, rip: int) -> Site:
        """The instruction at RIP for an access to MMIO: the machine's own emulator comes first,
        with what KVM's takes."""
        insn = self.instruction(rip)
        bound = self._emulator.bind(insn) if insn.code in mmio_forms() else None
        if bound is None or not bound.handlers:
            bound = self._bind(insn)
        return Site(bound, self.fetched(rip), rip)

    def _bind(self, insn: Insn) -> Bound:
        """Who takes ``insn``: the user's handlers, or the machine if it intercepts it."""
        settings = self._settings
        action = self.intercepts.bind(insn)
        if action is not None and not settings.handlers.find_loaded(insn):
            return self._kernel.bound(insn, action)
        bound = self._tier.bind(insn)
        if bound.handlers or not settings.intercepted[insn.code] or not insn.code:
            return bound
        return self._kernel.bind(insn)
