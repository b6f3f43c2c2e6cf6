"""What the guest is told it has: CPUID as a function of a set of features.

Sources: SDM Vol. 2, CPUID; AMD APM Vol. 3, appendix E. Features have iced-x86's names.

The processor presented is a client Skylake (GenuineIntel, family 6, model 0x5E). glibc chooses by
feature bits, but some of its preferences go by vendor and model: on this one it takes its AVX2
string functions as soon as AVX2 and BMI2 are lit (later models with TSX or AVX-512 quirks have
extra conditions), reads its cache sizes from leaf 4, and expects no 3DNow! or XOP. The brand string
and the hypervisor bit tell the truth to whoever wants to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final, TypeAlias

from iced_x86 import Code, Instruction, OpCodeInfo

from sandbox.cpu import Cpu
from sandbox.decode import FEATURE_NAMES, FORM_NAMES
from sandbox.host_cpuid import BASELINE, BITS
from sandbox.xsave import (
    AVX,
    AVX512_MASK,
    COMPONENTS,
    PKRU,
    SSE,
    X87,
    compacted_size,
    standard_size,
)

Leaf: TypeAlias = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

_EAX, _EBX, _ECX, _EDX = range(4)
_ZERO: Final[Leaf] = (0, 0, 0, 0)

_BASE_BITS: Final = {
    (1, 0, _EDX): "0 FPU, 4 TSC, 5 MSR, 8 CX8, 11 SEP, 15 CMOV, 19 CLFSH, 23 MMX, 24 FXSR, "
    "25 SSE, 26 SSE2",
    (7, 0, _ECX): "0 PREFETCHWT1, 3 PKU",  # bit 4, the host's answer, is OSPKE
    (0x80000001, 0, _EDX): "11 SYSCALL",
}


def _bits() -> dict[str, tuple[int, int, int, int]]:
    found = {}
    for table in (BITS, _BASE_BITS):
        for (leaf, subleaf, register), text in table.items():
            for entry in text.split(","):
                bit, name = entry.split()
                found[name] = (leaf, subleaf, register, int(bit))
    return found


FEATURE_BITS: Final = _bits()
"""Feature name to (leaf, subleaf, register, bit); register 0 is EAX, 3 is EDX."""

# Bits that stand for no instruction.
_ALWAYS: Final = {
    (1, 0, _ECX): [31],  # hypervisor present
    (1, 0, _EDX): [2, 3, 6, 13, 16, 17],  # DE PSE PAE PGE PAT PSE36
    (7, 0, _EBX): [13],  # FCS and FDS are always saved as 0
    (0xD, 1, _EAX): [2],  # XGETBV with ECX = 1
    (0x80000001, 0, _ECX): [0],  # LAHF in 64-bit mode
    (0x80000001, 0, _EDX): [20, 29],  # NX, long mode
    (0x80000007, 0, _EDX): [8],  # invariant TSC
}
_ERMS: Final = (7, 0, _EBX, 9)
"""REP MOVSB and STOSB are fast."""
APIC = 1 << 9
"""Bit of leaf 1 EDX: there is a local APIC."""
OSXSAVE, OSPKE = 1 << 27, 1 << 4
"""Bits of leaf 1 ECX and leaf 7 ECX that show CR4.OSXSAVE and CR4.PKE."""
CR4_OSXSAVE, CR4_PKE = 1 << 18, 1 << 22

# Which features are lit

CANDIDATES: Final = tuple(
    """SSE3 SSSE3 SSE4_1 SSE4_2 POPCNT CMPXCHG16B PCLMULQDQ AES SHA GFNI SEP RDTSCP RDPID
    RDRAND RDSEED MOVBE LZCNT BMI1 BMI2 ADX CLFLUSHOPT CLWB CLDEMOTE CLZERO PREFETCHW PREFETCHWT1
    FSGSBASE MOVDIRI MOVDIR64B SERIALIZE WAITPKG RAO_INT CMPCCXADD SSE4A TBM MONITORX
    XSAVE XSAVEOPT XSAVEC XSAVES AVX F16C FMA AVX2 VAES VPCLMULQDQ FMA4 XOP AVX_VNNI AVX_VNNI_INT8
    AVX_VNNI_INT16 AVX_IFMA AVX_NE_CONVERT SHA512 SM3 SM4
    AVX512F AVX512CD AVX512BW AVX512DQ AVX512_IFMA AVX512_VBMI AVX512_VBMI2 AVX512_VNNI
    AVX512_BITALG AVX512_VPOPCNTDQ AVX512_BF16 AVX512_VP2INTERSECT AVX512_FP16 AVX512VL""".split()
)
"""The features that :func:`features` may light, in the order they are tried.

