"""Numbers and layouts of the KVM API that only the engine ``kvm`` needs; see also sandbox.abi.

Source: ``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h``, whose names are kept.
"""

from __future__ import annotations

import struct
from typing import Final

KVM_CAP_READONLY_MEM = 81
KVM_CAP_XSAVE = 55
KVM_CAP_IRQCHIP = 0
KVM_CAP_PIT2 = 33

KVM_CREATE_IRQCHIP = 0xAE60
KVM_IRQ_LINE = 0x4008AE61
KVM_CREATE_PIT2 = 0x4040AE77
KVM_INTERRUPT = 0x4004AE86
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_SET_IDENTITY_MAP_ADDR = 0x4008AE48
KVM_GET_MSRS = 0xC008AE88
KVM_SET_MSRS = 0x4008AE89
KVM_SET_CPUID2 = 0x4008AE90
KVM_GET_DEBUGREGS = 0x8080AEA1
KVM_SET_DEBUGREGS = 0x4080AEA2
KVM_GET_XSAVE = 0x9000AEA4
KVM_SET_XSAVE = 0x5000AEA5
KVM_GET_XCRS = 0x8188AEA6
KVM_SET_XCRS = 0x4188AEA7

XSAVE_BYTES = 4096
"""``struct kvm_xsave``: an XSAVE area in the standard format."""
KVM_PIT_SPEAKER_DUMMY = 1
PIT_CONFIG_BYTES = 64
"""``struct kvm_pit_config``: flags, then nothing."""
IRQ_LEVEL: Final = struct.Struct("<II")
"""``struct kvm_irq_level``: line, level."""
DEBUGREGS_BYTES = 128
"""``struct kvm_debugregs``: DR0-3, DR6, DR7, flags, all 64 bits."""

CPUID_HEAD: Final = struct.Struct("<II")
"""``struct kvm_cpuid2``: how many entries follow."""
CPUID_ENTRY: Final = struct.Struct("<7I12x")
"""``struct kvm_cpuid_entry2``: function, index, flags, EAX, EBX, ECX, EDX."""
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
MAX_CPUID_ENTRIES = 256

MSRS: Final = struct.Struct("<II I4xQ")
"""``struct kvm_msrs`` with one entry: count, index, value."""
XCRS: Final = struct.Struct("<IIII Q 368x")
"""``struct kvm_xcrs`` with one entry: count, flags, index, reserved, value."""
SEGMENT: Final = struct.Struct("<QIH10B")
"""``struct kvm_segment``: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable."""
TABLE: Final = struct.Struct("<QH6x")
"""``struct kvm_dtable``: base, limit."""

TSS_ADDRESS = 0xFFFB_D000
"""Three pages below 4 GiB that Intel's KVM needs for real mode on processors that cannot run it."""
IDENTITY_MAP_ADDRESS = 0xFFFB_C000
"""One more for its page table."""
