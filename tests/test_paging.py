"""Page walks and page tables, compared with guest accesses that Unicorn walks itself.

The tables are written by hand, in all four kinds of paging; a guest then makes the access natively,
and its #PF error code and CR2, or its success and the accessed and dirty bits, must be what the
walker says and does. Where the manual and Unicorn part, the manual's word is tested by itself.
"""

from __future__ import annotations

import itertools
import struct
from dataclasses import dataclass, field

import pytest

from sandbox.boot import CODE_64, DATA, USER_CODE_64, USER_DATA
from sandbox.cpu import Fault
from sandbox.errors import SandboxError
from sandbox.exits import GuestException, Hlt
from sandbox.memory import PAGE_SIZE, MmioRead, PhysicalMemory
from sandbox.paging import (
    ACCESSED,
    DIRTY,
    FETCH,
    LARGE,
    NX,
    PRESENT,
    READ,
    SYSTEM_READ,
    SYSTEM_WRITE,
    USER,
    WRITE,
    WRITE_ACCESS,
    Access,
    AddressSpace,
    FrameAllocator,
    PagedMemory,
    Walker,
)
from sandbox.registers import AC, RBX, RSP
from tests.guest import machine

PE, PG, WP = 1, 1 << 31, 1 << 16
PSE, PAE, SMEP, SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
LMA, NXE = 1 << 10, 1 << 11
ALL = PRESENT | WRITE | USER


@dataclass
class Control:
    """Control registers without a CPU."""

    cr0: int = PE | PG | WP
    cr3: int = 0x1000
    cr4: int = PAE
    efer: int = LMA | NXE
    rflags: int = 2
    cpl: int = 0
    memory: PhysicalMemory = field(default_factory=PhysicalMemory)

    def __post_init__(self) -> None:
        self.memory.add_slot(0, 0x10_0000)

    def read(self, name: str) -> int:
        return int(getattr(self, name))

    def put(self, table: int, index: int, entry: int, size: int = 8) -> None:
        self.memory.load(table + index * size, entry.to_bytes(size, "little"))

    def get(self, table: int, index: int, size: int = 8) -> int:
        return int.from_bytes(self.memory.read(table + index * size, size), "little")

    def translate(self, address: int, access: Access = READ) -> int:
        return Walker(self, self.memory).translate(address, access)

    def fault(self, address: int, access: Access = READ) -> tuple[int, int | None, int | None]:
        with pytest.raises(Fault) as error:
            self.translate(address, access)
        return error.value.vector, error.value.error_code, error.value.address


def four_level(leaf: int = 0x8000 | ALL, **control: int) -> Control:
    """Linear 0x4020_0000 + 0x3000 by one entry of each of four tables."""
    c = Control(**control)  # type: ignore[arg-type]
    c.put(0x1000, 0, 0x2000 | ALL)
    c.put(0x2000, 1, 0x3000 | ALL)
    c.put(0x3000, 1, 0x4000 | ALL)
    c.put(0x4000, 3, leaf)
    return c


HERE = 0x4020_3000

# The manual's words


def test_without_paging_linear_is_physical_cut_to_32_bits() -> None:
    assert Control(cr0=PE).translate(0x1_2345_6789) == 0x2345_6789


def test_four_levels() -> None:
    assert four_level().translate(HERE + 0xABC) == 0x8ABC


def test_large_pages_of_2_mib_and_1_gib() -> None:
    c = four_level()
    c.put(0x3000, 2, 0xFFE0_0000 | ALL | LARGE)
    assert c.translate(0x4040_0000 + 0x12_3456) == 0xFFF2_3456
    c.put(0x2000, 2, 0x1_C000_0000 | ALL | LARGE)
    assert c.translate(0x8000_0000 + 0x1234_5678) == 0x1_D234_5678


