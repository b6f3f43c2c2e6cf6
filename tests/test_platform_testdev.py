"""fw_cfg and the devices for tests: what QEMU's have, byte by byte."""

from __future__ import annotations

import pytest

from sandbox.platform.fw_cfg import FwCfg
from sandbox.platform.testdev import (
    IORAM_SIZE,
    DebugExit,
    IoRam,
    Lines,
    Register,
    ShutdownPort,
)


def item(device: FwCfg, key: int, size: int) -> bytes:
    device.write(0, 2, key)
    return bytes(device.read(1, 1) for _ in range(size))


def test_fw_cfg_items() -> None:
    device = FwCfg(64 << 20)
    assert item(device, 0, 4) == b"QEMU"
    assert item(device, 1, 4) == b"\x01\0\0\0", "no DMA"
    assert int.from_bytes(item(device, 3, 8), "little") == 64 << 20
    assert item(device, 5, 2) == b"\x01\0"
    assert item(device, 0xF, 2) == b"\x01\0"
    assert item(device, 0x19, 4) == bytes(4), "no files"


def test_fw_cfg_ends_in_zeros_and_starts_again_when_selected() -> None:
    device = FwCfg(0)
    assert item(device, 0, 6) == b"QEMU\0\0"
    assert item(device, 0, 2) == b"QE"
    assert item(device, 0x1234, 3) == bytes(3), "no such item"
    device.write(0, 2, 0)
    device.write(1, 1, 0xFF)
    device.write(0, 1, 5)
    assert device.read(1, 1) == ord("Q"), "read-only, and selected by 16 bits only"


def test_register_keeps_what_is_written() -> None:
    device = Register()
    device.write(0, 4, 0x1234_5678)
    device.write(1, 1, 0xAB)
    assert device.read(0, 4) == 0x1234_AB78
    assert device.read(2, 2) == 0x1234
    device.write(3, 4, 0xFFFF_FFFF)
    assert device.read(0, 4) == 0xFF34_AB78


def test_ioram_is_memory() -> None:
    device = IoRam()
    device.write(0x100, 8, 0x1122_3344_5566_7788)
    assert device.read(0x102, 4) == 0x3344_5566
    device.write(IORAM_SIZE - 1, 4, 0xAABB_CCDD)
    assert device.read(IORAM_SIZE - 1, 1) == 0xDD


def test_lines_raise_and_lower() -> None:
    seen: list[tuple[int, bool]] = []
    device = Lines(lambda line, high: seen.append((line, high)))
    for offset, value in ((5, 1), (5, 0), (15, 7), (16, 1)):
        device.write(offset, 1, value)
    assert seen == [(5, True), (5, False), (15, True)]


@pytest.mark.parametrize(("code", "status"), [(0, 1), (1, 3), (0x10, 33), (0x2A, 85), (255, 255)])
def test_debug_exit(code: int, status: int) -> None:
    ends: list[int] = []
    DebugExit(ends.append).write(0, 4, code)
    assert ends == [status]


@pytest.mark.parametrize(
    ("text", "ends"),
    [(b"Shutdown", [0]), (b"ShutShutdown", []), (b"xShutdown", [0]), (b"shutdown", [])],
)
def test_shutdown_port(text: bytes, ends: list[int]) -> None:
    seen: list[int] = []
    device = ShutdownPort(seen.append)
    for letter in text:
        device.write(0, 1, letter)
    assert seen == ends
