"""Paths that a peer names, against a root with something to reach beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import blake3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replicas import DIRECTORY, FILE, Replica, stream, upload

from farshore.dbm.messages import Chunk, Copy, MakeDir, Nak, NoSignature, Patch, Put, Remove, Upload, WantSignature
from farshore.dbm.replica.paths import MAX_PATH, Handles, check, open_regular
from farshore.errors import UnsafePath

PARTS = st.sampled_from([b"", b"/", b"//", b"///", b".", b"..", b"secret", b"d", b"door", b"\0", b"f", b"root"])
# Names that are too long, or ours, and what is almost that.
ODD_PARTS = st.sampled_from([b".farshore-", b".farshore", b".x", b"\n", b"n" * 254, b"/" + b"n" * 255, b"/.", b"/x"])


@settings(max_examples=500)
@given(
    st.lists(PARTS | ODD_PARTS, max_size=6).map(b"".join)
    | st.integers(14, 17).map(lambda count: b"/".join([b"n" * 255] * count))
)
def test_a_path_is_allowed_if_each_of_its_names_is(path: bytes) -> None:
    allowed = all(
        name not in (b"", b".", b"..") and b"\0" not in name and len(name) < 256 and not name.startswith(b".farshore-")
        for name in (path.split(b"/") if path else [])
    )
    if allowed and len(path) <= MAX_PATH:
        assert check(path) is path
    else:
        with pytest.raises(UnsafePath):
            check(path)


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "f").write_text("out")
    return tmp_path


@pytest.mark.parametrize("slashes", [1, 2, 3, 4])
def test_slashes_in_front_lead_nowhere(replica: Replica, beside: Path, slashes: int) -> None:
    path = b"/" * slashes + b"secret"
    # The directory beside the root is one that is opened for the root itself, and kept for the next operation.
    first = MakeDir(0, b"", DIRECTORY)
    for operation in (Put(0, path, FILE, b"evil"), Remove(0, path), MakeDir(0, path, DIRECTORY)):
        assert isinstance(replica.send(first, operation), Nak)
    replica.source.put(*upload(1, b"f", stream(b"evil")))
    assert isinstance(replica.send(first, Patch(0, path, FILE, 1)), Nak)
    assert isinstance(replica.send(Copy(0, b"g", FILE, 0, path, blake3.blake3(b"secret").digest())), Nak)
    replica.source.put(Upload(2, 0, path, True, False, 0), Chunk(2, b"", False))
    assert isinstance(replica.source.verdict(), Nak)
    replica.disconnect()
    replica.source.put(WantSignature(0, path))
    assert isinstance(replica.source.read(), NoSignature)
    assert (beside / "secret").read_text() == "secret"
    assert os.listdir(replica.root) == []


@pytest.fixture
def handles(beside: Path) -> Iterator[Handles]:
    root = beside / "root"
    (root / "d").mkdir(parents=True)
    (root / "d" / "f").write_text("in")
    (root / "door").symlink_to("../out")
    made = Handles(os.fsencode(root))
    made.directory(b"d")
    yield made
    made.forget()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(st.lists(PARTS, min_size=1, max_size=6).map(b"".join) | st.lists(PARTS, max_size=5).map(b"/".join))
def test_a_parent_is_within_the_root_or_there_is_none(handles: Handles, path: bytes) -> None:
    try:
        parent, name = handles.parent(path)
    except (UnsafePath, OSError):
        return
    reached = os.readlink(f"/proc/self/fd/{parent}")
    root = os.fsdecode(handles._root)
    assert name == (path.rpartition(b"/")[2] or b"root")
    assert reached == (os.path.dirname(root) if not path else reached)
    assert not path or (reached + "/").startswith(root + "/")


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
def test_what_is_no_file_is_never_opened(handles: Handles, kind: int) -> None:
    os.mknod(handles._root + b"/node", kind | 0o600)
    assert open_regular(handles, b"node") is None
    assert open_regular(handles, b"door") is None
    assert open_regular(handles, b"d") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes are root's to make")
def test_a_device_is_not_used_by_looking_at_it(handles: Handles) -> None:
    # No driver has this number, so that opening it fails, and a stat of it does not.
    os.mknod(handles._root + b"/device", stat.S_IFCHR | 0o600, os.makedev(240, 77))
    assert open_regular(handles, b"device") is None


def test_a_file_is_opened_for_reading(handles: Handles) -> None:
    handle = open_regular(handles, b"d/f")
    assert handle is not None
    assert os.read(handle, 10) == b"in"
    os.close(handle)
