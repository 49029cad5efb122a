"""How many directories there are, and what the kernel's limit should be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from farshore.cli import main
from farshore.fmm.kernel import count_all, count_directories, watches_for


def test_directories_are_counted(tmp_path: Path) -> None:
    for name in ("a/b/c", "a/d", "e"):
        (tmp_path / "top" / name).mkdir(parents=True)
    (tmp_path / "top" / "a" / "file").touch()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "top")
    os.mkdir(os.fsencode(tmp_path) + b"/top/\xff")
    top = os.fsencode(tmp_path / "top")
    assert count_directories(top) == 7
    assert count_directories(top + b"/link") == 7
    assert count_directories(top + b"/a/file") == count_directories(b"/no/such") == 0
    assert count_all([top + b"/a", top + b"/e"]) == 5


def test_a_little_growth_changes_nothing() -> None:
    assert watches_for(0) == 0
    for directories in (1, 2, 3, 1000, 524_287, 524_288, 3_000_000):
        assert watches_for(directories) >= 2 * directories
        assert watches_for(directories) < 4 * directories
    assert watches_for(600_000) == watches_for(700_000) == watches_for(1_000_000)


def test_the_command_tells_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    assert main(["limits", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"directories": 2, "watches": 4}
    assert main(["limits", str(tmp_path), str(tmp_path / "none")]) == 0
    assert "2 directories; fs.inotify.max_user_watches should be 4 at least" in capsys.readouterr().out
