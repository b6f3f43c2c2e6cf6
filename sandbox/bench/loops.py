"""The loops that the suites time."""

from __future__ import annotations

from dataclasses import dataclass

from guests.assemble import assemble

SCRATCH = 0x20_0000
"""1 MiB of data that the loops may use."""
WARM_UP = 64
"""Iterations before those that are timed."""


@dataclass(frozen=True, slots=True)
class Loop:
    """``body`` is one iteration; RCX counts down, RDI points to 1 MiB of data."""

    name: str
    body: str
    stores: bool = False
    """A store-heavy loop."""

    def code(self, count: int) -> bytes:
        """A flat 64-bit guest that runs the body a few times up to a first HLT, so that all is
        translated and bound, and ``count`` times up to the second."""
        return assemble(
            f"mov rdi, {SCRATCH:#x}\nmov rsi, {SCRATCH:#x}\nxor ebx, ebx\nmov ecx, {WARM_UP}\n"
            f"again:\n{self.body}\ndec ecx\njnz again\nhlt\nmov ecx, {count}\njmp again\n"
        )


_PUSH = "\n".join(["push rax"] * 10 + ["pop rax"] * 10)
_WALK = "add ebx, 64\nand ebx, 0xfffff\n"

FASTPATH = (
    Loop("alu", "add rax, rbx\nxor rdx, rax\nlea rbx, [rax + rdx * 2]\nimul rdx, rbx"),
    Loop("branch", "test cl, 3\njz skip\nadd rax, 1\nskip:\ntest cl, 5\njnz over\ninc rdx\nover:"),
    Loop("call", "call function\njmp done\nfunction:\nret\ndone:"),
    Loop("load", f"{_WALK}mov rax, [rdi + rbx]\nadd rdx, rax"),
    Loop("store", f"{_WALK}mov [rdi + rbx], rax", stores=True),
    Loop("push and pop", _PUSH, stores=True),
    Loop("read-modify-write", f"{_WALK}add qword ptr [rdi + rbx], 1", stores=True),
    Loop("string", f"mov r8d, ecx\nmov rdi, {SCRATCH:#x}\nmov ecx, 64\nrep stosq\nmov ecx, r8d",
         stores=True),
    Loop("x87", "fld1\nfadd st(0), st(0)\nfsqrt\nfstp st(0)"),
    Loop("sse", "paddd xmm0, xmm1\npshufd xmm1, xmm0, 0x1b\nmulps xmm2, xmm3"),
)  # fmt: skip

NEW_INSTRUCTION = "0f 3f 01"
"""Bytes that are no instruction: what the trivial handler takes."""
RUN = 10
"""Instructions in a run."""


def run_of(name: str, instruction: str) -> Loop:
    """A loop over :data:`RUN` copies of an instruction."""
    return Loop(name, "\n".join([instruction] * RUN))


_NEW = f".byte {', '.join('0x' + byte for byte in NEW_INSTRUCTION.split())}"
_VECTOR = "vpaddd ymm1, ymm2, ymm3"
TRAP = Loop("one trap", _NEW)
RUN_OF_TRAPS = run_of("run of ten traps", _NEW)
VECTOR = Loop("one vpaddd", _VECTOR)
RUN_OF_VECTORS = run_of("run of ten vpaddd", _VECTOR)
"""What Unicorn refuses and hook-and-emulate scripts are written for."""

OPERATIONS = (
    "vmovdqa ymm1, ymm2",
    "vmovdqu ymm1, [rsi]",
    "vmovdqu [rsi], ymm1",
    "vpaddd ymm1, ymm2, ymm3",
    "vpand ymm1, ymm2, ymm3",
    "vpcmpeqb ymm1, ymm2, ymm3",
    "vpminub ymm1, ymm2, ymm3",
    "vpslld ymm1, ymm2, 3",
    "vpshufb ymm1, ymm2, ymm3",
    "vpshufd ymm1, ymm2, 0x1b",
    "vpunpcklbw ymm1, ymm2, ymm3",
    "vpmovmskb eax, ymm1",
    "vpmulld ymm1, ymm2, ymm3",
    "vextracti128 xmm1, ymm2, 1",
    "vaddps ymm1, ymm2, ymm3",
    "vmulpd ymm1, ymm2, ymm3",
    "vdivps ymm1, ymm2, ymm3",
    "vminps ymm1, ymm2, ymm3",
    "vcvtdq2ps ymm1, ymm2",
    "vfmadd231ps ymm1, ymm2, ymm3",
    "vfmadd231pd ymm1, ymm2, ymm3",
    "vaddsd xmm1, xmm2, xmm3",
    "andn eax, ebx, edx",
    "shlx rax, rbx, rdx",
)
"""Instructions whose handlers are timed."""
