"""The x87 control instructions (SDM Vol. 2; Vol. 1, 8.1.10, 8.3.11 and 8.3.12), WAIT and EMMS.

The environment in memory has the instruction and operand pointers, but no selectors: they are
deprecated, and stored as 0 (CPUID.7:EBX[13]).
"""

from __future__ import annotations

from handlers.x87_fpu import CONDITIONS, FLAGS, TOP, Body, Control, Fpu, control, has_memory
from sandbox.cpu import UD, Cpu, Fault, bind_address
from sandbox.decode import Insn
from sandbox.registers import RAX, VM
from sandbox.xsave import FPCW_RESET, TAGS_EMPTY, full_tags

_CONTROL_BITS, _CONTROL_FIXED = 0x1F3F, 0x40
_PE, _EM = 1, 4
_REGISTERS_SIZE = 80
_UNUSED = 0xFFFF_0000


def _nobody(_insn: Insn) -> None:
    """Nobody wants to hear that the status word is shown."""


def _initialize(fpu: Fpu) -> None:
    """FNINIT: all but the registers' contents."""
    fpu.load_control(FPCW_RESET)
    fpu.sw, fpu.tags = 0, TAGS_EMPTY
    for name in ("fip", "fdp", "fop"):
        fpu.write(name, 0)


def _load_control(fpu: Fpu, value: int) -> None:
    fpu.load_control(value & _CONTROL_BITS | _CONTROL_FIXED)
    fpu.summarize()


@control("fninit", begin=Fpu.begin_control)
def fninit(_cpu: Cpu, fpu: Fpu, _insn: Insn) -> Body:
    """Reset the unit."""
    return lambda: _initialize(fpu)


@control("fnclex", begin=Fpu.begin_control)
def fnclex(_cpu: Cpu, fpu: Fpu, _insn: Insn) -> Body:
    """Clear the exception flags, SF, ES and B."""

    def body() -> None:
        fpu.sw &= TOP | CONDITIONS

    return body


