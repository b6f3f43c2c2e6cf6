"""Random guest programs around vector instructions, and their execution in several ways.

A program is text; registers have roles, so that it ends and its memory operands are where they are
meant to be: RSI, RDI, RBP and RSP point to data, RDX is a small index; RCX, R14 and R15 count.
Undefined flags are neither compared nor used.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from iced_x86 import Decoder
from keystone import KS_ARCH_X86, KS_MODE_64, Ks

from sandbox import boot
from sandbox.boot import Machine
from sandbox.exits import GuestException, Intr, Mmio
from sandbox.memory import PAGE_SIZE
from sandbox.policy import Policy
from tests.guest import BASE, enter_user_mode, machine

PACKS: Final = ("integer", "avx2", "system", "x87")
CODE_PAGES: Final = 3
DATA: Final = 0x4000_0000
"""Physical memory of a slot of its own: two pages that may be written, one that may only be read,
one that is not mapped, one more; behind it a page without memory, and a slot that is read-only."""
PAGES: Final = 5
DEVICE: Final = DATA + PAGES * PAGE_SIZE
ROM: Final = DEVICE + PAGE_SIZE
STACK: Final = DATA + PAGE_SIZE - 0x100
LONG = ("rax", "rbx", "r8", "r9", "r10", "r11", "r12", "r13")
WORDS = {
    8: LONG,
    4: ("eax", "ebx", "r8d", "r9d", "r10d", "r11d", "r12d", "r13d"),
    2: ("ax", "bx", "r8w", "r9w", "r10w", "r11w", "r12w", "r13w"),
    1: ("al", "bl", "r8b", "r9b", "r10b", "r11b", "r12b", "r13b"),
}
HIGH = ("ah", "bh")
POINTERS = ("rsi", "rdi", "rbp", "rsp")
HLT: Final = 0xF4
TYPES = {1: "byte ptr", 2: "word ptr", 4: "dword ptr", 8: "qword ptr", 16: "", 32: ""}
CONDITIONS = "o no b ae e ne be a s ns p np l ge le g".split()


class Writer:
    """Writes one program."""

    def __init__(
        self, rng: random.Random, *, faults: bool = True, code_stores: bool = False,
        floats: bool = True,
        x87: bool = False,
    ) -> None:  # fmt: skip
        self.rng = rng
        self.floats = floats
        self.x87 = x87
        self.faults = faults
        self.code_stores = code_stores
        self.lines: list[str] = []
        self.labels = 0

    def pick(self, *values: Any) -> Any:
        return self.rng.choice(values)

    def memory(self, size: int) -> str:
        rng = self.rng
        kind = rng.random()
        at = rng.randrange(0, 0x180)
        if self.faults and kind < 0.06:  # where pages end, and in odd ones
            page = rng.choice((1, 1, 1, 2, 2, 3, 5, 6)) * PAGE_SIZE
            near = rng.choice((-size, -size + 1, -size // 2, -1, 0, 8))
            where = f"rdi + {page + near - 0x400}"
        elif kind < 0.14:
            where = f"rdi + {PAGE_SIZE - 0x400 - rng.randrange(1, max(size, 2))}"
        elif kind < 0.3:
            where = f"rsi + rdx*{rng.choice((1, 2, 4, 8))} + {at}"
        elif kind < 0.38:
            where = f"rsp + {at - 0x40}"
        elif kind < 0.46:
            where = f"rdx + {DATA + at}" if rng.random() < 0.5 else f"rdx*8 + {DATA + at}"
        elif kind < 0.54:
            return f"{TYPES[size]} {rng.choice(('fs', 'gs'))}:[rdx + {at}]"
        elif kind < 0.62:
            where = "rip + constants" if not self.code_stores else "rip + data"
        elif kind < 0.8:
            where = f"rbp + {rng.randrange(0, 4) * size}"
        else:
            where = f"{rng.choice(POINTERS)} + {at & -size}"
        return f"{TYPES[size]} [{where}]"

    def target(self, size: int) -> str:
        """A memory operand to be written."""
        while True:
            found = self.memory(size)
            if "constants" not in found:
                return found

    def ymm(self) -> int:
        return self.rng.choice((0, 1, 2, 3, 7, 8, 9, 15))

    # -- vector instructions ----------------------------------------------------------------------

    def vector(self) -> str:
        if self.x87 and self.rng.random() < 0.5:
            return self.float80()
        while True:
            found = str(self.rng.choice(VECTOR)(self))
            if self.floats or not found.startswith(_FLOATING):
                return found

    def float80(self) -> str:
        rng, i = self.rng, self.rng.randrange(4)
        return str(rng.choice((
            lambda: rng.choice("fld1 fldz fldpi fldl2e fldln2 fscale fprem fprem1 fxtract".split()),
            lambda: rng.choice("fabs fchs fsqrt frndint fincstp".split()),
            lambda: f"fld {rng.choice((self.memory(8), 'qword ptr [rbp + 16]'))}",
            lambda: f"fild {self.memory(4)}",
            lambda: f"{rng.choice(('fcomi', 'fucomi', 'fcomip', 'fucomip'))} st(0), st({i})",
            lambda: f"{rng.choice(('fst', 'fstp', 'fld', 'fxch'))} st({i})",
            lambda: f"{rng.choice(('faddp', 'fmulp', 'fsubp'))} st({i + 1}), st(0)",
            lambda: f"fisttp {self.target(rng.choice((2, 4, 8)))}",
            lambda: f"fldcw word ptr [rip + words + {2 * rng.randrange(8)}]",
            lambda: "fninit",
        ))())  # fmt: skip

    def reg(self, size: int) -> str:
        return f"{'ymm' if size == 32 else 'xmm'}{self.ymm()}"

    def source(self, size: int, memory: int = 0) -> str:
        return self.memory(memory or size) if self.rng.random() < 0.35 else self.reg(size)

    # -- scalar instructions ----------------------------------------------------------------------

    def general(self, size: int) -> str:
        if size == 1 and self.rng.random() < 0.1:
            return str(self.rng.choice(HIGH))
        return str(self.rng.choice(WORDS[size]))

    def plain(self) -> str:
        """Keeps flags."""
        rng = self.rng
        size = rng.choice((1, 2, 4, 4, 8, 8, 8))
        kind = rng.random()
        if kind < 0.2:
            return f"mov {self.general(size)}, {self.memory(size)}"
        if kind < 0.35:
            return f"mov {self.target(size)}, {rng.choice(WORDS[size])}"
        if kind < 0.42:
            return f"mov {self.target(size)}, {rng.randrange(100)}"
        if kind < 0.52:
            big = rng.choice((4, 8))
            return f"lea {self.general(big)}, [{rng.choice(LONG)} + rdx*4 + {rng.randrange(99)}]"
        if kind < 0.6:
            small = rng.choice((1, 2))
            name = rng.choice(("movzx", "movsx"))
            other = self.memory(small) if rng.random() < 0.5 else rng.choice(WORDS[small])
            return f"{name} {rng.choice(WORDS[rng.choice((4, 8))])}, {other}"
        if kind < 0.66:
            return f"movsxd {rng.choice(LONG)}, {rng.choice((self.memory(4), 'r9d'))}"
        if kind < 0.72:
            return f"not {rng.choice(WORDS[size])}"
        if kind < 0.76:
            return f"bswap {rng.choice(WORDS[rng.choice((4, 8))])}"
        if kind < 0.82:
            name = rng.choice(("shlx", "shrx", "sarx"))
            return f"{name} {rng.choice(LONG)}, {rng.choice(LONG)}, {rng.choice(LONG)}"
        if kind < 0.85:
            return f"rorx {rng.choice(LONG)}, {rng.choice(LONG)}, {rng.randrange(64)}"
        if kind < 0.9:
            return f"push {rng.choice(LONG)}\n    pop {rng.choice(LONG)}"
        if kind < 0.93:
            return f"mov {rng.choice(LONG)}, {rng.choice(('rsp', 'rsi', 'rdi', 'rbp'))}"
        if kind < 0.95:
            return f"pdep {rng.choice(LONG)}, {rng.choice(LONG)}, {rng.choice(LONG)}"
        if kind < 0.97:
            return "nop"
        same = rng.choice(WORDS[size])
        return f"mov {same}, {rng.choice(WORDS[size])}"

    def producer(self) -> str:
        """Sets all flags, of which at most AF is undefined."""
        rng = self.rng
        size = rng.choice((1, 2, 4, 4, 8, 8, 8))
        name = rng.choice("add sub and or xor cmp test neg cmp vptest vcomisd".split())
        if name == "neg":
            return f"neg {rng.choice(WORDS[size])}"
        if name == "vptest":
            which = rng.choice((16, 32))
            return f"vptest {self.reg(which)}, {self.source(which)}"
        if name == "vcomisd":
            return f"vucomisd {self.reg(16)}, {self.source(16, 8)}"
        kind = rng.random()
        if kind < 0.3 and name != "test":
            return f"{name} {rng.choice(WORDS[size])}, {self.memory(size)}"
        if kind < 0.4:
            place = self.memory(size) if name in ("cmp", "test") else self.target(size)
            return f"{name} {place}, {rng.choice(WORDS[size])}"
        if kind < 0.6:
            return f"{name} {rng.choice(WORDS[size])}, {rng.randrange(100)}"
        return f"{name} {rng.choice(WORDS[size])}, {rng.choice(WORDS[size])}"

    def consumer(self) -> str:
        rng = self.rng
        size = rng.choice((1, 2, 4, 8))
        kind = rng.random()
        condition = rng.choice(CONDITIONS)
        if kind < 0.25:
            place = self.target(1) if rng.random() < 0.3 else self.general(1)
            return f"set{condition} {place}"
        if kind < 0.5:
            wide = rng.choice((2, 4, 8))
            other = self.memory(wide) if rng.random() < 0.3 else rng.choice(WORDS[wide])
            return f"cmov{condition} {rng.choice(WORDS[wide])}, {other}"
        if kind < 0.75:
            name = rng.choice(("adc", "sbb"))
            other = self.memory(size) if rng.random() < 0.3 else rng.choice(WORDS[size])
            return f"{name} {rng.choice(WORDS[size])}, {other}"
        return f"{rng.choice(('inc', 'dec'))} {rng.choice(WORDS[size])}"

    def undefined(self) -> str:
        """Leaves flags undefined: then some that are defined."""
        rng = self.rng
        what = rng.choice((
            f"shl {rng.choice(LONG)}, {rng.randrange(64)}",
            f"sar {rng.choice(WORDS[4])}, {rng.randrange(32)}",
            f"shr {rng.choice(WORDS[2])}, {rng.randrange(1, 16)}",
            f"imul {rng.choice(LONG)}, {rng.choice(LONG)}",
            f"tzcnt {rng.choice(LONG)}, {rng.choice(LONG)}",
            f"popcnt {rng.choice(LONG)}, {rng.choice(LONG)}",
            f"blsr {rng.choice(LONG)}, {rng.choice(LONG)}",
            f"bzhi {rng.choice(LONG)}, {rng.choice(LONG)}, {rng.choice(LONG)}",
            f"andn {rng.choice(LONG)}, {rng.choice(LONG)}, {rng.choice(LONG)}",
        ))  # fmt: skip
        return f"{what}\n    test {rng.choice(LONG)}, {rng.choice(LONG)}"

    # -- the whole --------------------------------------------------------------------------------

    def label(self) -> str:
        self.labels += 1
        return f"l{self.labels}"

    def straight(self, count: int) -> None:
        rng = self.rng
        for _ in range(count):
            kind = rng.random()
            if kind < 0.5:
                self.lines.append(self.vector())
            elif kind < 0.68:
                self.lines.append(self.plain())
            elif kind < 0.82:
                self.lines.append(self.producer())
                for _n in range(rng.randrange(3)):
                    self.lines.append(self.consumer() if rng.random() < 0.6 else self.vector())
            elif kind < 0.87:
                self.lines.append(self.undefined())
            elif kind < 0.97:
                label = self.label()
                self.lines.append(self.producer())
                if rng.random() < 0.3:
                    self.lines.append(self.vector())
                self.lines.append(f"j{rng.choice(CONDITIONS)} {label}")
                self.straight(rng.randrange(1, 4))
                self.lines.append(f"{label}:")
            elif kind < 0.985:
                label, end = self.label(), self.label()
                self.lines += [f"jmp {end}", f"{label}:", self.vector(), "ret", f"{end}:"]
                self.lines.append(f"call {label}")
            else:
                self.lines.append(f"jmp {(label := self.label())}")
                self.lines.append(f"{label}:")

    def loop(self, rounds: int, depth: int = 1) -> None:
        counter, label = ("rcx", "r14", "r15")[depth - 1], self.label()
        self.lines += [f"mov {counter}, {rounds}", f"{label}:"]
        for _ in range(self.rng.randrange(1, 3)):
            self.straight(self.rng.randrange(2, 8))
            if depth > 1 and self.rng.random() < 0.7:
                self.loop(self.rng.choice((2, 5, 30)), depth - 1)
        end = self.pick(f"dec {counter}", f"sub {counter}, 1", f"add {counter}, -1")
        self.lines += [end, f"jnz {label}"]


def _three(names: str, size: int = 0) -> Callable[[Writer], str]:
    def make(w: Writer) -> str:
        which = size or w.rng.choice((16, 32))
        return f"{w.rng.choice(names.split())} {w.reg(which)}, {w.reg(which)}, {w.source(which)}"

    return make


def _two(names: str) -> Callable[[Writer], str]:
    def make(w: Writer) -> str:
        size = w.rng.choice((16, 32))
        return f"{w.rng.choice(names.split())} {w.reg(size)}, {w.source(size)}"

    return make


def _scalar(names: str) -> Callable[[Writer], str]:
    def make(w: Writer) -> str:
        name = w.rng.choice(names.split())
        return f"{name} {w.reg(16)}, {w.reg(16)}, {w.source(16, 8 if name.endswith('d') else 4)}"

    return make


def _move(w: Writer) -> str:
    size = w.rng.choice((16, 32))
    name = w.rng.choice(("vmovdqu", "vmovups", "vmovupd"))
    if w.rng.random() < 0.5:
        return f"{name} {w.target(size)}, {w.reg(size)}"
    return f"{name} {w.reg(size)}, {w.source(size)}"


def _aligned(w: Writer) -> str:
    size = w.rng.choice((16, 32))
    name, at = w.rng.choice(("vmovdqa", "vmovaps", "vmovapd")), w.rng.randrange(4) * size
    place = f"{TYPES[size]} [rbp + {at}]"
    store = w.rng.random() < 0.4
    return f"{name} {place}, {w.reg(size)}" if store else f"{name} {w.reg(size)}, {place}"


def _general(w: Writer) -> str:
    rng, x, byte = w.rng, w.reg(16), w.rng.randrange(256)
    return str(rng.choice((
        lambda: f"vmovd {x}, {rng.choice((*WORDS[4], w.memory(4)))}",
        lambda: f"vmovq {x}, {rng.choice((*LONG, w.memory(8)))}",
        lambda: f"vmovd {rng.choice((*WORDS[4], w.target(4)))}, {x}",
        lambda: f"vmovq {rng.choice((*LONG, w.target(8)))}, {x}",
        lambda: f"vpmovmskb {rng.choice(WORDS[4])}, {w.reg(rng.choice((16, 32)))}",
        lambda: f"vmovmskps {rng.choice(WORDS[4])}, {w.reg(rng.choice((16, 32)))}",
        lambda: f"vpinsrb {x}, {w.reg(16)}, {rng.choice((*WORDS[4], w.memory(1)))}, {byte & 15}",
        lambda: f"vpinsrw {x}, {w.reg(16)}, {rng.choice((*WORDS[4], w.memory(2)))}, {byte & 7}",
        lambda: f"vpinsrq {x}, {w.reg(16)}, {rng.choice((*LONG, w.memory(8)))}, {rng.randrange(2)}",
        lambda: f"vpextrb {rng.choice((*WORDS[4], w.target(1)))}, {x}, {rng.randrange(16)}",
        lambda: f"vpextrw {rng.choice((*WORDS[4], w.target(2)))}, {x}, {rng.randrange(8)}",
        lambda: f"vpextrd {rng.choice((*WORDS[4], w.target(4)))}, {x}, {rng.randrange(4)}",
        lambda: f"vpextrq {rng.choice((*LONG, w.target(8)))}, {x}, {rng.randrange(2)}",
        lambda: f"vcvtsi2sd {x}, {w.reg(16)}, {rng.choice((*LONG, w.memory(8)))}",
        lambda: f"vcvtsi2ss {x}, {w.reg(16)}, {rng.choice((*WORDS[4], w.memory(4)))}",
        lambda: f"vcvttsd2si {rng.choice(LONG)}, {rng.choice((x, w.memory(8)))}",
        lambda: f"vcvtsd2si {rng.choice(LONG)}, {rng.choice((x, w.memory(8)))}",
    ))())  # fmt: skip


def _various(w: Writer) -> str:
    rng, byte = w.rng, w.rng.randrange(256)
    size = rng.choice((16, 32))
    y, z, small = w.reg(32), w.reg(32), w.reg(16)
    return str(rng.choice((
        lambda: f"vpermq {y}, {w.source(32)}, {byte}",
        lambda: f"vpermd {y}, {z}, {w.source(32)}",
        lambda: f"vperm2i128 {y}, {z}, {w.source(32)}, {byte}",
        lambda: f"vinserti128 {y}, {z}, {w.source(16)}, {byte & 1}",
        lambda: f"vextracti128 {rng.choice((small, w.target(16)))}, {y}, {byte & 1}",
        lambda: f"vpalignr {w.reg(size)}, {w.reg(size)}, {w.source(size)}, {byte & 31}",
        lambda: f"vpshufd {w.reg(size)}, {w.source(size)}, {byte}",
        lambda: f"vshufps {w.reg(size)}, {w.reg(size)}, {w.source(size)}, {byte}",
        lambda: f"vblendps {w.reg(size)}, {w.reg(size)}, {w.source(size)}, {byte}",
        lambda: f"vpblendvb {w.reg(size)}, {w.reg(size)}, {w.source(size)}, {w.reg(size)}",
        lambda: f"vpsrld {w.reg(size)}, {w.reg(size)}, {byte & 31}",
        lambda: f"vpslldq {w.reg(size)}, {w.reg(size)}, {byte & 15}",
        lambda: f"vpsllq {y}, {z}, {w.source(16)}",
        lambda: f"vpbroadcastb {y}, {rng.choice((small, w.memory(1)))}",
        lambda: f"vpbroadcastd {y}, {rng.choice((small, w.memory(4)))}",
        lambda: f"vbroadcasti128 {y}, {w.memory(16)}",
        lambda: f"vbroadcastsd {y}, {rng.choice((small, w.memory(8)))}",
        lambda: f"vpmovzxbd {y}, {rng.choice((small, w.memory(8)))}",
        lambda: f"vpmovsxwq {y}, {rng.choice((small, w.memory(8)))}",
        lambda: f"vmovhps {small}, {w.reg(16)}, {w.memory(8)}",
        lambda: f"vmovlps {w.target(8)}, {small}",
        lambda: f"vmovss {small}, {w.memory(4)}",
        lambda: f"vmovsd {w.target(8)}, {small}",
        lambda: f"vcvtph2ps {y}, {rng.choice((small, w.memory(16)))}",
        lambda: f"vcvtps2ph {rng.choice((small, w.target(16)))}, {y}, {byte & 7}",
        lambda: f"vcvtps2pd {y}, {rng.choice((small, w.memory(16)))}",
        lambda: f"vroundps {w.reg(size)}, {w.source(size)}, {byte & 15}",
        lambda: f"vcmppd {w.reg(size)}, {w.reg(size)}, {w.source(size)}, {byte & 31}",
        lambda: f"vlddqu {w.reg(size)}, {w.memory(size)}",
        lambda: f"vpmaskmovd {w.reg(size)}, {w.reg(size)}, {w.memory(size)}",
        lambda: rng.choice(("vzeroupper", "vzeroupper", "vzeroall")),
    ))())  # fmt: skip


_INTEGER = _three(
    "vpaddb vpaddd vpaddq vpsubw vpsubd vpand vpandn vpor vpxor vpcmpeqb vpcmpgtd vpminud vpmaxsw "
    "vpmulld vpmuludq vpmaddwd vpshufb vpunpcklbw vpackuswb vpavgb vpsadbw vpabsd".replace(
        " vpabsd", ""
    )
)
_FLOAT = _three(
    "vaddps vsubpd vmulps vmulpd vdivps vdivpd vminps vmaxpd vaddsubps vhaddpd vandps vxorpd "
    "vunpcklps vfmadd213ps vfmadd231pd vfnmsub132ps vfmaddsub213pd"
)
_UNARY = _two("vsqrtps vsqrtpd vcvtdq2ps vcvttps2dq vcvtps2dq vpabsd vpabsb vmovshdup vmovddup")
_SCALAR = _scalar(
    "vaddss vaddsd vsubsd vmulss vdivsd vdivss vsqrtsd vminsd vfmadd213sd vfmsub231ss"
)
_FLOATING: Final = (
    "vadds", "vaddp", "vsub", "vmul", "vdiv", "vsqrt", "vmin", "vmax", "vcmp", "vhadd", "vcvt",
    "vround", "vfm", "vfn", "vucomi",
)  # fmt: skip
"""Beginnings of mnemonics: portable sequences leave out flags, and choose among NaNs."""
VECTOR: Final[Sequence[Callable[[Writer], str]]] = (
    *[_INTEGER] * 5, _FLOAT, _UNARY, _SCALAR, *[_move] * 4, _aligned, *[_general] * 3,
    *[_various] * 3,
)  # fmt: skip


@dataclass
class Program:
    """Code for BASE, and what the registers and memory hold at its start."""

    text: str
    code: bytes
    seed: int
    mxcsr: int = 0x1F80
    user: bool = False
    starts: frozenset[int] = field(default_factory=frozenset)


_KEYSTONE: Final = Ks(KS_ARCH_X86, KS_MODE_64)
"""Without the checks of :mod:`guests.assemble`: whatever it makes of a line, all run the same."""
CONSTANTS = """
    hlt
    .balign 32