def test_pae() -> None:
    c = Control(efer=NXE, cr3=0x1020)
    c.put(0x1020, 1, 0x3000 | PRESENT)
    c.put(0x3000, 1, 0x4000 | ALL)
    c.put(0x3000, 2, 0x60_0000 | ALL | LARGE)
    c.put(0x4000, 3, 0x8000 | ALL)
    assert c.translate(HERE + 5) == 0x8005
    assert c.translate(0x4040_0000 + 0x1F_FFFF) == 0x7F_FFFF
    c.cpl = 3
    assert c.translate(HERE, WRITE_ACCESS) == 0x8000, "a PDPTE limits nothing"
    assert c.get(0x1020, 1) == 0x3000 | PRESENT, "and is not marked"


def test_32_bit_paging() -> None:
    c = Control(efer=0, cr4=PSE)
    c.put(0x1000, 0x101, 0x4000 | ALL, 4)
    c.put(0x4000, 3, 0x8000 | ALL, 4)
    c.put(0x1000, 0x102, 0x80_0000 | ALL | LARGE, 4)
    assert c.translate(0x4040_3000 + 7) == 0x8007
    assert c.translate(0x4080_0000 + 0x3F_FFFF) == 0xBF_FFFF
    c.cr4 = 0
    c.put(0x1000, 0x102, 0x4000 | ALL | LARGE, 4)
    assert c.translate(0x4080_3000) == 0x8000, "without CR4.PSE bit 7 means nothing"


def test_a_4_mib_page_beyond_4_gib_by_pse36() -> None:
    """Bits 20:13 of the entry are bits 39:32 of the address (SDM Vol. 3, table 4-4)."""
    c = Control(efer=0, cr4=PSE)
    c.put(0x1000, 0x102, 0x80_0000 | 0x12 << 13 | ALL | LARGE, 4)
    assert c.translate(0x4080_0000 + 0x1234) == 0x12_0080_1234


def test_non_canonical_is_gp() -> None:
    c = four_level()
    for address in (1 << 47, (1 << 64) - (1 << 47) - 1, 0x8000_0000_0000_0000):
        assert c.fault(address) == (13, 0, None)


@pytest.mark.parametrize("table", [0x1000, 0x2000, 0x3000, 0x4000])
def test_an_absent_entry_at_each_level(table: int) -> None:
    c = four_level()
    index = {0x1000: 0, 0x4000: 3}.get(table, 1)
    c.put(table, index, c.get(table, index) & ~PRESENT)
    assert c.fault(HERE) == (14, 0, HERE)
    assert c.fault(HERE, WRITE_ACCESS) == (14, 2, HERE)
    assert c.fault(HERE, FETCH) == (14, 0x10, HERE)
    c.cpl = 3
    assert c.fault(HERE, WRITE_ACCESS) == (14, 6, HERE)
    assert c.fault(HERE, SYSTEM_WRITE) == (14, 2, HERE)


def test_reserved_bits_fault() -> None:
    c = four_level()
    c.put(0x3000, 2, 0xFFE0_0000 | 1 << 15 | ALL | LARGE)
    assert c.fault(0x4040_0000) == (14, 9, 0x4040_0000)
    c = four_level(0x8000 | ALL | NX, efer=LMA)
    assert c.fault(HERE) == (14, 9, HERE), "NX is reserved without EFER.NXE"
    c = four_level()
    c.put(0x1000, 0, c.get(0x1000, 0) | LARGE)
    assert c.fault(HERE) == (14, 9, HERE), "no large page in a PML4"


@pytest.mark.parametrize("bit", [40, 47, 51])
def test_physical_address_bits_beyond_the_width_are_reserved(bit: int) -> None:
    c = four_level(0x8000 | ALL | 1 << bit)
    assert c.fault(HERE) == (14, 9, HERE)


def test_the_fetch_bit_of_the_error_code_needs_nx_or_smep() -> None:
    assert four_level(0, efer=LMA).fault(HERE, FETCH) == (14, 0, HERE)
    assert four_level(0, efer=LMA, cr4=PAE | SMEP).fault(HERE, FETCH) == (14, 0x10, HERE)