@control("fnstcw", begin=Fpu.begin_control)
def fnstcw(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store the control word."""
    address = bind_address(cpu, insn)
    return lambda: cpu.write_int(address(), fpu.cw, 2)


@control("fldcw", begin=Fpu.begin_waiting)
def fldcw(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Load the control word; what it unmasks is pending then."""
    address = bind_address(cpu, insn)
    return lambda: _load_control(fpu, cpu.read_int(address(), 2))


@control("fnstsw", begin=Fpu.begin_control)
def fnstsw(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store the status word, to memory or AX. The service ``x87_shown`` hears of it."""
    shown = cpu.services.get("x87_shown", _nobody)
    if has_memory(insn):
        address = bind_address(cpu, insn)

        def store() -> None:
            cpu.write_int(address(), fpu.sw, 2)
            shown(insn)

        return store

    def body() -> None:
        shown(insn)
        cpu.gpr[RAX] = cpu.gpr[RAX] & ~0xFFFF | fpu.sw

    return body


# The environment


def _is_real(cpu: Cpu) -> bool:
    """Real-address and virtual-8086 mode have an image of their own."""
    return not cpu.registers.bank.read("cr0") & _PE or cpu.rflags & VM != 0


def environment(cpu: Cpu, fpu: Fpu, narrow: bool) -> bytes:
    """What FNSTENV stores: 14 bytes if ``narrow``, else 28 (SDM Vol. 1, figures 8-9 to 8-12)."""
    tags = sum(1 << n for n in range(8) if fpu.tags >> 2 * n & 3 != 3)
    words = [fpu.cw, fpu.sw, full_tags(tags, fpu.sw >> 11 & 7, [fpu.st(i) for i in range(8)])]
    fip, fdp, fop = (fpu.read(name) for name in ("fip", "fdp", "fop"))
    if narrow:
        above = (fip >> 16 & 15) << 12 | fop, (fdp >> 16 & 15) << 12
        words += [fip, above[0] if _is_real(cpu) else 0, fdp, above[1] if _is_real(cpu) else 0]
        return b"".join((word & 0xFFFF).to_bytes(2, "little") for word in words)
    words = [word | _UNUSED for word in words]
    if _is_real(cpu):
        for pointer, opcode in ((fip, fop), (fdp, 0)):
            words += [pointer & 0xFFFF | _UNUSED, (pointer >> 16 & 0xFFFF) << 12 | opcode]
    else:
        words += [fip & 0xFFFF_FFFF, (fop & 0x7FF) << 16, fdp & 0xFFFF_FFFF, _UNUSED]
    return b"".join(word.to_bytes(4, "little") for word in words)


def load_environment(cpu: Cpu, fpu: Fpu, image: bytes) -> None:
    """What FLDENV loads; exceptions that are unmasked in it are pending then."""
    narrow = len(image) == 14
    size = 2 if narrow else 4
    words = [int.from_bytes(image[at : at + size], "little") for at in range(0, len(image), size)]
    fip, code, fdp, data = words[3:7]
    fop = code >> 16
    if _is_real(cpu):
        fip = fip & 0xFFFF | code >> 12 << 16
        fdp = fdp & 0xFFFF | data >> 12 << 16
        fop = code
    fpu.sw, fpu.tags = words[1] & 0xFFFF, words[2] & 0xFFFF
    _load_control(fpu, words[0])
    fpu.write("fip", fip & 0xFFFF_FFFF)
    fpu.write("fdp", fdp & 0xFFFF_FFFF)
    fpu.write("fop", fop & 0x7FF)


def _environment_size(insn: Insn) -> int:
    return 14 if insn.form.endswith(("M14BYTE", "M94BYTE")) else 28


@control("fnstenv", begin=Fpu.begin_control)
def fnstenv(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store the environment, and mask all exceptions."""
    address, narrow = bind_address(cpu, insn), _environment_size(insn) == 14
    shown = cpu.services.get("x87_shown", _nobody)

    def body() -> None:
        cpu.write(address(), environment(cpu, fpu, narrow))
        shown(insn)
        fpu.load_control(fpu.cw | FLAGS)
        fpu.summarize()

    return body


@control("fldenv", begin=Fpu.begin_waiting)
def fldenv(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Load the environment."""
    address, size = bind_address(cpu, insn), _environment_size(insn)
    return lambda: load_environment(cpu, fpu, cpu.read(address(), size))


@control("fnsave", begin=Fpu.begin_control)
def fnsave(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store the environment and the registers, and reset the unit."""
    address, narrow = bind_address(cpu, insn), _environment_size(insn) == 14
    shown = cpu.services.get("x87_shown", _nobody)

    def body() -> None:
        registers = b"".join(fpu.st(i).to_bytes(10, "little") for i in range(8))
        cpu.write(address(), environment(cpu, fpu, narrow) + registers)
        shown(insn)
        _initialize(fpu)

    return body


@control("frstor", begin=Fpu.begin_waiting)
def frstor(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Load the environment and the registers."""
    address, size = bind_address(cpu, insn), _environment_size(insn)

    def body() -> None:
        image = cpu.read(address(), size + _REGISTERS_SIZE)
        load_environment(cpu, fpu, image[:size])
        tags = fpu.tags
        for i in range(8):
            at = size + 10 * i
            fpu.set(i, int.from_bytes(image[at : at + 10], "little"))
        fpu.tags = tags

    return body


# Instructions that do little


def _bind_nothing(_cpu: Cpu, _fpu: Fpu, _insn: Insn) -> Body:
    return lambda: None


def _begin_emms(fpu: Fpu) -> None:
    if fpu.read("cr0") & _EM:
        raise Fault(UD)
    fpu.begin_waiting()


def _bind_emms(_cpu: Cpu, fpu: Fpu, _insn: Insn) -> Body:
    def body() -> None:
        fpu.sw &= ~TOP
        fpu.tags = TAGS_EMPTY

    return body


fnop = Control(_bind_nothing, ("fnop",), Fpu.begin_waiting)
obsolete = Control(_bind_nothing, ("fneni", "fndisi", "fnsetpm"), Fpu.begin_control)
"""For coprocessors that are long gone: they do nothing since the 387."""

wait = Control(_bind_nothing, ("wait",), Fpu.begin_wait)
emms = Control(_bind_emms, ("emms",), _begin_emms)

HANDLERS = [fninit, fnclex, fnstcw, fldcw, fnstsw, fnstenv, fldenv, fnsave, frstor]
HANDLERS += [fnop, obsolete, wait, emms]
