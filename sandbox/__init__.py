"""x86 sandbox in two tiers under KVM's emulation-failure contract.

The names that programs need, imported when first used, so that ``import sandbox`` costs nothing.
What handlers are written with is in :mod:`sandbox.handler`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE
    from sandbox.boot import Machine, boot_flat
    from sandbox.cpu import Cpu, Fault
    from sandbox.decode import Insn
    from sandbox.errors import (
        EngineError,
        GuestImageError,
        HandlerError,
        HandlerTimeoutError,
        KvmError,
        MemoryMapError,
        PolicyError,
        SandboxError,
    )
    from sandbox.exits import (
        EmulationFailure,
        GuestException,
        Hlt,
        InternalError,
        Intr,
        Io,
        Mmio,
        Shutdown,
    )
    from sandbox.handler import Pack
    from sandbox.policy import Policy
    from sandbox.process import boot_process
    from sandbox.vcpu import Vcpu
    from sandbox.vm import Vm

_NAMES = {
    "abi": "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
    "boot": "Machine boot_flat",
    "cpu": "Cpu Fault",
    "decode": "Insn",
    "errors": "EngineError GuestImageError HandlerError HandlerTimeoutError KvmError "
    "MemoryMapError PolicyError SandboxError",
    "exits": "EmulationFailure GuestException Hlt InternalError Intr Io Mmio Shutdown",
    "handler": "Pack",
    "policy": "Policy",
    "process": "boot_process",
    "vcpu": "Vcpu",
    "vm": "Vm",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "KVM_CAP_EXIT_ON_EMULATION_FAILURE",
    "Cpu",
    "EmulationFailure",
    "EngineError",
    "Fault",
    "GuestException",
    "GuestImageError",
    "HandlerError",
    "HandlerTimeoutError",
    "Hlt",
    "Insn",
    "InternalError",
    "Intr",
    "Io",
    "KvmError",
    "Machine",
    "MemoryMapError",
    "Mmio",
    "Pack",
    "Policy",
    "PolicyError",
    "SandboxError",
    "Shutdown",
    "Vcpu",
    "Vm",
    "boot_flat",
    "boot_process",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'sandbox' has no attribute {name!r}")
        value = getattr(import_module(f"sandbox.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
