"""A state directory of another version."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from farshore.dbm import layout
from farshore.dbm.replica.mark import Mark
from farshore.errors import StateError


def opened(directory: Path) -> None:
    os.close(layout.open_state(directory))


def test_a_new_directory_is_of_todays_version(tmp_path: Path) -> None:
    opened(tmp_path / "state")
    assert (tmp_path / "state" / "version").read_text() == f"{layout.VERSION}\n"
    opened(tmp_path / "state")


def test_one_without_a_journal_is_brought_up_to_date(tmp_path: Path) -> None:
    group = tmp_path / "groups" / "web"
    group.mkdir(parents=True)
    (group / "started").write_bytes(struct.pack(">Q", 4711))
    # Cut off in between, it goes on.
    (tmp_path / "groups" / "db").mkdir()
    (tmp_path / "groups" / "db" / "started").write_bytes(b"")
    opened(tmp_path)
    mark = Mark(group / "applied")
    assert mark.position.seq == 4711
    mark.close()
    assert sorted(path.name for path in group.iterdir()) == ["applied"]
    assert (tmp_path / "version").read_text() == f"{layout.VERSION}\n"


@pytest.mark.parametrize("text", ["", "two", "-1", "\xff"])
def test_a_version_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "version").write_bytes(text.encode("latin-1"))
    with pytest.raises(StateError, match="version: is damaged"):
        opened(tmp_path)


def test_what_a_newer_one_wrote_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("99\n")
    (tmp_path / "groups" / "web").mkdir(parents=True)
    (tmp_path / "groups" / "web" / "started").write_bytes(bytes(8))
    with pytest.raises(StateError, match=f"of version 99, .* reads versions up to {layout.VERSION}"):
        opened(tmp_path)
    assert (tmp_path / "groups" / "web" / "started").exists()
    # Nobody holds the lock.
    (tmp_path / "version").write_text("2\n")
    opened(tmp_path)
