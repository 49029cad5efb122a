"""Choosing an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.errors import UsageError
from farshore.fmm import Root, factory, fanotify, kernel, make_watcher


@pytest.mark.parametrize("engine", ["auto", "inotify"])
def test_engines(engine: str, tmp_path: Path) -> None:
    watcher = make_watcher(engine, [Root(os.fsencode(tmp_path))])
    assert len(watcher.start()) == 1
    watcher.close()


@pytest.mark.parametrize(
    ("many", "watches", "refusal", "engine"),
    [
        (3, 1000, "", "fanotify"),
        (4, 1000, "", "inotify"),
        (1000, 6, "", "fanotify"),
        (3, 1000, "not permitted", "inotify"),
    ],
)
def test_a_large_tree_is_watched_as_a_whole_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int, watches: int, refusal: str, engine: str
) -> None:
    for name in ("a", "b", "b/c"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(factory, "MANY_DIRECTORIES", many)
    monkeypatch.setattr(kernel, "most_watches", lambda: watches)
    monkeypatch.setattr(fanotify, "why_not", lambda roots: refusal)
    watcher = make_watcher("auto", [Root(os.fsencode(tmp_path))])
    assert watcher.counts().engine == engine
    watcher.close()


def test_a_process_without_the_right_is_told_so(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.setgid(65534); os.setuid(65534)\n"
        "from farshore.fmm import Root\nfrom farshore.fmm.fanotify import why_not\n"
        "print(why_not([Root(os.fsencode(sys.argv[1]))]))"
    )
    if os.geteuid() != 0:
        pytest.skip("needs root")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    if "No module named" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("the Python installation is closed to other users")
    assert "CAP_SYS_ADMIN" in done.stdout, done.stderr


def test_unknown_engine_names_what_is_allowed() -> None:
    with pytest.raises(UsageError, match="auto, inotify"):
        make_watcher("magic", [])


def test_pyinotify_is_loaded_only_to_watch() -> None:
    code = "import sys, farshore.fmm; sys.exit('pyinotify' in sys.modules or 'pathspec' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_engine_is_silent() -> None:
    code = "import farshore.fmm.inotify, logging; assert not logging.getLogger('pyinotify').handlers"
    done = subprocess.run([sys.executable, "-Wdefault", "-c", code], check=True, capture_output=True)
    assert b"asyncore" not in done.stderr