RIGHTS = [
    # leaf, cpl, cr0, cr4, rflags, access, error code or None
    (ALL, 3, WP, 0, 0, READ, None),
    (ALL, 3, WP, 0, 0, WRITE_ACCESS, None),
    (ALL, 3, WP, 0, 0, FETCH, None),
    (PRESENT | WRITE, 3, WP, 0, 0, READ, 5),
    (PRESENT | WRITE, 3, WP, 0, 0, FETCH, 0x15),
    (PRESENT | WRITE, 3, WP, 0, 0, SYSTEM_READ, None),
    (PRESENT | USER, 3, WP, 0, 0, WRITE_ACCESS, 7),
    (PRESENT | USER, 3, 0, 0, 0, WRITE_ACCESS, 7),
    (PRESENT | USER, 0, WP, 0, 0, WRITE_ACCESS, 3),
    (PRESENT | USER, 0, 0, 0, 0, WRITE_ACCESS, None),
    (PRESENT, 0, WP, 0, 0, WRITE_ACCESS, 3),
    (PRESENT, 0, WP, 0, 0, READ, None),
    (ALL | NX, 0, WP, 0, 0, FETCH, 0x11),
    (ALL | NX, 3, WP, 0, 0, FETCH, 0x15),
    (ALL | NX, 3, WP, 0, 0, READ, None),
    (ALL, 0, WP, SMEP, 0, FETCH, 0x11),
    (ALL, 3, WP, SMEP, 0, FETCH, None),
    (PRESENT | WRITE, 0, WP, SMEP, 0, FETCH, None),
    (ALL, 0, WP, SMAP, 0, READ, 1),
    (ALL, 0, WP, SMAP, 0, WRITE_ACCESS, 3),
    (ALL, 0, WP, SMAP, AC, READ, None),
    (ALL, 0, WP, SMAP, AC, SYSTEM_READ, 1),
    (ALL, 3, WP, SMAP, 0, READ, None),
    (ALL, 0, WP, SMAP, 0, FETCH, None),
    (PRESENT | WRITE, 0, WP, SMAP, 0, READ, None),
]


@pytest.mark.parametrize(("leaf", "cpl", "cr0", "cr4", "rflags", "access", "error"), RIGHTS)
def test_rights(
    leaf: int, cpl: int, cr0: int, cr4: int, rflags: int, access: Access, error: int | None
) -> None:
    c = four_level(0x8000 | leaf, cpl=cpl, cr0=PE | PG | cr0, cr4=PAE | cr4, rflags=2 | rflags)
    if error is None:
        assert c.translate(HERE, access) == 0x8000
    else:
        assert c.fault(HERE, access) == (14, error, HERE)


def test_the_rights_of_all_levels_are_combined() -> None:
    for table, index in ((0x1000, 0), (0x2000, 1), (0x3000, 1)):
        for bit, access, error in ((WRITE, WRITE_ACCESS, 7), (USER, READ, 5)):
            c = four_level(cpl=3)
            c.put(table, index, c.get(table, index) & ~bit)
            assert c.fault(HERE, access) == (14, error, HERE)
        c = four_level()
        c.put(table, index, c.get(table, index) | NX)
        assert c.fault(HERE, FETCH) == (14, 0x11, HERE)


def test_accessed_and_dirty_bits_are_set_as_used_and_not_by_a_fault() -> None:
    c = four_level(0x8000 | PRESENT | USER, cpl=3)
    c.fault(HERE, WRITE_ACCESS)
    assert [c.get(t, i) & (ACCESSED | DIRTY) for t, i in ((0x1000, 0), (0x4000, 3))] == [0, 0]
    c.translate(HERE)
    walked = ((0x1000, 0), (0x2000, 1), (0x3000, 1), (0x4000, 3))
    assert [c.get(t, i) & (ACCESSED | DIRTY) for t, i in walked] == [ACCESSED] * 4
    c.put(0x4000, 3, 0x8000 | ALL)
    c.translate(HERE, WRITE_ACCESS)
    assert [c.get(t, i) & (ACCESSED | DIRTY) for t, i in walked] == [
        *[ACCESSED] * 3, ACCESSED | DIRTY
    ]  # fmt: skip


# The same by guests that Unicorn translates for

TABLES = 0x20_0000
"""Physical: PML4, PDPT, PD, PT of the page under test, one after the other."""
PAGE = 0x100_0000_0000
TARGET = 0x30_0000


