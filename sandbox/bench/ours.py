"""A static Linux program in the sandbox, as ``sandbox run`` runs it by default."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

from sandbox import abi
from sandbox.bench.outcome import Outcome
from sandbox.packs import load_pack
from sandbox.process import boot_process, process_status
from sandbox.run import DEFAULT_PACKS
from sandbox.vm import DEFAULT_ENGINE, DEFAULT_POLICY, Vm

PACKS = (*DEFAULT_PACKS, "linux")
for _name in PACKS:  # imported with this module; a VM imports them when it first needs them
    load_pack(_name)


def run(
    program: str, argv: Sequence[str], env: Mapping[str, str], engine: str = DEFAULT_ENGINE
) -> Outcome:
    """Run ``program`` under the default policy with the default handlers."""
    with Vm(DEFAULT_POLICY, PACKS, engine=engine) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        machine = boot_process(vm, program, argv, env)
        gc.freeze()  # as the command does
        left = machine.vcpu.run()
        ended = process_status(left)
        traps = machine.vcpu.stats.fallback_count
    if ended is None:
        return Outcome(refused=str(left), traps=traps)
    return Outcome(status=ended[0], refused=ended[1], traps=traps)


def run_kvm(program: str, argv: Sequence[str], env: Mapping[str, str]) -> Outcome:
    """The same under Linux KVM."""
    return run(program, argv, env, "kvm")
