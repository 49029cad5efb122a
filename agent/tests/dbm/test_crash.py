"""A short crash campaign; `make crash` runs a long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import crash
import pytest


@pytest.mark.parametrize("options", [[], ["--snapshots"]], ids=["live", "snapshots"])
def test_kills_lose_and_tear_nothing(tmp_path: Path, options: list[str]) -> None:
    # In a process of its own: the campaign forks, and a fork has none of the threads that other tests left behind.
    report = tmp_path / "report.json"
    campaign = [sys.executable, crash.__file__, "--kills", "24", "--minutes", "4", "--seed", "20260", *options]
    done = subprocess.run([*campaign, "--dir", str(tmp_path / "base"), "--report", str(report)], check=False)
    if done.returncode == 77:
        pytest.skip("there is no btrfs to be had")
    result = json.loads(report.read_text())
    assert result["failures"] == []
    assert done.returncode == 0
    assert result["kills"] > 4
    assert result["observed"] > 0