def guest(
    code: str, leaf: int, cpl: int, cr0: int, cr4: int, rflags: int
) -> tuple[object, int, int]:
    """What the vCPU left with, CR2, and the leaf entry afterwards."""
    with machine(code) as found:
        assert found.space is not None
        memory, bank = found.vm.memory, found.vm.engine.bank
        root = found.space.root
        pml4 = memory.read(root, 8)
        memory.load(TABLES, pml4)
        index = PAGE >> 39 & 511
        memory.load(TABLES + index * 8, struct.pack("<Q", TABLES + 0x1000 | ALL))
        memory.load(
            TABLES + 0x1000 + (PAGE >> 30 & 511) * 8, struct.pack("<Q", TABLES + 0x2000 | ALL)
        )
        memory.load(TABLES + 0x2000, struct.pack("<Q", TABLES + 0x3000 | ALL))
        memory.load(TABLES + 0x3000, struct.pack("<Q", TARGET | leaf))
        memory.load(TARGET, b"\xc3")
        bank.write("cr3", TABLES)
        if (
            cr4 & (SMEP | SMAP) and not cpl
        ):  # the guest's own pages are user pages in the machine's tables
            found.space.map(0x1000, 0x1000, 0x1000, write=True, execute=True, user=False)
            stack = found.vcpu.registers.gpr[RSP] - PAGE_SIZE
            found.space.map(stack, stack, PAGE_SIZE, write=True, execute=False, user=False)
        bank.write("cr4", bank.read("cr4") | cr4)
        bank.write("cr0", bank.read("cr0") & ~WP | cr0)
        bank.write("rflags", 2 | rflags)
        bank.write_segment("cs", USER_CODE_64 if cpl else CODE_64)
        bank.write_segment("ss", USER_DATA if cpl else DATA)
        found.vcpu.registers.gpr[RBX] = PAGE
        left = found.vcpu.run(5)
        entry = int.from_bytes(memory.read(TABLES + 0x3000, 8), "little")
        return left, bank.read("cr2"), entry


NATIVE = {READ: "mov al, [rbx]", WRITE_ACCESS: "mov [rbx], al", FETCH: "call rbx"}


@pytest.mark.parametrize(
    ("leaf", "cpl", "cr0", "cr4", "rflags", "access", "error"),
    [case for case in RIGHTS if case[5] in NATIVE],
)
def test_native_accesses_of_the_fast_path_have_the_same_rights(
    leaf: int, cpl: int, cr0: int, cr4: int, rflags: int, access: Access, error: int | None
) -> None:
    end = "int3" if cpl else "hlt"
    left, cr2, entry = guest(f"{NATIVE[access]}\n {end}", leaf, cpl, cr0, cr4, rflags)
    if error is None:
        assert left == (GuestException(3) if cpl else Hlt())
        dirty = DIRTY if access is WRITE_ACCESS else 0
        assert entry & (ACCESSED | DIRTY) == ACCESSED | dirty
    else:
        assert (left, cr2) == (GuestException(14, error), PAGE)
        assert entry & (ACCESSED | DIRTY) == 0


@pytest.mark.parametrize("reserved", [1 << 40, 1 << 47, 1 << 51])
def test_native_accesses_see_reserved_bits_like_the_walker(reserved: int) -> None:
    left, cr2, _entry = guest("mov al, [rbx]\n hlt", ALL | reserved, 0, WP, 0, 0)
    assert (left, cr2) == (GuestException(14, 9), PAGE)


