"""The command ``sandbox explain``: a file or bytes, instruction by instruction."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

from guests.load import Kind, detect, load_elf, load_raw, read_file
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.engine.allowlist import NEVER_RUN
from sandbox.engine.host_operands import operands_instead
from sandbox.engine.misread import MISREAD
from sandbox.engine.unicorn_lowering import NOP
from sandbox.errors import SandboxError
from sandbox.explain import explain, parse_hex, table
from sandbox.fallback import Tier, lowering_of
from sandbox.intercepts import Intercepts
from sandbox.lowering import can_lower
from sandbox.policy import operand_kind
from sandbox.run import BITNESS, make_vm
from sandbox.settings import Settings
from sandbox.side_effects import aligned_forms, sse_float_forms, x87_float_forms
from sandbox.vm import Vm

MACHINE = "the machine"
"""Who takes an intercepted instruction for which no handler is needed."""


def explain_command(options: Namespace) -> int:
    """Print the table; the status to exit with."""
    path = Path(options.what)
    kind = detect(path) if path.exists() else Kind.RAW
    bitness = 64 if kind is Kind.ELF else BITNESS[options.mode]
    with make_vm(options, kind) as vm:
        cpu, settings = vm.create_vcpu().cpu, vm.settings
        decode, resolve = Tier(cpu, settings.handlers).decode, _resolver(cpu, settings)
        for address, data in _parts(options, path, kind, bitness):
            lines = explain(
                data, bitness, vm.policy, resolve, address, decode=decode, bar=_bar(settings),
                lowers=_lowers(vm),
            )  # fmt: skip
            for row in table(lines):
                print(row)
    return 0


def _resolver(cpu: Cpu, settings: Settings) -> Callable[[Insn], list[str]]:
    """Names the handlers that take an instruction: those that do not decline it at binding."""
    tier, kernel = Tier(cpu, settings.handlers), Tier(cpu, settings.kernel)
    intercepts = Intercepts(cpu, settings.ports)

    def resolve(insn: Insn) -> list[str]:
        found = tier.bind(insn).handlers
        if not found and insn.code and settings.intercepted[insn.code]:
            if intercepts.bind(insn) is not None:
                return [MACHINE]
            found = kernel.bind(insn).handlers
        return [handler.name for handler in found]

    return resolve


def _lowers(vm: Vm) -> Callable[[Insn], bool]:
    """Whether an instruction is lowered, where it may be: in 64-bit code with AVX switched on."""
    settings, traps = vm.settings, vm.engine.traps

    def lowers(insn: Insn) -> bool:
        found = settings.handlers.find(insn)
        if not found or insn.bitness != 64 or not settings.policy.lowering:
            return False
        lowering = lowering_of(found[0], insn, host=settings.policy.host)
        if lowering is None:
            return False
        on_host = lowering.on_host and operands_instead(insn.iced, insn.raw) and not traps(NOP)
        return bool(on_host) or (
            lowering.rule is not None and can_lower(insn.iced, lowering.rule, traps)
        )

    return lowers


def _bar(settings: Settings) -> Callable[[Insn], str]:
    """Why an instruction is trapped whatever the policy's rules say; "" if they decide."""
    policy = settings.policy
    floats = frozenset((*sse_float_forms(), *x87_float_forms()))
    aligned = frozenset(aligned_forms())

    def bar(insn: Insn) -> str:
        if insn.code and settings.intercepted[insn.code]:
            return "intercepted by the machine under every policy"
        if insn.code in NEVER_RUN:
            return "crashes Unicorn"
        if MISREAD[insn.bitness].match(insn.raw):
            return "Unicorn takes these bytes for another instruction"
        if policy.float_flags == "exact" and insn.code in floats:
            return 'float_flags = "exact"'
        if policy.alignment == "exact" and insn.code in aligned:
            return 'alignment = "exact"' if operand_kind(insn) == "memory" else ""
        return ""

    return bar


def _parts(options: Namespace, path: Path, kind: Kind, bitness: int) -> Iterator[tuple[int, bytes]]:
    """(address, code) of each executable part."""
    if not path.exists():
        try:
            yield options.base, parse_hex(options.what)
        except ValueError as error:
            raise SandboxError(str(error)) from None
    elif kind is Kind.ELF:
        for segment in load_elf(path).segments:
            if segment.executable:
                yield segment.address, segment.data
    elif kind is Kind.RAW:
        yield options.base, load_raw(path)
    else:
        from guests.assemble import assemble

        source = read_file(path).decode(errors="replace")
        yield options.base, assemble(source, options.base, bitness, str(path))
