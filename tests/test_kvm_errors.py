"""What the engine ``kvm`` says where it cannot work: one line with the way out. No KVM needed."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sandbox import abi
from sandbox.cli import main
from sandbox.engine import kvm_abi, kvm_device
from sandbox.errors import EngineError
from sandbox.vm import Vm


def reason() -> str:
    found = kvm_device.unavailable()
    assert found is not None and "\n" not in found
    return found


def test_a_machine_without_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kvm_device, "DEVICE", str(tmp_path / "kvm"))
    assert reason().startswith("this machine has no /dev/kvm: ")


@pytest.mark.parametrize(
    ("number", "start"),
    [
        (errno.EACCES, "no permission to open /dev/kvm: "),
        (errno.EPERM, "no permission to open /dev/kvm: "),
        (errno.ENODEV, "/dev/kvm is there, but no KVM module stands behind it: "),
        (errno.EMFILE, "/dev/kvm cannot be opened: Too many open files"),
    ],
)
def test_a_device_that_cannot_be_opened(
    monkeypatch: pytest.MonkeyPatch, number: int, start: str
) -> None:
    def refuse(*_arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    assert reason().startswith(start)


def test_a_file_that_is_not_kvm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.write_bytes(b"")
    monkeypatch.setattr(kvm_device, "DEVICE", str(path))
    assert reason() == f"KVM_GET_API_VERSION: {os.strerror(errno.ENOTTY)}"


def answers(monkeypatch: pytest.MonkeyPatch, version: int, missing: int) -> None:
    """A device that answers API version and capabilities like this."""

    def call(_file: Any, _name: str, request: int, argument: int = 0) -> int:
        return version if request == abi.KVM_GET_API_VERSION else int(argument != missing)

    monkeypatch.setattr(kvm_device, "DEVICE", os.devnull)
    monkeypatch.setattr(kvm_device.KvmFile, "call", call)


def test_a_kernel_of_another_api(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, 11, 0)
    assert "API version 11, want 12" in reason()


@pytest.mark.parametrize("cap", [abi.KVM_CAP_IMMEDIATE_EXIT, kvm_abi.KVM_CAP_XSAVE])
def test_a_kernel_that_lacks_a_capability(monkeypatch: pytest.MonkeyPatch, cap: int) -> None:
    answers(monkeypatch, abi.KVM_API_VERSION, cap)
    assert f"(capability {cap})" in reason()


def test_an_engine_that_does_not_exist() -> None:
    with pytest.raises(EngineError, match="engine 'xen': there are unicorn and kvm"):
        Vm(engine="xen")


def test_the_command_ends_with_one_line_and_the_usage_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kvm_device, "DEVICE", str(tmp_path / "kvm"))
    guest = tmp_path / "guest.asm"
    guest.write_text("hlt\n")
    assert main(["run", "--engine", "kvm", str(guest)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sandbox: this machine has no /dev/kvm") and shown.count("\n") == 1


def test_numbers_are_those_of_the_kernels_header() -> None:
    """_IOR and _IOW of asm-generic/ioctl.h, from the sizes in the kernel's structures."""
    sizes = {
        "KVM_GET_SUPPORTED_CPUID": (3, 0x05, 8),
        "KVM_SET_IDENTITY_MAP_ADDR": (1, 0x48, 8),
        "KVM_CREATE_IRQCHIP": (0, 0x60, 0),
        "KVM_IRQ_LINE": (1, 0x61, kvm_abi.IRQ_LEVEL.size),
        "KVM_CREATE_PIT2": (1, 0x77, kvm_abi.PIT_CONFIG_BYTES),
        "KVM_GET_MSRS": (3, 0x88, 8),
        "KVM_SET_MSRS": (1, 0x89, 8),
        "KVM_SET_CPUID2": (1, 0x90, 8),
        "KVM_GET_DEBUGREGS": (2, 0xA1, kvm_abi.DEBUGREGS_BYTES),
        "KVM_SET_DEBUGREGS": (1, 0xA2, kvm_abi.DEBUGREGS_BYTES),
        "KVM_GET_XSAVE": (2, 0xA4, kvm_abi.XSAVE_BYTES),
        "KVM_SET_XSAVE": (1, 0xA5, kvm_abi.XSAVE_BYTES),
        "KVM_GET_XCRS": (2, 0xA6, kvm_abi.XCRS.size),
        "KVM_SET_XCRS": (1, 0xA7, kvm_abi.XCRS.size),
    }
    for name, (direction, number, size) in sizes.items():
        assert getattr(kvm_abi, name) == direction << 30 | size << 16 | 0xAE << 8 | number, name