@pytest.mark.parametrize("pae", [False, True])
def test_32_bit_guests_translate_like_the_walker(pae: bool) -> None:
    """A protected-mode guest turns paging on and reads through a small and a large page."""
    source = f"""
        mov eax, 0x200000
        mov cr3, eax
        mov eax, cr4
        or eax, {PSE | (PAE if pae else 0):#x}
        mov cr4, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        mov ebx, [0x40403000]
        mov ecx, [0x40812344]
        mov [0x40403004], ebx
        hlt
    """
    with machine(source, "protected") as found:
        memory = found.vm.memory
        size = 8 if pae else 4

        def put(table: int, index: int, entry: int) -> None:
            memory.load(table + index * size, entry.to_bytes(size, "little"))

        if pae:
            put(0x20_0000, 0, 0x20_1000 | PRESENT)
            put(0x20_0000, 1, 0x20_2000 | PRESENT)
            put(0x20_1000, 0, 0 | ALL | LARGE)
            put(0x20_2000, 2, 0x20_3000 | ALL)
            put(0x20_2000, 4, 0x40_0000 | ALL | LARGE)
            put(0x20_3000, 3, 0x30_0000 | ALL)
        else:
            put(0x20_0000, 0, 0 | ALL | LARGE)
            put(0x20_0000, 0x101, 0x20_3000 | ALL)
            put(0x20_0000, 0x102, 0x40_0000 | 1 << 13 | ALL | LARGE)  # PSE-36: at 0x1_0040_0000
            put(0x20_3000, 3, 0x30_0000 | ALL)
        memory.load(0x30_0000, b"smal")
        high = 0 if pae else 1 << 32
        memory.add_slot(0x1_0040_0000, 0x40_0000)
        memory.load(high + 0x41_2344, b"larg")
        left = found.vcpu.run(5)
        assert isinstance(left, Hlt), (left, hex(found.vcpu.registers.rip))
        gpr = found.vcpu.registers.gpr
        assert gpr[3].to_bytes(4, "little") == b"smal"
        assert gpr[1].to_bytes(4, "little") == b"larg"
        assert memory.read(0x30_0004, 4) == b"smal"
        for address, data in ((0x4040_3000, b"smal"), (0x4081_2344, b"larg")):
            assert found.vcpu.cpu.read(address, 4) == data


# Virtual memory as handlers see it


@pytest.fixture
def paged() -> tuple[PagedMemory, Control]:
    """Pages 3 and 4 of HERE's table lie apart; 5 is absent, 6 read-only."""
    c = four_level()
    c.put(0x4000, 4, 0xA000 | ALL)
    c.put(0x4000, 6, 0xC000 | PRESENT | USER)
    c.put(0x4000, 7, 0x5_0000_0000 | ALL)
    return PagedMemory(Walker(c, c.memory), c.memory), c


def test_accesses_across_pages(paged: tuple[PagedMemory, Control]) -> None:
    memory, c = paged
    for _warm in range(2):
        memory.write(HERE + 0xFFE, b"abcd")
        assert memory.read(HERE + 0xFFE, 4) == b"abcd"
    assert (c.memory.read(0x8FFE, 2), c.memory.read(0xA000, 2)) == (b"ab", b"cd")


@pytest.mark.parametrize(("page", "error"), [(0x1000, 2), (0x2FFE - 0xFFE, 3)])
def test_a_write_that_faults_in_its_second_page_writes_nothing(
    paged: tuple[PagedMemory, Control], page: int, error: int
) -> None:
    memory, c = paged
    start = HERE + 0x1FFE if error == 2 else HERE + 0x3000 - 2
    if error == 3:
        c.put(0x4000, 5, 0xB000 | ALL)
    for attempt in (lambda: memory.write(start, b"abcd"), lambda: memory.check_write(start, 4)):
        with pytest.raises(Fault) as fault:
            attempt()
        assert (fault.value.error_code, fault.value.address) == (error, start + 2)
    assert c.memory.read(0xAFFE, 2) == c.memory.read(0xBFFE, 2) == bytes(2)


def test_a_fault_comes_before_mmio(paged: tuple[PagedMemory, Control]) -> None:
    memory, c = paged
    with pytest.raises(MmioRead):
        memory.read(HERE + 0x4000, 4)
    c.put(0x4000, 8, 0)
    with pytest.raises(Fault):
        memory.read(HERE + 0x4FFE, 4)


def test_changed_tables_are_seen_after_a_flush(paged: tuple[PagedMemory, Control]) -> None:
    memory, c = paged
    memory.write(HERE, b"old")
    c.put(0x4000, 3, 0xE000 | ALL)
    memory.flush()
    assert memory.read(HERE, 3) == bytes(3)


