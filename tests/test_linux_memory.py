"""brk, mmap and relatives: against a page-by-page model, and every refusal the manual names."""

from __future__ import annotations

from errno import EACCES, EBADF, EEXIST, EFAULT, EINVAL, ENODEV, ENOMEM, EPERM
from pathlib import Path
from random import Random

import pytest

from handlers.linux.memory import HIGHEST, MAX_AREAS, PAGE
from sandbox.cpu import Fault
from tests.linux_process import BAD, PRIVATE_ANONYMOUS, SCRATCH, Guest, guest_below

MMAP, MPROTECT, MUNMAP, BRK, MREMAP, MADVISE = 9, 10, 11, 12, 25, 28
FIXED, NOREPLACE, LOW = 0x10, 0x10_0000, 0x40
NONE, READ, WRITE, EXEC = 0, 1, 2, 4
MAYMOVE = 1


def allocate(
    guest: Guest, pages: int, prot: int = READ | WRITE, at: int = 0, flags: int = 0
) -> int:
    return guest.call(MMAP, at, pages * PAGE, prot, PRIVATE_ANONYMOUS | flags, -1, 0)


def can_read(guest: Guest, address: int) -> bool:
    try:
        guest.cpu.read(address, 1)
    except Fault:
        return False
    return True


def can_write(guest: Guest, address: int) -> bool:
    try:
        guest.cpu.check_write(address, 1)
    except Fault:
        return False
    return True


def can_execute(guest: Guest, address: int) -> bool:
    try:
        guest.cpu.fetch(address, 1)
    except Fault:
        return False
    return True


def test_new_memory_is_zero_and_has_the_rights_asked_for() -> None:
    guest = Guest()
    for prot in (READ, READ | WRITE, READ | EXEC, READ | WRITE | EXEC, NONE):
        at = allocate(guest, 3, prot)
        assert at % PAGE == 0
        last = at + 3 * PAGE - 1
        for address in (at, last):
            assert can_read(guest, address) == bool(prot)
            assert can_write(guest, address) == bool(prot & WRITE)
            assert can_execute(guest, address) == bool(prot & EXEC)
        if prot:
            assert guest.cpu.read(at, 3 * PAGE) == bytes(3 * PAGE)


def test_freed_frames_come_back_zeroed() -> None:
    guest = Guest(ram=4 << 20)
    for _round in range(20):
        at = allocate(guest, 256)
        assert at > 0
        assert guest.cpu.read(at, PAGE) == bytes(PAGE)
        guest.put(b"\xff" * PAGE, at)
        assert guest.call(MUNMAP, at, 256 * PAGE) == 0
        assert not can_read(guest, at)


def test_exhausted_ram_is_enomem_and_changes_nothing() -> None:
    guest = Guest(ram=2 << 20)
    assert allocate(guest, 4096) == -ENOMEM
    before = guest.memory.areas
    at = allocate(guest, 100)
    assert guest.call(MMAP, at, 4096 * PAGE, 3, PRIVATE_ANONYMOUS | FIXED, -1, 0) == -ENOMEM
    assert can_write(guest, at)
    assert guest.call(MUNMAP, at, 100 * PAGE) == 0
    assert guest.memory.areas == before
    assert allocate(guest, 400) > 0


def test_fragmented_ram_is_used_to_the_last_frame() -> None:
    guest = Guest(ram=2 << 20)
    singles = []
    while (at := allocate(guest, 1)) > 0:
        singles.append(at)
    for at in singles[::2]:
        assert guest.call(MUNMAP, at, PAGE) == 0
    wide = allocate(guest, len(singles[::2]) - 8)
    assert wide > 0
    assert can_write(guest, wide)


