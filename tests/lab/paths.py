"""Where a lab keeps its things, all of it derived from the lab's name: what `down` needs to know is never lost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .proc import LabError

RUN_ROOT = Path("/run/farshore-lab")
VAR_ROOT = Path("/var/tmp/farshore-lab")
NETNS_ROOT = Path("/run/netns")

_LAB_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?")


@dataclass(frozen=True)
class LabPaths:
    """Names of the files, directories and namespaces of the lab called `name`."""

    name: str

    def __post_init__(self) -> None:
        if not _LAB_NAME.fullmatch(self.name):
            raise LabError(f"lab name {self.name!r}: lower-case letters, digits and inner hyphens, at most 30")

    @property
    def run(self) -> Path:
        """State that is worth nothing after a reboot of the machine."""
        return RUN_ROOT / self.name

    @property
    def var(self) -> Path:
        """The hosts' disks."""
        return VAR_ROOT / self.name

    @property
    def lock(self) -> Path:
        """Outside `run`, which comes and goes under the lock."""
        return RUN_ROOT / f".{self.name}.lock"

    @property
    def topology(self) -> Path:
        """The copy of the topology file that this lab was made from."""
        return self.run / "topology.yml"

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`."""
        return self.run / "ssh_config"

    @property
    def ssh_key(self) -> Path:
        """The only key that the hosts let in."""
        return self.run / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """The hosts' public keys."""
        return self.run / "known_hosts"

    @property
    def inventory(self) -> Path:
        """Connection variables for Ansible."""
        return self.run / "inventory.yml"

    @property
    def ssh_masters(self) -> Path:
        """Sockets of shared SSH connections."""
        return self.run / "cm"

    @property
    def cuts(self) -> Path:
        """One file per cut link; it outlives restarts of the host."""
        return self.run / "cuts"

    @property
    def captures(self) -> Path:
        """One file per running capture."""
        return self.run / "captures"

    @property
    def fabric(self) -> str:
        """The network namespace of the bridges."""
        return self.netns("fabric")

    def netns(self, host: str) -> str:
        """The network namespace of a host."""
        return f"fs-{self.name}-{host}"

    def host_run(self, host: str) -> Path:
        """A host's console log and state."""
        return self.run / "hosts" / host

    def console(self, host: str) -> Path:
        """What the host has printed since it was made."""
        return self.host_run(host) / "console.log"

    def host_var(self, host: str) -> Path:
        """A host's disk: `upper` is what it wrote over its base."""
        return self.var / host

    def all_netns(self) -> list[str]:
        """The namespaces of this lab that exist, whatever made them."""
        if not NETNS_ROOT.is_dir():
            return []
        # A host's name has no hyphen, so lab "a" doesn't claim "fs-a-b-web1" of lab "a-b".
        return sorted(
            entry.name
            for entry in NETNS_ROOT.iterdir()
            if entry.name.startswith("fs-") and entry.name[3:].rpartition("-")[0] == self.name
        )


def known_labs() -> list[str]:
    """Names of all labs that have left anything on this machine."""
    names = {entry.name for root in (RUN_ROOT, VAR_ROOT) if root.is_dir() for entry in root.iterdir()}
    if NETNS_ROOT.is_dir():
        names |= {entry.name[3:].rpartition("-")[0] for entry in NETNS_ROOT.iterdir() if entry.name.startswith("fs-")}
    return sorted(name for name in names if _LAB_NAME.fullmatch(name))
