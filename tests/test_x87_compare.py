"""x87 comparisons and FXAM against the host CPU."""

from __future__ import annotations

import pytest

from handlers import x87_compare
from tests.x87_oracle import assert_same, needs_host

FORMS = {
    "fcom m32": "d85710", "fcom m64": "dc5710", "fcomp m32": "d85f10", "fcomp m64": "dc5f10",
    "ficom m16": "de5710", "ficom m32": "da5710", "ficomp m16": "de5f10", "ficomp m32": "da5f10",
    "fcom": "d8d3", "fcom st1": "d8d1", "fcomp": "d8db", "fcompp": "ded9",
    "fcom, alias": "dcd3", "fcomp, alias": "ded3",
    "fucom": "dde3", "fucom st1": "dde1", "fucomp": "ddeb", "fucompp": "dae9",
    "fcomi": "dbf3", "fcomi st1": "dbf1", "fcomip": "dff3", "fucomi": "dbeb", "fucomip": "dfeb",
    "ftst": "d9e4", "fxam": "d9e5",
}  # fmt: skip


@needs_host
@pytest.mark.parametrize("code", FORMS.values(), ids=FORMS)
def test_comparisons_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, x87_compare.HANDLERS, 250)
