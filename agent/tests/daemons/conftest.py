"""A pair of nodes, and an authority that takes certificates back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from authority import Authority
from nodes import Pair, running_pair


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Both nodes run; nobody owns the group yet."""
    async with running_pair(tmp_path) as made:
        yield made


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """A CA with certificates for all who are in a pair's tests, and a list with nobody on it."""
    made = Authority(tmp_path / "pki")
    for name in ("local", "remote", "stranger", "gateway"):
        made.issue(name)
    made.revoke()
    return made
