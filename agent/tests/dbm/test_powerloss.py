"""Disks that lose power lose what was not flushed, and a short campaign on them; `make powerloss` runs a long one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import disks
import powerloss
import pytest
from disks import FILESYSTEMS, Machine

from farshore.dbm.planner import Planned
from farshore.dbm.sender import _Pending

pytestmark = pytest.mark.skipif(bool(disks.why_not()), reason=disks.why_not() or "-")
KINDS = [
    pytest.param(name, marks=pytest.mark.skipif(bool(disks.why_not(each.kind)), reason=disks.why_not(each.kind) or "-"))
    for name, each in FILESYSTEMS.items()
]
_BLOCK = 4096
_CUTS = 12

Make = Callable[..., Machine]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Make]:
    made: list[Machine] = []

    def make(name: str, **options: Any) -> Machine:
        try:
            made.append(Machine(tmp_path / f"machine{len(made)}", FILESYSTEMS[name], **options))
        except disks.Unavailable as error:
            pytest.skip(str(error))
        return made[-1]

    yield make
    for each in made:
        each.close()


def cut(machine: Machine, seed: int) -> disks.Survived:
    machine.freeze()
    machine.fail()
    machine.unmount()
    return machine.restore(seed)


def backing_file(device: str) -> str:
    """What a loop device is attached to, "" for nothing; "/" when the mount that its file was in is gone."""
    try:
        return Path("/sys/block", device, "loop/backing_file").read_text().strip()
    except OSError:
        return ""


def is_free(device: str, base: Path) -> bool:
    """Whether a device that was attached to a file below ``base`` is not so any more."""
    backing = backing_file(device)
    return backing != "/" and str(base) not in backing


def write_file(path: Path, data: bytes, sync: bool) -> None:
    """A new file; with ``sync``, a durable one."""
    with path.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    if sync:
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


@pytest.mark.parametrize("name", KINDS)
def test_a_cut_takes_what_was_not_synced_and_nothing_else(machine: Make, name: str) -> None:
    disk = machine(name)
    top = disk.mounts[0]
    lost = 0
    for number in range(_CUTS):
        data = os.urandom(50_000)
        write_file(top / "without", data, sync=False)
        write_file(top / f"with{number}", data, sync=True)
        cut(disk, number)
        assert disk.mount()
        assert (top / f"with{number}").read_bytes() == data
        there = (top / "without").read_bytes() if (top / "without").exists() else b""
        lost += there != data
    assert lost > 0
    assert len(list(top.glob("with[0-9]*"))) == _CUTS


@pytest.mark.parametrize("name", KINDS)
def test_sectors_survive_or_not_each_for_itself(machine: Make, name: str) -> None:
    disk = machine(name)
    disk.unmount()
    sector = disk.filesystem.sector
    seen: set[str] = set()
    torn = 0
    for seed in range(4 * _CUTS):
        handle = os.open(disk.device(), os.O_RDWR)
        try:
            os.pwrite(handle, b"o" * 4 * _BLOCK, 0)
            os.fsync(handle)
            # Written to the disk, which is not told to flush it.
            for block in range(4):
                os.pwrite(handle, b"n" * _BLOCK, block * _BLOCK)
            assert disks.write_back(handle)
            survived = cut(disk, seed)
        finally:
            os.close(handle)
        seen.add(survived.lot)
        handle = os.open(disk.device(), os.O_RDONLY)
        found = os.pread(handle, 4 * _BLOCK, 0)
        os.close(handle)
        sectors = [found[at : at + sector] for at in range(0, len(found), sector)]
        assert set(sectors) <= {b"n" * sector, b"o" * sector}
        new = sum(each[:1] == b"n" for each in sectors) * sector
        assert (survived.bytes, survived.kept_bytes) == (4 * _BLOCK, new)
        if survived.lot in ("nothing", "all"):
            assert new == (0 if survived.lot == "nothing" else 4 * _BLOCK)
        torn += any(len(set(found[at : at + _BLOCK])) > 1 for at in range(0, len(found), _BLOCK))
    assert seen == {"nothing", "all", "prefix", "writes", "sectors"}
    assert (torn > 0) == (sector < _BLOCK)


@pytest.mark.parametrize("name", KINDS)
def test_a_disk_that_lies_about_flushes_is_found_out(machine: Make, name: str) -> None:
    disk = machine(name, lies=True)
    lost = 0
    for seed in range(_CUTS):
        write_file(disk.mounts[0] / "with", b"x" * 50_000, sync=True)
        cut(disk, seed)
        try:
            disk.mount()
        except disks.Unmountable:
            return
        lost += not (disk.mounts[0] / "with").exists()
        (disk.mounts[0] / "with").unlink(missing_ok=True)
    assert lost > 0


def test_the_power_goes_just_before_a_certain_flush(machine: Make) -> None:
    disk = machine("ext4")
    disk.sync()
    disk.freeze_at("flush", 1)
    writer = subprocess.Popen(
        [sys.executable, "-c", "import os, sys; f = open(sys.argv[1], 'w'); os.fsync(f.fileno())", disk.mounts[0] / "f"]
    )
    try:
        while not disk.frozen:
            assert writer.poll() is None
        # The promise is not given.
        assert writer.poll() is None
        writer.kill()
        disk.fail()
    finally:
        writer.kill()
        writer.wait()
    disk.unmount()
    disk.restore(1)
    assert disk.mount()


def test_machines_side_by_side_have_nothing_in_common(machine: Make) -> None:
    one, two = machine("ext4"), machine("ext4", count=2)
    assert len({one.device(), two.device(0), two.device(1)}) == 3
    write_file(one.mounts[0] / "f", b"1", sync=True)
    write_file(two.mounts[1] / "f", b"2", sync=True)
    cut(one, 1)
    assert (two.mounts[1] / "f").read_bytes() == b"2"
    cut(two, 1)
    assert one.mount()
    assert two.mount()
    assert (one.mounts[0] / "f").read_bytes() == b"1"
    assert (two.mounts[1] / "f").read_bytes() == b"2"


def test_nothing_is_left_of_a_machine_whose_maker_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; import disks; disks.enter_namespace();"
        "machine = disks.Machine(Path(sys.argv[1]), disks.FILESYSTEMS['ext4']);"
        "(machine.mounts[0] / 'f').write_bytes(b'x' * 100_000);"
        "print(machine.device(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(disks.__file__).parent)}
    command = [sys.executable, "-c", code, str(tmp_path / "machine")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.stdout.startswith("/dev/loop")
    disks.wait_until(lambda: is_free(Path(done.stdout.strip()).name, tmp_path))


def test_a_number_that_is_used_again_stands_for_its_last_transaction(machine: Make) -> None:
    disk = machine("ext4")
    path = disk.mounts[0] / "pending"
    for seed in range(_CUTS):
        pending = _Pending(path)
        pending.add(Planned(1, changed={(0, b"never begun")}))
        disk.sync()
        # The next connection, in which the number is used again.
        pending.reset()
        pending.add(Planned(1, changed={(0, b"begun")}))
        pending.close()
        cut(disk, seed)
        assert disk.mount()
        pending = _Pending(path)
        found = pending.between(0, 1)
        assert found is None or [each.paths for each in found] == [[(0, b"begun")]]
        pending.reset()
        pending.close()


def campaign(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run a campaign in a process of its own, as it forks and has mounts of its own; its exit code and report."""
    report = tmp_path / "report.json"
    command = [sys.executable, powerloss.__file__, "--dir", str(tmp_path / "base"), "--report", str(report), *options]
    done = subprocess.run(command, check=False)
    if done.returncode == powerloss.CANNOT:
        pytest.skip("this machine cannot have such disks")
    return done.returncode, json.loads(report.read_text())


