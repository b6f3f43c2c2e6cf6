"""A guest that steps itself with TF sees a #DB after each instruction, whichever tier ran it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from sandbox.exits import Intr
from sandbox.policy import Policy
from sandbox.registers import RAX, RSI
from tests.guest import BASE, add_idt, machine, policy, run_to_hlt

HANDLER = 0x80
SOURCE = f"""
    jmp start
    .space {HANDLER - 2}, 0x90
debug:                                  ; at BASE + {HANDLER:#x}: note where the next one is
    push rbx
    mov rbx, [rsp + 8]
    mov [rsi], ebx
    add rsi, 4
    pop rbx
    iretq
start:
    mov esi, 0x8000
    pushfq
    or dword ptr [rsp], 0x100
    popfq
    nop
    bswap eax
    mov ecx, 3
    xchg eax, edx
    pushfq
    and dword ptr [rsp], 0xfffffeff
    popfq
    inc eax
    hlt
"""


def steps(chosen: str | Policy, *packs: str) -> tuple[list[int], int]:
    """The RIPs that the debug handler saw, and RAX."""
    with machine(SOURCE, policy=chosen, handlers=packs) as found:
        add_idt(found, {1: BASE + HANDLER})
        run_to_hlt(found)
        registers = found.vcpu.registers
        count = (registers.gpr[RSI] - 0x8000) // 4
        data = found.vm.memory.read(0x8000, 4 * count)
        rips = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        return rips, registers.gpr[RAX]


def test_unicorn_steps_as_the_manual_says() -> None:
    rips, _rax = steps("baseline")
    lengths = [b - a for a, b in pairwise(rips)]
    assert lengths == [2, 5, 1, 1, 7, 1]  # bswap, mov, xchg, pushfq, and, popfq


@pytest.mark.parametrize(
    "chosen", [policy("bswap", "xchg"), policy("popfq", "iretq"), Policy.load("nothing")]
)
def test_stepping_is_the_same_in_the_handler_tier(chosen: Policy) -> None:
    assert steps(chosen, "integer", "system") == steps("baseline")


def test_a_request_to_stop_before_the_run_is_not_lost() -> None:
    with machine("inc eax\n hlt") as found:
        found.vcpu.request_stop()
        assert isinstance(found.vcpu.run(10), Intr)
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == 1
