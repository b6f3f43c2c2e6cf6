"""The real thing: guest code under Linux KVM, behind the same protocol as Unicorn.

What runs natively is the processor's and the kernel's choice, not the policy's: only what KVM's own
emulator gives up on comes back as :attr:`Stop.INSN`. Everything else that ends KVM_RUN is handed
out as the exit that stands in ``kvm_run``.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import ClassVar, Final

from sandbox import abi
from sandbox.cpuid import FEATURE_BITS, CpuidModel
from sandbox.decode import Insn
from sandbox.engine import kvm_abi
from sandbox.engine.kvm_device import (
    KvmFile,
    create_vcpu,
    create_vm,
    open_device,
    run_vcpu,
    supported_cpuid,
)
from sandbox.engine.kvm_irqchip import Irqchip
from sandbox.engine.kvm_state import KvmBank
from sandbox.engine.kvm_trampoline import Trampoline
from sandbox.engine.protocol import Entry, Stop
from sandbox.errors import EngineError
from sandbox.exits import EmulationFailure, Exit, Hlt, RunPage, read_exit
from sandbox.lowering import Lowering
from sandbox.memory import PhysicalMemory, Slot
from sandbox.paging import CR0_PG, AddressSpace, PagedMemory, Walker

KICK: Final = signal.SIGRTMIN + 4
"""Sent to the thread that runs a guest to bring it out of KVM_RUN; its handler does nothing."""

_COMPLETED: Final = frozenset(
    {abi.KVM_EXIT_IO, abi.KVM_EXIT_MMIO, abi.KVM_EXIT_HYPERCALL, abi.KVM_EXIT_X86_RDMSR,
     abi.KVM_EXIT_X86_WRMSR}
)  # fmt: skip
"""Exits that the kernel finishes when it is entered again (api.rst, section 5)."""
_FAULTS: Final = frozenset({errno.EFAULT, 133})  # 133 is EHWPOISON
_RIP: Final = 16


def _ignore(_name: str, _value: int) -> None: ...


def _kicked(_number: int, _frame: FrameType | None) -> None: ...


class KvmEngine:
    """A VM of the kernel's with one vCPU. ``cpuid`` gives what the guest is to be told, when it
    first runs; ``irqchip``: the kernel has the interrupt controllers. Create it in the main thread,
    where Python can set a signal handler."""

    share_registers: ClassVar[bool] = True
    """Whether to have the kernel leave registers in ``kvm_run`` if it can (KVM_CAP_SYNC_REGS). Not
    doing so is for measuring what it saves."""

    def __init__(
        self, physical: PhysicalMemory, cpuid: Callable[[], CpuidModel], *, irqchip: bool = False
    ) -> None:
        _catch_kicks()
        self._physical = physical
        self._model: Callable[[], CpuidModel] | None = cpuid
        device = open_device()
        self._vm: KvmFile | None = None
        self._vcpu: KvmFile | None = None
        try:
            self.supported = supported_cpuid(device)
            self._vm = create_vm(device)
            self.irqchip = Irqchip(self._vm) if irqchip else None
            self._vcpu, shared = create_vcpu(device, self._vm)
            self.page = RunPage(shared)
            synced = self.share_registers and device.has(abi.KVM_CAP_SYNC_REGS) & 3 == 3
            self._bank = KvmBank(self._vcpu, self.page, synced, self.supported)
            self._bank.start()
            self._bank.registers.gpr[2] = 0  # RDX tells the processor's model after reset: ours
            self._slots: dict[int, int] = {}
            for slot in physical.slots:
                self._map(slot)
        except EngineError:
            self.close()
            raise
        finally:
            device.close()
        physical.on_slot.append(self._map)
        physical.on_unslot.append(self._unmap)
        self.registers = self._bank.registers
        walker = Walker(self._bank, physical)
        self.memory = PagedMemory(walker, physical)
        self.system_memory = PagedMemory(walker, physical, implicit=True)
        self.on_float_control: Callable[[str, int], None] = _ignore
        """Never called: the processor has all of MXCSR and the x87 control word."""
        self._trusted_root: int | None = None
        self.vector = self.error_code = self.generation = 0
        self.left: Exit | None = None
        self.trampoline: Trampoline | None = None
        self._kicked = False
        """Whether the thread in KVM_RUN was sent a signal."""
        self._left_rip = 0
        self._pending = False
        self._bank.on_control = self._flush
        self._controlled = b""
        self._untrusted = self._tables_changed = False
        self._thread = 0
        """The thread inside KVM_RUN, or 0."""

    @property
    def bank(self) -> KvmBank:
        return self._bank

    # -- memory -------------------------------------------------------------------------------

    def _map(self, slot: Slot) -> None:
        number = next(n for n in range(len(self._slots) + 1) if n not in self._slots.values())
        self._set_region(slot, number, slot.size)
        self._slots[slot.base] = number

    def _unmap(self, slot: Slot) -> None:
        self._set_region(slot, self._slots.pop(slot.base), 0)
        self._flush()

    def _set_region(self, slot: Slot, number: int, size: int) -> None:
        assert self._vm is not None
        if slot.readonly and not self._vm.has(kvm_abi.KVM_CAP_READONLY_MEM):
            raise EngineError("this kernel's KVM has no read-only memory (capability 81)")
        flags = abi.KVM_MEM_READONLY if slot.readonly else 0
        region = abi.kvm_userspace_memory_region(number, flags, slot.base, size, slot.address)
        name = f"KVM_SET_USER_MEMORY_REGION for the slot at {slot.base:#x}"
        self._vm.exchange(name, abi.KVM_SET_USER_MEMORY_REGION, bytearray(region))

    def _remap_tables(self) -> None:
        self._tables_changed = False
        slot = self._physical.find(self._bank.read("cr3"))
        if slot is not None:
            number = self._slots[slot.base]
            self._set_region(slot, number, 0)
            self._set_region(slot, number, slot.size)

    # -- running ------------------------------------------------------------------------------

    @property
    def entry(self) -> Entry:
        return Entry.of(self.enter)

    def enter(self) -> Stop:
        if self._model is not None:
            model, self._model = self._model, None
            self._set_cpuid(model())
        if self._tables_changed:
            self._remap_tables()
        self._bank.push_xcr0()
        if self._pending:
            stop = self._complete()
            if stop is not None:
                return stop
        self._bank.push()
        while True:
            stop = self._classify(self._run())
            if stop is not None:
                return stop

    def _run(self) -> int:
        """KVM_RUN; its errno, or 0."""
        assert self._vcpu is not None
        self._kicked = False
        self._thread = threading.get_ident()
        try:
            return run_vcpu(self._vcpu.descriptor)
        finally:  # Ctrl-C comes out of the call too
            self._thread = 0
            self._bank.pull()

    def _classify(self, error: int) -> Stop | None:
        """What the end of KVM_RUN means; None: go on."""
        run = self.page.run
        if error == errno.EINTR:
            run.immediate_exit, self._pending = 0, False
            return Stop.ASKED
        if error == errno.EAGAIN:
            return None
        reason = run.exit_reason
        if error and not (error in _FAULTS and reason == abi.KVM_EXIT_MEMORY_FAULT):
            hint = ": the kernel refuses the registers" if error == errno.EINVAL else ""
            where = f"at {self.registers.rip:#x}"
            raise EngineError(f"KVM_RUN {where}: {os.strerror(error)}{hint}")
        self._pending = reason in _COMPLETED
        self.left = read_exit(self.page)
        self._left_rip = self.registers.rip
        if isinstance(self.left, EmulationFailure):
            return Stop.INSN
        if self.trampoline is not None and isinstance(self.left, Hlt):
            ended = self.trampoline.leave(self._bank)
            if ended is not None:
                stop, self.vector, self.error_code = ended
                return stop
        return Stop.EXIT

    def _complete(self) -> Stop | None:
        """Registers were written while the kernel waits for an answer: have it finish the exit
        first, and come back at once. What was written stands; if RIP is among it, all registers
        stay as they are now: then nobody waits for the answer.
        """
        changes = self._bank.changes()
        if not changes:
            return None
        abandoned = _RIP in changes
        if abandoned:
            changes = dict(enumerate(self._bank.general))
        run = self.page.run
        run.immediate_exit, run.kvm_dirty_regs = 1, 0
        while (error := self._run()) == 0 and abandoned:
            pass  # one more part of the same access
        self._bank.apply(changes)
        stop = self._classify(error)
        return None if stop is Stop.ASKED else stop

    def failure(self) -> Exit | None:
        """What the kernel said about the instruction at RIP, debug words included."""
        left = self.left
        if isinstance(left, EmulationFailure) and self._left_rip == self.registers.rip:
            return left
        return None

    def stop(self) -> None:
        self.page.run.immediate_exit = 1
        thread = self._thread
        if thread and not self._kicked:  # one is enough, and a flood of them would hold it up
            self._kicked = True
            with suppress(BlockingIOError):  # so many are on their way that no more can be queued
                signal.pthread_kill(thread, KICK)

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: the guest takes this external interrupt when it is entered next."""
        assert self._vcpu is not None
        number = bytearray(vector.to_bytes(4, "little"))
        self._vcpu.exchange("KVM_INTERRUPT", kvm_abi.KVM_INTERRUPT, number)

    def run_user_code(self, space: AddressSpace) -> None:
        """What runs from now on is a program at CPL 3 in ``space``, without a kernel: SYSCALL is
        an instruction for the handler tier, and exceptions come out."""
        if self.irqchip is not None:
            raise EngineError(
                "a program without a kernel leaves by HLT, which irqchip='kernel' keeps inside: "
                "make the Vm without it"
            )
        self.trampoline = Trampoline(self._physical, space)
        self.trampoline.install(self._bank)

    def set_exit_on_failure(self, on: bool) -> None:
        assert self._vm is not None
        cap = abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE
        if not self._vm.has(cap):
            raise EngineError(
                f"this kernel's KVM lacks KVM_CAP_EXIT_ON_EMULATION_FAILURE ({cap}): Linux 5.14"
            )
        request = abi.kvm_enable_cap(cap)
        request.args[0] = int(on)
        self._vm.exchange("KVM_ENABLE_CAP", abi.KVM_ENABLE_CAP, bytearray(request))

    # -- CPUID --------------------------------------------------------------------------------

    def offers(self, feature: str) -> bool:
        """Whether the kernel can give ``feature`` (iced-x86's name) to the guest."""
        where = FEATURE_BITS.get(feature)
        return where is None or self.supported.bit(*where)

    def _set_cpuid(self, model: CpuidModel) -> None:
        """Tell the guest what the model says, but for what the processor itself goes by."""
        assert self._vcpu is not None
        leaves = model.leaves()
        for (leaf, subleaf), words in self.supported.leaves.items():
            if leaf == 0xD and (leaf, subleaf) in leaves:
                leaves[leaf, subleaf] = words  # the area as XSAVE lays it out here
        if (0xD, 0) in leaves:
            eax, *sizes = leaves[0xD, 0]
            self._bank.xcr0_allowed = eax & model.xcr0_mask
            leaves[0xD, 0] = (self._bank.xcr0_allowed, sizes[0], sizes[1], 0)
        if (0x80000008, 0) in self.supported.leaves:
            sizes_leaf = self.supported.leaves[0x80000008, 0]
            leaves[0x80000008, 0] = (sizes_leaf[0], 0, 0, 0)
        head, entry = kvm_abi.CPUID_HEAD, kvm_abi.CPUID_ENTRY
        buffer = bytearray(head.pack(len(leaves), 0))
        for (leaf, subleaf), words in sorted(leaves.items()):
            indexed = model.is_indexed(leaf)
            flags = kvm_abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX if indexed else 0
            buffer += entry.pack(leaf, subleaf, flags, *words)
        self._vcpu.exchange("KVM_SET_CPUID2", kvm_abi.KVM_SET_CPUID2, buffer)

        def shown(leaf: int, subleaf: int, register: int, bit: int) -> bool:
            words = leaves.get((leaf, subleaf), (0, 0, 0, 0))
            return bool(words[register] >> bit & 1) and self.supported.bit(
                leaf, subleaf, register, bit
            )

        self._bank.allow_cr4(shown)

    # -- what only the engine of the policy does ------------------------------------------------

    def set_traps(
        self,
        traps: bytes,
        traps_insn: Callable[[Insn], bool] | None = None,
        lowered: Callable[[Insn], Lowering | None] | None = None,
        *,
        count: bool = False,
    ) -> None:
        """Nothing: KVM has no allowlist."""

    def lowered(self) -> tuple[Counter[str], Counter[str]]:
        return Counter(), Counter()

    def trust(self, space: AddressSpace) -> None:
        self._trusted_root = space.root

    def traps(self, insn: Insn) -> bool:
        return False

    def lowers(self, insn: Insn) -> bool:
        return False

    def tick(self) -> None:
        """Nothing to do."""

    def flush_translations(self) -> None:
        """The kernel does not see us write to page tables that it may have shadowed: taking their
        slot away and giving it back makes it forget them."""
        self._flush()
        self._tables_changed = True

    def sync(self) -> None:
        self._bank.pull_extended()
        state = self._bank.control_state()
        if self._untrusted or state != self._controlled:
            self._controlled = state
            paged = self._bank.read("cr0") & CR0_PG
            self._untrusted = bool(paged) and self._bank.read("cr3") != self._trusted_root
            self._flush()

    def _flush(self) -> None:
        self.generation += 1
        self.memory.flush()
        self.system_memory.flush()

    def close(self) -> None:
        """Give VM and vCPU back to the kernel."""
        if self._map in self._physical.on_slot:
            self._physical.on_slot.remove(self._map)
            self._physical.on_unslot.remove(self._unmap)
        for file in (self._vcpu, self._vm):
            if file is not None:
                file.close()


def _catch_kicks() -> None:
    """A signal that is caught interrupts KVM_RUN; one that is ignored does not."""
    if signal.getsignal(KICK) is _kicked:
        return
    if threading.current_thread() is not threading.main_thread():
        raise EngineError("create the first vCPU of the engine kvm in the main thread")
    signal.signal(KICK, _kicked)
