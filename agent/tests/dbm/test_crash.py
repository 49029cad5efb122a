"""A short crash campaign; `make crash` runs a long one."""

from __future__ import annotations

from pathlib import Path

from crash import Campaign


def test_kills_lose_and_tear_nothing(tmp_path: Path) -> None:
    result = Campaign(tmp_path / "base", 20_260, print).run(kills=24, seconds=240)
    assert result.failures == []
    assert result.kills > 4
    assert result.observed > 0
