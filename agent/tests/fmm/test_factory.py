"""Choosing an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from farshore.errors import UsageError
from farshore.fmm import Root, make_watcher


@pytest.mark.parametrize("engine", ["auto", "inotify"])
def test_engines(engine: str, tmp_path: Path) -> None:
    watcher = make_watcher(engine, [Root(os.fsencode(tmp_path))])
    assert len(watcher.start()) == 1
    watcher.close()


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
