"""The fast path runs what the policy allows and nothing else, and the guest cannot tell."""

from __future__ import annotations

import random
import time

import pytest

from guests.assemble import assemble
from sandbox.boot import Machine, Mode
from sandbox.exits import EmulationFailure, GuestException, Hlt
from sandbox.paging import AddressSpace
from sandbox.registers import RAX, RBX, RCX, RDI, RSP
from tests.fuzz_engine import confined
from tests.guest import (
    BASE,
    BITNESS,
    MODES,
    Recorder,
    add_idt,
    machine,
    own_tables,
    policy,
    run_to_hlt,
)

REGISTERS = {
    "real": ("cx", "si", "di", "ax"),
    "protected": ("ecx", "esi", "edi", "eax"),
    "long": ("rcx", "rsi", "rdi", "rax"),
}
TRAPS = {"bswap": b"\x0f\xc8", "cwde": b"\x98", "imul": b"\x6b\xd2\x07", "nop": b"\x66\x0f\x1f\x00"}
"""Instructions to trap, of one to four bytes, in any mode."""
MNEMONICS = ("bswap", "cwde", "cbw", "imul", "nop")
COPY = 0x8000
NOP = b"\x8b\xf6"  # mov esi, esi: a filler that is not on the list


def filler(size: int) -> bytes:
    return NOP * (size // 2) + b"\xf8" * (size % 2)  # clc


def copies_itself(mode: Mode, body_at: int, body: bytes) -> tuple[bytes, int]:
    """Code that runs ``body`` (at address ``body_at``) three times, then copies itself."""
    count, source, target, _ = REGISTERS[mode]
    bits = BITNESS[mode]
    head = assemble(f"mov {count}, 3", BASE, bits)
    again = BASE + len(head)
    middle = head + filler(body_at - again) + body
    at = BASE + len(middle)
    size = 0x1100
    tail = f"""
        dec {count}
        jz done
        jmp {again}
    done:
        mov {source}, {BASE}
        mov {target}, {COPY}
        mov {count}, {size}
        cld
        rep movsb
        hlt
    """
    code = middle + assemble(tail, at, bits)
    return code.ljust(size, b"\xcc"), size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRAPS)
@pytest.mark.parametrize(
    "where",
    ["block start", "mid block", "page end", "across pages", "page start"],
)
def test_a_guest_that_reads_its_code_sees_its_own_bytes(mode: Mode, name: str, where: str) -> None:
    trap = TRAPS[name]
    head = len(assemble(f"mov {REGISTERS[mode][0]}, 3", BASE, BITNESS[mode]))
    at = {
        "block start": BASE + head,
        "mid block": BASE + 0x20,
        "page end": 0x2000 - len(trap),
        "across pages": 0x2000 - len(trap) // 2,
        "page start": 0x2000,
    }[where]
    code, size = copies_itself(mode, at, trap)
    recorder = Recorder(*MNEMONICS)
    with machine(code, mode, policy=policy(*MNEMONICS), handlers=[recorder.pack]) as found:
        run_to_hlt(found)
        assert found.vm.memory.read(COPY, size) == code
        assert found.vm.memory.read(BASE, size) == code
    assert recorder.rips == [at] * 3


SELF_MODIFYING = {
    "the same block": """
        mov ecx, 4
    again:
        mov byte ptr [rip + here + 1], 0xc8     # bswap eax
        mov eax, 1
    here:
        .byte 0x0f, 0xff, 0x90
        mov byte ptr [rip + here + 1], 0x31     # rdtsc
        dec ecx
        jnz again
        hlt
    """,
    "another block": """
        mov ecx, 4
    again:
        mov byte ptr [rip + here + 1], 0xa2
        mov word ptr [rip + here], 0x9090
        mov eax, 1
        call here
        mov word ptr [rip + here], 0xc80f
        call here
        dec ecx
        jnz again
        hlt
        .align 64
    here:
        .byte 0x90, 0x90
        ret
    """,
}


@pytest.mark.parametrize("where", SELF_MODIFYING)
def test_self_modifying_code_cannot_hide_a_forbidden_instruction(where: str) -> None:
    code = assemble(SELF_MODIFYING[where], BASE, 64)
    recorder = Recorder("bswap")
    with machine(code, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] & 0xFFFF_FFFF == 1
    assert recorder.texts == ["bswap eax"] * 4


