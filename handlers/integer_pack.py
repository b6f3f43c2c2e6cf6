"""The base ISA in Python: general-purpose instructions of 16-, 32- and 64-bit code.

Far transfers, segment loads, system registers and port input and output are not in it.
"""

from __future__ import annotations

from handlers import (
    integer_arithmetic,
    integer_atomic,
    integer_bits,
    integer_branch,
    integer_condition,
    integer_decimal,
    integer_direct,
    integer_exchange,
    integer_flags,
    integer_hints,
    integer_logic,
    integer_move,
    integer_muldiv,
    integer_shift,
    integer_stack,
    integer_string,
    integer_transaction,
    integer_wait,
)
from sandbox.handler import Pack

PACK = Pack.of(
    "integer",
    integer_arithmetic.HANDLERS,
    integer_logic.HANDLERS,
    integer_shift.HANDLERS,
    integer_bits.HANDLERS,
    integer_muldiv.HANDLERS,
    integer_move.HANDLERS,
    integer_exchange.HANDLERS,
    integer_condition.HANDLERS,
    integer_decimal.HANDLERS,
    integer_flags.HANDLERS,
    integer_hints.HANDLERS,
    integer_stack.HANDLERS,
    integer_branch.HANDLERS,
    integer_string.HANDLERS,
    integer_atomic.HANDLERS,
    integer_direct.HANDLERS,
    integer_transaction.HANDLERS,
    integer_wait.HANDLERS,
)