A form that needs two features counts against the later one: VPCLMULQDQ xmm needs PCLMULQDQ and AVX,
so without it AVX stays dark. Not here, and so never lit: what needs more of a machine than its
instructions (CET, PKU, SMAP, RTM, AMX, VMX, SVM, SGX, key locker, user interrupts, MONITOR), what
Intel never had or has dropped (3DNow!, LWP, MPX, KNC), PTWRITE (which stands for processor trace).
"""

_PREREQUISITES: Final = {
    "SSSE3": "SSE3", "SSE4_1": "SSSE3", "SSE4_2": "SSE4_1", "XSAVEOPT": "XSAVE",
    "XSAVEC": "XSAVE", "XSAVES": "XSAVEC",
    "AVX": "XSAVE SSE4_2 POPCNT", "F16C": "AVX", "FMA": "AVX", "AVX2": "AVX",
    "VAES": "AVX AES", "VPCLMULQDQ": "AVX PCLMULQDQ", "FMA4": "AVX", "XOP": "AVX",
    "AVX_VNNI": "AVX2", "AVX_VNNI_INT8": "AVX2", "AVX_VNNI_INT16": "AVX2", "AVX_IFMA": "AVX2",
    "AVX_NE_CONVERT": "AVX2", "SHA512": "AVX2", "SM3": "AVX", "SM4": "AVX2",
    "AVX512F": "AVX2 FMA F16C",
    "AVX512_VBMI": "AVX512BW", "AVX512_VBMI2": "AVX512BW", "AVX512_BITALG": "AVX512BW",
    "AVX512_BF16": "AVX512BW", "AVX512_FP16": "AVX512BW AVX512DQ",
}  # fmt: skip
"""A feature without these would be a processor that no program expects (all AVX512* need F)."""

EXEMPT_FORMS: Final = {
    "SYSRETD": "a kernel's way back; programs that look at the bit use SYSCALL",
    "SYSRETQ": "see SYSRETD",
    "SYSEXITD": "a kernel's way back; programs that look at the bit use SYSENTER",
    "SYSEXITQ": "see SYSEXITD",
    "PREFETCHRESERVED3_M8": "a reserved hint, used by nothing",
    "PREFETCHRESERVED4_M8": "see PREFETCHRESERVED3_M8",
    "PREFETCHRESERVED5_M8": "see PREFETCHRESERVED3_M8",
    "PREFETCHRESERVED6_M8": "see PREFETCHRESERVED3_M8",
}
"""Forms that do not count, with the reason."""


def features(runs: Callable[[int], bool]) -> frozenset[str]:
    """The features whose every instruction form is run right, given which forms (``Code``) are.

    The baseline of x86-64 (SSE2 and older) is always in: there is no such processor without it.
    A feature is lit exactly if its prerequisites are and ``runs`` holds for every form valid in
    64-bit mode that needs it and, besides it, only what is lit.
    """
    lit = set(BASELINE)
    forms = _forms()
    for name in CANDIDATES:
        if name.startswith("AVX512") and name != "AVX512F" and "AVX512F" not in lit:
            continue
        if not lit.issuperset(_PREREQUISITES.get(name, "").split()):
            continue
        lit.add(name)
        if not all(runs(code) for needed, code in forms[name] if needed <= lit):
            lit.discard(name)
    return frozenset(lit)


def missing(runs: Callable[[int], bool], name: str) -> list[str]:
    """Which forms keep a feature dark, by name."""
    return [FORM_NAMES[code] for _needed, code in _forms()[name] if not runs(code)]


@lru_cache(maxsize=1)
def _forms() -> dict[str, list[tuple[frozenset[str], int]]]:
    """By candidate feature: its forms of 64-bit mode, each with all the features it needs."""
    found: dict[str, list[tuple[frozenset[str], int]]] = {name: [] for name in CANDIDATES}
    instruction = Instruction()
    codes: dict[str, Any] = {n: v for n, v in vars(Code).items() if isinstance(v, int)}
    for name, code in codes.items():
        if name in EXEMPT_FORMS or not OpCodeInfo(code).mode64:
            continue
        instruction.code = code
        needed = frozenset(FEATURE_NAMES[f] for f in instruction.cpuid_features())
        for feature in needed & found.keys():
            found[feature].append((needed, code))
    return found


# What CPUID answers


class CpuidModel:
    """CPUID for a set of features, callable as ``(leaf, subleaf) -> (eax, ebx, ecx, edx)``.

    The call tells what does not change; :meth:`bind` adds what follows a vCPU's state (OSXSAVE,
    OSPKE, the size of the enabled XSAVE area). ``physical_bits`` is 36 to 52; ``apic``:
    the machine has a local APIC. ValueError for a feature that has no CPUID bit.
    """

    max_leaf, max_extended = 0x16, 0x80000008

    def __init__(
        self,
        features: Iterable[str],
        *,
        vendor: str = "GenuineIntel",
        brand: str = "unicorn-fallback virtual x86-64",
        signature: int = 0x506E3,
        physical_bits: int = 40,
        tsc_hz: int = 2_000_000_000,
        apic: bool = False,
    ) -> None:
        self.features = frozenset(features)
        unknown = sorted(self.features - FEATURE_BITS.keys() - BASELINE)
        if unknown:
            raise ValueError(f"no CPUID bit for feature {unknown[0]!r}")
        if len(vendor) != 12 or not 36 <= physical_bits <= 52 or len(brand) > 47:
            raise ValueError("want a vendor of 12 letters, a brand of at most 47, 36 to 52 bits")
        self.xcr0_mask = self._xcr0_mask()
        """What XSETBV may set in XCR0."""
        self._leaves: dict[tuple[int, int], list[int]] = {}
        self._identify(vendor, brand, signature)
        self._describe_caches()
        self._describe_machine(physical_bits, tsc_hz)
        self._describe_xsave()
        self._light()
        if apic:
            self._leaves[1, 0][_EDX] |= APIC

    def __call__(self, leaf: int, subleaf: int = 0) -> Leaf:
        hypervisor = leaf >> 16 == 0x4000
        top = self.max_extended if leaf >> 31 else self.max_leaf
        if not hypervisor and leaf > top:
            leaf = self.max_leaf  # as Intel's do
        key = (leaf, subleaf if leaf in _INDEXED else 0)
        if leaf == 0xB and key not in self._leaves:
            return (0, 0, subleaf & 0xFF, 0)
        eax, ebx, ecx, edx = self._leaves.get(key, _ZERO)
        return eax, ebx, ecx, edx

    def leaves(self) -> dict[tuple[int, int], Leaf]:
        """All answers but the zero ones, by (leaf, subleaf), for KVM_SET_CPUID2."""
        return {at: (w[0], w[1], w[2], w[3]) for at, w in self._leaves.items()}

    @staticmethod
    def is_indexed(leaf: int) -> bool:
        """Whether a leaf looks at ECX."""
        return leaf in _INDEXED

    def bind(self, cpu: Cpu) -> Callable[[int, int], Leaf]:
        """CPUID as one vCPU executes it."""
        registers = cpu.registers

        def cpuid(leaf: int, subleaf: int) -> Leaf:
            eax, ebx, ecx, edx = self(leaf, subleaf)
            if leaf == 1 and registers.bank.read("cr4") & CR4_OSXSAVE:
                ecx |= OSXSAVE & ecx << 1  # only where XSAVE (bit 26) is
            elif leaf == 7 and subleaf == 0 and registers.bank.read("cr4") & CR4_PKE:
                ecx |= OSPKE & ecx << 1
            elif leaf == 0xD and "XSAVE" in self.features:
                if subleaf == 0:
                    ebx = standard_size(registers.xcr0)
                elif subleaf == 1 and "XSAVEC" in self.features:
                    ebx = compacted_size(registers.xcr0)
            return eax, ebx, ecx, edx

        return cpuid

    def _xcr0_mask(self) -> int:
        mask = 1 << X87 | 1 << SSE
        if "AVX" in self.features:
            mask |= 1 << AVX
        if "AVX512F" in self.features:
            mask |= AVX512_MASK
        if "PKU" in self.features:
            mask |= 1 << PKRU
        return mask

    def _identify(self, vendor: str, brand: str, signature: int) -> None:
        leaves = self._leaves
        ebx, edx, ecx = _words(vendor.encode())
        leaves[0, 0] = [self.max_leaf, ebx, ecx, edx]
        leaves[1, 0] = [signature, 0x0001_0800, 0, 0]  # CLFLUSH 64 bytes, 1 processor, APIC id 0
        leaves[0x40000000, 0] = [0x40000000, *_words(b"UnicornFback")]
        leaves[0x80000000, 0] = [self.max_extended, 0, 0, 0]
        words = _words(brand.encode().ljust(48, b"\0"))
        for part in range(3):
            leaves[0x80000002 + part, 0] = words[4 * part : 4 * part + 4]

    def _describe_caches(self) -> None:
        """L1 32 + 32 KiB, L2 256 KiB, L3 8 MiB, lines of 64 bytes, one core."""
        leaves = self._leaves
        leaves[2, 0] = [0xFF01, 0xF0, 0, 0]  # descriptor FF: see leaf 4
        shapes = ((1, 1, 8, 64, 0), (2, 1, 8, 64, 0), (3, 2, 4, 1024, 0), (3, 3, 16, 8192, 6))
        for index, (kind, level, ways, sets, edx) in enumerate(shapes):
            shape = (ways - 1) << 22 | (64 - 1)
            leaves[4, index] = [kind | level << 5 | 1 << 8, shape, sets - 1, edx]
        leaves[0x80000006, 0] = [0, 0, 256 << 16 | 4 << 12 | 64, 0]

    def _describe_machine(self, physical_bits: int, tsc_hz: int) -> None:
        leaves = self._leaves
        leaves[0xB, 0] = [0, 1, 0x100, 0]  # one thread a core
        leaves[0xB, 1] = [0, 1, 0x201, 0]  # one core
        crystal_hz = 25_000_000
        leaves[0x15, 0] = [crystal_hz, tsc_hz, crystal_hz, 0]  # TSC = crystal * EBX / EAX
        mhz = tsc_hz // 1_000_000
        leaves[0x16, 0] = [mhz, mhz, 100, 0]
        leaves[0x80000008, 0] = [physical_bits | 48 << 8, 0, 0, 0]

    def _describe_xsave(self) -> None:
        if "XSAVE" not in self.features:
            return
        leaves = self._leaves
        mask = self.xcr0_mask
        leaves[0xD, 0] = [mask, standard_size(1), standard_size(mask), 0]
        leaves[0xD, 1] = [0, compacted_size(1) if "XSAVEC" in self.features else 0, 0, 0]
        for number, component in COMPONENTS.items():
            if mask >> number & 1:
                leaves[0xD, number] = [component.size, component.offset, 0, 0]

    def _light(self) -> None:
        lit = [FEATURE_BITS[name] for name in self.features | BASELINE if name in FEATURE_BITS]
        lit += [(*at, bit) for at, bits in _ALWAYS.items() for bit in bits]
        if "AVX2" in self.features:
            # glibc then copies and fills long blocks with one REP instruction on the fast path, not
            # with thousands of trapped vector moves: memcpy of 1 MiB took 9 ms instead of 147.
            lit.append(_ERMS)
        for leaf, subleaf, register, bit in lit:
            if leaf == 0xD and "XSAVE" not in self.features:
                continue
            self._leaves.setdefault((leaf, subleaf), [0, 0, 0, 0])[register] |= 1 << bit
        if (7, 1) in self._leaves:
            self._leaves[7, 0][_EAX] = 1


_INDEXED: Final = frozenset({4, 7, 0xB, 0xD, 0x14})
"""Leaves that look at ECX."""


def _words(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