def test_reserved_address_space_costs_no_ram_until_it_is_opened() -> None:
    guest = Guest(ram=2 << 20)
    at = allocate(guest, 1 << 20, NONE)
    assert at > 0
    assert not can_read(guest, at)
    assert guest.call(MPROTECT, at + 5 * PAGE, 2 * PAGE, READ | WRITE) == 0
    guest.put(b"abc", at + 5 * PAGE)
    assert not can_read(guest, at + 7 * PAGE)
    assert guest.call(MPROTECT, at, 4096 * PAGE, READ) == -ENOMEM
    assert guest.call(MUNMAP, at, (1 << 20) * PAGE) == 0


def test_protection_none_keeps_the_contents() -> None:
    guest = Guest()
    at = allocate(guest, 2)
    guest.put(b"kept", at)
    assert guest.call(MPROTECT, at, PAGE, NONE) == 0
    assert not can_read(guest, at) and can_read(guest, at + PAGE)
    assert guest.call(MPROTECT, at, PAGE, READ) == 0
    assert guest.get(4, at) == b"kept" and not can_write(guest, at)


def test_a_hint_is_followed_if_free_and_fixed_replaces() -> None:
    guest = Guest()
    wish = 0x2000_0000
    assert allocate(guest, 2, at=wish + 5) == wish
    assert allocate(guest, 2, at=wish) not in (wish, -EEXIST)
    guest.put(b"old", wish + PAGE)
    assert allocate(guest, 1, at=wish + PAGE, flags=FIXED) == wish + PAGE
    assert guest.get(3, wish + PAGE) == bytes(3)
    assert allocate(guest, 1, at=wish + PAGE, flags=NOREPLACE) == -EEXIST
    assert allocate(guest, 1, at=wish + 2 * PAGE, flags=NOREPLACE) == wish + 2 * PAGE
    assert 0 < allocate(guest, 1, flags=LOW) < 1 << 31


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 0, 3, 0x22, -1, 0), EINVAL),
        ((0, PAGE, 3, 0x22, -1, 1), EINVAL),
        ((0, PAGE, 3, 0x20, -1, 0), EINVAL),
        ((0, PAGE, 0x1000, 0x22, -1, 0), EINVAL),
        ((0, 1 << 62, 3, 0x22, -1, 0), ENOMEM),
        ((0, (1 << 64) - 1, 3, 0x22, -1, 0), ENOMEM),
        ((0x1000_0001, PAGE, 3, 0x32, -1, 0), EINVAL),
        ((0x1000, PAGE, 3, 0x32, -1, 0), EPERM),
        ((HIGHEST, PAGE, 3, 0x32, -1, 0), ENOMEM),
        ((1 << 63, PAGE, 3, 0x32, -1, 0), ENOMEM),
        ((0, PAGE, 1, 0x02, 99, 0), EBADF),
    ],
)
def test_mmap_refuses(arguments: tuple[int, ...], expected: int) -> None:
    assert Guest().call(MMAP, *arguments) == -expected


def test_ranges_that_cannot_exist_are_refused() -> None:
    guest = Guest()
    assert guest.call(MUNMAP, SCRATCH + 1, PAGE) == -EINVAL
    assert guest.call(MUNMAP, SCRATCH, 0) == -EINVAL
    assert guest.call(MUNMAP, SCRATCH, 1 << 63) == -EINVAL
    assert guest.call(MUNMAP, 0, HIGHEST) == 0
    assert guest.memory.areas == ()
    assert guest.call(MPROTECT, BAD, PAGE, READ) == -ENOMEM
    assert guest.call(MPROTECT, SCRATCH + 1, PAGE, READ) == -EINVAL
    assert guest.call(MPROTECT, SCRATCH, PAGE, 0x100) == -EINVAL


def test_the_heap_grows_and_shrinks() -> None:
    guest = Guest()
    start = guest.call(BRK, 0)
    assert guest.call(BRK, start + 0x2345) == start + 0x2345
    guest.put(b"x", start + 0x2FFF)
    assert not can_read(guest, start + 0x3000)
    assert guest.call(BRK, start + 0x1000) == start + 0x1000
    assert not can_read(guest, start + 0x1000)
    assert guest.call(BRK, start + 0x3000) == start + 0x3000
    assert guest.get(1, start + 0x2FFF) == b"\0"
    for refused in (start - 1, 1 << 46, 1 << 63, (1 << 64) - 1, SCRATCH + 1):
        assert guest.call(BRK, refused) == start + 0x3000