def test_the_cpl_decides_and_implicit_accesses_are_the_systems() -> None:
    c = four_level(0x8000 | PRESENT | WRITE, cpl=3)
    walker = Walker(c, c.memory)
    with pytest.raises(Fault):
        PagedMemory(walker, c.memory).read(HERE, 1)
    assert PagedMemory(walker, c.memory, implicit=True).read(HERE, 1) == b"\0"


def test_an_access_at_the_end_of_the_address_space_wraps_to_zero_and_faults() -> None:
    c = four_level()
    c.put(0x1000, 511, 0x2000 | ALL)
    c.put(0x2000, 511, 0x3000 | ALL)
    c.put(0x3000, 511, 0x4000 | ALL)
    c.put(0x4000, 511, 0xF000 | ALL)
    memory = PagedMemory(Walker(c, c.memory), c.memory)
    top = (1 << 64) - 2
    assert memory.read(top, 2) == bytes(2)
    with pytest.raises(Fault) as fault:
        memory.read(top, 4)
    assert fault.value.address == 0


# Tables that the machine builds


@pytest.fixture
def space() -> tuple[AddressSpace, Control, list[int]]:
    c = Control()
    changes: list[int] = []
    built = AddressSpace(
        c.memory, FrameAllocator(c.memory, 0x1_0000, 0x8_0000), lambda: changes.append(1)
    )
    c.cr3 = built.root
    return built, c, changes


def test_map_unmap_protect(space: tuple[AddressSpace, Control, list[int]]) -> None:
    built, c, changes = space
    first = 0x7FFF_FFFF_E000  # to the end of the lower half, across nothing
    built.map(first, 0x9_0000, 0x2000, write=True, execute=False)
    assert changes == []
    assert c.translate(first + 0x1234, WRITE_ACCESS) == 0x9_1234
    assert c.fault(first, FETCH) == (14, 0x11, first)
    built.protect(first, 0x1000, write=False, execute=True)
    assert changes == [1]
    assert c.translate(first, FETCH) == 0x9_0000
    assert c.fault(first, WRITE_ACCESS) == (14, 3, first)
    assert c.translate(first + 0x1000, WRITE_ACCESS) == 0x9_1000
    built.unmap(first, 0x2000)
    assert c.fault(first + 0x1FFF)[1] == 0
    built.unmap(first, 0x2000)


def test_map_over_tables_of_several_levels(space: tuple[AddressSpace, Control, list[int]]) -> None:
    built, c, _changes = space
    start = (1 << 39) - 0x2000
    built.map(start, 0x9_0000, 0x4000, write=True, execute=True, user=False)
    for n in range(4):
        assert c.translate(start + n * 0x1000 + n) == 0x9_0000 + n * 0x1000 + n
    c.cpl = 3
    assert c.fault(start)[1] == 5


def test_mapping_again_replaces_and_tells(space: tuple[AddressSpace, Control, list[int]]) -> None:
    built, c, changes = space
    built.map(0x1000, 0x9_0000, 1, write=True, execute=True)
    built.map(0x1000, 0xA_0000, 1, write=False, execute=False)
    assert (c.translate(0x1000), len(changes)) == (0xA_0000, 1)


def test_frames_are_zeroed_reused_and_run_out() -> None:
    memory = PhysicalMemory()
    memory.add_slot(0, 0x1_0000)
    frames = FrameAllocator(memory, 0x4000, 0x4000)
    got = [frames.allocate(1), frames.allocate(0x2000), frames.allocate(PAGE_SIZE)]
    assert got == [0x4000, 0x5000, 0x7000]
    with pytest.raises((MemoryError, SandboxError), match="exhausted"):
        frames.allocate(1)
    memory.write(0x5000, b"old" * 1000)
    frames.free(0x5000, 0x1000)
    frames.free(0x6000, 0x1000)
    assert frames.allocate(0x2000) == 0x5000
    assert memory.read(0x5000, 0x2000) == bytes(0x2000)
    for order in itertools.permutations(((0x4000, 0x1000), (0x5000, 0x2000), (0x7000, 0x1000))):
        for where, size in order:
            frames.free(where, size)
        assert frames.allocate(0x4000) == 0x4000
