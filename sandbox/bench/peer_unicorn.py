"""The peer: a static Linux program in Unicorn through its own Python binding.

One map of flat memory with the binding's default protection, as its users write it. No policy and
no handlers: Unicorn runs what it takes for right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sandbox.bench.flat_process import SIZE, FlatProcess
from sandbox.bench.outcome import Outcome
from sandbox.decode import MAX_LENGTH, DecodeError, decode


def run(program: str, argv: Sequence[str], env: Mapping[str, str]) -> Outcome:
    """Run ``program``."""
    import unicorn
    from unicorn import x86_const as x86

    uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    process = FlatProcess(
        program, argv, env, lambda base: uc.reg_write(x86.UC_X86_REG_FS_BASE, base)
    )
    uc.mem_map_ptr(0, SIZE, unicorn.UC_PROT_ALL, process.host_address)
    uc.reg_write(x86.UC_X86_REG_RSP, process.rsp)
    uc.reg_write(x86.UC_X86_REG_MXCSR, 0x1F80)
    uc.reg_write(x86.UC_X86_REG_FPCW, 0x37F)
    registers = (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX)

    def system_call(uc: Any, _data: object) -> None:
        value = process.system_call(*(uc.reg_read(register) for register in registers))
        uc.reg_write(x86.UC_X86_REG_RAX, value % (1 << 64))
        if process.status is not None:
            uc.emu_stop()

    uc.hook_add(unicorn.UC_HOOK_INSN, system_call, None, 1, 0, x86.UC_X86_INS_SYSCALL)
    try:
        uc.emu_start(process.entry, SIZE)
    except unicorn.UcError as error:
        rip = uc.reg_read(x86.UC_X86_REG_RIP)
        return Outcome(refused=f"{error}, at {_text(process.read(rip, MAX_LENGTH))!r}")
    return Outcome(status=process.status)


def _text(code: bytes) -> str:
    try:
        return str(decode(code, 64).iced)
    except DecodeError:
        return code.hex(" ")
