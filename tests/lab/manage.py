"""Whole labs: up, down, and what happens to their hosts in between."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from . import base, capture, cgroup, fabric, ssh
from . import host as machine
from .paths import LabPaths
from .proc import LabError, locked, run
from .topology import Host, Topology, load

BOOT_TIMEOUT = 80.0

# Every systemd needs a dozen inotify instances, and all hosts count as the same root user.
_INOTIFY_INSTANCES = 4096

Say = Callable[[str], None]


def holding(paths: LabPaths) -> AbstractContextManager[None]:
    """The lock under which a lab is changed."""
    return locked(paths.lock, f"the lab {paths.name}", timeout=180)


def opened(paths: LabPaths) -> Topology:
    """The topology of a lab that is up; LabError when there is none of that name."""
    if not paths.topology.exists():
        raise LabError(f"no lab {paths.name!r} is up: tests/lab/lab up --name {paths.name}")
    return load(paths.topology)


def up(paths: LabPaths, topology_file: Path, say: Say) -> Topology:
    """Make the lab and return when all its hosts run and answer SSH; on any error all of it is removed again."""
    topology = load(topology_file)
    releases = {host.release for host in topology.hosts.values()}
    base.ensure(releases, say)
    with holding(paths):
        if paths.run.exists() or paths.var.exists() or paths.all_netns():
            raise LabError(f"there is a lab {paths.name!r} already: tests/lab/lab down --name {paths.name}")
        try:
            _build(paths, topology_file, topology, say)
        except BaseException:
            say("failed: removing everything that was made")
            _remove(paths)
            raise
    return topology


def _build(paths: LabPaths, topology_file: Path, topology: Topology, say: Say) -> None:
    _allow_inotify(say)
    for directory in (paths.run, paths.var, paths.ssh_masters, paths.cuts):
        directory.mkdir(parents=True, mode=0o700)
    shutil.copyfile(topology_file, paths.topology)
    public_key = ssh.make_key(paths)
    hosts = list(topology.hosts.values())
    for host in hosts:
        machine.prepare(paths, host, public_key)
    known = "".join(machine.host_public_key(paths, host) for host in hosts)
    paths.known_hosts.write_text(known, encoding="ascii")
    ssh.write_files(paths, topology)
    fabric.build(paths, topology)
    say("network is laid, booting " + " ".join(topology.hosts))
    for host in hosts:
        machine.launch(paths, host)
    with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
        for _ in pool.map(lambda host: wait_ready(paths, host, say), hosts):
            pass


def wait_ready(paths: LabPaths, host: Host, say: Say, *, not_boot_id: str = "") -> None:
    """Wait until a host has finished booting and answers SSH; LabError with its console's end when it doesn't.

    With `not_boot_id`, the boot of that ID is the one before the one that is waited for.
    """
    started = time.monotonic()
    deadline = started + BOOT_TIMEOUT
    question = (
        "cat /proc/sys/kernel/random/boot_id; systemctl is-system-running --wait; "
        "systemctl list-units --failed --plain --no-legend"
    )
    while time.monotonic() < deadline:
        answer = ssh.ask(paths, host, question, timeout=max(1.0, deadline - time.monotonic()))
        lines = answer.stdout.splitlines() if answer else []
        if len(lines) >= 2 and lines[0] != not_boot_id and lines[1] in ("running", "degraded"):
            failed = [line.split()[0] for line in lines[2:] if line.split()]
            say(f"{host.name} is {lines[1]}" + (f": failed are {' '.join(failed)}" if failed else ""))
            return
        # A supervisor that has just been started may not be in its group yet.
        if not machine.is_on(paths, host) and time.monotonic() - started > 2:
            raise machine.failure(paths, host, "ended instead of booting")
        time.sleep(0.25)
    raise machine.failure(paths, host, f"has not booted within {BOOT_TIMEOUT:g} s")


def down(paths: LabPaths) -> bool:
    """Remove a lab or what is left of one; return whether there was anything."""
    with holding(paths):
        existed = _remove(paths)
        paths.lock.unlink(missing_ok=True)
    cgroup.tidy()
    return existed


def _remove(paths: LabPaths) -> bool:
    group = cgroup.group(paths.name)
    existed = paths.run.exists() or paths.var.exists() or bool(paths.all_netns()) or group.is_dir()
    ssh.hang_up(paths)
    cgroup.kill(group)
    fabric.demolish(paths)
    for directory in (paths.run, paths.var):
        if directory.exists():
            # Not shutil.rmtree: a host's tree may have names and depths that only rm takes without complaint.
            run(["rm", "-rf", "--one-file-system", str(directory)], timeout=120)
    return existed


def kill(paths: LabPaths, topology: Topology, host: Host) -> None:
    """Pull a host's plug."""
    ssh.hang_up(paths, host)
    machine.kill(paths, topology, host)


def start(paths: LabPaths, host: Host, say: Say) -> None:
    """Boot a host that is off, from its disk as it was left; returns when it answers SSH."""
    if machine.is_on(paths, host):
        raise LabError(f"{host.name} is on already")
    ssh.hang_up(paths, host)
    machine.launch(paths, host)
    wait_ready(paths, host, say)


def reboot(paths: LabPaths, host: Host, say: Say) -> None:
    """Reboot a host the orderly way; returns when it answers SSH again."""
    asked = ssh.ask(paths, host, "cat /proc/sys/kernel/random/boot_id", timeout=20)
    if not asked or asked.returncode:
        raise machine.failure(paths, host, "does not answer SSH, so it can't be asked to reboot")
    ssh.hang_up(paths, host)
    # The connection usually dies before the answer.
    ssh.ask(paths, host, "systemctl reboot", timeout=20)
    wait_ready(paths, host, say, not_boot_id=asked.stdout.strip())


def status(paths: LabPaths) -> dict[str, Any]:
    """What `list` shows about one lab."""
    if not paths.topology.exists():
        return {"name": paths.name, "hosts": {}, "cut": [], "captures": [], "broken": True}
    topology = load(paths.topology)
    hosts = {
        host.name: {
            "release": host.release,
            "state": "on" if machine.is_on(paths, host) else "off",
            "leader": machine.leader(paths, host),
            "management": str(host.management.ip),
            "addresses": {i.name: str(i.address) for i in host.interfaces},
        }
        for host in topology.hosts.values()
    }
    cuts = sorted(entry.name for entry in paths.cuts.iterdir()) if paths.cuts.is_dir() else []
    return {
        "name": paths.name,
        "hosts": hosts,
        "cut": cuts,
        "captures": capture.running_captures(paths),
        "broken": False,
        "ssh_config": str(paths.ssh_config),
        "inventory": str(paths.inventory),
    }


def _allow_inotify(say: Say) -> None:
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text(encoding="ascii")) < _INOTIFY_INSTANCES:
        limit.write_text(str(_INOTIFY_INSTANCES), encoding="ascii")
        say(f"raised this machine's fs.inotify.max_user_instances to {_INOTIFY_INSTANCES}")
