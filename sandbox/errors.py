"""Errors a user of the sandbox can meet. Every message says what, where and what to do."""

from __future__ import annotations


class SandboxError(Exception):
    """Base of all errors that the sandbox reports to its user: one clear line."""


class GuestImageError(SandboxError):
    """A guest image (ELF, raw, assembly) cannot be loaded; names the file and the reason."""


class PolicyError(SandboxError):
    """A policy file is wrong; the message starts with ``file:line:``."""


class MemoryMapError(SandboxError):
    """A memory slot or device range overlaps, is misaligned or is empty."""


class EngineError(SandboxError):
    """The engine (Unicorn, KVM) is missing, unsupported or failed in an unexpected way."""


class HandlerError(SandboxError):
    """A handler raised an error of its own; names the handler and the guest instruction."""


class HandlerTimeoutError(HandlerError):
    """A handler did not return in time and was interrupted."""


class KvmError(SandboxError, OSError):
    """An ioctl of the KVM contract was refused; ``errno`` is what the kernel would return."""

    def __init__(self, errno: int, message: str) -> None:
        OSError.__init__(self, errno, message)
