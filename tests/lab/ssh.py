"""How the controller reaches the hosts: SSH through the bridges' namespace, for people and for Ansible."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress

import yaml

from .fabric import in_netns
from .paths import LabPaths
from .proc import LabError, run
from .topology import Host, Topology


def _options(paths: LabPaths) -> dict[str, str]:
    return {
        "User": "root",
        "IdentityFile": str(paths.ssh_key),
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": str(paths.known_hosts),
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
        "ConnectTimeout": "5",
        # A host whose plug was pulled doesn't say goodbye.
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "LogLevel": "ERROR",
        "ProxyCommand": " ".join((*in_netns(paths.fabric), "nc %h %p")),
        "ControlMaster": "auto",
        "ControlPersist": "60",
        # In the lab's own directory: two labs have hosts with the same address.
        "ControlPath": f"{paths.ssh_masters}/%h",
    }


def write_files(paths: LabPaths, topology: Topology) -> None:
    """Write ssh_config and the inventory piece; both need the key pair and known_hosts beside them."""
    options = _options(paths)
    blocks = [f"Host {host.name}\n    HostName {host.management.ip}\n" for host in topology.hosts.values()]
    everyone = "Host *\n" + "".join(f"    {key} {value}\n" for key, value in options.items())
    paths.ssh_config.write_text("".join(blocks) + everyone, encoding="utf-8")
    own_variables = {"User", "IdentityFile"}  # Ansible has variables for these
    words = [f"-o {key}={_quoted(value)}" for key, value in options.items() if key not in own_variables]
    hosts = {
        host.name: {
            "ansible_host": str(host.management.ip),
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(paths.ssh_key),
            "ansible_ssh_common_args": " ".join(words),
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        for host in topology.hosts.values()
    }
    text = yaml.safe_dump({"all": {"hosts": hosts}}, sort_keys=False, width=10_000)
    paths.inventory.write_text(text, encoding="utf-8")


def _quoted(value: str) -> str:
    return f'"{value}"' if " " in value else value


def make_key(paths: LabPaths) -> str:
    """Make the lab's key pair and return the public half, as for authorized_keys."""
    comment = f"farshore-lab-{paths.name}"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(paths.ssh_key)])
    return paths.ssh_key.with_suffix(".pub").read_text(encoding="ascii")


def command(paths: LabPaths, host: str, words: Sequence[str] = ()) -> list[str]:
    """The ssh command line that runs `words` on a host, or a login shell."""
    return ["ssh", "-F", str(paths.ssh_config), host, *words]


def ask(paths: LabPaths, host: Host, words: str, *, timeout: float) -> subprocess.CompletedProcess[str] | None:
    """Run a command over a connection of its own; None when the host can't be reached or takes too long."""
    alone = ["ssh", "-F", str(paths.ssh_config), "-o", "ControlMaster=no", "-o", "ControlPath=none"]
    try:
        done = run([*alone, host.name, words], timeout=timeout, check=False)
    except LabError:
        return None
    return None if done.returncode == 255 else done


def hang_up(paths: LabPaths, host: Host | None = None) -> None:
    """End shared connections: to a host that is going away, whose next command would wait in vain, or to all."""
    if not paths.ssh_masters.is_dir():
        return
    for socket in paths.ssh_masters.iterdir():
        if host is None or socket.name == str(host.management.ip):
            with suppress(LabError):  # one that doesn't even listen ends with its proxy
                run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "lab"], timeout=10, check=False)
            socket.unlink(missing_ok=True)
