"""The programs that run on the hosts: manifest, churn, damage, and users against a real HTTP server."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from farshore_drill import compare, history

FILES = Path(__file__).resolve().parents[2] / "roles" / "drill" / "files"


def run(program: str, *arguments: object) -> str:
    words = [sys.executable, str(FILES / program), *map(str, arguments)]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


def manifest(root: Path, *more: str) -> dict[tuple[str, str], dict[str, Any]]:
    return compare.load(run("manifest.py", root, "--as", "tree", *more).splitlines())


def tree(root: Path) -> Path:
    (root / "a").mkdir(parents=True)
    (root / "a" / "one.txt").write_text("one")
    (root / "a" / "x.tmp").write_text("temporary")
    os.link(root / "a" / "one.txt", root / "same.txt")
    (root / "link").symlink_to("a/one.txt")
    Path(os.fsdecode(os.fsencode(root) + b"/bad \xff name")).write_text("bad")
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)
    os.utime(root, ns=(10**18, 10**18))
    return root


def test_trees_that_are_the_same_do_not_differ(tmp_path: Path) -> None:
    result = compare.compare(manifest(tree(tmp_path / "x")), manifest(tree(tmp_path / "y")))
    assert (result.compared, result.differing) == (7, 0)
    assert result.types == {"file": 4, "directory": 2, "symlink": 1}


def _touch(root: Path) -> None:
    os.utime(root / "same.txt", ns=(10**18, 10**18 + 1))


def _retarget(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("a")


def _unlink_hard(root: Path) -> None:
    (root / "same.txt").unlink()
    (root / "same.txt").write_text("one")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "a" / "one.txt").write_text("two"), "sha256"),
        (lambda root: (root / "a").chmod(0o700), "mode"),
        (_touch, "mtime_ns"),
        (_retarget, "target"),
        (_unlink_hard, "link"),
        (lambda root: (root / "link").unlink(), "only on the local server"),
        (lambda root: (root / "new").mkdir(), "only on the backup server"),
    ],
)
def test_each_difference_is_named(tmp_path: Path, change: Any, words: str) -> None:
    local, backup = tree(tmp_path / "x"), tree(tmp_path / "y")
    change(backup)
    result = compare.compare(manifest(local), manifest(backup))
    assert result.differing
    assert any(words in line for line in result.differences)


def test_what_is_excluded_is_not_listed_unless_it_is_included(tmp_path: Path) -> None:
    root = tree(tmp_path / "x")
    (root / ".farshore-stage").write_text("ours")
    assert ("tree", "a/x.tmp") in manifest(root)
    assert ("tree", "a/x.tmp") not in manifest(root, "--exclude=*.tmp")
    assert ("tree", "a/x.tmp") in manifest(root, "--exclude=*.tmp", "--include=x.tmp")
    assert not [path for _, path in manifest(root) if "farshore" in path]


@pytest.mark.parametrize(
    ("limit", "age", "size"), [("--max-size=1kB", 10**6, 1001), ("--min-age=1h", 60, 1), ("--max-age=90d", 10**7, 1)]
)
def test_what_the_limits_leave_alone_is_no_difference(tmp_path: Path, limit: str, age: int, size: int) -> None:
    local, backup = tree(tmp_path / "x"), tree(tmp_path / "y")
    (local / "a" / "one.txt").write_bytes(b"x" * size)
    then = time.time() - age
    os.utime(local / "a" / "one.txt", (then, then))
    (local / "a" / "new").write_bytes(b"y" * size)
    os.utime(local / "a" / "new", (then, then))
    os.utime(local / "a", ns=(10**18, 10**18))
    assert compare.compare(manifest(local), manifest(backup)).differing == 3
    assert compare.compare(manifest(local, limit), manifest(backup, limit)).differences == []


def test_files_change_until_they_are_told_to_stop(tmp_path: Path) -> None:
    source = tree(tmp_path / "source")
    target, count = tmp_path / "churn", tmp_path / "count.json"
    run("churn.py", "populate", target, "--marker=m", f"--source={source}", "--large-size=1", "--files=3")
    before = manifest(target)
    assert len([path for _, path in before if path.startswith("tree/") and path.endswith("same.txt")])
    words = [
        sys.executable,
        str(FILES / "churn.py"),
        "run",
        str(target),
        "--marker=m",
        "--rate=500",
        f"--count={count}",
    ]
    with subprocess.Popen(words) as process:
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert json.loads(count.read_text())["changes"] > 50
    assert compare.compare(before, manifest(target)).differing > 10


def test_damage_is_done_once_and_told(tmp_path: Path) -> None:
    root = tmp_path / "x"
    root.mkdir()
    for number in range(20):
        (root / f"{number}").write_text("content" * 100)
    flag = tmp_path / "flag"
    flag.touch()
    options = ("--delete=5", "--garble=4", f"--flag={flag}", f"--report={tmp_path / 'report'}")
    run("damage.py", root, *options)
    assert json.loads((tmp_path / "report").read_text()) == {"deleted": 5, "garbled": 4}
    assert len(list(root.iterdir())) == 15
    assert sum(path.read_bytes() != b"content" * 100 for path in root.iterdir()) == 4
    with pytest.raises(subprocess.CalledProcessError):
        run("damage.py", root, *options)


class Store(http.server.BaseHTTPRequestHandler):
    """Two servers in one: whose name it bears, and what each of them has."""

    protocol_version = "HTTP/1.1"
    serving = "web1"
    silent = False
    stores: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - one store for all requests of a test

    def answer(self, status: int, content: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("X-Served-By", self.serving)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        content = self.stores[self.serving].get(self.path)
        self.answer(503 if self.silent else 200 if content is not None else 404, content or b"")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.silent:
            self.stores[self.serving][self.path] = content
        self.answer(503 if self.silent else 201)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def store() -> Iterator[str]:
    Store.stores, Store.serving, Store.silent = {"web1": {}, "bak1": {}}, "web1", False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/docs/"
    server.shutdown()
    server.server_close()


def test_users_remember_what_a_switch_and_a_return_did_to_them(store: str, tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    words = [
        sys.executable,
        str(FILES / "user.py"),
        f"--url={store}",
        f"--history={path}",
        "--marker=mark",
        "--rate=60",
    ]
    with subprocess.Popen(words) as process:
        time.sleep(1.5)
        # The backup has everything but one document; that one is lost at the switch.
        Store.silent = True
        time.sleep(0.5)
        Store.stores["bak1"] = dict(Store.stores["web1"])
        del Store.stores["bak1"]["/docs/00003.txt"]
        Store.serving, Store.silent = "bak1", False
        time.sleep(3.0)
        Store.stores["web1"] = dict(Store.stores["bak1"])
        Store.serving = "web1"
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    with open(path, encoding="ascii") as file:
        past = history.load(file)
    figures = history.measure(past, "web1", "bak1")
    assert past.complete
    assert min(figures.user_writes_before, figures.user_writes_away, figures.user_writes_after) > 10
    assert figures.user_writes_lost_at_switch >= 1
    assert all("document 3 " in line for line in figures.lost)
    assert figures.rto_seconds is not None
    assert 0.3 < figures.rto_seconds < 10
    assert figures.rpo_seconds is not None
    assert figures.rpo_seconds > 0
    assert figures.user_writes_lost_after_failback == 0
    assert figures.user_writes_unobserved_at_switch == 0
    assert all(b"mark" in content for content in Store.stores["web1"].values())
