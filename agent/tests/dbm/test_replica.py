"""The replica's end alone: what it does with operations, hostile ones included."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from replicas import DIRECTORY, FILE, Replica, stream, upload

from farshore.dbm.messages import (
    Ack,
    Applied,
    Begin,
    Chunk,
    FromSource,
    Link,
    MakeDir,
    MakeSymlink,
    Meta,
    Move,
    Nak,
    Patch,
    Put,
    Remove,
    SetMeta,
    Upload,
)
from farshore.dbm.replica import staging
from farshore.dbm.replica.stage import Stage
from farshore.dbm.replica.view import Progress, copy_out
from farshore.errors import ProtocolError


def crossing(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[Any, Any], bool]) -> None:
    """Some renames find another filesystem: those of which ``refuses(source, target)`` is true."""
    rename = os.rename

    def other(source: Any, target: Any, **where: Any) -> None:
        if refuses(source, target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target, **where)

    monkeypatch.setattr(os, "rename", other)


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def kept(base: Path) -> dict[str, str]:
    return {str(p.relative_to(base)): p.read_text() for p in base.rglob("*") if p.is_file()}


@pytest.mark.parametrize("path", [b".farshore-stage", b"d/.farshore-x", b".farshore-x/f"])
def test_our_names_are_refused(replica: Replica, path: bytes) -> None:
    for operation in (MakeSymlink(0, path, FILE, b"/etc"), MakeDir(0, path, DIRECTORY), Put(0, path, FILE, b"")):
        answer = replica.send(operation)
        assert isinstance(answer, Nak)
        assert "replica's own" in answer.reason
    assert os.listdir(replica.root) == []


def test_a_link_in_the_place_for_staging_is_not_followed(replica: Replica, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "0123456789abcdef").write_text("precious")
    (replica.state / "0").mkdir()
    (replica.state / "0" / "stage").symlink_to(outside)
    (tmp_path / ".farshore-stage-root").symlink_to(outside)
    (replica.root / ".farshore-stage").symlink_to(outside)
    replica.close()
    replica.open()
    replica.source.put(*replica.transaction(Put(0, b"f", FILE, b"x")))
    assert replica.source.read() == Ack(1)
    told = replica.source.read()
    assert isinstance(told, Applied)
    assert "no place for temporary files" in told.stalled
    assert os.listdir(outside) == ["0123456789abcdef"]


def test_staging_that_others_can_write_to_is_not_used(replica: Replica) -> None:
    stage = replica.state / "0" / "stage"
    stage.mkdir(parents=True)
    stage.chmod(0o777)
    (stage / "0123456789abcdef").write_text("not ours")
    assert isinstance(replica.send(Put(0, b"f", FILE, b"x")), Ack)
    assert os.listdir(stage) == ["0123456789abcdef"]


def test_staging_leaves_nothing_and_removes_nothing_else(replica: Replica) -> None:
    stage = replica.state / "0" / "stage"
    stage.mkdir(parents=True, mode=0o700)
    (stage / "0123456789abcdef").write_text("from a crash")
    (stage / "else").write_text("somebody's")
    replica.close()
    replica.open()
    assert os.listdir(stage) == ["else"]
    assert isinstance(replica.send(Put(0, b"f", FILE, b"x"), Move(0, b"nothing", b"x")), Nak)
    replica.work(replica.applier.checkpoint)
    assert os.listdir(stage) == ["else"]


@pytest.mark.parametrize("operation", [MakeSymlink(0, b"", FILE, b"/tmp"), Link(0, b"", b"l")])
def test_a_root_never_becomes_a_link(replica: Replica, operation: FromSource) -> None:
    assert isinstance(replica.send(MakeSymlink(0, b"l", FILE, b"/tmp")), Ack)
    assert isinstance(replica.send(operation), Nak)
    assert not replica.root.is_symlink()
    assert (replica.root / "l").is_symlink()


def test_a_root_may_be_the_administrators_link(replica: Replica, tmp_path: Path) -> None:
    replica.close()
    replica.root.rename(tmp_path / "data")
    replica.root.symlink_to("data")
    replica.open()
    assert isinstance(replica.send(MakeDir(0, b"", DIRECTORY), Put(0, b"f", FILE, b"x")), Ack)
    assert replica.root.is_symlink()
    assert (tmp_path / "data" / "f").read_text() == "x"


def test_a_file_takes_a_directorys_place(replica: Replica) -> None:
    (replica.root / "a" / "b" / "x").mkdir(parents=True)
    (replica.root / "a" / "b" / "x" / "f").touch()
    (replica.root / "q").mkdir()
    assert isinstance(replica.send(Put(0, b"q/n", FILE, b"1"), Put(0, b"a/b/x", FILE, b"2")), Ack)
    assert (replica.root / "a" / "b" / "x").read_text() == "2"


def test_what_is_excluded_is_kept_aside_too(replica: Replica, tmp_path: Path) -> None:
    replica.applier.keep_aside(tmp_path / "aside", lambda *_: True)
    (replica.root / "d" / "e").mkdir(parents=True)
    (replica.root / "d" / "e" / "x.tmp").write_text("excluded")
    (replica.root / "d" / "y").write_text("y")
    (replica.root / "d" / "link").symlink_to("/etc")
    assert isinstance(replica.send(Remove(0, b"d")), Ack)
    assert kept(tmp_path / "aside") == {"0/d/e/x.tmp": "excluded", "0/d/y": "y"}
    assert replica.applier.kept_aside == 2


def test_files_kept_aside_never_collide(replica: Replica, tmp_path: Path) -> None:
    replica.applier.keep_aside(tmp_path / "aside", lambda *_: True)
    (replica.root / "a").write_text("a file")
    assert isinstance(replica.send(MakeDir(0, b"a", DIRECTORY)), Ack)
    (replica.root / "a" / "b").write_text("below")
    assert isinstance(replica.send(Remove(0, b"a")), Ack)
    (replica.root / "a").write_text("another file")
    assert isinstance(replica.send(Remove(0, b"a")), Ack)
    assert kept(tmp_path / "aside") == {"0/a": "a file", "0~1/a/b": "below", "0~2/a": "another file"}


def test_what_the_stream_placed_is_not_kept_aside(replica: Replica, tmp_path: Path) -> None:
    replica.applier.keep_aside(tmp_path / "aside", lambda *_: True)
    for content in (b"1", b"2"):
        assert isinstance(replica.send(Put(0, b"f", FILE, content)), Ack)
    assert isinstance(replica.send(Move(0, b"f", b"g"), Remove(0, b"g")), Ack)
    assert replica.applier.kept_aside == 0


@pytest.mark.parametrize("based", [False, True])
def test_a_filesystem_mounted_below_the_root(replica: Replica, monkeypatch: pytest.MonkeyPatch, based: bool) -> None:
    (replica.root / "up").mkdir()
    assert isinstance(replica.send(Put(0, b"a", FILE, b"a")), Ack)
    if based:
        (replica.root / "up" / "f").write_text("old")
    # Staged names are of 16 digits; those that are renamed in their own directory begin otherwise.
    crossing(monkeypatch, lambda source, target: len(source) == 16 and target == b"f")
    meta = Meta(0o640, os.getuid(), os.getgid(), 5, 6, [(b"user.k", b"v")])
    data = bytes(3 << 20) + b"end"
    replica.source.put(*upload(1, b"up/f", stream(data)))
    assert isinstance(replica.send(Patch(0, b"up/f", meta, 1)), Ack)
    placed = replica.root / "up" / "f"
    assert placed.read_bytes() == data
    assert (stat.S_IMODE(placed.stat().st_mode), placed.stat().st_mtime_ns) == (0o640, 6)
    assert os.getxattr(placed, "user.k") == b"v"
    assert os.listdir(replica.root / "up") == ["f"]


def test_no_handle_is_lost_when_nothing_can_be_staged(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    (replica.root / "f").write_bytes(bytes(100_000))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Stage, "create", full)
    before = handles()
    for _ in range(5):
        replica.source.put(Upload(1, 0, b"f", True, False, 0), Chunk(1, stream(b""), True))
        answer = replica.source.verdict()
        assert isinstance(answer, Nak)
        assert (answer.seq, answer.unknown_base) == (0, False)
        replica.disconnect()
    assert handles() == before


def test_no_handle_outlives_a_transaction(replica: Replica) -> None:
    assert isinstance(replica.send(MakeDir(0, b"d", DIRECTORY), Put(0, b"d/first", FILE, b"")), Ack)
    assert isinstance(replica.send(Remove(0, b"d")), Ack)
    before = replica.work(handles)
    for number in range(3):
        path = b"d%d" % number
        assert isinstance(replica.send(MakeDir(0, path, DIRECTORY), Put(0, path + b"/f", FILE, b"x")), Ack)
        assert isinstance(replica.send(Remove(0, path)), Ack)
    assert replica.work(handles) <= before


@pytest.mark.parametrize(
    "operation",
    [
        MakeSymlink(0, b"l", FILE, b"x" * 5000),
        SetMeta(0, b"l", Meta(0o644, 0, 0, 1, 1, [(b"user.k", bytes(5000))])),
        Move(0, b"l", b"/".join([b"n" * 250] * 16)),
    ],
)
def test_metadata_of_a_transaction_is_bounded(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, operation: FromSource
) -> None:
    monkeypatch.setattr(staging, "MAX_METADATA", 20_000)
    replica.source.put(Begin(1, 1), *[operation] * 5)
    ended = replica.ended()
    assert isinstance(ended, ProtocolError)
    assert "bytes of metadata" in str(ended)


def test_what_is_applied_is_durable_before_its_journal_goes(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    (replica.root / "f").write_text("x")
    assert isinstance(replica.send(SetMeta(0, b"f", FILE)), Ack)
    journal = replica.state / "journal"
    assert os.listdir(journal)
    left: list[int] = []
    monkeypatch.setattr("farshore.dbm.replica.tree.syncfs", lambda handle: left.append(len(os.listdir(journal))))
    replica.work(replica.applier.checkpoint)
    assert left == [1]
    assert os.listdir(journal) == []


def test_a_very_deep_tree_is_removed(replica: Replica, tmp_path: Path) -> None:
    replica.applier.keep_aside(tmp_path / "aside", lambda *_: True)
    top = here = os.open(replica.root, os.O_RDONLY)
    for _ in range(2500):
        os.mkdir("dd", dir_fd=here)
        below = os.open("dd", os.O_RDONLY, dir_fd=here)
        if here != top:
            os.close(here)
        here = below
    os.close(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=here))
    os.close(here)
    os.close(top)
    (replica.root / "dd" / "other").mkdir()
    assert isinstance(replica.send(Remove(0, b"dd")), Ack)
    assert os.listdir(replica.root) == []
    assert replica.applier.kept_aside == 1


def test_removal_never_follows_a_link(replica: Replica, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").touch()
    (replica.root / "d" / "e").mkdir(parents=True)
    (replica.root / "d" / "e" / "l").symlink_to(tmp_path / "outside")
    assert isinstance(replica.send(Remove(0, b"d")), Ack)
    assert os.listdir(tmp_path / "outside") == ["f"]


@pytest.mark.parametrize("mode", [0o555, 0o311, 0])
def test_an_ordinary_user_changes_a_read_only_directory(tmp_path: Path, mode: int) -> None:
    """In a process of its own, which is nobody's when the tests are root's."""
    meta = Meta(mode, 65534, 65534, 1, 1, [])
    file = Meta(0o644, 65534, 65534, 1, 1, [])
    base = Path(os.fsdecode(os.path.realpath(tmp_path)))
    if os.geteuid() != 0:
        meta, file = (Meta(m.mode, os.getuid(), os.getgid(), 1, 1, []) for m in (meta, file))
    (base / "root").mkdir()
    if os.geteuid() == 0:
        os.chown(base / "root", 65534, 65534)
        os.chown(base, 65534, 65534)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(base)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            _read_only(meta, file)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _read_only(meta: Meta, file: Meta) -> None:
    # Relative: the directories above belong to root.
    replica = Replica(Path())

    def send(*operations: FromSource) -> None:
        answer = replica.send(*operations)
        assert isinstance(answer, Ack), answer

    def mode(path: str) -> int:
        return stat.S_IMODE(os.lstat(path).st_mode)

    send(MakeDir(0, b"d", meta), Put(0, b"d/f", file, b"1"), MakeDir(0, b"d/e", meta), Put(0, b"d/e/f", file, b"1"))
    assert mode("root/d") == meta.mode
    send(Put(0, b"d/f", file, b"2"), Put(0, b"d/g", file, b"2"))
    send(SetMeta(0, b"d", meta), Move(0, b"d/g", b"d/h"))
    assert mode("root/d") == meta.mode
    send(MakeDir(0, b"other", meta), Move(0, b"d/e", b"other/e"))
    assert (mode("root/d"), mode("root/other")) == (meta.mode, meta.mode)
    send(Remove(0, b"d/h"), Remove(0, b"d"), Remove(0, b"other"))
    assert os.listdir("root") == []
    if meta.mode & 0o500 != 0o500:
        return
    # That they could be changed for a moment, the history does not take for their modes.
    for seq in range(1, 5):
        replica.work(lambda seq=seq: copy_out(replica.applier.view(0, seq), b"", b"past-%d" % seq, Progress()))
        assert mode(f"past-{seq}/d") == meta.mode
    assert (mode("past-4/other"), mode("past-3/d/e")) == (meta.mode, meta.mode)
