"""Addition and subtraction (SDM Vol. 1, 7.3.2): every function gives (result, flags)."""

from __future__ import annotations

from handlers.flags import MASK, STATUS, of_difference, of_sum
from handlers.integer import Operation
from sandbox.registers import CF, OF


def add(bits: int, a: int, b: int) -> tuple[int, int]:
    total = a + b
    return total & MASK[bits], of_sum(bits, a, b, total)


def adc(bits: int, a: int, b: int, flags: int) -> tuple[int, int]:
    total = a + b + (flags & CF)
    return total & MASK[bits], of_sum(bits, a, b, total)


def sub(bits: int, a: int, b: int) -> tuple[int, int]:
    difference = a - b
    return difference & MASK[bits], of_difference(bits, a, b, difference)


def sbb(bits: int, a: int, b: int, flags: int) -> tuple[int, int]:
    difference = a - b - (flags & CF)
    return difference & MASK[bits], of_difference(bits, a, b, difference)


def inc(bits: int, a: int) -> tuple[int, int]:
    result, flags = add(bits, a, 1)
    return result, flags & ~CF


def dec(bits: int, a: int) -> tuple[int, int]:
    result, flags = sub(bits, a, 1)
    return result, flags & ~CF


def neg(bits: int, a: int) -> tuple[int, int]:
    return sub(bits, 0, a)


def adcx(bits: int, a: int, b: int, flags: int) -> tuple[int, int]:
    total = a + b + (flags & CF)
    return total & MASK[bits], CF if total >> bits else 0


def adox(bits: int, a: int, b: int, flags: int) -> tuple[int, int]:
    total = a + b + (1 if flags & OF else 0)
    return total & MASK[bits], OF if total >> bits else 0


HANDLERS = [
    Operation("add", "mr", add, STATUS),
    Operation("adc", "mr", adc, STATUS, takes_flags=True),
    Operation("sub", "mr", sub, STATUS),
    Operation("sbb", "mr", sbb, STATUS, takes_flags=True),
    Operation("cmp", "rr", sub, STATUS),
    Operation("inc", "m", inc, STATUS & ~CF),
    Operation("dec", "m", dec, STATUS & ~CF),
    Operation("neg", "m", neg, STATUS),
    Operation("adcx", "mr", adcx, CF, takes_flags=True),
    Operation("adox", "mr", adox, OF, takes_flags=True),
]
