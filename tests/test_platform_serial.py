"""The serial port as the PC16550D's data sheet has it."""

from __future__ import annotations

import io

import pytest

from sandbox.platform.serial import Serial

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


@pytest.fixture
def port() -> tuple[Serial, io.BytesIO, list[bool]]:
    out, levels = io.BytesIO(), list[bool]()
    return Serial(out, levels.append), out, levels


Port = tuple[Serial, io.BytesIO, list[bool]]


def send(serial: Serial, text: bytes) -> None:
    for value in text:
        serial.write(DATA, 1, value)


def test_what_is_sent_comes_out_and_the_line_is_always_ready(port: Port) -> None:
    serial, out, _levels = port
    assert serial.read(LSR, 1) == 0x60
    send(serial, b"hello\n")
    assert out.getvalue() == b"hello\n"
    assert serial.read(LSR, 1) == 0x60
    assert serial.read(DATA, 1) == 0


def test_divisor_latch_hides_data_and_ier(port: Port) -> None:
    serial, out, _levels = port
    serial.write(IER, 1, 0)
    serial.write(LCR, 1, 0x83)
    serial.write(DATA, 1, 0x34)
    serial.write(IER, 1, 0x12)
    assert (serial.read(DATA, 1), serial.read(IER, 1)) == (0x34, 0x12)
    serial.write(LCR, 1, 3)
    assert serial.read(IER, 1) == 0
    assert serial.read(LCR, 1) == 3
    assert out.getvalue() == b""


def test_registers_keep_what_they_have_bits_for(port: Port) -> None:
    serial, _out, _levels = port
    for register, kept in ((IER, 0x0F), (LCR, 0x7F), (MCR, 0x1F), (SCR, 0xFF)):
        serial.write(register, 1, 0xFF & (0x7F if register == LCR else 0xFF))
        assert serial.read(register, 1) == kept
        serial.write(register, 1, 0)


def test_fifos_are_found_by_the_identification(port: Port) -> None:
    serial, _out, _levels = port
    assert serial.read(IIR, 1) == 1
    serial.write(IIR, 1, 7)
    assert serial.read(IIR, 1) == 0xC1
    serial.write(IIR, 1, 0)
    assert serial.read(IIR, 1) == 1


def test_transmitter_empty_interrupts_and_reading_iir_ends_it(port: Port) -> None:
    serial, _out, levels = port
    serial.write(MCR, 1, 8)
    serial.write(IER, 1, 2)
    assert levels[-1]
    assert serial.read(IIR, 1) == 2
    assert levels == [True, False]
    assert serial.read(IIR, 1) == 1
    send(serial, b"x")
    assert levels[-1]
    serial.write(MCR, 1, 0)
    assert not levels[-1], "OUT2 connects the line"


def test_loopback_brings_data_and_modem_lines_back(port: Port) -> None:
    serial, out, levels = port
    serial.write(MCR, 1, 0x1F)
    serial.write(IER, 1, 1)
    send(serial, b"A")
    assert serial.read(LSR, 1) == 0x61
    assert serial.read(IIR, 1) == 4
    assert serial.read(MSR, 1) == 0xF0
    assert serial.read(DATA, 1) == ord("A")
    assert serial.read(LSR, 1) == 0x60
    assert serial.read(IIR, 1) == 1
    serial.write(MCR, 1, 0x12)
    assert serial.read(MSR, 1) == 0x10, "RTS comes back as CTS"
    assert out.getvalue() == b"" and not any(levels)
    serial.write(MCR, 1, 0)
    assert serial.read(MSR, 1) == 0xB0