constants:
    .quad 0x0123456789abcdef, 0x3ff0000000000000, 0xbff8000000000000, 0x4000000040400000
words: .word 0x37f, 0x37f, 0xf7f, 0x77f, 0x27f, 0x07f, 0x33b, 0xb7f
    .quad 0x7ff0000000000000, 0xffffffffffffffff, 0x8000000080000000, 0x0000000100000001
"""


def program(seed: int, *, mxcsr: Sequence[int] = (0x1F80,), **more: Any) -> Program:
    """A random program; ``more``: of :class:`Writer`."""
    rng = random.Random(seed)
    writer = Writer(rng, **more)
    shape = rng.random()
    if shape < 0.45:
        writer.straight(rng.randrange(4, 40))
    elif shape < 0.8:
        writer.straight(rng.randrange(3))
        writer.loop(rng.choice((1, 2, 3, 17, 250)))
        writer.straight(rng.randrange(4))
    else:
        writer.loop(rng.choice((2, 9)), 2 + (rng.random() < 0.3))
    text = "\n".join(f"    {line}" if not line.endswith(":") else line for line in writer.lines)
    text += CONSTANTS
    at = BASE + rng.choice((0, 0, 0, PAGE_SIZE - rng.randrange(1, 200)))
    code = bytes(_KEYSTONE.asm(text, at)[0])
    starts = frozenset(insn.ip for insn in Decoder(64, code, ip=at))
    image = b"\xcc" * (at - BASE) + code
    return Program(text, image, seed, rng.choice(mxcsr), rng.random() < 0.4, starts)


@contextmanager
def computer(**exactness: Any) -> Iterator[Machine]:
    """A guest with the memory of the programs, under ``verified`` with these choices."""
    policy = Policy.load("verified").with_exactness(**exactness)
    image = b"\xf4" * (CODE_PAGES * PAGE_SIZE)
    with machine(image, policy=policy, handlers=PACKS) as found:
        space, vm = found.space, found.vm
        assert space is not None
        vm.add_memory(DATA, PAGES * PAGE_SIZE)
        vm.memory.add_slot(ROM, PAGE_SIZE, readonly=True)
        space.map(DATA, DATA, 2 * PAGE_SIZE, write=True, execute=False)
        space.map(DATA + 2 * PAGE_SIZE, DATA + 2 * PAGE_SIZE, PAGE_SIZE, write=False, execute=False)
        space.map(DATA + 4 * PAGE_SIZE, DATA + 4 * PAGE_SIZE, PAGE_SIZE, write=True, execute=False)
        space.map(DEVICE, DEVICE, PAGE_SIZE, write=True, execute=False)
        space.map(ROM, ROM, PAGE_SIZE, write=True, execute=False)
        yield found


_FLOATS = (0.0, 1.0, -1.5, 3.0e38, 1e-39, float("inf"), float("nan"), 7.0, -0.0, 1e-45)


def _vectors(rng: random.Random) -> bytes:
    parts = []
    for number in range(32):
        kind = rng.random()
        if number >= 16:
            low = bytes(32)
        elif kind < 0.4:
            low = rng.randbytes(32)
        elif kind < 0.8:
            low = struct.pack("<8f", *(rng.choice(_FLOATS) for _ in range(8)))
        else:
            low = struct.pack("<4d", *(rng.choice(_FLOATS) for _ in range(4)))
        parts.append(low + bytes(32))
    return b"".join(parts)


def load(found: Machine, what: Program, *, at: int | None = None) -> None:
    """Make the machine ready to run a program."""
    rng = random.Random(what.seed + 1)
    registers, bank, vm = found.vcpu.registers, found.vm.engine.bank, found.vm
    vm.memory.load(BASE, what.code.ljust(CODE_PAGES * PAGE_SIZE, b"\xf4"))
    vm.memory.load(DATA, rng.randbytes(PAGES * PAGE_SIZE))
    for number in range(16):
        registers.gpr[number] = rng.choice((rng.getrandbits(64), rng.randrange(256), 0))
    registers.gpr[6], registers.gpr[7] = DATA + 0x100, DATA + 0x400
    registers.gpr[5], registers.gpr[4] = DATA + 0x800, STACK
    registers.gpr[2] = rng.randrange(20)
    registers.vec.raw[:] = _vectors(rng)
    if bank.read_segment("cs").dpl != (3 if what.user else 0):
        if what.user:
            enter_user_mode(found)
        else:
            bank.write_segment("cs", boot.CODE_64)
            bank.write_segment("ss", boot.DATA)
    bank.write("rflags", 2 | rng.choice((0, 1, 0x8C1, 0x8D5)))
    bank.write("mxcsr", what.mxcsr)
    bank.write("fs_base", DATA + 0x200)
    bank.write("gs_base", DATA + PAGE_SIZE - 0x100)
    bank.write("cr2", 0)
    for name, value in (("fpcw", 0x37F), ("fpsw", 0), ("fptag", 0xFFFF)):
        bank.write(name, value)
    for number in range(8):
        bank.write(f"st{number}", 0)
    registers.rip = min(what.starts) if at is None else at


_X87 = ("fpcw", "fpsw", "fptag", *(f"st{number}" for number in range(8)))
Snapshot = tuple[Any, ...]


def snapshot(found: Machine, *, flags: int = 0x8C5, mxcsr: bool = False) -> Snapshot:
    """All that the guest can see of itself. Of the flags AF is left out."""
    registers = found.vcpu.registers
    memory = found.vm.memory
    return (
        hex(registers.rip),
        tuple(map(hex, registers.gpr)),
        hex(registers.rflags & ~0xFFF | registers.rflags & (flags | 0x700)),
        bytes(registers.vec.raw)[:1024].hex(),
        hex(registers.mxcsr if mxcsr else registers.mxcsr & ~0x3F),
        *(hex(found.vm.engine.bank.read(name)) for name in _X87),
        zlib.crc32(memory.read(BASE, CODE_PAGES * PAGE_SIZE)),
        zlib.crc32(memory.read(DATA, PAGES * PAGE_SIZE)),
        zlib.crc32(memory.read(ROM, PAGE_SIZE)),
    )


def run(found: Machine, what: Program, *, mxcsr: bool = False, exits: int = 12) -> list[Any]:
    """What is seen at each exit; an instruction that faults is left out, a device answers."""
    trace: list[Any] = []
    registers, bank = found.vcpu.registers, found.vm.engine.bank
    for _ in range(exits):
        while isinstance(left := found.vcpu.run(20), Intr):
            pass
        seen: list[Any] = [type(left).__name__]
        if isinstance(left, Mmio):
            seen += [hex(left.phys_addr), left.len, left.is_write, bytes(left.data)]
            if not left.is_write:
                left.data = zlib.crc32(str(len(trace)).encode()).to_bytes(8, "little")[: left.len]
            trace.append((*seen, hex(registers.rip)))
            continue
        if isinstance(left, GuestException):
            seen += [left.exception, hex(left.error_code)]
            if left.exception == 14:
                seen.append(hex(bank.read("cr2")))
        trace.append((*seen, *snapshot(found, mxcsr=mxcsr)))
        if not isinstance(left, GuestException) or registers.rip not in what.starts:
            break
        code = found.vm.memory.read(registers.rip, 15)
        if code[0] == HLT:
            break
        registers.rip += Decoder(64, code).decode().len
    return trace


def copy_state(source: Machine, target: Machine) -> None:
    """Have another machine, on which the same program was loaded, go on where one stands."""
    one, other = source.vcpu.registers, target.vcpu.registers
    for name in ("gpr", "opmask"):
        getattr(other, name)[:] = getattr(one, name)[:]
    other.vec.raw[:] = one.vec.raw[:]
    banks = source.vm.engine.bank, target.vm.engine.bank
    for name in ("rflags", "mxcsr", *_X87):
        banks[1].write(name, banks[0].read(name))
    for at, size in ((BASE, CODE_PAGES * PAGE_SIZE), (DATA, PAGES * PAGE_SIZE)):
        target.vm.memory.load(at, source.vm.memory.read(at, size))
    other.rip = one.rip


def counts(found: Machine) -> Counter[str]:
    """How often the instructions that are trapped were done so far, by whomever."""
    stats = found.vcpu.stats
    return Counter(stats.by_mnemonic) + Counter(stats.lowered)


def first_difference(one: list[Any], other: list[Any]) -> str | None:
    """Where two traces differ, in words."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            parts = [f"{x} / {y}" for x, y in zip(a, b, strict=False) if x != y]
            return f"exit {number} ({a[0]} {a[1:3]}): " + "; ".join(parts)
    return None if len(one) == len(other) else f"{len(one)} exits / {len(other)}"
