"""Small guests on the whole machine, for tests of the fast path and the run loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guests.assemble import assemble
from sandbox import abi
from sandbox.boot import Machine, Mode, boot_flat
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.exits import Hlt
from sandbox.handler import FunctionHandler, Pack
from sandbox.policy import Policy
from sandbox.vm import Vm

BITNESS: dict[Mode, int] = {"real": 16, "protected": 32, "long": 64}
MODES: tuple[Mode, ...] = ("real", "protected", "long")
BASE = 0x1000


def policy(*trapped: str, allowed: tuple[str, ...] = (), extra: str = "") -> Policy:
    """The baseline less the mnemonics ``trapped``; or nothing but the mnemonics ``allowed``."""
    text = f'extends = "{"nothing" if allowed else "baseline"}"\n'
    for action, names in (("allow", allowed), ("trap", trapped)):
        if names:
            text += f'[[rule]]\naction = "{action}"\nmnemonic = {list(names)}\n'
    return Policy.parse(text + extra)


class Recorder:
    """Handlers that do nothing but note where they were asked: ``rips``, ``texts``."""

    def __init__(self, *mnemonics: str, patterns: tuple[str, ...] = ()) -> None:
        self.rips: list[int] = []
        self.texts: list[str] = []
        self.pack = Pack("recorder", (FunctionHandler(self._note, mnemonics, (), patterns),))

    def _note(self, cpu: Cpu, insn: Insn) -> None:
        self.rips.append(cpu.rip)
        self.texts.append(str(insn.iced))


@contextmanager
def machine(
    code: bytes | str,
    mode: Mode = "long",
    *,
    base: int = BASE,
    policy: str | Policy = "baseline",
    handlers: Iterable[str | Path | Pack] = (),
    cap: bool = True,
) -> Iterator[Machine]:
    """A flat guest, ready to run; ``code`` is assembled if it is text."""
    if isinstance(code, str):
        code = assemble(code, base, BITNESS[mode])
    with Vm(policy, handlers) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, int(cap))
        yield boot_flat(vm, code, base, mode)


def run_to_hlt(found: Machine, timeout: float = 10) -> None:
    """Run; anything but HLT is a failure."""
    left: Any = found.vcpu.run(timeout)
    assert isinstance(left, Hlt), f"{left} at {found.vcpu.registers.rip:#x}"
