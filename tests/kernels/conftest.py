"""What the tests of the interpreted kernels share."""

from __future__ import annotations

import pytest


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of decode attention: the interpreter runs them one by one."""
    from kernels import attention

    monkeypatch.setattr(attention, "DECODE_PROGRAMS", 16)
