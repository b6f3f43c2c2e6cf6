"""The kernel's own interrupt controllers and timer: two 8259s, an IO APIC, the local APIC and an
i8254 (api.rst, KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2 and KVM_IRQ_LINE).

With them, HLT waits inside the kernel and is no exit.
"""

from __future__ import annotations

from typing import Final

from sandbox.engine import kvm_abi
from sandbox.engine.kvm_device import KvmFile
from sandbox.errors import EngineError

LINES: Final = 24
"""Those of the IO APIC; the first 16 lead to the 8259s as well."""
_NEEDED: Final = {
    kvm_abi.KVM_CAP_IRQCHIP: "an interrupt controller",
    kvm_abi.KVM_CAP_PIT2: "KVM_CREATE_PIT2",
}


class Irqchip:
    """Made for a VM that has no vCPU yet."""

    def __init__(self, vm: KvmFile) -> None:
        for cap, what in _NEEDED.items():
            if not vm.has(cap):
                raise EngineError(f"this kernel's KVM lacks {what} (capability {cap})")
        vm.call("KVM_CREATE_IRQCHIP", kvm_abi.KVM_CREATE_IRQCHIP)
        config = bytearray(kvm_abi.PIT_CONFIG_BYTES)
        config[0] = kvm_abi.KVM_PIT_SPEAKER_DUMMY  # port 61h too: gate and output of channel 2
        vm.exchange("KVM_CREATE_PIT2", kvm_abi.KVM_CREATE_PIT2, config)
        self._vm = vm

    def set_line(self, line: int, level: int) -> None:
        """Raise or lower an input; from any thread, also while the guest runs."""
        if not 0 <= line < LINES:
            raise EngineError(f"interrupt line {line}: there are 0 to {LINES - 1}")
        buffer = bytearray(kvm_abi.IRQ_LEVEL.pack(line, int(bool(level))))
        self._vm.exchange("KVM_IRQ_LINE", kvm_abi.KVM_IRQ_LINE, buffer)
