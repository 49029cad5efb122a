"""What the lab needs on the machine itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from .proc import LabError, run

# Command -> Debian package.
NEEDED = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "sysctl": "procps",
    "tcpdump": "tcpdump",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nc": "netcat-openbsd",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
}


def missing() -> list[str]:
    """Packages that have to be installed before the lab works."""
    return sorted({package for command, package in NEEDED.items() if not shutil.which(command)})


def install(say: Callable[[str], None]) -> None:
    """Install what is missing with apt; nothing happens when nothing is."""
    packages = missing()
    if not packages:
        say("everything is there")
        return
    say("installing " + " ".join(packages))
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-y"]
    run([*apt, "update"], timeout=300)
    run([*apt, "--no-install-recommends", "install", *packages], timeout=600)


def check() -> None:
    """LabError saying what to do when the machine isn't ready for a lab."""
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces and mounts: run it as root")
    if packages := missing():
        raise LabError(f"missing are {' '.join(packages)}: run `tests/lab/lab deps`")
    if not os.path.exists("/dev/net/tun"):
        raise LabError("there is no /dev/net/tun, which gateways need for IPsec in user space")
