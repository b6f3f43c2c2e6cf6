"""The loops that the suites time: name, assembly of one iteration, iterations of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sandbox.bench.measure import Effort

SCRATCH = 0x20_0000
"""1 MiB of data that the loops may use."""


@dataclass(frozen=True, slots=True)
class Loop:
    """``body`` runs ``count`` times with RCX counting down; RDI points to 1 MiB of data."""

    name: str
    body: str
    count: int
    stores: bool = False
    """A store-heavy loop."""

    def scaled(self, effort: Effort) -> Loop:
        """The same with fewer or more iterations."""
        return replace(self, count=effort.count(self.count))

    @property
    def source(self) -> str:
        return (
            f"mov rdi, {SCRATCH:#x}\nmov rsi, {SCRATCH:#x}\nxor ebx, ebx\nmov ecx, {self.count}\n"
            f"again:\n{self.body}\ndec ecx\njnz again\nhlt\n"
        )


_PUSH = "\n".join(["push rax"] * 10 + ["pop rax"] * 10)
_WALK = "add ebx, 64\nand ebx, 0xfffff\n"

FASTPATH = (
    Loop("alu", "add rax, rbx\nxor rdx, rax\nlea rbx, [rax + rdx * 2]\nimul rdx, rbx", 60_000_000),
    Loop("branch", "test cl, 3\njz skip\nadd rax, 1\nskip:\ntest cl, 5\njnz over\ninc rdx\nover:",
         30_000_000),
    Loop("call", "call function\njmp done\nfunction:\nret\ndone:", 6_000_000),
    Loop("load", f"{_WALK}mov rax, [rdi + rbx]\nadd rdx, rax", 50_000_000),
    Loop("store", f"{_WALK}mov [rdi + rbx], rax", 6_000_000, stores=True),
    Loop("push and pop", _PUSH, 700_000, stores=True),
    Loop("read-modify-write", f"{_WALK}add qword ptr [rdi + rbx], 1", 6_000_000, stores=True),
    Loop("string", f"mov r8d, ecx\nmov rdi, {SCRATCH:#x}\nmov ecx, 64\nrep stosq\nmov ecx, r8d",
         50_000, stores=True),
    Loop("x87", "fld1\nfadd st(0), st(0)\nfsqrt\nfstp st(0)", 4_000_000),
    Loop("sse", "paddd xmm0, xmm1\npshufd xmm1, xmm0, 0x1b\nmulps xmm2, xmm3", 8_000_000),
)  # fmt: skip

NEW_INSTRUCTION = "0f 3f 01"
"""Bytes that are no instruction: what the trivial handler takes."""
TRAP = Loop("one trap", ".byte 0x0f, 0x3f, 0x01", 200_000)
RUN_OF_TRAPS = Loop("run of ten traps", "\n".join([".byte 0x0f, 0x3f, 0x01"] * 10), 40_000)

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