def test_remap_grows_in_place_moves_and_shrinks() -> None:
    guest = Guest()
    at = 0x2000_0000
    allocate(guest, 2, at=at)
    guest.put(b"data", at + PAGE)
    assert guest.call(MREMAP, at, 2 * PAGE, 4 * PAGE, 0) == at
    assert can_write(guest, at + 3 * PAGE)
    allocate(guest, 1, at=at + 4 * PAGE)
    assert guest.call(MREMAP, at, 4 * PAGE, 5 * PAGE, 0) == -ENOMEM
    moved = guest.call(MREMAP, at, 4 * PAGE, 5 * PAGE, MAYMOVE)
    assert moved > 0 and guest.get(4, moved + PAGE) == b"data"
    assert not can_read(guest, at) and can_write(guest, moved + 4 * PAGE)
    assert guest.call(MREMAP, moved, 5 * PAGE, 2 * PAGE, 0) == moved
    assert not can_read(guest, moved + 2 * PAGE)
    target = 0x3000_0000
    assert guest.call(MREMAP, moved, 2 * PAGE, PAGE, MAYMOVE | 2, target) == target
    assert not can_read(guest, moved) and not can_read(guest, moved + PAGE)
    assert guest.call(MREMAP, target, PAGE, 0, MAYMOVE) == -EINVAL
    assert guest.call(MREMAP, BAD, PAGE, PAGE * 2, MAYMOVE) == -EFAULT
    assert guest.call(MREMAP, target, PAGE, 1 << 62, MAYMOVE) == -ENOMEM
    assert guest.call(MREMAP, target, PAGE, PAGE, MAYMOVE | 2, target) == -EINVAL


def test_remapping_needs_no_memory_of_its_own() -> None:
    guest = Guest(ram=4 << 20)
    at = allocate(guest, 600)
    guest.put(b"x", at)
    moved = guest.call(MREMAP, at, 600 * PAGE, 600 * PAGE, MAYMOVE | 2, 0x3000_0000)
    assert guest.get(1, moved) == b"x"


def test_exhausted_page_tables_are_enomem_and_change_nothing() -> None:
    guest = Guest(tables=9 * PAGE)
    places = [0x2000_0000 + (i << 30) for i in range(20)]
    made = [at for at in places if allocate(guest, 1, at=at, flags=FIXED) == at]
    assert 1 <= len(made) < 20
    assert allocate(guest, 1, at=places[-1], flags=FIXED) == -ENOMEM
    guest.put(b"kept", made[0])
    assert guest.call(MREMAP, made[0], PAGE, PAGE, 3, places[-1]) == -ENOMEM
    assert guest.get(4, made[0]) == b"kept" and can_write(guest, made[0])
    assert guest.call(MREMAP, made[0], PAGE, 2 * PAGE, 3, places[-1]) == -ENOMEM
    assert guest.get(4, made[0]) == b"kept"
    assert not guest.memory.is_mapped(places[-1], places[-1] + PAGE)
    assert guest.call(MPROTECT, made[0], PAGE, NONE) == 0
    assert guest.call(MREMAP, made[0], PAGE, PAGE, 3, places[-1]) == places[-1]
    assert guest.call(MPROTECT, places[-1], PAGE, READ) == -ENOMEM
    assert guest.memory.is_mapped(places[-1], places[-1] + PAGE)


def test_discarded_pages_read_as_zero() -> None:
    guest = Guest()
    at = allocate(guest, 4)
    guest.put(b"\xaa" * 4 * PAGE, at)
    assert guest.call(MADVISE, at + PAGE, 2 * PAGE, 4) == 0
    expected = b"\xaa" * PAGE + bytes(2 * PAGE) + b"\xaa" * PAGE
    assert guest.get(4 * PAGE, at) == expected
    assert guest.call(MADVISE, at, PAGE, 8) == 0
    assert guest.call(MADVISE, at, PAGE, 77) == -EINVAL
    assert guest.call(MADVISE, BAD, PAGE, 4) == -ENOMEM


