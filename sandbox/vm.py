"""A virtual machine: memory, policy, capabilities, handlers, one vCPU."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from sandbox import abi
from sandbox.cpuid import CpuidModel, Leaf, features
from sandbox.engine.protocol import Engine
from sandbox.engine.unicorn import UnicornEngine
from sandbox.errors import EngineError, KvmError, MemoryMapError, SandboxError
from sandbox.external import DeliveredInterrupts, External, InterruptSource
from sandbox.fallback import HandlerTable
from sandbox.handler import Pack
from sandbox.intercepts import intercepted_forms
from sandbox.memory import Device, DeviceRange, Slot
from sandbox.packs import find_pack, load_pack
from sandbox.policy import Policy
from sandbox.settings import Settings
from sandbox.vcpu import Vcpu

DEFAULT_POLICY = "verified"
ENGINES = ("unicorn", "kvm")
DEFAULT_ENGINE = "unicorn"
KERNEL_PACKS = ("system",)
EMULATOR_PACKS = ("integer", "mmx", "x87", "avx2", "system")


class Vm:
    """A VM with at most one vCPU.

    ``policy`` is a preset's name, a file or a :class:`~sandbox.policy.Policy`; ``handlers`` are
    packs by name, file (``.py``) or as :class:`~sandbox.handler.Pack`, asked in this order. The
    handler tier works while ``KVM_CAP_EXIT_ON_EMULATION_FAILURE`` is enabled (it is off at first,
    as in KVM). ``irqchip="kernel"``, under the engine ``kvm``: the guest has the kernel's interrupt
    controllers and timer, and its HLT is no exit.

    A Vm is a context manager: :meth:`close` frees the engine.
    """

    def __init__(
        self,
        policy: str | Path | Policy = DEFAULT_POLICY,
        handlers: Iterable[str | Path | Pack] = (),
        *,
        engine: str = DEFAULT_ENGINE,
        irqchip: str | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise EngineError(f"engine {engine!r}: there are {' and '.join(ENGINES)}")
        if irqchip is not None and (engine, irqchip) != ("kvm", "kernel"):
            raise EngineError(
                f"irqchip {irqchip!r} under the engine {engine}: there is 'kernel', under kvm"
            )
        self.engine_name = engine
        self.irqchip = irqchip
        """``kernel`` if the interrupt controllers are the kernel's."""
        self._offers: Callable[[str], bool] | None = None
        """Which features the processor has, where the engine runs on a real one."""
        self._settings = Settings(policy if isinstance(policy, Policy) else Policy.load(policy))
        self.memory = self._settings.memory
        """Guest physical memory."""
        self.vcpu: Vcpu | None = None
        self._engine: Engine | None = None
        self._xcr0_wanted = 0
        for table, names in (
            (self._settings.kernel, KERNEL_PACKS),
            (self._settings.emulator, EMULATOR_PACKS),
        ):
            for name in names:
                _install(table, name)
        for source in handlers:
            _install(self._settings.handlers, source)
        for table in (self._settings.kernel, self._settings.handlers):
            table.on_load = self._light_xcr0

    # -- KVM's interface ----------------------------------------------------------------------

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where the capability is unknown."""
        return 1 if cap in _CAPABILITIES else 0

    def enable_cap(self, cap: int, arg: int = 1, flags: int = 0) -> None:
        """KVM_ENABLE_CAP on the VM; at any time, toggles both ways at once.

        Raises :class:`~sandbox.errors.KvmError` with EINVAL as the kernel does: an unknown
        capability, flags, or an argument with bits other than 0.
        """
        if cap != abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE:
            raise KvmError(errno.EINVAL, f"capability {cap} cannot be enabled on this VM")
        if flags:
            raise KvmError(errno.EINVAL, f"KVM_ENABLE_CAP: flags must be 0, not {flags:#x}")
        if arg & ~1:
            raise KvmError(
                errno.EINVAL,
                f"KVM_CAP_EXIT_ON_EMULATION_FAILURE: the argument must be 0 or 1, not {arg:#x}",
            )
        if self._engine is not None:
            self._engine.set_exit_on_failure(bool(arg))
        self._settings.exit_on_emulation_failure = bool(arg)

    def create_vcpu(self) -> Vcpu:
        """The VM's vCPU, in the state after reset: real mode, all else as SDM table 9-1."""
        if self.vcpu is not None:
            raise KvmError(errno.EEXIST, "this VM has its vCPU already; make another Vm")
        self._engine = self._make_engine()
        self._engine.set_exit_on_failure(self._settings.exit_on_emulation_failure)
        self.vcpu = Vcpu(self._engine, self._settings)
        self.vcpu.cpu.services["x87_shown"] = self.vcpu.side_effects.x87_shown
        self._apply()
        return self.vcpu

    def _make_engine(self) -> Engine:
        if self.engine_name == "unicorn":
            return UnicornEngine(self.memory)
        from sandbox.engine.kvm import KvmEngine  # not needed, and not imported, for Unicorn

        if self.irqchip is not None:
            self._settings.interruptible = True  # so that CPUID shows the local APIC
        engine = KvmEngine(self.memory, self.cpuid_model, irqchip=self.irqchip is not None)
        self._offers = engine.offers
        return engine

    # -- memory and devices ---------------------------------------------------------------------

    def add_memory(self, base: int, size: int, *, readonly: bool = False) -> Slot:
        """RAM (or ROM) at guest physical ``base``; both multiples of 4096."""
        return self.memory.add_slot(base, size, readonly=readonly)

    def add_mmio(self, base: int, size: int, device: Device) -> DeviceRange:
        """A device that answers for a range of guest physical memory."""
        return self.memory.add_device(base, size, device)

    def add_ports(self, base: int, count: int, device: Device) -> DeviceRange:
        """A device that answers for ``count`` IO ports from ``base`` on."""
        if count <= 0 or base < 0 or base + count > 1 << 16:
            raise MemoryMapError(f"IO ports {base:#x}+{count}: want 1 or more within 0..0xffff")
        for other in self._settings.ports.ranges:
            if base < other.end and other.base < base + count:
                raise MemoryMapError(
                    f"IO ports {base:#x}..{base + count - 1:#x} overlap "
                    f"{other.base:#x}..{other.end - 1:#x}"
                )
        found = DeviceRange(base, count, device)
        self._settings.ports.ranges.append(found)
        return found

    def float_ports(self, device: Device) -> None:
        """Let ``device`` answer for all IO ports that have no other."""
        self._settings.ports.others = DeviceRange(0, 1 << 16, device)

    def attach_interrupts(self, source: InterruptSource) -> Callable[[], None]:
        """Have the vCPU take external interrupts from ``source``.

        To be called whenever the guest has written to a device that may raise one.
        """
        if self.vcpu is None or self._engine is None:
            raise SandboxError("this VM has no vCPU yet: call create_vcpu()")
        if self.irqchip is not None:
            raise SandboxError("irqchip='kernel': this VM has its interrupt controllers already")
        self._settings.interruptible = True
        external = self.vcpu.external = self._external(source, self._engine, self.vcpu)
        self._apply()
        return external.changed

    def _external(self, source: InterruptSource, engine: Engine, vcpu: Vcpu) -> External:
        if isinstance(engine, UnicornEngine):
            self._settings.intercepted = intercepted_forms(interruptible=True)
            _install(self._settings.kernel, "integer")  # STI and POPF, for whoever has no handlers
            return DeliveredInterrupts(source, engine, vcpu, vcpu.cpu)
        from sandbox.engine.kvm import KvmEngine
        from sandbox.engine.kvm_interrupts import KvmInterrupts

        assert isinstance(engine, KvmEngine)
        return KvmInterrupts(source, engine, vcpu)

    def set_irq_line(self, line: int, level: int) -> None:
        """KVM_IRQ_LINE: raise or lower an input (0 to 23) of the kernel's interrupt controllers.

        Only with ``irqchip="kernel"``; from any thread.
        """
        if self.irqchip is None:
            raise SandboxError("set_irq_line: make the Vm with engine='kvm', irqchip='kernel'")
        chip = self.engine.irqchip  # type: ignore[attr-defined]
        chip.set_line(line, level)

    # -- policy and handlers --------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """What the fast path may run; may be replaced at any time while the vCPU does not run."""
        return self._settings.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._settings.policy = policy
        self._apply()

    def install(self, source: str | Path | Pack) -> None:
        """Install a handler pack after those that are there."""
        _install(self._settings.handlers, source)
        self._apply()

    def runs_form(self, code: int) -> bool:
        """Whether the fast path or a handler runs a form (an iced-x86 ``Code``)."""
        settings = self._settings
        if settings.intercepted[code]:
            return settings.kernel.takes(code) or settings.handlers.takes(code)
        return bool(settings.policy.allowed[code]) or settings.handlers.takes(code)

    @property
    def engine(self) -> Engine:
        """The fast path of the vCPU."""
        if self._engine is None:
            raise SandboxError("this VM has no vCPU yet: call create_vcpu()")
        return self._engine

    @property
    def settings(self) -> Settings:
        return self._settings

    def _apply(self) -> None:
        """Bring the engine and the vCPU in line with policy and handlers."""
        if self._engine is None or self.vcpu is None:
            return
        self.vcpu.side_effects.apply()
        self.vcpu.invalidate()
        self.vcpu.cpu.services["cpuid"] = self._first_cpuid

    def _first_cpuid(self, leaf: int, subleaf: int) -> Leaf:
        """CPUID until it is first asked for: the answer hangs on all handlers there are."""
        assert self.vcpu is not None
        cpuid = self.cpuid_model().bind(self.vcpu.cpu)
        self.vcpu.cpu.services["cpuid"] = cpuid
        return cpuid(leaf, subleaf)

    def cpuid_model(self) -> CpuidModel:
        """What the guest is told it has: what the fast path and the handlers run right, and where
        the fast path is a real processor, no more than that has."""
        found = features(self.runs_form)
        offered = found if self._offers is None else filter(self._offers, found)
        return CpuidModel(offered, apic=self._settings.interruptible)

    def enable_xstate(self, components: int) -> None:
        """Have the guest start with these bits of XCR0 set, as far as CPUID offers them.

        They are set when the handlers are loaded, which is before anything can see them.
        """
        self._xcr0_wanted = components
        if self._settings.handlers.loaded and self._settings.kernel.loaded:
            self._light_xcr0()

    def _light_xcr0(self) -> None:
        if self._xcr0_wanted and self.vcpu is not None:
            wanted, self._xcr0_wanted = self._xcr0_wanted, 0
            model = CpuidModel(features(self.runs_form))  # of the handler tier, not the processor
            self.vcpu.registers.xcr0 = wanted & model.xcr0_mask

    def close(self) -> None:
        """Free the engine; registers keep their values.

        Raises :class:`~sandbox.errors.SandboxError` while the vCPU runs.
        """
        if self.vcpu is not None:
            if self.vcpu.thread:
                raise SandboxError("the vCPU is running: stop it before its Vm is closed")
            self.vcpu.closed = True
        if self.vcpu is not None and self.vcpu.external is not None:
            self.vcpu.external.close()
        if self._engine is not None:
            self._engine.close()
        if self.vcpu is not None:
            self.vcpu.cpu.gpr = self.vcpu.registers.gpr  # no longer the engine's memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _install(table: HandlerTable, source: str | Path | Pack) -> None:
    later = find_pack(source)
    if later is not None:
        table.defer(later)
    else:
        table.add(load_pack(source))


_CAPABILITIES = frozenset(
    {
        abi.KVM_CAP_USER_MEMORY,
        abi.KVM_CAP_INTERNAL_ERROR_DATA,
        abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    }
)
