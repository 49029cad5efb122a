"""One host: its disk, its boots under a supervisor, its end."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

from . import base, cgroup, fabric
from .paths import NETNS_ROOT, LabPaths
from .proc import LabError, run, tail
from .topology import Host, Topology

# systemd-nspawn's way to say that the host wants to be booted again (EXIT_FORCE_RESTART).
_REBOOT = 133

# Beside nspawn's usual set: gateways change routes and rules; CAP_SYS_NICE and the like are in the set already.
_CAPABILITIES = "CAP_NET_ADMIN,CAP_IPC_LOCK,CAP_SYSLOG,CAP_BPF,CAP_PERFMON"

# fanotify with file handles, and bpf, are real hosts' but not containers' daily bread: nspawn's filter stops them.
_SYSTEM_CALLS = "fanotify_init fanotify_mark name_to_handle_at open_by_handle_at bpf @keyring"

# Without these, fanotify can't mark the host's file system, and a hard link falls apart when one of its names is
# written to: both work on the disk of a real host.
_OVERLAY = "index=on,nfs_export=on"

# Runs in a mount namespace of its own, so that the overlay, this view of control groups and nspawn's locks end with the
# host's last process, however it ends. cgroup2 is mounted over whatever the machine has: Debian 13's systemd boots on
# nothing else.
_BOOT = """
set -eu
{enter_group}
umount -l /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p {var}/work {var}/root
mount -t overlay overlay -o {options},lowerdir={lower},upperdir={var}/upper,workdir={var}/work {var}/root
mkdir -p /run/systemd/nspawn
mount -t tmpfs -o mode=755 tmpfs /run/systemd/nspawn
export SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
exec {nspawn}
"""


def prepare(paths: LabPaths, host: Host, public_key: str) -> None:
    """Make a host's disk: what differs from its base before the first boot.

    Written straight into the overlay's upper directory, which is allowed only while nothing has it mounted.
    """
    var = paths.host_var(host.name)
    etc = var / "upper" / "etc"
    root = var / "upper" / "root"
    for directory in (etc / "ssh", root / ".ssh"):
        directory.mkdir(parents=True)
    # The upper directory becomes the host's "/": it, /etc and /root need the modes they have in the base.
    lower = base.base_path(host.release)
    for directory in (var / "upper", etc, etc / "ssh", root):
        shutil.copymode(lower / directory.relative_to(var / "upper"), directory)
    (root / ".ssh").chmod(0o700)
    _write(root / ".ssh" / "authorized_keys", public_key, 0o600)
    _write(etc / "hostname", f"{host.name}\n")
    _write(etc / "hosts", f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n::1 localhost\n")
    # With a machine ID this is no first boot to systemd, which would otherwise enable units by preset.
    _write(etc / "machine-id", f"{uuid.uuid4().hex}\n", 0o444)
    key = etc / "ssh" / "ssh_host_ed25519_key"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", host.name, "-f", str(key)])
    paths.host_run(host.name).mkdir(parents=True, exist_ok=True)


def host_public_key(paths: LabPaths, host: Host) -> str:
    """The host's SSH key, in the form of a known_hosts line."""
    file = paths.host_var(host.name) / "upper" / "etc" / "ssh" / "ssh_host_ed25519_key.pub"
    kind, key, *_ = file.read_text(encoding="ascii").split()
    return f"{host.management.ip} {kind} {key}\n"


def launch(paths: LabPaths, host: Host) -> None:
    """Start the host's supervisor, which boots it, and return at once."""
    script = Path(__file__).with_name("lab")
    words = [sys.executable, str(script), "_supervise", "--name", paths.name, host.name]
    with paths.console(host.name).open("ab") as console:
        # Entering the group is the first thing it does, so there is no moment at which killing the group misses it.
        subprocess.Popen(
            ["sh", "-c", f"{cgroup.enter_command(paths.name, host.name, 'supervisor')}; exec {shlex.join(words)}"],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            cwd="/",
            start_new_session=True,
        )


def supervise(paths: LabPaths, topology: Topology, host: Host) -> int:
    """Boot the host, again each time that it asks for a reboot, until it is off; return nspawn's exit code.

    Each boot starts with a fresh network namespace; an off host's is gone, so it answers nothing.
    """
    while True:
        fabric.plug(paths, topology, host)
        enter = cgroup.enter_command(paths.name, host.name, "machine")
        script = _BOOT.format(
            enter_group=enter,
            options=_OVERLAY,
            var=shlex.quote(str(paths.host_var(host.name))),
            lower=shlex.quote(str(base.base_path(host.release))),
            nspawn=shlex.join(_nspawn(paths, host)),
        )
        # Slave, not private: a network namespace's name that is removed outside must not live on in here.
        code = subprocess.run(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script], check=False
        ).returncode
        cgroup.kill(cgroup.group(paths.name, host.name) / "machine")
        if code != _REBOOT:
            fabric.unplug(paths, topology, host)
            return code


def _nspawn(paths: LabPaths, host: Host) -> list[str]:
    return [
        "systemd-nspawn",
        "--quiet",
        "--boot",
        # There may be no systemd on the machine to register with, and no unit to be put into.
        "--register=no",
        "--keep-unit",
        f"--directory={paths.host_var(host.name) / 'root'}",
        f"--machine={paths.netns(host.name)}",
        f"--hostname={host.name}",
        f"--network-namespace-path={NETNS_ROOT / paths.netns(host.name)}",
        f"--capability={_CAPABILITIES}",
        f"--system-call-filter={_SYSTEM_CALLS}",
        "--bind=/dev/net/tun",
        "--console=read-only",
        "--link-journal=no",
        "--resolv-conf=off",
        "--timezone=off",
    ]


def leader(paths: LabPaths, host: Host) -> int | None:
    """The host's PID 1 as the machine sees it; None while the host is off."""
    for pid in cgroup.pids(cgroup.group(paths.name, host.name)):
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("NSpid:") and line.split()[2:] == ["1"]:
                return pid
    return None


def is_on(paths: LabPaths, host: Host) -> bool:
    """Whether anything of the host runs."""
    return bool(cgroup.pids(cgroup.group(paths.name, host.name)))


def kill(paths: LabPaths, topology: Topology, host: Host) -> None:
    """Pull the plug: the host says nothing more on any cable, then none of its processes exists."""
    # Cables first: processes that die send FIN and RST, a host without power doesn't.
    fabric.unplug(paths, topology, host)
    cgroup.kill(cgroup.group(paths.name, host.name))
    # A host that was just rebooting may have been plugged in again in between.
    fabric.unplug(paths, topology, host)


def failure(paths: LabPaths, host: Host, what: str) -> LabError:
    """An error about a host that shows the end of its console."""
    console = paths.console(host.name)
    return LabError(f"{host.name}: {what}; its console ({console}) ends with\n{tail(console)}")


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
