"""The command ``sandbox run``: load a guest, run it, end with its status."""

from __future__ import annotations

import gc
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from guests.load import Kind, detect, load_raw, read_file
from sandbox import abi
from sandbox.boot import Machine, boot_flat
from sandbox.console import DEBUG_PORT, SERIAL_COUNT, SERIAL_PORT, Console
from sandbox.errors import GuestImageError, HandlerError, HandlerTimeoutError, SandboxError
from sandbox.exits import EmulationFailure, Exit, GuestException, Hlt, Intr, Io, Mmio, Shutdown
from sandbox.interrupt import run_interruptibly
from sandbox.policy import Policy
from sandbox.registers import GPR_NAMES
from sandbox.report import report_data, write_report
from sandbox.trace import summary, tracer
from sandbox.vm import DEFAULT_ENGINE, Vm

BITNESS = {"real": 16, "protected": 32, "long": 64}
DEFAULT_PACKS = ("integer", "avx2", "x87", "mmx")
INSTRUCTION_PACKS = (*DEFAULT_PACKS, "amd")
"""All that emulate instructions for user programs: what is checked against hardware."""

PROCESS_MEMORY = 1024
"""MiB of RAM of a Linux program."""

STATUS_TIMEOUT = 124
STATUS_LIMIT = 125
STATUS_INTERRUPTED = 130
STATUS_HANDLER = 70
_SIGNAL_OF_VECTOR = {0: 8, 1: 5, 3: 5, 4: 11, 5: 11, 6: 4, 7: 4, 16: 8, 17: 7, 19: 8}
_SIGILL, _SIGTRAP, _SIGABRT, _SIGSEGV = 4, 5, 6, 11


def run_command(options: Namespace) -> int:
    """Run ``options.program``; the status to exit with."""
    kind = detect(options.program)
    vm = make_vm(options, kind)
    with vm, ExitStack() as cleanup:
        machine = load(vm, options, kind, cleanup)
        return _run(machine, options)


def make_vm(options: Namespace, kind: Kind) -> Vm:
    """A VM with the policy and the handler packs that the options ask for."""
    policy = Policy.load(options.policy)
    if options.unhandled:
        policy = policy.with_unhandled(options.unhandled)
    lowering = False if options.no_lowering else None
    host = False if options.no_host else None
    policy = policy.with_exactness(options.float_flags, options.alignment, lowering, host)
    wanted = list(options.handlers)
    if "none" in wanted:
        wanted = [name for name in wanted if name != "none"]
    else:
        wanted += [name for name in DEFAULT_PACKS if name not in wanted]
        if kind is Kind.ELF and "linux" not in wanted:
            wanted.append("linux")
    engine = getattr(options, "engine", DEFAULT_ENGINE)
    any_level = engine == "kvm" or kind is Kind.MULTIBOOT
    if any_level and "none" not in options.handlers and "system" not in wanted:
        wanted.append("system")  # what is not run may be any instruction of a kernel
    vm = Vm(policy, wanted, engine=engine, irqchip=getattr(options, "irqchip", None))
    shown = (getattr(options, name, None) for name in ("summary", "trace", "report"))
    vm.settings.count_lowered = any(shown)
    vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
    return vm


def load(vm: Vm, options: Namespace, kind: Kind, cleanup: ExitStack) -> Machine:
    """Load the guest and make it ready to run."""
    path = Path(options.program)
    if kind is Kind.ELF:
        return _load_process(vm, options, cleanup)
    if kind is Kind.MULTIBOOT:
        return _load_multiboot(vm, options)
    if options.args:
        raise GuestImageError(f"{path}: a {kind} guest takes no arguments")
    console = Console(sys.stdout.buffer)
    vm.add_ports(SERIAL_PORT, SERIAL_COUNT, console)
    vm.add_ports(DEBUG_PORT, 1, console)
    return boot_flat(vm, _image(path, kind, options), options.base, options.mode)


def _load_multiboot(vm: Vm, options: Namespace) -> Machine:
    from guests.multiboot import load_multiboot
    from sandbox.multiboot import DEFAULT_RAM, boot_multiboot

    line = " ".join((options.program, *options.args))
    ram = options.memory << 20 if options.memory else DEFAULT_RAM
    return boot_multiboot(vm, load_multiboot(options.program), sys.stdout.buffer, line, ram=ram)


def _load_process(vm: Vm, options: Namespace, cleanup: ExitStack) -> Machine:
    from handlers.linux import Files, Root  # not needed, and not imported, for bare guests
    from sandbox.process import boot_process

    root = None
    if options.root:
        root = Root(options.root)
        cleanup.callback(root.close)
    return boot_process(
        vm,
        options.program,
        [options.program, *options.args],
        dict(variable.split("=", 1) for variable in options.env),
        files=Files.standard(root=root) if root else None,
        seed=options.seed,
        ram=(options.memory or PROCESS_MEMORY) << 20,
    )


def _image(path: Path, kind: Kind, options: Namespace) -> bytes:
    if kind is Kind.RAW:
        return load_raw(path)
    from guests.assemble import assemble

    try:
        source = read_file(path).decode()
    except UnicodeDecodeError as error:
        raise GuestImageError(f"{path}: not text: {error.reason} at byte {error.start}") from None
    return assemble(source, options.base, BITNESS[options.mode], str(path))


