"""Encodings that Unicorn takes for another instruction than the processor and our decoder do.

Length and validity are compared for each block; what cannot be seen there is an instruction of the
same length with another meaning. Unicorn 2.1.4 lets 66 win over F2 and F3 where they select the
instruction (SDM Vol. 2, 2.1.2 leaves that open, processors let F2 and F3 win), takes the first of
F2 and F3 instead of the last, and gives near branches with 66 a 16-bit operand in 64-bit mode,
where Intel's processors ignore the prefix. No compiler emits these; they are trapped.
"""

from __future__ import annotations

import re

_LEGACY = rb"\x26\x2e\x36\x3e\x64-\x67\xf0\xf2\xf3"


def _pattern(prefixes: bytes, *rules: bytes) -> re.Pattern[bytes]:
    prefix = b"[" + prefixes + b"]"
    return re.compile(b"|".join(rule.replace(b"P", prefix) for rule in rules), re.DOTALL)


_BOTH_REPEATS = rb"(?=P*\xf2)(?=P*\xf3)P+"
_OVERRIDDEN = rb"(?=P*\x66)(?=P*[\xf2\xf3])P+\x0f[^\x38\x3a\xb8\xbc\xbd]"
_SHORT_BRANCH = (
    rb"(?=P*\x66)P+(?<![\x48-\x4f])"
    rb"(?:[\xc2\xc3\xe8\xe9]|\x0f[\x80-\x8f]|\xff[\x10-\x17\x20-\x27\x50-\x57\x60-\x67"
    rb"\x90-\x97\xa0-\xa7\xd0-\xd7\xe0-\xe7])"
)

MISREAD = {
    16: _pattern(_LEGACY, _BOTH_REPEATS, _OVERRIDDEN),
    32: _pattern(_LEGACY, _BOTH_REPEATS, _OVERRIDDEN),
    64: _pattern(_LEGACY + rb"\x40-\x4f", _BOTH_REPEATS, _OVERRIDDEN, _SHORT_BRANCH),
}
"""By bitness: matches an instruction that must not be left to Unicorn."""

MAY_BE_MISREAD = re.compile(rb"[\x66\xf2\xf3]").search
"""Whether code may hold such an instruction: all have one of these prefixes."""