def test_code_page_written_and_executed_in_one_page_stays_checked_over_many_rounds() -> None:
    """Every byte of a slot of code is rewritten in turn: allowed, forbidden, allowed, ..."""
    code = """
        xor ebx, ebx
        mov ecx, 200
    again:
        lea rdi, [rip + room]
        mov eax, ecx
        and eax, 1
        lea rsi, [rip + words]
        movzx edx, word ptr [rsi + rax * 2]
        mov eax, ecx
        and eax, 63
        lea rdi, [rdi + rax * 2]
        mov [rdi], dx
        mov byte ptr [rdi + 2], 0xc3
        mov eax, 0x11223344
        call rdi
        cmp eax, 0x11223344
        setne al
        movzx eax, al
        add ebx, eax
        dec ecx
        jnz again
        hlt
    words:
        .byte 0x0f, 0xc8, 0x31, 0xf6
        .align 256
    room:
        .space 256
    """
    recorder = Recorder("bswap")
    with machine(code, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RBX] == 0, "no bswap ran"
    assert len(recorder.rips) == 100


def test_jump_into_the_middle_of_an_instruction_is_checked_there() -> None:
    code = """
        mov ecx, 3
    again:
        .byte 0xb8                              # mov eax, imm32
    inside:
        .byte 0x0f, 0xc8, 0xeb, 0x02            # as code: bswap eax; jmp +2
        jmp inside
        dec ecx
        jnz again
        hlt
    """
    recorder = Recorder("bswap")
    with machine(code, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        run_to_hlt(found)
    assert len(recorder.rips) == 3


def test_the_same_physical_code_at_two_addresses_is_trapped_at_both() -> None:
    code = assemble("start: bswap eax\n ret", 0x5000, 64)
    main = (
        "mov eax, 0x5000\n call rax\n mov eax, 0x9000\n call rax\n mov eax, 0x5000\n call rax\n hlt"
    )
    recorder = Recorder("bswap")
    with machine(main, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        space = found.space
        assert space is not None
        space.map(0x5000, 0x20000, 0x1000, write=True, execute=True)
        space.map(0x9000, 0x20000, 0x1000, write=True, execute=True)
        found.vm.memory.load(0x20000, code)
        run_to_hlt(found)
    assert recorder.rips == [0x5000, 0x9000, 0x5000]


def test_a_host_write_reaches_translated_code_through_all_its_addresses() -> None:
    """Both aliases have run; then the host replaces the code by a forbidden instruction."""
    main = """
        xor ecx, ecx
    again:
        mov eax, 0x5000
        call rax
        mov eax, 0x9000
        call rax
        inc ecx
        mov edx, 0xf4
        out dx, al
        jmp again
    """
    recorder = Recorder("bswap")
    with machine(main, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        vcpu, memory, space = found.vcpu, found.vm.memory, found.space
        assert space is not None
        space.map(0x5000, 0x20000, 0x1000, write=True, execute=True)
        space.map(0x9000, 0x20000, 0x1000, write=True, execute=True)
        memory.load(0x20000, assemble("xor eax, eax\n ret"))
        for _round in range(3):
            vcpu.run(10)
            memory.load(0x20000, assemble("bswap eax\n ret"))
            vcpu.run(10)
            memory.write(0x20000, assemble("xor eax, eax\n ret"))
    assert recorder.rips == [0x5000, 0x9000] * 3


@pytest.mark.parametrize("write", ["movbe", "xchg"])
def test_a_handlers_store_over_running_code_takes_effect(write: str) -> None:
    """The store is emulated by a handler; what it writes is forbidden, then allowed again."""
    code = """
        mov ecx, 3
    again:
        mov eax, 0xc0ffc80f                     # 0f c8: bswap eax
        call store
        call target
        mov eax, 0xc0ffc031                     # 31 c0: xor eax, eax
        call store
        call target
        dec ecx
        jnz again
        hlt
    store:
        WRITE
        ret
        .align 64
    target:
        xor eax, eax
        ret
    """
    instruction = {
        "movbe": "rol ax, 8\n movbe [rip + target], ax",
        "xchg": "xchg [rip + target], ax",
    }[write]
    recorder = Recorder("bswap")
    with machine(
        code.replace("WRITE", instruction),
        policy=policy("bswap", "movbe", "xchg"),
        handlers=[recorder.pack, "integer"],
    ) as found:
        run_to_hlt(found)
    assert len(recorder.rips) == 3


def test_trapped_neighbours_do_not_keep_an_instruction_trapped_that_was_replaced() -> None:
    """The second of two trapped instructions becomes an allowed one: the fast path takes it."""
    code = """
        mov ecx, 2
    again:
        bswap eax
    second:
        bswap ebx
        mov word ptr [rip + second], 0xdaf7     # neg edx
        dec ecx
        jnz again
        hlt
    """
    recorder = Recorder("bswap")
    with machine(code, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        found.vcpu.registers.gpr[2] = 5
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[2] == 0xFFFF_FFFB
    assert recorder.texts == ["bswap eax", "bswap ebx", "bswap eax"]


def test_policy_changes_between_runs_in_both_directions() -> None:
    code = """
    again:
        mov eax, 1
        bswap eax
        mov edx, 0xf4
        out dx, eax
        jmp again
    """
    recorder = Recorder("bswap")
    with machine(code, handlers=[recorder.pack]) as found:
        vm, vcpu, seen = found.vm, found.vcpu, []
        for names in ((), ("bswap",), (), ("bswap", "nop"), ()):
            vm.policy = policy(*names)
            seen.append(vcpu.run(10).value)
    assert seen == [0x0100_0000, 1, 0x0100_0000, 1, 0x0100_0000]


def test_byte_pattern_rules_trap_exactly_what_they_match() -> None:
    extra = '[[rule]]\naction = "trap"\nbytes = ["0f c9", "90"]\n'
    code = "bswap eax\n bswap ecx\n nop\n .byte 0x66, 0x90\n bswap edx\n bswap ecx\n hlt"
    recorder = Recorder("bswap", "nop")
    with machine(code, policy=policy(extra=extra), handlers=[recorder.pack]) as found:
        run_to_hlt(found)
    assert recorder.rips == [0x1002, 0x1004, 0x1009]


def test_byte_pattern_rules_can_allow_a_few_bytes_of_a_trapped_form() -> None:
    extra = '[[rule]]\naction = "allow"\nbytes = "0f c9"\n'
    recorder = Recorder("bswap")
    code = "bswap eax\n bswap ecx\n hlt"
    with machine(code, policy=policy("bswap", extra=extra), handlers=[recorder.pack]) as found:
        found.vcpu.registers.gpr[RCX] = 1
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RCX] == 0x0100_0000
    assert recorder.rips == [0x1000]


def test_byte_pattern_rules_hold_for_intercepted_instructions_too() -> None:
    """An allow rule on bytes does not make the machine lose HLT."""
    extra = '[[rule]]\naction = "allow"\nbytes = ["f4", "e6 ??"]\n'
    with machine("hlt", policy=policy(extra=extra)) as found:
        run_to_hlt(found)


def test_thousands_of_blocks_overflow_the_code_buffer_and_stay_checked() -> None:
    """Blocks are dropped when the buffer is full and translated again: still trapped."""
    block = assemble("add eax, 1\n jmp next\nnext:", BASE, 64)
    trapped = assemble("bswap edx\n jmp next\nnext:", BASE, 64)
    unit = block * 40 + trapped
    code = b"\xb9\x03\x00\x00\x00" + unit * 500
    back = BASE + 5
    code += assemble(f"dec ecx\n jz done\n jmp {back}\ndone: hlt", BASE + len(code), 64)
    recorder = Recorder("bswap")
    with machine(code, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        run_to_hlt(found, 60)
        assert found.vcpu.registers.gpr[RAX] == 3 * 40 * 500
    assert len(recorder.rips) == 3 * 500
    assert recorder.rips[:500] == recorder.rips[500:1000] == recorder.rips[1000:]


@pytest.mark.parametrize("raw", ["06", "0fff", "c4e27d", "f00f0b", "66" * 15, "62f1fd48"])
def test_undecodable_bytes_are_an_emulation_failure_at_their_address(raw: str) -> None:
    code = b"\x31\xc0" + bytes.fromhex(raw)
    with machine(code.ljust(64, b"\xff"), policy="everything") as found:
        left = found.vcpu.run(10)
        assert found.vcpu.registers.rip == BASE + 2
    assert left.insn_size == 15
    assert left.bytes.startswith(bytes.fromhex(raw)[:15])


def entry_of(found: Machine, space: AddressSpace, page: int) -> int:
    """Where the page-table entry of a linear page lies."""
    table = space.root
    for shift in (39, 30, 21):
        where = table + (page >> shift & 511) * 8
        table = int.from_bytes(found.vm.memory.read(where, 8), "little") & 0xF_FFFF_FFFF_F000
    return table + (page >> 12 & 511) * 8


def test_code_replaced_by_the_host_while_its_page_was_not_executable() -> None:
    """As a JIT compiler's read() into a page that ran before and will run again."""
    main = """
    again:
        mov eax, 0x5000
        call rax
        mov edx, 0xf4
        out dx, al
        jmp again
    """
    recorder = Recorder("bswap")
    with machine(main, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        vcpu, memory, space = found.vcpu, found.vm.memory, found.space
        assert space is not None
        space.map(0x5000, 0x20000, 0x1000, write=True, execute=True)
        memory.load(0x20000, assemble("xor eax, eax\n ret"))
        vcpu.run(10)
        space.protect(0x5000, 0x1000, write=True, execute=False)
        memory.load(0x20000, assemble("bswap eax\n ret"))
        space.protect(0x5000, 0x1000, write=False, execute=True)
        vcpu.run(10)
    assert recorder.rips == [0x5000]


def test_a_frame_reused_at_the_same_address_runs_its_new_code() -> None:
    """Unmapped, given back, zeroed, filled with other code and mapped again where it was."""
    main = "again:\n mov eax, 0x5000\n call rax\n mov edx, 0xf4\n out dx, al\n jmp again"
    with machine(main) as found:
        vcpu, memory, space = found.vcpu, found.vm.memory, found.space
        assert space is not None
        for value in (1, 2, 3):
            memory.load(0x20000, assemble(f"mov al, {value}\n ret"))
            space.map(0x5000, 0x20000, 0x1000, write=False, execute=True)
            assert vcpu.run(10).value == value
            space.unmap(0x5000, 0x1000)


OWN_TABLES = """
    mov cr3, rax
    mov eax, 0x5000
    call rax
    mov [rbx], rdi                          # another frame, and no INVLPG
    AFTER
    mov ebp, 0x5100
    mov eax, 1
    call rbp
    hlt
"""


@pytest.mark.parametrize(
    "after", ["", "mov edx, 0x5000\n invlpg [rdx]", "mov rax, cr3\n mov cr3, rax"]
)
def test_a_stale_translation_cannot_hide_a_forbidden_instruction(after: str) -> None:
    """The guest changes its page tables: the policy must judge the bytes that really run."""
    recorder = Recorder("bswap")
    with machine("hlt", policy=policy("bswap"), handlers=[recorder.pack]) as found:
        memory, gpr = found.vm.memory, found.vcpu.registers.gpr
        space = own_tables(found)
        memory.load(0x20000, b"\xc3".ljust(0x100, b"\x90") + assemble("bswap eax\n ret"))
        memory.load(0x21000, b"\xc3".ljust(0x100, b"\x90") + assemble("xor ecx, ecx\n ret"))
        space.map(0x5000, 0x20000, 0x1000, write=True, execute=True)
        entry = entry_of(found, space, 0x5000)
        source = OWN_TABLES.replace("AFTER", after)
        memory.load(BASE, assemble(source))
        gpr[RAX], gpr[RBX], gpr[RDI], gpr[RCX] = space.root, entry, 0x21003, 7
        run_to_hlt(found)
        assert gpr[RAX] == 1, "a forbidden instruction ran"
        if after:
            assert (gpr[RCX], recorder.rips) == (0, [])


@pytest.mark.parametrize("where", SELF_MODIFYING)
def test_self_modifying_code_under_the_guests_own_page_tables(where: str) -> None:
    recorder = Recorder("bswap")
    code = "mov cr3, rax\n" + SELF_MODIFYING[where]
    with machine(code, policy=policy("bswap"), handlers=[recorder.pack]) as found:
        found.vcpu.registers.gpr[RAX] = own_tables(found).root
        run_to_hlt(found)
    assert len(recorder.rips) == 4


@pytest.mark.parametrize(
    ("mode", "raw"),
    [
        ("long", "66f30f58c1"),  # addss; Unicorn: addpd
        ("long", "f30f58c1".replace("f3", "f366")),
        ("long", "f3f20f58c1"),
        ("long", "f2f30fb8c1"),
        ("long", "66c3"),
        ("long", "66e803101010"),
        ("long", "660f8403101010"),
        ("long", "66ffd0"),
        ("long", "66ff6310"),
        ("long", "4866c3"),
        ("protected", "66f30f58c1"),
        ("protected", "f3f20f58c1"),
        ("real", "66f30f58c1"),
        ("real", "f2f3a6"),
    ],
)
def test_an_encoding_that_unicorn_reads_otherwise_is_not_left_to_it(mode: Mode, raw: str) -> None:
    code = bytes.fromhex(raw)
    with machine(code.ljust(32, b"\xf4"), mode, policy="everything") as found:
        left = found.vcpu.run(10)
        assert found.vcpu.registers.rip == BASE
    assert left.bytes.startswith(code)


@pytest.mark.parametrize(
    ("mode", "raw"),
    [
        ("long", "66f30fb8c1"),  # popcnt ax, cx
        ("long", "66f20f38f1c1"),  # crc32 eax, cx
        ("long", "66f3ab"),  # rep stosw
        ("long", "6648e800000000"),  # the call of general-dynamic TLS
        ("long", "f3c3"),
        ("protected", "66e80000"),
        ("real", "66e800000000"),
        ("long", "f30f1efa"),
        ("long", "662e0f1f840000000000"),
    ],
)
def test_usual_encodings_with_prefixes_stay_on_the_fast_path(mode: Mode, raw: str) -> None:
    with machine(bytes.fromhex(raw).ljust(32, b"\xf4"), mode, policy="everything") as found:
        found.vcpu.registers.gpr[RCX] = 0
        found.vcpu.registers.gpr[RDI] = 0x4000
        if raw == "f3c3":
            found.vcpu.registers.gpr[RSP] -= 8
            found.vm.memory.load(found.vcpu.registers.gpr[RSP], (BASE + 16).to_bytes(8, "little"))
        run_to_hlt(found)
        assert found.vcpu.stats.fallback_count == 1, "only HLT"


@pytest.mark.parametrize("mode", MODES)
def test_no_forbidden_form_runs_in_random_bytes(mode: Mode) -> None:
    """A little of what ``python -m tests.fuzz_engine`` does for as long as it is told to."""
    tally = confined(mode, random.Random(1), time.process_time() + 1)
    assert tally["EmulationFailure"] > 10


def before_nothing(mode: Mode, last: bytes) -> tuple[bytes, int]:
    """Code that jumps to ``last``, which ends where memory ends, at 0x21000."""
    at = 0x21000 - len(last)
    if mode == "real":
        return b"\xea" + (at & 0xFFF).to_bytes(2, "little") + (0x2000).to_bytes(2, "little"), at
    register = REGISTERS[mode][1]
    return assemble(f"mov {register}, {at}\n jmp {register}", BASE, BITNESS[mode]), at


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("idt", [False, True])
@pytest.mark.parametrize("last", [b"\x98", b"\xf8\xf9\x98", b"\xf8\x89\xd8", b"\x89\xd8\x98\x0f"])
def test_code_runs_up_to_where_the_next_page_cannot_be_fetched(
    mode: Mode, idt: bool, last: bytes
) -> None:
    """Unicorn translates past the end first; what comes before it must run all the same."""
    recorder = Recorder("cwde", "cbw")
    code, at = before_nothing(mode, last)
    forbidden = policy("cwde", "cbw")
    with machine(code, mode, policy=forbidden, handlers=[recorder.pack]) as found:
        memory, registers = found.vm.memory, found.vcpu.registers
        memory.remove_slot(0)
        memory.add_slot(0, 0x21000)
        memory.load(BASE, code)
        memory.load(at, last)
        if found.space is not None:
            found.space.unmap(0x21000, 0x1000)
            found.space.map(0x20000, 0x20000, 0x1000, write=True, execute=True)
            if idt:
                memory.add_slot(0x10_0000, 0x10_0000)
                found.space.map(BASE, BASE, 0x1000, write=True, execute=True)
                memory.load(0x1F00, b"\xf4")
                add_idt(found, {14: 0x1F00})
        registers.gpr[RBX] = 0x77
        left = found.vcpu.run(10)
        cut = last[-1:] == b"\x0f"
        end = 0x21000 - cut
        if mode == "long" and idt:
            assert isinstance(left, Hlt)
            assert found.vcpu.cpu.read_int(registers.gpr[RSP] + 8, 8) == end
        else:
            kind = GuestException if mode == "long" or cut else EmulationFailure
            assert isinstance(left, kind) or (cut and mode != "long"), left
            assert registers.rip & 0xFFF == end & 0xFFF
        assert registers.gpr[RAX] & 0xFF == (0x77 if b"\x89\xd8" in last else 0)
    assert recorder.rips == [
        (at + n) if mode != "real" else (at + n) & 0xFFF for n, b in enumerate(last) if b == 0x98
    ]