def _run(machine: Machine, options: Namespace) -> int:
    vcpu = machine.vcpu
    vcpu.max_exits = options.max_exits
    if options.trace:
        vcpu.on_trap = tracer(sys.stderr, vcpu.stats)
    deadline = None if options.timeout is None else time.monotonic() + options.timeout
    left: Any = None
    gc.freeze()  # what is there now stays, and need not be looked at again and again
    try:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        left = run_interruptibly(vcpu, timeout)
        status, message = status_of(machine, left, options)
    except KeyboardInterrupt:
        status, message = STATUS_INTERRUPTED, f"interrupted at {vcpu.registers.rip:#x}"
    except HandlerTimeoutError as error:
        status, message = STATUS_TIMEOUT, f"{error}, at {vcpu.registers.rip:#x}"
    except HandlerError as error:
        if isinstance(error.__cause__, BrokenPipeError):
            raise error.__cause__ from None  # nobody reads the guest's console any more
        status, message = STATUS_HANDLER, f"{error}, at {vcpu.registers.rip:#x}"
    sys.stdout.flush()
    if message:
        print(f"sandbox: {message}", file=sys.stderr)
    _show(machine, options)
    if options.report:
        data = report_data(left, status, vcpu.registers, vcpu.stats)
        if message:
            data["exit"]["message"] = message
        write_report(Path(options.report), data)
    return status


def _show(machine: Machine, options: Namespace) -> None:
    registers = machine.vcpu.registers
    if options.regs:
        for row in range(0, 16, 4):
            cells = (f"{GPR_NAMES[n]:>3} {registers.gpr[n]:016x}" for n in range(row, row + 4))
            print("  ".join(cells), file=sys.stderr)
        print(f"rip {registers.rip:016x}  rflags {registers.rflags:08x}", file=sys.stderr)
        for number in range(32):
            value = registers.vec.read(number)[::-1]
            if any(value):
                print(f"zmm{number:<2} {value.hex()}", file=sys.stderr)
    if options.trace or options.summary:
        for line in summary(machine.vcpu.stats):
            print(line, file=sys.stderr)
        process = machine.vcpu.cpu.services.get("linux")
        if process is not None and process.unknown:
            named = ", ".join(f"{name} {count}x" for name, count in process.unknown.items())
            print(f"system calls answered with ENOSYS: {named}", file=sys.stderr)


def status_of(machine: Machine, left: Any, options: Namespace) -> tuple[int, str]:
    """The exit status for what ended the run, and a line that says what was wrong, if anything."""
    if machine.status_of is not None and (ended := machine.status_of(left)) is not None:
        return ended
    rip = machine.vcpu.registers.rip
    match left:
        case Hlt():
            return 0, ""
        case Intr() if _limited(machine, options):
            return STATUS_LIMIT, f"stopped after {options.max_exits} trapped instructions"
        case Intr():
            return STATUS_TIMEOUT, f"still running after {options.timeout} s, at {rip:#x}"
        case EmulationFailure() if left.bytes is None:
            return 128 + _SIGSEGV, f"nothing is mapped at {rip:#x}, where the guest jumped"
        case EmulationFailure():
            return 128 + _SIGILL, _unhandled_text(machine, rip, left)
        case GuestException():
            return _exception_status(machine, rip, left)
        case Mmio():
            what = "wrote to" if left.is_write else "read from"
            place = f"physical address {left.phys_addr:#x}, where nothing is mapped"
            return 128 + _SIGSEGV, f"the guest {what} {place}, at {rip:#x}"
        case Io():
            return STATUS_LIMIT, f"the guest used IO port {left.port:#x}, which has no device"
        case Shutdown():
            return 128 + _SIGABRT, f"triple fault at {rip:#x}"
        case Exit():
            return STATUS_LIMIT, f"{left}, at {rip:#x}"
        case _:
            return 0, f"a handler ended the run: {left}"


def _limited(machine: Machine, options: Namespace) -> bool:
    limit = options.max_exits
    return limit is not None and machine.vcpu.stats.fallback_count >= limit


def _unhandled_text(machine: Machine, rip: int, left: EmulationFailure) -> str:
    insn = machine.vcpu.instruction()
    text = f"'{insn.text(rip)}'" if insn.code else (left.bytes or b"").hex(" ")
    return f"no handler takes {text} at {rip:#x} (#UD)"


def _exception_status(machine: Machine, rip: int, left: GuestException) -> tuple[int, str]:
    name = _VECTOR_NAMES.get(left.exception, f"vector {left.exception}")
    text = f"{name} at {rip:#x}, and the guest has no handler for it"
    if left.exception == 14:
        address = machine.vcpu.registers.bank.read("cr2")
        kind = "execute" if left.error_code & 16 else "write" if left.error_code & 2 else "read"
        text = f"{name} ({kind} of {address:#x}) at {rip:#x}"
    return 128 + _SIGNAL_OF_VECTOR.get(left.exception, _SIGSEGV), text


_VECTOR_NAMES = {
    0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS",
    11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM",
}  # fmt: skip

__all__ = ["SandboxError", "run_command"]
