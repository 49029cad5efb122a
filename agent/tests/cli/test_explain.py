"""``farshore explain`` as a user runs it."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import Mirror

from farshore.cli.explain import NOT_PROTECTED, describe
from farshore.control import api
from farshore.dbm import explain
from farshore.dbm.explain import Place, locate
from farshore.dbm.index import Known
from farshore.fmm.dirty import Wait
from farshore.fmm.types import FileKind, Root


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    source = tmp_path / "src"
    source.mkdir()
    made = Mirror(
        tmp_path, source, "--exclude", "*.tmp", "--exclude", "cache/", "--include", "keep.tmp", "--max-size", "1kB",
        "--min-age", "1s",
    )  # fmt: skip
    for name in ("a", "d/b", "d/c"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
        os.utime(source / name, (1e9, 1e9))
    made.start()
    try:
        yield made
    finally:
        if made.process is not None and made.process.poll() is None:
            made.kill()


def ask(mirror: Mirror, path: object, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = mirror.command("explain", os.fspath(path), *arguments, "--state", str(mirror.state))  # type: ignore[call-overload]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def explained(mirror: Mirror, path: object, code: int) -> dict[str, Any]:
    asked = ask(mirror, path, "--json")
    assert asked.returncode == code, asked.stdout + asked.stderr
    answer: dict[str, Any] = json.loads(asked.stdout)
    return answer


def test_a_file_that_is_durable(mirror: Mirror) -> None:
    asked = ask(mirror, mirror.source / "a")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    lines = asked.stdout.splitlines()
    assert lines[0] == str(mirror.source / "a")
    assert lines[1] == f"  group:     mirror; protected path {mirror.source}, the other server is replica"
    assert lines[2] == "  protected: yes"
    assert lines[3] == "  copy:      the same as here"
    assert lines[4].startswith("  durable:   ")
    answer = explained(mirror, mirror.source / "a", 0)
    assert (answer["state"], answer["durable"], answer["group"]) == ("same", True, "mirror")


def test_a_directory_tells_how_many_wait_below_it(mirror: Mirror) -> None:
    answer = explained(mirror, mirror.source / "d", 0)
    assert (answer["known_below"], answer["waiting_below"], answer["state"]) == (2, 0, "same")
    assert explained(mirror, mirror.source, 0)["known_below"] == 4
    assert "below it:  2 paths are known on replica; 0 wait" in ask(mirror, mirror.source / "d").stdout


def test_the_pattern_that_leaves_it_out_is_named(mirror: Mirror) -> None:
    (mirror.source / "cache").mkdir()
    for name in ("x.tmp", "keep.tmp", "cache/f"):
        (mirror.source / name).write_text("x")
        os.utime(mirror.source / name, (1e9, 1e9))
    mirror.flush()
    answer = explained(mirror, mirror.source / "x.tmp", NOT_PROTECTED)
    assert (answer["option"], answer["number"], answer["pattern"]) == ("exclude", 1, "*.tmp")
    assert answer["why"] == "the pattern '*.tmp' leaves it out (exclude, number 1)"
    answer = explained(mirror, mirror.source / "cache" / "f", NOT_PROTECTED)
    assert answer["why"] == (
        f"the pattern 'cache/' leaves out the directory {mirror.source}/cache, and all that is in it "
        "(exclude, number 2)"
    )
    answer = explained(mirror, mirror.source / "keep.tmp", 0)
    assert answer["why"] == "the pattern 'keep.tmp' takes it back (include, number 1)"


def test_what_is_never_replicated_says_why(mirror: Mirror) -> None:
    (mirror.source / "large").write_bytes(b"x" * 1001)
    os.utime(mirror.source / "large", (1e9, 1e9))
    (mirror.source / ".farshore-x").write_text("x")
    directory = os.open(mirror.source, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{directory}/socket")
    finally:
        os.close(directory)
    mirror.flush()
    for name, why in {
        "large": "it is larger than max_size 1kB: it has 1001 bytes",
        ".farshore-x": "names that begin with .farshore- are Farshore's own temporary files",
        "socket": "it is a socket, which is of no use without the program that made it",
    }.items():
        answer = explained(mirror, mirror.source / name, NOT_PROTECTED)
        assert (answer["why"], answer["protected"]) == (why, False)
        assert f"protected: no, {why}" in ask(mirror, mirror.source / name).stdout


def test_what_is_too_young_will_be_sent(mirror: Mirror) -> None:
    (mirror.source / "young").write_text("x")
    os.utime(mirror.source / "young", (time.time() + 1e6,) * 2)
    deadline = time.monotonic() + 60
    states = []
    while (asked := ask(mirror, mirror.source / "young", "--json")).returncode == 1:
        states.append(json.loads(asked.stdout)["state"])
        assert time.monotonic() < deadline, states
    assert asked.returncode == 0
    assert set(states) <= {"young", "waiting", "sending", "missing"}


def test_what_nobody_protects_is_told_with_what_is_near(mirror: Mirror, tmp_path: Path) -> None:
    asked = ask(mirror, tmp_path / "other" / "x")
    assert asked.returncode == NOT_PROTECTED
    assert "protected: no, it does not lie below any protected path of this server" in asked.stdout
    assert f"nearest:   {mirror.source}" in asked.stdout


def test_links_above_are_resolved_and_relative_paths_made_absolute(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mirror.source / "d")
    assert explained(mirror, tmp_path / "link" / "b", 0)["path"] == str(mirror.source / "d" / "b")
    assert explained(mirror, tmp_path / "link", NOT_PROTECTED)["group"] == ""
    relative = os.path.relpath(mirror.source / "a")
    assert explained(mirror, relative, 0)["path"] == str(mirror.source / "a")
    assert explained(mirror, mirror.source / "d" / "..", 0)["path"] == str(mirror.source)


def test_any_bytes_can_be_asked_for(mirror: Mirror) -> None:
    name = os.fsencode(mirror.source) + b"/\xff\n"
    with open(name, "wb") as file:
        file.write(b"x")
    os.utime(name, (1e9, 1e9))
    mirror.flush()
    command = [*map(os.fsencode, mirror.command("explain")), name, b"--json", b"--state", os.fsencode(mirror.state)]
    asked = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert asked.returncode == 0, asked.stderr
    assert json.loads(asked.stdout)["path"] == f"{mirror.source}/\\xff\\n"


def test_a_pause_and_what_waits_for_its_end_are_told(mirror: Mirror) -> None:
    subprocess.run(mirror.command("pause", "--state", str(mirror.state)), check=True)
    (mirror.source / "a").write_text("changed")
    answer = explained(mirror, mirror.source / "a", 1)
    assert answer["state"] == "different" or answer["state"] == "young"
    assert (answer["protected"], answer["durable"]) == (True, False)
    answer = explained(mirror, mirror.source / "d" / "b", 1)
    assert (answer["state"], answer["reason"], answer["durable"]) == ("same", "paused by the administrator", False)
    answer = explained(mirror, mirror.source / "nothing", 1)
    assert (answer["state"], answer["reason"]) == ("absent", "nothing is here, nor on the other server")


def test_what_is_on_its_way_is_not_called_durable(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("new")
    status = file.lstat()
    root = Root(os.fsencode(tmp_path))
    facts = explain.look(root, Place(os.fsencode(file), "web", 0, b"f"))
    known = Known(
        0, b"f", FileKind.FILE, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_size,
        status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino, 1, 0, None, (), None, told_ns=10**18,
    )  # fmt: skip
    copy = explain.Copy(known, 0, "", "", kept=False)

    def told(wait: Wait | None, *, acknowledged: bool) -> api.Explanation:
        line = explain.Line(True, "", acknowledged, "", "", now=100.0)
        return explain.judge(facts, copy, wait, 0, line, "web", "bak1")

    sent = told(Wait(90.0, b"f", taken=True), acknowledged=False)
    assert (sent.state, sent.durable, sent.durable_at) == ("sending", False, None)
    # That it is marked again says nothing of the change before, of which the answer has come.
    assert told(Wait(90.0, b"f", taken=False), acknowledged=True).durable_at == 1e9
    there = told(None, acknowledged=True)
    assert (there.state, there.durable, there.durable_at) == ("same", True, 1e9)


def test_the_replica_sends_who_asks_to_the_source(mirror: Mirror) -> None:
    mirror.state = mirror.state / "replica"
    answer = explained(mirror, mirror.destination / "a", 1)
    assert (answer["state"], answer["protected"], answer["peer"]) == ("replica", True, "source")
    assert "ask on source how it is" in ask(mirror, mirror.destination / "a").stdout
    assert explained(mirror, mirror.destination / "x.tmp", NOT_PROTECTED)["pattern"] == "*.tmp"


def test_a_path_belongs_to_the_root_it_lies_below() -> None:
    with tempfile.TemporaryDirectory() as base:
        top = os.fsencode(os.path.realpath(base))
        os.makedirs(top + b"/real/sub")
        os.symlink(b"real", top + b"/link")
        roots = [("web", 0, top + b"/link"), ("db", 0, b"/var/lib/db"), ("db", 1, b"/var/lib/db2"), ("x", 0, b"/x")]
        assert locate(top + b"/link/sub/f", roots) == Place(top + b"/link/sub/f", "web", 0, b"sub/f")
        assert locate(top + b"/real/sub/f", roots) == Place(top + b"/link/sub/f", "web", 0, b"sub/f")
        assert locate(top + b"/link/", roots) == locate(top + b"/real", roots) == Place(top + b"/link", "web", 0)
        assert locate(b"/var/lib/db2/a", roots).root == 1
        assert locate(b"/var/lib/dbx", roots).near == (b"/var/lib/db", b"/var/lib/db2", top + b"/link")
        assert locate(b"/", roots).group == ""


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (api.Explanation("/f", "g", "/", "b", protected=True, state="waiting", waiting=12.0, reason="paused"),
         "  copy:      changed here, and not sent yet, for 12 s; paused"),
        (api.Explanation("/f", "g", "/", "b", protected=True, state="sending", waiting=600.0),
         "  copy:      on its way, for 10 min"),
        (api.Explanation("/f", "g", "/", "b", protected=True, state="same", durable=True),
         "  durable:   yes, on b, as it is here now"),
        (api.Explanation("/f", why="no", near=[]), "  nearest:   this server protects nothing"),
    ],
)  # fmt: skip
def test_the_lines_for_people(answer: api.Explanation, line: str) -> None:
    assert line in list(describe(answer))
