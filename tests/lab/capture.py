"""Packet captures on a lab's bridges."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from .fabric import bridge, in_netns, port
from .paths import LabPaths
from .proc import LabError, tail, wait_for
from .topology import INTERNET, Topology


def device(topology: Topology, link: str) -> str:
    """Where to listen for LINK: `internet`, a network's name, or `host:interface`."""
    if link == "internet":
        return bridge(INTERNET)
    if link in topology.networks:
        return bridge(link)
    ((host, interface),) = topology.links(link)
    return port(host.name, interface)


def start(paths: LabPaths, topology: Topology, file: Path, link: str) -> None:
    """Record every frame on a link into a pcap file; returns once frames are being recorded."""
    file = file.absolute()
    if any(running["file"] == str(file) for running in running_captures(paths)):
        raise LabError(f"a capture into {file} is running already")
    paths.captures.mkdir(exist_ok=True)
    log = paths.captures / "tcpdump.log"
    # Without immediate mode the frames of the last second are lost when it is stopped, without the larger buffer
    # those of a busy moment.
    listen = ["tcpdump", "-i", device(topology, link), "-n", "-s", "0", "-U", "--immediate-mode", "-B", "16384"]
    listen += ["-w", str(file), "-Z", "root"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*in_netns(paths.fabric), *listen],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    state = {"pid": process.pid, "file": str(file), "link": link}
    (paths.captures / f"{process.pid}.json").write_text(json.dumps(state), encoding="utf-8")

    def listening() -> bool:
        if process.poll() is not None:
            raise LabError(f"tcpdump has ended: {tail(log)}")
        return "listening on" in log.read_text(encoding="utf-8", errors="replace")

    try:
        wait_for(listening, "tcpdump to listen", timeout=15)
    except BaseException:
        process.kill()
        process.wait()
        (paths.captures / f"{process.pid}.json").unlink()
        raise


def running_captures(paths: LabPaths) -> list[dict[str, Any]]:
    """Captures that are being recorded: pid, file, link."""
    if not paths.captures.is_dir():
        return []
    states = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(paths.captures.glob("*.json"))]
    return [state for state in states if _is_tcpdump(state["pid"])]


def stop(paths: LabPaths, file: Path | None = None) -> list[str]:
    """End all captures, or the one into `file`, and return the files; these are complete then."""
    wanted = [state for state in running_captures(paths) if file is None or state["file"] == str(file.absolute())]
    if not wanted:
        raise LabError("no such capture is running")
    for state in wanted:
        os.kill(state["pid"], signal.SIGINT)
    wait_for(lambda: not any(_is_tcpdump(state["pid"]) for state in wanted), "tcpdump to end", timeout=15)
    for state in wanted:
        (paths.captures / f"{state['pid']}.json").unlink()
    return [state["file"] for state in wanted]


def _is_tcpdump(pid: int) -> bool:
    """Whether the process is still the capture: a number alone may be somebody else's by now."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return b"tcpdump" in words[0] and state != "Z"
