"""The sample C programs of ``guests/c``: what they are run with, and how they are built.

``python -m guests.samples OUTDIR [COMPILER]`` builds all of them at every level into ``OUTDIR``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.errors import GuestImageError

SOURCES = Path(__file__).with_name("c")
LEVELS = ("x86-64", "x86-64-v2", "x86-64-v3")
"""Values of gcc's ``-march`` (the x86-64 psABI's microarchitecture levels)."""
OPTIMIZATIONS = ("O2", "O3")
FAST_MATH = "-ffast-math"
"""An option for the compiler; its startup code sets FTZ and DAZ in MXCSR."""
PREBUILTS = {
    name: SOURCES / "prebuilt" / f"{name}-x86-64-v3-O3-musl-gcc" for name in ("demo", "sort")
}
"""Samples built for x86-64-v3, for machines without a compiler; see the README beside them.
Bare Unicorn refuses ``demo`` and runs ``sort`` to the end with wrong output."""
PREBUILT = PREBUILTS["demo"]


@dataclass(frozen=True)
class Run:
    """One way to run a sample; ``status`` is the exit status it must end with."""

    args: tuple[str, ...] = ()
    stdin: bytes = b""
    env: dict[str, str] = field(default_factory=dict)
    status: int = 0


_PROSE = (
    b"Two tiers, one contract.\n\nThe fast path runs what it may;\tthe handler tier the rest.\n"
)
_PLAIN = (Run(),)

SAMPLES: dict[str, tuple[Run, ...]] = {
    "decay": _PLAIN,
    "demo": _PLAIN,
    "dot": _PLAIN,
    "hash": _PLAIN,
    "json": _PLAIN,
    "longdouble": _PLAIN,
    "matmul": _PLAIN,
    "nbody": _PLAIN,
    "sha256": _PLAIN,
    "sort": _PLAIN,
    "strings": _PLAIN,
    "wc": (
        Run(stdin=_PROSE),
        Run(args=("-u", "the", "tier"), stdin=_PROSE * 40, env={"WC_PREFIX": "> "}),
        Run(args=("the", "absent"), stdin=_PROSE[:-1], status=1),
        Run(args=("-x",), status=2),
    ),
}
"""Name of each sample and the runs that show what it does."""


SMALL = {
    "demo": ("-DTEXT=8192",),
    "dot": ("-DN=512",),
    "json": ("-DRECORDS=20",),
    "longdouble": ("-DSTEPS=10",),
    "matmul": ("-DN=16",),
    "sort": ("-DN=100",),
    "strings": ("-DSIZE=16384",),
}
"""Options for :func:`build` that leave some less to do: none then runs a million instructions."""


def build(
    name: str,
    level: str,
    opt: str,
    outdir: str | Path,
    compiler: str = "gcc",
    options: Sequence[str] = (),
) -> Path:
    """Build a sample as a static executable and return its path in ``outdir``.

    ``level`` is one of :data:`LEVELS`, ``opt`` one of :data:`OPTIMIZATIONS`, ``options`` are
    further ones for the compiler. Raises :class:`GuestImageError` if there is no such sample, no
    compiler, or if it fails.
    """
    source = SOURCES / f"{name}.c"
    if name not in SAMPLES:
        raise GuestImageError(f"no sample {name!r}; there are: {', '.join(SAMPLES)}")
    if shutil.which(compiler) is None:
        raise GuestImageError(
            f"cannot build {source.name}: compiler {compiler!r} not found; install it "
            f"(Debian: apt install gcc libc6-dev) or run the prebuilt guest {PREBUILT}"
        )
    kind = "-fast-math" if FAST_MATH in options else ""
    target = Path(outdir) / f"{name}-{level}-{opt}-{compiler}{kind}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GuestImageError(f"cannot build into {outdir}: {error.strerror}") from error
    flags = (f"-{opt}", f"-march={level}", "-static", *options)
    command = [compiler, *flags, "-o", str(target), str(source)]
    done = subprocess.run([*command, "-lm"], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = next(
            (line for line in lines if "error: " in line or "cannot find" in line), lines[0]
        )
        raise GuestImageError(f"{' '.join(command)} -lm failed: {reason}")
    return target


def build_all(outdir: str | Path, compiler: str = "gcc") -> list[Path]:
    """Build every sample at every level and optimization into ``outdir``."""
    return [
        build(name, level, opt, outdir, compiler)
        for name in SAMPLES
        for level in LEVELS
        for opt in OPTIMIZATIONS
    ]


def main(arguments: list[str]) -> int:
    """Command line: ``OUTDIR [COMPILER]``; prints the path of each program."""
    if len(arguments) not in (1, 2):
        print("usage: python -m guests.samples OUTDIR [COMPILER]", file=sys.stderr)
        return 2
    try:
        for path in build_all(*arguments):
            print(path)
    except GuestImageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
