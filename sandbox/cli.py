"""The command ``sandbox``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sandbox.errors import SandboxError

STATUS_USAGE = 2
DESCRIPTION = "x86 sandbox: Unicorn runs what it runs right, Python handlers emulate the rest."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's would wait actively, and for us
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except SandboxError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return STATUS_USAGE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sandbox", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="run a guest", description=_RUN))
    _add_explain(commands.add_parser("explain", help="say where each instruction runs and why"))
    _add_bench(commands.add_parser("bench", help="measure the sandbox against its peers"))
    conformance = commands.add_parser(
        "conformance", help="compare fast path and handlers with this CPU", description=_CONFORMANCE
    )
    _add_conformance(conformance)
    return parser


_RUN = (
    "Run an assembly file (.asm, .s), a raw image (.bin), a static x86-64 Linux program or a "
    "multiboot kernel. "
    "Ends with the guest's status; 124 timeout, 125 limit reached, 132 unhandled #UD, "
    "139 memory fault, 70 broken handler, 2 usage error."
)


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy", default="verified", metavar="NAME|FILE", help="what the fast path may run"
    )
    parser.add_argument(
        "--handlers",
        action="append",
        default=[],
        metavar="NAME|FILE.py",
        help="a handler pack, asked before the default ones; 'none': without the default ones",
    )
    parser.add_argument(
        "--unhandled",
        choices=("inject", "exit", "skip"),
        help="what to do with an instruction that no handler takes (default: the policy's word)",
    )
    for name, what in (("float-flags", "float exception flags"), ("alignment", "alignment faults")):
        parser.add_argument(
            f"--{name}",
            choices=("lazy", "exact"),
            help=f"{what}: left out on the fast path, or had from handlers (default: the policy's)",
        )
    parser.add_argument(
        "--no-lowering",
        action="store_true",
        help="emulate every trapped instruction in its handler (default: the policy's word)",
    )
    parser.add_argument(
        "--no-host",
        action="store_true",
        help="run no trapped instruction on the host's own CPU (default: the policy's word)",
    )
    parser.add_argument(
        "--mode", choices=("real", "protected", "long"), default="long", help="16, 32 or 64 bits"
    )
    parser.add_argument(
        "--base", type=_number, default=0x1000, metavar="ADDRESS", help="load address (0x1000)"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_policy(parser)
    add = parser.add_argument
    add(
        "--engine",
        choices=("unicorn", "kvm"),
        default="unicorn",
        help="what runs the guest: Unicorn under the policy (default), or Linux KVM, where the "
        "processor runs all it can",
    )
    add(
        "--irqchip",
        choices=("kernel",),
        help="with --engine kvm: the kernel's interrupt controllers",
    )
    add("--timeout", type=_seconds, metavar="SECONDS", help="stop after this time, status 124")
    add("--max-exits", type=_count, metavar="N", help="stop after N trapped instructions")
    add("--trace", action="store_true", help="print each trapped instruction to stderr")
    add("--report", metavar="FILE", help="write exit, registers and statistics as JSON")
    add("--regs", action="store_true", help="print the final registers to stderr")
    add("--summary", action="store_true", help="print what ran where to stderr")
    add("--root", metavar="DIR", help="a directory that a Linux program may read (default: none)")
    add(
        "--env",
        action="append",
        default=[],
        type=_variable,
        metavar="NAME=VALUE",
        help="an environment variable of a Linux program",
    )
    add("--seed", type=int, default=0, help="seed of a Linux program's random numbers")
    add("--memory", type=_count, metavar="MIB", help="RAM (Linux program 1024, kernel 128)")
    add("program", metavar="PROGRAM")
    add("args", nargs=argparse.REMAINDER, metavar="ARGS")
    parser.set_defaults(command=_run)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    _add_policy(parser)
    parser.add_argument("what", metavar="FILE|HEXBYTES")
    parser.set_defaults(command=_explain)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "suite",
        nargs="*",
        metavar="SUITE",
        help="fastpath fallback operations startup scaling programs",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--picture", metavar="FILE", help="draw the ratios: .png, .svg or .pdf (needs matplotlib)"
    )
    parser.add_argument(
        "--read", metavar="FILE", help="show the results in FILE instead of measuring"
    )
    parser.add_argument(
        "--only", metavar="REGEX", default="", help='figures whose "suite name" matches'
    )
    parser.add_argument(
        "--rounds", metavar="N", type=int, help="rounds of each comparison (default: by suite)"
    )
    parser.add_argument(
        "--scale", metavar="X", type=float, default=1.0,
        help="length of the runs; below 1 is quick and noisy (default 1)",
    )  # fmt: skip
    parser.set_defaults(command=_bench)


_CONFORMANCE = (
    "Run each instruction form on the same prepared states on the fast path, in the handlers and "
    "on this CPU, and say what differs. Status 1 if a handler differs."
)


def _add_conformance(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--forms", default="", metavar="REGEX", help="forms whose name matches")
    add("--features", nargs="+", metavar="NAME", help="forms that need no other CPUID features")
    add(
        "--tier",
        choices=("fast", "handlers", "lowered", "host", "both"),
        default="both",
        help="what to compare; lowered: sequences, host: host runs, both: fast and handlers",
    )
    add("--policy", metavar="NAME", help="on the fast path only what this policy allows")
    add("--cases", type=_count, default=16, metavar="N", help="states per encoding (16)")
    add("--seconds", type=_seconds, metavar="S", help="stop after this time")
    add("--seed", type=int, default=0, help="of the random states")
    add("--jobs", type=_count, metavar="N", help="processes (default: one per CPU)")
    add("--handlers", action="append", metavar="NAME", help="packs (default: those of `run`)")
    add("--full", action="store_true", help="print the first difference of each form in full")
    add("--date", default="undated", help="to be written into what is made")
    add("--data", nargs="+", metavar="FILE", help="take the data of earlier runs, added up")
    add("--json", metavar="FILE", help="write the data")
    add("--write-evidence", metavar="FILE", help="write the figures for each form")
    add("--write-policy", metavar="FILE", help="write a policy that allows what is right")
    add("--write-known-wrong", metavar="FILE", help="write the page of what is wrong")
    parser.set_defaults(command=_conformance)


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; such as 0x1000") from None


def _count(text: str) -> int:
    value = _number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: want a number above 0")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: want a number of seconds above 0")
    return value


def _variable(text: str) -> str:
    if "=" not in text[1:]:
        raise argparse.ArgumentTypeError(f"{text!r}: want NAME=VALUE")
    return text


def _run(options: argparse.Namespace) -> int:
    from sandbox.run import run_command

    return run_command(options)


def _explain(options: argparse.Namespace) -> int:
    from sandbox.explain_command import explain_command

    return explain_command(options)


def _conformance(options: argparse.Namespace) -> int:
    from sandbox.conformance_command import conformance_command

    return conformance_command(options)


def _bench(options: argparse.Namespace) -> int:
    from sandbox.bench.command import bench_command

    return bench_command(options)


if __name__ == "__main__":
    sys.exit(main())
