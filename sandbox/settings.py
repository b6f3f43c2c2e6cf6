"""What all vCPUs of one VM share and the VM may change at run time."""

from __future__ import annotations

from dataclasses import dataclass, field

from sandbox.fallback import HandlerTable
from sandbox.intercepts import Ports, intercepted_forms
from sandbox.memory import PhysicalMemory
from sandbox.policy import Policy


@dataclass(slots=True)
class Settings:
    """Policy, capability, memory and the three sets of handlers."""

    policy: Policy
    memory: PhysicalMemory = field(default_factory=PhysicalMemory)
    ports: Ports = field(default_factory=Ports)
    exit_on_emulation_failure: bool = False
    handlers: HandlerTable = field(default_factory=HandlerTable)
    """The user's: the handler tier."""
    kernel: HandlerTable = field(default_factory=HandlerTable)
    """For intercepted instructions, when the tier does not take them."""
    emulator: HandlerTable = field(default_factory=HandlerTable)
    """For instructions that touch MMIO: what KVM's own emulator would do."""
    intercepted: bytes = field(default_factory=intercepted_forms)
    count_lowered: bool = False
    """Whether executions of lowered instructions are counted, at a cost."""
    interruptible: bool = False
    """Whether the machine has interrupt controllers."""

    @property
    def intercepted_codes(self) -> tuple[int, ...]:
        """The forms (iced-x86 ``Code``) that the machine takes itself."""
        return tuple(code for code, is_one in enumerate(self.intercepted) if is_one)
