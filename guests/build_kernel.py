"""Build the test kernel of ``guests/kernel``: ``python -m guests.build_kernel IMAGE``.

It needs gcc for x86-64 and binutils; ``guests/kernel/prebuilt`` has an image for machines without.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sandbox.errors import GuestImageError

SOURCES = Path(__file__).with_name("kernel")
PREBUILT = SOURCES / "prebuilt" / "kernel.elf"
FLAGS = (
    "-m64 -O1 -Wall -Wextra -Werror -ffreestanding -nostdlib -static -fno-pic -no-pie "
    "-mno-red-zone -mgeneral-regs-only -fno-stack-protector -fcf-protection=none "
    "-fno-asynchronous-unwind-tables "
    "-Wl,--build-id=none,-z,noexecstack,-z,max-page-size=4096,-T,kernel.ld"
).split()
TOOLS = ("gcc", "objcopy")


def build_kernel(image: str | Path) -> None:
    """Build ``image``: 64-bit code in a 32-bit ELF file, as multiboot wants it."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise GuestImageError(
            f"cannot build the test kernel: {missing[0]} not found; the prebuilt one is {PREBUILT}"
        )
    sources = sorted(path.name for path in SOURCES.iterdir() if path.suffix in (".S", ".c"))
    with tempfile.TemporaryDirectory() as folder:
        linked = f"{folder}/kernel"
        _run(["gcc", *FLAGS, "-o", linked, *sources])
        _run(["objcopy", "-O", "elf32-i386", "--strip-all", linked, str(Path(image).absolute())])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise GuestImageError(f"building the test kernel: {command[0]} failed: {reason}")


def main(arguments: list[str]) -> int:
    """Command line: ``IMAGE``."""
    if len(arguments) != 1:
        print("usage: python -m guests.build_kernel IMAGE", file=sys.stderr)
        return 2
    try:
        build_kernel(arguments[0])
    except GuestImageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
