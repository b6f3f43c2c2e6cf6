"""A static program in bare Unicorn, for comparison: what happens without the sandbox.

Only the system calls that a musl program needs to print and exit; no policy, no handlers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guests.load import ElfImage, load_elf
from sandbox.decode import MAX_LENGTH, DecodeError, decode

_STACK_BASE, _STACK_BYTES = 0x7F00_0000_0000, 1 << 20
_PAGE = 4096
_AT_PHDR, _AT_PHENT, _AT_PHNUM, _AT_PAGESZ, _AT_RANDOM = 3, 4, 5, 6, 25
_WRITE, _IOCTL, _WRITEV, _EXIT, _ARCH_PRCTL, _SET_TID, _EXIT_GROUP = 1, 16, 20, 60, 158, 218, 231
_ENOTTY, _ENOSYS = 25, 38


@dataclass
class BareRun:
    """``status`` is the exit status, None if Unicorn stopped at ``refused`` (an instruction)."""

    status: int | None = None
    output: bytes = b""
    refused: str = ""


def run_bare(path: str | Path, timeout: float = 20) -> BareRun:
    """Run a program in bare Unicorn, for at most ``timeout`` seconds."""
    import unicorn
    from unicorn import x86_const as x86

    image = load_elf(path)
    uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    start = image.segments[0].address & -_PAGE
    uc.mem_map(start, (image.end - start + _PAGE) & -_PAGE)
    for segment in image.segments:
        uc.mem_write(segment.address, segment.data)
    uc.mem_map(_STACK_BASE, _STACK_BYTES)
    stack = _STACK_BASE + _STACK_BYTES - _PAGE
    uc.mem_write(stack, _initial_stack(image, stack))
    uc.reg_write(x86.UC_X86_REG_RSP, stack)
    result = BareRun()

    def system_call(uc: Any, _data: object) -> None:
        number, *arguments = (
            uc.reg_read(register)
            for register in (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI)
        )
        count = uc.reg_read(x86.UC_X86_REG_RDX)
        value = _system_call(uc, result, number, arguments, count)
        if number == _ARCH_PRCTL:
            uc.reg_write(x86.UC_X86_REG_FS_BASE, arguments[1])
        uc.reg_write(x86.UC_X86_REG_RAX, value % (1 << 64))

    uc.hook_add(unicorn.UC_HOOK_INSN, system_call, None, 1, 0, x86.UC_X86_INS_SYSCALL)
    try:
        uc.emu_start(image.entry, 0, timeout=int(timeout * 1_000_000))
    except unicorn.UcError as error:
        code = bytes(uc.mem_read(uc.reg_read(x86.UC_X86_REG_RIP), MAX_LENGTH))
        try:
            result.refused = str(decode(code, 64).iced)
        except DecodeError:
            result.refused = str(error)
    return result


def _initial_stack(image: ElfImage, address: int) -> bytes:
    """argc, argv, no environment and the auxiliary vector (AMD64 psABI, 3.4.1)."""
    name, random = address + 0x400, address + 0x500
    auxiliary = [_AT_PHDR, image.headers_address, _AT_PHENT, image.header_size, _AT_PHNUM]
    auxiliary += [image.header_count, _AT_PAGESZ, _PAGE, _AT_RANDOM, random, 0, 0]
    return struct.pack("<16Q", 1, name, 0, 0, *auxiliary)


def _system_call(uc: Any, result: BareRun, number: int, arguments: list[int], count: int) -> int:
    if number == _WRITE:
        result.output += uc.mem_read(arguments[1], count)
        return count
    if number == _WRITEV:
        vectors = struct.iter_unpack("<QQ", uc.mem_read(arguments[1], 16 * count))
        data = b"".join(bytes(uc.mem_read(base, size)) for base, size in vectors)
        result.output += data
        return len(data)
    if number in (_EXIT, _EXIT_GROUP):
        result.status = arguments[0] & 0xFF
        uc.emu_stop()
    return {_IOCTL: -_ENOTTY, _ARCH_PRCTL: 0, _SET_TID: 1}.get(number, -_ENOSYS)