def test_the_number_of_areas_is_limited() -> None:
    guest = Guest()
    at = allocate(guest, 1, NONE)
    guest.memory._areas = guest.memory._areas[:1] * MAX_AREAS
    assert allocate(guest, 1, NONE, at=at, flags=FIXED) == -ENOMEM


def test_a_file_is_mapped_privately(tmp_path: Path) -> None:
    content = bytes(Random(3).randbytes(2 * PAGE + 100))
    (tmp_path / "data").write_bytes(content)
    guest = guest_below(tmp_path)
    fd = guest.open("/data")
    at = guest.call(MMAP, 0, 3 * PAGE, READ, 2, fd, 0)
    assert guest.get(3 * PAGE, at) == content.ljust(3 * PAGE, b"\0")
    assert not can_write(guest, at)
    at = guest.call(MMAP, 0, PAGE, READ | WRITE, 2, fd, PAGE)
    assert guest.get(PAGE, at) == content[PAGE : 2 * PAGE]
    guest.put(b"mine", at)
    assert (tmp_path / "data").read_bytes() == content
    assert guest.call(MMAP, 0, PAGE, READ | WRITE, 1, fd, 0) == -ENODEV
    assert guest.call(MMAP, 0, PAGE, READ, 2, guest.open("/"), 0) == -EACCES


def test_random_operations_agree_with_a_model_of_single_pages() -> None:
    """The model keeps a dictionary of pages: number to [rights, first byte]."""
    rng, guest = Random(7), Guest(ram=16 << 20)
    base, count = 0x4000_0000, 40
    model: dict[int, list[int]] = {}
    for _step in range(600):
        first = rng.randrange(count)
        pages = rng.randrange(1, count - first + 1) if rng.random() < 0.3 else 1
        pages = min(pages, count - first)
        at, span = base + first * PAGE, range(first, first + pages)
        prot = rng.choice((NONE, READ, READ | WRITE))
        action = rng.choice(("map", "unmap", "protect", "write", "discard", "remap"))
        if action == "map":
            assert allocate(guest, pages, prot, at, FIXED) == at
            model |= {page: [prot, 0] for page in span}
        elif action == "unmap":
            assert guest.call(MUNMAP, at, pages * PAGE) == 0
            for page in span:
                model.pop(page, None)
        elif action == "protect":
            whole = all(page in model for page in span)
            expected = 0 if whole else -ENOMEM
            assert guest.call(MPROTECT, at, pages * PAGE, prot) == expected
            for page in span if whole else ():
                model[page][0] = prot
        elif action == "write" and model.get(first, [0])[0] & WRITE:
            value = rng.randrange(256)
            guest.put(bytes([value]), at)
            model[first][1] = value
        elif action == "discard":
            whole = all(page in model for page in span)
            assert guest.call(MADVISE, at, pages * PAGE, 4) == (0 if whole else -ENOMEM)
            for page in span if whole else ():
                model[page][1] = 0
        elif action == "remap":
            target = rng.randrange(count - pages + 1)
            apart = target + pages <= first or first + pages <= target
            if apart and all(page in model for page in span):
                goal = base + target * PAGE
                assert guest.call(MREMAP, at, pages * PAGE, pages * PAGE, 3, goal) == goal
                moved = [model.pop(page) for page in span]
                model |= dict(zip(range(target, target + pages), moved, strict=True))
        for page in range(count):
            prot, value = model.get(page, [NONE, 0])
            where = base + page * PAGE
            assert can_write(guest, where) == bool(prot & WRITE), (action, page)
            assert can_read(guest, where) == bool(prot), (action, page)
            if prot:
                assert guest.get(1, where)[0] == value, (action, page)
