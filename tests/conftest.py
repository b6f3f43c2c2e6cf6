"""Fixtures that several files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sandbox.engine import unicorn_entry
from sandbox.engine.host_builder import HostBuilder
from sandbox.engine.host_operands import host_features


@pytest.fixture(scope="module", params=("host runs", "sequences"))
def lowering_mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """How trapped instructions are lowered: by the host's CPU, or as if we could make no code."""
    if request.param == "host runs":
        if not host_features() >= {"avx", "avx2"}:
            pytest.skip("the host's CPU has no AVX2")
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostBuilder, "make", staticmethod(lambda *_: None))
        patch.setattr(unicorn_entry, "executable_page", lambda _code=b"": None)
        yield request.param
