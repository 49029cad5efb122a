"""``farshore mirror`` as a user runs it: the destination is identical, whatever happens to the source."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from nodes import Mirror
from trees import Mutator, differences


def real_tree() -> Path:
    """A tree of real files: an installed package of some hundred files with large ones among them."""
    import netaddr
    import yaml

    assert netaddr.__file__ and yaml.__file__
    return Path(netaddr.__file__).parent.parent


def copy_some(source: Path, target: Path, most: int) -> int:
    """Copy packages of an installation until about ``most`` files are there."""
    count = 0
    for package in sorted(source.iterdir()):
        if not package.is_dir() or package.name in ("llvmlite", "nvidia", "ansible_collections"):
            continue
        shutil.copytree(package, target / package.name, symlinks=True)
        count += sum(len(files) for _, _, files in os.walk(target / package.name))
        if count >= most:
            break
    return count


def test_real_tree_stays_identical_through_random_changes(mirror: Mirror) -> None:
    assert copy_some(real_tree(), mirror.source, 1500) >= 1000
    mirror.start()
    assert differences(mirror.source, mirror.destination) == []
    mutator = Mutator(mirror.source, 7)
    for _ in range(6):
        for _ in range(40):
            mutator.step()
        mirror.flush()
        assert differences(mirror.source, mirror.destination) == []
    assert mirror.stop() == 0
    assert sorted(os.listdir(mirror.destination)) == sorted(os.listdir(mirror.source))


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_through_restarts_kills_and_pauses(mirror: Mirror, seed: int) -> None:
    mutator = Mutator(mirror.source, seed)
    chance = random.Random(seed)
    for _ in range(50):
        mutator.step()
    mirror.start()
    for _ in range(8):
        event = chance.choice(["", "", "kill", "restart", "pause"])
        if event == "pause":
            subprocess.run(mirror.command("pause", "--state", str(mirror.state)), check=True)
        for number in range(30):
            mutator.step()
            if number == 15 and event in ("kill", "restart"):
                mirror.kill() if event == "kill" else mirror.stop()
        if event in ("kill", "restart"):
            mirror.start()
        elif event == "pause":
            subprocess.run(mirror.command("resume", "--state", str(mirror.state)), check=True)
        mirror.flush()
        assert differences(mirror.source, mirror.destination) == [], (seed, event)


def test_once_ends_in_step_and_removes_what_is_only_in_the_destination(mirror: Mirror) -> None:
    (mirror.source / "kept").write_bytes(b"x" * 300_000)
    mirror.destination.mkdir()
    (mirror.destination / "extra").write_text("nobody else has this")
    (mirror.destination / "kept").write_bytes(b"x" * 299_999 + b"y")
    mirror.options = ("--once",)
    mirror.start()
    assert mirror.process is not None
    assert mirror.process.wait(60) == 0
    assert differences(mirror.source, mirror.destination) == []
    aside = [path for path in mirror.state.rglob("aside/**/*") if path.is_file()]
    assert sorted(path.name for path in aside) == ["extra", "kept"]
    assert any(path.read_bytes() == b"nobody else has this" for path in aside)


def test_a_single_file_can_be_mirrored(mirror: Mirror) -> None:
    shutil.rmtree(mirror.source)
    mirror.source.write_text("one")
    mirror.start()
    assert mirror.destination.read_text() == "one"
    mirror.source.with_name("new").write_text("two")
    mirror.source.with_name("new").replace(mirror.source)
    mirror.flush()
    assert differences(mirror.source, mirror.destination) == []


def test_excluded_paths_stay_where_they_are(mirror: Mirror) -> None:
    mirror.options = ("--exclude", "*.log", "--exclude", "cache/", "--include", "/keep.log")
    (mirror.source / "cache").mkdir()
    for name in ("a.txt", "a.log", "keep.log", "cache/b.txt"):
        (mirror.source / name).write_text(name)
    mirror.start()
    (mirror.source / "later.log").write_text("x")
    (mirror.source / "later.txt").write_text("x")
    mirror.flush()
    assert sorted(path.name for path in mirror.destination.rglob("*")) == ["a.txt", "keep.log", "later.txt"]


def test_flush_says_why_it_failed(mirror: Mirror) -> None:
    result = subprocess.run(
        mirror.command("flush", "--state", str(mirror.source), "--timeout", "1"), capture_output=True, text=True
    )
    assert result.returncode == 10
    assert "node.sock" in result.stderr


def test_flush_of_a_paused_group_is_refused(mirror: Mirror) -> None:
    mirror.start()
    subprocess.run(mirror.command("pause", "--state", str(mirror.state)), check=True)
    result = subprocess.run(
        mirror.command("flush", "--state", str(mirror.state), "--timeout", "2"), capture_output=True, text=True
    )
    assert result.returncode == 26
    assert "paused" in result.stderr


def test_state_of_another_pair_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    mirror.start()
    mirror.stop()
    other = subprocess.run(
        mirror.command("mirror", "--state", str(mirror.state), "--once", str(mirror.source), str(tmp_path / "other")),
        capture_output=True,
        text=True,
    )
    assert other.returncode == 2
    assert "belongs to the mirror" in other.stderr


@pytest.mark.parametrize("inside", ["src/dst", "src", "."])
def test_trees_within_each_other_are_refused(mirror: Mirror, tmp_path: Path, inside: str) -> None:
    result = subprocess.run(
        mirror.command("mirror", "--state", str(mirror.state), str(mirror.source), str(tmp_path / inside)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert not mirror.state.exists() or not (mirror.state / "source").exists()


def test_a_missing_root_never_empties_the_replica(mirror: Mirror) -> None:
    (mirror.source / "precious").write_text("x")
    mirror.start()
    mirror.source.rename(mirror.source.with_name("away"))
    subprocess.run(
        mirror.command("flush", "--state", str(mirror.state), "--timeout", "3"), capture_output=True, text=True
    )
    assert (mirror.destination / "precious").read_text() == "x"
    status = subprocess.run(
        mirror.command("status", "--state", str(mirror.state)), capture_output=True, text=True, check=True
    )
    assert str(mirror.source) in status.stdout


def test_runs_without_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("every other test shows it")
    base = Path(tempfile.mkdtemp())
    code = "import os, sys; os.setgid(65534); os.setuid(65534); from farshore.cli import main; sys.exit(main())"
    try:
        (base / "src").mkdir()
        (base / "src" / "file").write_text("hello")
        for path in (base, base / "src", base / "src" / "file"):
            os.chown(path, 65534, 65534)
        arguments = ["mirror", "--state", str(base / "state"), "--once", str(base / "src"), str(base / "dst")]
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            cwd="/",
            env=os.environ | {"NUMBA_CACHE_DIR": str(base / "numba"), "HOME": str(base)},
        )
        if result.returncode == 1 and ("ModuleNotFoundError" in result.stderr or "PermissionError" in result.stderr):
            pytest.skip("the Python installation is closed to other users")
        assert result.returncode == 0, result.stderr
        assert differences(base / "src", base / "dst") == []
    finally:
        shutil.rmtree(base)
