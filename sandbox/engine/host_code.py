"""Machine code for the host's own CPU: the pieces that a host run is put together from.

System V calling convention, registers that a callee may change, no stack but the red zone::

    RDX  Unicorn's CPU state          R8   the TLB of the current CPL
    R9   the state page               RSI  address of a memory operand
    R10, R11, RCX  general registers  RAX, RCX, RDI  scratch

Functions return the encoded instructions. Vector registers keep the guest's numbers.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Final

from sandbox.engine.unicorn_tlb import FAST_BYTES, SUPERVISOR, TlbLayout

PAGE_OFFSET_BITS: Final = 12
RETURN: Final = b"\xc3"
ZERO_UPPERS: Final = bytes.fromhex("c5f877")  # vzeroupper
_HOST_MXCSR, _GUEST_MXCSR, _ROUNDS, _NEXT = -16, -12, -24, -40
"""Offsets from RSP, in the red zone, below what PUSHFQ writes."""
_CC_OP_EFLAGS: Final = 1
"""QEMU's name for "the flags are what ``cc_src`` says"."""
_HFLAGS_TS: Final = 1 << 11
_MASKS: Final = 0x1F80
_DEFINED_MXCSR: Final = 0xFFFF


def _i32(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


def _u64(value: int) -> bytes:
    return (value & (1 << 64) - 1).to_bytes(8, "little")


def set_rax(value: int) -> bytes:
    return b"\x48\xb8" + _u64(value)


def set_rcx(value: int) -> bytes:
    return b"\x48\xb9" + _u64(value)


@cache
def load_state(register: str, offset: int) -> bytes:
    """A register from 8 bytes of the CPU state. Flags stay."""
    return bytes((_REX[register], 0x8B, _MODRM[register])) + _i32(offset)


@cache
def store_state(register: str, offset: int) -> bytes:
    """A register to 8 bytes of the CPU state. Flags stay."""
    return bytes((_REX[register], 0x89, _MODRM[register])) + _i32(offset)


_NUMBERS = {"rax": 0, "rcx": 1, "rsi": 6, "rdi": 7, "r10": 10, "r11": 11}
_REX = {name: 0x48 | (number & 8) >> 1 for name, number in _NUMBERS.items()}
_MODRM = {name: 0x82 | (number & 7) << 3 for name, number in _NUMBERS.items()}  # [rdx + disp32]


# -- vector registers: the low half in the CPU state, the upper half in the state page ---------


@cache
def load_low(n: int, offset: int) -> bytes:
    """VMOVDQU xmm, [rdx + offset]; the upper half becomes 0."""
    return bytes((0xC5, 0xFA if n < 8 else 0x7A, 0x6F, 0x82 | (n & 7) << 3)) + _i32(offset)


@cache
def store_low(n: int, offset: int) -> bytes:
    """VMOVDQU [rdx + offset], xmm."""
    return bytes((0xC5, 0xFA if n < 8 else 0x7A, 0x7F, 0x82 | (n & 7) << 3)) + _i32(offset)


@cache
def load_upper(n: int, offset: int) -> bytes:
    """VINSERTI128 ymm, ymm, [r9 + offset], 1."""
    return _vex_r9(n, ~n & 15, 0x38) + _i32(offset) + b"\x01"


@cache
def store_upper(n: int, offset: int) -> bytes:
    """VEXTRACTI128 [r9 + offset], ymm, 1."""
    return _vex_r9(n, 15, 0x39) + _i32(offset) + b"\x01"


def _vex_r9(n: int, vvvv: int, opcode: int) -> bytes:
    """Three-byte VEX, map 0F3A, 66, 256 bits, and a ModRM byte for [r9 + disp32]."""
    return bytes((0xC4, (n < 8) << 7 | 0x43, vvvv << 3 | 5, opcode, 0x81 | (n & 7) << 3))


def clear_uppers(offset: int) -> bytes:
    """Zeros over the upper halves of all 16 registers, by YMM0, which becomes 0."""
    stores = (b"\xc4\xc1\x7e\x7f\x81" + _i32(offset + at) for at in range(0, 256, 32))
    return b"\xc5\xf9\xef\xc0" + b"".join(stores)  # vpxor xmm0, xmm0, xmm0; vmovdqu [r9..], ymm0


# -- memory: through the TLB --------------------------------------------------------------------


def choose_tlb(hflags: int, layout: TlbLayout) -> bytes:
    """R8 becomes the TLB for the CPL in ``hflags``; SMAP is off."""
    there = layout.fast + SUPERVISOR * FAST_BYTES
    return b"".join((
        b"\x8b\x82", _i32(hflags),  # mov eax, [rdx + hflags]
        b"\x83\xe0\x03",  # and eax, 3
        b"\xff\xc0",  # inc eax
        b"\xc1\xe8\x02",  # shr eax, 2: 1 at CPL 3, else 0
        b"\xc1\xe0\x04",  # shl eax, 4: the TLB of CPL 3 is the one before
        b"\x4c\x8d\x82", _i32(there),  # lea r8, [rdx + there]
        b"\x49\x29\xc0",  # sub r8, rax
    ))  # fmt: skip


def scaled_address(scale: int, displacement: int) -> bytes:
    """LEA RSI, [rsi + rdi * scale + displacement]."""
    sib = {1: 0, 2: 1, 4: 2, 8: 3}[scale] << 6 | 7 << 3 | 6
    return bytes((0x48, 0x8D, 0xB4, sib)) + _i32(displacement)


def add_displacement(displacement: int) -> bytes:
    """LEA RSI, [rsi + displacement]."""
    return b"\x48\x8d\xb6" + _i32(displacement) if displacement else b""


def scaled_alone(scale: int, displacement: int) -> bytes:
    """LEA RSI, [rdi * scale + displacement]."""
    sib = {1: 0, 2: 1, 4: 2, 8: 3}[scale] << 6 | 7 << 3 | 5
    return bytes((0x48, 0x8D, 0x34, sib)) + _i32(displacement)


def set_r10(value: int) -> bytes:
    return b"\x49\xba" + _u64(value)


def set_rsi(value: int) -> bytes:
    return b"\x48\xbe" + _u64(value)


def add_state_to_rsi(offset: int) -> bytes:
    """ADD RSI, [rdx + offset]: a segment base."""
    return b"\x48\x03\xb2" + _i32(offset)


def point_to_state_page(offset: int) -> bytes:
    """LEA RSI, [r9 + offset]."""
    return b"\x49\x8d\xb1" + _i32(offset)


def test_alignment(alignment: int) -> bytes:
    """TEST SIL, alignment - 1; what follows goes by NZ."""
    return b"\x40\xf6\xc6" + bytes((alignment - 1,))


def look_up(size: int, field: int, layout: TlbLayout) -> bytes:
    """Compare the entry for RSI with the page of the operand's last byte; RDI is the entry.

    Equal: the page is there, the access is allowed and needs nothing more than a move, and the
    operand does not reach into the next page.
    """
    return b"".join((
        b"\x48\x89\xf7",  # mov rdi, rsi
        b"\x48\xc1\xef", bytes((PAGE_OFFSET_BITS - layout.entry_bits,)),  # shr rdi, n
        b"\x49\x23\x38",  # and rdi, [r8]
        b"\x49\x03\x78\x08",  # add rdi, [r8 + 8]
        b"\x48\x8d\x46", bytes((size - 1,)),  # lea rax, [rsi + size - 1]
        b"\x48\x25", _i32(-1 << PAGE_OFFSET_BITS),  # and rax, -4096
        b"\x48\x3b\x47", bytes((field,)),  # cmp rax, [rdi + field]
    ))  # fmt: skip


def to_host(layout: TlbLayout) -> bytes:
    """ADD RSI, [rdi + addend]: from the guest's linear address to the host's."""
    return b"\x48\x03\x77" + bytes((layout.addend,))


NOT_ZERO: Final = 5
"""As a condition: the last four bits of the opcode."""


def jump_if(condition: int, distance: int) -> bytes:
    return bytes((0x0F, 0x80 | condition)) + _i32(distance)


JUMP_IF_BYTES: Final = 6


def jump(distance: int) -> bytes:
    return b"\xe9" + _i32(distance)


JUMP_BYTES: Final = 5


# -- flags ----------------------------------------------------------------------------------------


def keep_flags(flags: int, cc_source: int, cc_operation: int) -> bytes:
    """Of the host's status flags, ``flags`` become the guest's. They, and RAX, are changed."""
    return b"".join((
        b"\x9c\x58",  # pushfq; pop rax
        b"\x25", _i32(flags),  # and eax, flags
        b"\x48\x89\x82", _i32(cc_source),  # mov [rdx + cc_source], rax
        b"\xc7\x82", _i32(cc_operation), _i32(_CC_OP_EFLAGS),  # mov dword [rdx + ..], 1
    ))  # fmt: skip


def take_flags(cc_source: int) -> bytes:
    """The guest's status flags, which :func:`keep_flags` left there, become the host's."""
    return b"".join((
        b"\x0f\xb6\x82", _i32(cc_source + 1),  # movzx eax, byte [rdx + cc_source + 1]
        b"\xc1\xe8\x03\x83\xe0\x01",  # shr eax, 3; and eax, 1: OF
        b"\x04\x7f",  # add al, 127: OF is set if it was 1
        b"\x8a\xa2", _i32(cc_source),  # mov ah, [rdx + cc_source]
        b"\x9e",  # sahf: the others
    ))  # fmt: skip


def test_task_switched(hflags: int) -> bytes:
    """Zero unless CR0.TS is set."""
    return b"\xf6\x82" + _i32(hflags + 1) + bytes((_HFLAGS_TS >> 8,))


# -- loops ----------------------------------------------------------------------------------------


def set_rounds(count: int) -> bytes:
    """MOV DWORD [rsp - 24], count."""
    return b"\xc7\x44\x24" + _i8(_ROUNDS) + _i32(count)


def count_round() -> bytes:
    """DEC DWORD [rsp - 24]: zero after the last."""
    return b"\xff\x4c\x24" + _i8(_ROUNDS)


# -- the stack ------------------------------------------------------------------------------------


def add_to_state(offset: int, value: int) -> bytes:
    """ADD QWORD [rdx + offset], value."""
    return b"\x48\x83\x82" + _i32(offset) + _i8(value)


LOAD_R10: Final = b"\x4c\x8b\x16"
"""MOV R10, [rsi]"""
STORE_R10: Final = b"\x4c\x89\x16"
RAX_FROM_R10: Final = b"\x4c\x89\xd0"


# -- MXCSR ----------------------------------------------------------------------------------------


def check_masks(mxcsr: int) -> bytes:
    """Compare the masks in the guest's MXCSR with all set; EAX is MXCSR, ECX the difference."""
    return b"".join((
        b"\x0f\xb7\x82", _i32(mxcsr),  # movzx eax, word [rdx + mxcsr]
        b"\x89\xc1",  # mov ecx, eax
        b"\xf7\xd1",  # not ecx
        b"\xf7\xc1", _i32(_MASKS),  # test ecx, masks
    ))  # fmt: skip


def enter_mxcsr() -> bytes:
    """From the host's MXCSR to the guest's, which :func:`check_masks` left in EAX."""
    return b"".join((
        b"\x0f\xae\x5c\x24", _i8(_HOST_MXCSR),  # stmxcsr [rsp - 8]
        b"\x89\x44\x24", _i8(_GUEST_MXCSR),  # mov [rsp - 4], eax
        b"\x0f\xae\x54\x24", _i8(_GUEST_MXCSR),  # ldmxcsr [rsp - 4]
    ))  # fmt: skip


def leave_mxcsr(mxcsr: int) -> bytes:
    """Back, with the exception flags for the guest to see."""
    return b"".join((
        b"\x0f\xae\x5c\x24", _i8(_GUEST_MXCSR),  # stmxcsr [rsp - 4]
        b"\x8b\x44\x24", _i8(_GUEST_MXCSR),  # mov eax, [rsp - 4]
        b"\x66\x89\x82", _i32(mxcsr),  # mov [rdx + mxcsr], ax
        b"\x0f\xae\x54\x24", _i8(_HOST_MXCSR),  # ldmxcsr [rsp - 8]
    ))  # fmt: skip


def _i8(value: int) -> bytes:
    return struct.pack("b", value)


# -- from and to Unicorn --------------------------------------------------------------------------


def count(offset: int) -> bytes:
    """INC QWORD [r9 + offset]."""
    return b"\x49\xff\x81" + _i32(offset)


def set_next(executed: int) -> bytes:
    """Hidden code goes on at RAX; and the note that it has to: 1 at ``executed``."""
    note = set_rcx(executed) + b"\x48\xc7\x01" + _i32(1)  # mov qword [rcx], 1
    return b"\x48\x8b\x4c\x24" + _i8(_NEXT) + b"\x48\x89\x01" + note


def clear_note(executed: int) -> bytes:
    """What is called before hidden code jumps."""
    return set_rcx(executed) + b"\x48\xc7\x01" + _i32(0) + RETURN


def dispatcher(base: int, entries: int, to_host: int, state: int, page: int, code: int) -> bytes:
    """What Unicorn calls before an instruction at ``address``: (handle, address, size, offsets).

    There is one instruction in each 16 bytes of hidden code from ``base`` on; ``offsets`` has 4
    bytes for each: where in ``code`` is what is to be done before it, 0 if nothing. The last 16
    bytes of its page begin with where it goes on; ``to_host`` leads from there to the host's.
    """
    jump = b"".join((
        b"\x48\x81\xce", _i32(0xFFF),  # or rsi, 0xfff
        b"\x48\xba", _u64(to_host - 15),  # mov rdx, to_host - 15
        b"\x48\x01\xd6",  # add rsi, rdx
        b"\x48\x89\x74\x24", _i8(_NEXT),  # mov [rsp - 40], rsi
        b"\x48\xba", _u64(state),  # mov rdx, state
        b"\x49\xb9", _u64(page),  # mov r9, page
        b"\x48\xb9", _u64(code),  # mov rcx, code
        b"\x48\x01\xc8",  # add rax, rcx
        b"\xff\xe0",  # jmp rax
    ))  # fmt: skip
    jump = b"\x85\xc0\x74" + bytes((len(jump),)) + jump  # test eax, eax; jz end
    jump = b"\x8b\x04\x81" + jump  # mov eax, [rcx + rax * 4]
    return b"".join((
        b"\x89\xf0",  # mov eax, esi
        b"\x2d", (base & 0xFFFF_FFFF).to_bytes(4, "little"),  # sub eax, base
        b"\xc1\xe8\x04",  # shr eax, 4
        b"\x3d", entries.to_bytes(4, "little"),  # cmp eax, entries
        b"\x73", bytes((len(jump),)),  # jae end
        jump, RETURN,
    ))  # fmt: skip


def count_words(address: int) -> bytes:
    """Count in the words at a host address that a way out was taken."""
    return set_rcx(address) + b"\x48\xff\x41\x10"  # inc qword [rcx + 16]


def bail(executed: int, bailed: int, handle: int, stop: int) -> bytes:
    """The end of every run that cannot go on: RCX points to the words of the instruction, see
    :mod:`sandbox.engine.host_memory`."""
    onward = b"\x48\xff\x41\x18" + set_next(executed) + RETURN  # inc qword [rcx + 24]
    return b"".join((
        b"\x48\x8b\x01",  # mov rax, [rcx]
        b"\x48\x85\xc0", b"\x74", bytes((len(onward),)),  # test rax, rax; jz stop
        onward,
        b"\x48\xff\x41\x10",  # inc qword [rcx + 16]
        b"\x48\xbf", _u64(bailed), b"\x48\x89\x0f",  # mov [bailed], rcx
        b"\x48\x8b\x41\x08", set_next(executed),  # mov rax, [rcx + 8]
        b"\x48\xbf", _u64(handle), set_rax(stop), b"\xff\xe0",  # uc_emu_stop(handle)
    ))  # fmt: skip
