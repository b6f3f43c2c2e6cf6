"""What the base ISA has and the integer pack has not: a list that may only shrink.

Missing are far transfers, interrupts, segment loads, descriptor tables, control and debug
registers, port input and output: the system's part, not the integer unit's.
"""

from __future__ import annotations

from handlers.integer_pack import PACK
from sandbox.decode import FORM_NAMES, MNEMONIC_NAMES, Insn, decode
from sandbox.encodings import all_forms, encodings
from tests.integer_cases import is_handled

FEATURES = frozenset(
    """INTEL8086 INTEL186 INTEL286 INTEL386 INTEL486 X64 CMOV CX8 CMPXCHG16B MULTIBYTENOP PAUSE
    CET_IBT PREFETCHW CLFSH CLFLUSHOPT CLWB CLDEMOTE MOVDIRI SERIALIZE
    BMI1 BMI2 ADX MOVBE POPCNT LZCNT""".split()
)

GAPS = """
CALL_M1616 CALL_M1632 CALL_M1664 JMP_M1616 JMP_M1632 JMP_M1664
RETFW RETFD RETFQ RETFW_IMM16 RETFD_IMM16 RETFQ_IMM16
INT1 INT3 INT_IMM8 IRETW IRETD IRETQ
MOV_SREG_RM16 MOV_SREG_R32M16 MOV_SREG_R64M16 POPW_FS POPQ_FS POPW_GS POPQ_GS
LSS_R16_M1616 LSS_R32_M1632 LSS_R64_M1664 LFS_R16_M1616 LFS_R32_M1632 LFS_R64_M1664
LGS_R16_M1616 LGS_R32_M1632 LGS_R64_M1664 SWAPGS
SLDT_RM16 SLDT_R32M16 SLDT_R64M16 STR_RM16 STR_R32M16 STR_R64M16
LLDT_RM16 LLDT_R32M16 LLDT_R64M16 LTR_RM16 LTR_R32M16 LTR_R64M16
VERR_RM16 VERR_R32M16 VERR_R64M16 VERW_RM16 VERW_R32M16 VERW_R64M16
LAR_R16_RM16 LAR_R32_R32M16 LAR_R64_R64M16 LSL_R16_RM16 LSL_R32_R32M16 LSL_R64_R64M16
SGDT_M1664 SIDT_M1664 LGDT_M1664 LIDT_M1664
SMSW_RM16 SMSW_R32M16 SMSW_R64M16 LMSW_RM16 LMSW_R32M16 LMSW_R64M16
MOV_R64_CR MOV_CR_R64 MOV_R64_DR MOV_DR_R64 CLTS INVLPG_M INVD WBINVD HLT WAIT
IN_AL_IMM8 IN_AX_IMM8 IN_EAX_IMM8 IN_AL_DX IN_AX_DX IN_EAX_DX
OUT_IMM8_AL OUT_IMM8_AX OUT_IMM8_EAX OUT_DX_AL OUT_DX_AX OUT_DX_EAX
INSB_M8_DX INSW_M16_DX INSD_M32_DX OUTSB_DX_M8 OUTSW_DX_M16 OUTSD_DX_M32
""".split()


def first_encoding(code: int) -> Insn | None:
    """None for what cannot be built: near branches, and forms that only AMD decodes."""
    try:
        return next(encodings(code), None)
    except ValueError:
        return None


def test_the_gaps_in_64_bit_mode_are_these() -> None:
    gaps = []
    for code in all_forms():
        insn = first_encoding(code)
        if insn is not None and insn.features[0] in FEATURES and not is_handled(insn):
            gaps.append(FORM_NAMES[code])
    assert sorted(gaps) == sorted(GAPS)


def test_near_branches_have_no_gaps() -> None:
    """Every one-byte and two-byte near branch opcode of 64-bit mode, and the groups."""
    opcodes = [bytes([op]) for op in (*range(0x70, 0x80), *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB)]
    opcodes += [b"\xc2", b"\xc3", b"\xff\xd0", b"\xff\xe0", b"\xff\x10", b"\xff\x20"]
    opcodes += [b"\x0f" + bytes([op]) for op in range(0x80, 0x90)]
    for opcode in opcodes:
        for prefix in (b"", b"\x67", b"\x3e", b"\xf2"):
            insn = decode(prefix + opcode + bytes(8), 64)
            assert is_handled(insn), insn


def test_every_name_in_the_pack_exists() -> None:
    mnemonics = {mnemonic for handler in PACK.handlers for mnemonic in handler.mnemonics}
    forms = {form for handler in PACK.handlers for form in handler.forms}
    assert mnemonics <= set(MNEMONIC_NAMES.values())
    assert forms <= set(FORM_NAMES.values())