def test_power_cuts_lose_and_tear_nothing(tmp_path: Path) -> None:
    code, report = campaign(tmp_path, "--on", "ext4", "--cuts", "8", "--minutes", "3", "--seed", "20261")
    assert report["failures"] == []
    assert code == 0
    assert report["cuts"] > 2
    assert report["campaigns"][0]["observed"] > 0


def test_an_interrupted_campaign_leaves_no_devices(tmp_path: Path) -> None:
    base = tmp_path / "base"
    command = [
        sys.executable,
        powerloss.__file__,
        "--dir",
        str(base),
        "--on",
        "ext4",
        "--cuts",
        "500",
        "--minutes",
        "3",
    ]
    with subprocess.Popen(command, start_new_session=True) as process:
        disks.wait_until(lambda: (base / "ext4" / "cuts.log").exists() or process.poll() is not None)
        if process.poll() == powerloss.CANNOT:
            pytest.skip("this machine cannot have such disks")
        devices = [each.name for each in Path("/sys/block").glob("loop*") if str(base) in backing_file(each.name)]
        assert len(devices) == 2
        # As Ctrl-C does: to all of them.
        os.killpg(process.pid, signal.SIGINT)
    assert process.returncode != 0
    disks.wait_until(lambda: all(is_free(device, base) for device in devices))


def test_a_replica_that_syncs_nothing_is_found_out(tmp_path: Path) -> None:
    code, report = campaign(
        tmp_path, "--on", "ext4", "--cuts", "60", "--minutes", "4", "--seed", "20262", "--break-sync", "replica"
    )
    assert code == 1
    assert len(report["failures"]) == 1
