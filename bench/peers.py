"""The others: rsync, rdiff, lsyncd, syncthing and cp, each made durable at its end as ours is."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.model import Sample
from bench.processes import BenchError, Daemon, free_port, need, run, syncfs, wait_until

_STAT = re.compile(r"^(Total bytes sent|Total bytes received|Literal data): ([\d,.]+)", re.MULTILINE)


def parse_rsync_stats(text: str) -> dict[str, int]:
    """The figures of ``rsync --stats`` that count bytes."""
    return {name: int(value.replace(",", "").replace(".", "")) for name, value in _STAT.findall(text)}


def rsync(source: str, target: str, options: Sequence[str], durable: Path, *, timeout: float = 900.0) -> Sample:
    """One rsync, and syncfs of the target."""
    began = time.monotonic()
    done = run(["rsync", "--stats", *options, source, target], timeout=timeout)
    syncfs(durable)
    seconds = time.monotonic() - began
    counted = parse_rsync_stats(done.output)
    sent, received = counted.get("Total bytes sent", 0), counted.get("Total bytes received", 0)
    return Sample(seconds, done.cpu, sent + received, {"literal bytes": float(counted.get("Literal data", 0))})


def rdiff(new: Path, old: Path, options: Sequence[str]) -> Sample:
    """Signature, delta and patch, the result under the old name, durable."""
    signature, delta, made = (old.with_name(f".{old.name}.{what}") for what in ("sig", "delta", "new"))
    began = time.monotonic()
    steps = [
        run(["rdiff", *options, "signature", str(old), str(signature)]),
        run(["rdiff", "delta", str(signature), str(new), str(delta)]),
        run(["rdiff", "patch", str(old), str(delta), str(made)]),
    ]
    wire = signature.stat().st_size + delta.stat().st_size
    os.replace(made, old)
    signature.unlink()
    delta.unlink()
    syncfs(old.parent)
    return Sample(time.monotonic() - began, sum(step.cpu for step in steps), wire)


def copy(new: Path, old: Path) -> Sample:
    """``cp`` beside the old name, rename, durable."""
    made = old.with_name(f".{old.name}.new")
    began = time.monotonic()
    done = run(["cp", "--reflink=never", str(new), str(made)])
    os.replace(made, old)
    syncfs(old.parent)
    return Sample(time.monotonic() - began, done.cpu, new.stat().st_size)


@contextlib.contextmanager
def rsync_daemon(
    tree: Path, work: Path, *, address: str = "127.0.0.1", enter: Sequence[str] = (), root: Path = Path("/")
) -> Iterator[int]:
    """An rsync daemon whose module ``m`` is `tree`; gives its port.

    `enter`: words before the command that bring it into another host (nsenter), where `tree` is a path; `root`: where
    that host's root lies, seen from here. The configuration is put beside the tree: rsync 3.5 follows no path through
    /proc.
    """
    port = free_port()
    config = tree.with_name(f"bench-rsyncd-{port}.conf")
    outside = root / config.relative_to("/")
    outside.write_text(
        f"use chroot = no\nuid = root\ngid = root\nread only = no\n[m]\npath = {tree}\n",
        encoding="utf-8",
    )
    words = ["rsync", "--daemon", "--no-detach", f"--config={config}", f"--address={address}", f"--port={port}"]
    daemon = Daemon([*enter, *words], work / "rsyncd.log")
    try:
        time.sleep(0.3)
        daemon.check()
        yield port
    finally:
        daemon.stop(3)
        outside.unlink(missing_ok=True)


class Lsyncd:
    """lsyncd with rsync on this machine, without compression; the tree may be empty when it starts.

    `delay` None: its own of 15 s. `on`: what it takes for a change (``inotifyMode``). `patience`: seconds for its first
    sync.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        work: Path,
        delay: int | None,
        *,
        on: str = "CloseWrite",
        patience: float = 120.0,
    ) -> None:
        need("lsyncd", "rsync")
        work.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        config = work / "lsyncd.lua"
        status = work / "status"
        waits = "" if delay is None else f"delay = {delay},"
        config.write_text(
            f'settings {{ nodaemon = true, statusFile = {_lua(status)}, statusInterval = 1, inotifyMode = "{on}" }}\n'
            f"sync {{ default.rsync, source = {_lua(source)}, target = {_lua(target)}, {waits}\n"
            "  rsync = { archive = true, compress = false, whole_file = true } }\n",
            encoding="utf-8",
        )
        self.target = target
        log = work / "lsyncd.log"
        log.write_bytes(b"")
        self._daemon = Daemon(["lsyncd", "-log", "Normal", str(config)], log)
        self._log = log
        try:
            wait_until(self._started, "lsyncd's first sync", timeout=patience)
        except BaseException:
            self.stop()
            raise

    def _started(self) -> bool:
        self._daemon.check()
        return "Startup of" in (text := self._log.read_text(errors="replace")) and "finished" in text

    @property
    def source(self) -> Daemon:
        """The process that watches the source."""
        return self._daemon

    def cpu(self) -> float:
        """CPU seconds so far, those of the rsyncs that have ended included."""
        return self._daemon.cpu()

    def stop(self) -> None:
        """End it."""
        self._daemon.stop(10)


def _lua(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


class Syncthing:
    """Two syncthings on the loopback with one folder, and without anything that looks for others or phones home.

    `watch_delay`: how long it gathers changes (10 s by default). `patience`: seconds until its first file has arrived.
    """

    def __init__(
        self, source: Path, target: Path, work: Path, watch_delay: float = 1.0, *, patience: float = 120.0
    ) -> None:
        need("syncthing")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self._daemons: list[Daemon] = []
        homes = [work / "a", work / "b"]
        trees = [source, target]
        ports = [free_port(), free_port()]
        guis = [free_port(), free_port()]
        ids = []
        for home in homes:
            run(["syncthing", "generate", "--no-default-folder", "--skip-port-probing", f"--home={home}"], timeout=60)
            device = ElementTree.parse(home / "config.xml").getroot().find("device")
            ids.append("" if device is None else device.get("id", ""))
        for each in (0, 1):
            trees[each].mkdir(parents=True, exist_ok=True)
            kind = ("sendonly", "receiveonly")[each]
            _configure(homes[each], ids, each, ports, guis[each], trees[each], kind, watch_delay)
        offline = {"STNOUPGRADE": "1", "STNORESTART": "1", "STNODEFAULTFOLDER": "1"}
        for home in homes:
            words = ["syncthing", "serve", f"--home={home}", "--no-browser", "--no-restart", "--logflags=0"]
            self._daemons.append(Daemon(words, work / f"{home.name}.log", env=offline))
        self.target = target
        self._probe(source, target, patience)

    def _probe(self, source: Path, target: Path, patience: float) -> None:
        """A file that has arrived says that both are up and connected."""
        probe = source / "probe"
        probe.write_bytes(b"1")
        try:
            wait_until(self._arrived(target / "probe"), "syncthing's first file", timeout=patience)
        except BaseException:
            self.stop()
            raise

    def _arrived(self, path: Path) -> Callable[[], bool]:
        def there() -> bool:
            for daemon in self._daemons:
                daemon.check()
            return path.exists()

        return there

    @property
    def source(self) -> Daemon:
        """The process that watches the source."""
        return self._daemons[0]

    def cpu(self) -> float:
        """CPU seconds of both so far."""
        return sum(daemon.cpu() for daemon in self._daemons)

    def stop(self) -> None:
        """End both."""
        for daemon in self._daemons:
            daemon.stop(10)


def _configure(
    home: Path, ids: list[str], me: int, ports: list[int], gui: int, tree: Path, kind: str, watch_delay: float
) -> None:
    path = home / "config.xml"
    document = ElementTree.parse(path)
    root = document.getroot()
    for tag in ("device", "folder", "options", "gui"):
        for old in root.findall(tag):
            root.remove(old)
    folder = ElementTree.SubElement(
        root,
        "folder",
        id="bench",
        label="bench",
        path=str(tree),
        type=kind,
        rescanIntervalS="3600",
        fsWatcherEnabled="true",
        fsWatcherDelayS=f"{watch_delay:g}",
    )
    for other in (0, 1):
        ElementTree.SubElement(folder, "device", id=ids[other])
        device = ElementTree.SubElement(root, "device", id=ids[other], name="ab"[other], compression="metadata")
        ElementTree.SubElement(device, "address").text = f"tcp://127.0.0.1:{ports[other]}"
    access = ElementTree.SubElement(root, "gui", enabled="true", tls="false")
    ElementTree.SubElement(access, "address").text = f"127.0.0.1:{gui}"
    ElementTree.SubElement(access, "apikey").text = "bench"
    options = ElementTree.SubElement(root, "options")
    for key, value in {
        "listenAddress": f"tcp://127.0.0.1:{ports[me]}",
        "globalAnnounceEnabled": "false",
        "localAnnounceEnabled": "false",
        "relaysEnabled": "false",
        "natEnabled": "false",
        "startBrowser": "false",
        "urAccepted": "-1",
        "crashReportingEnabled": "false",
        "autoUpgradeIntervalH": "0",
        "reconnectionIntervalS": "1",
        "announceLANAddresses": "false",
        "stunKeepaliveStartS": "0",
    }.items():
        ElementTree.SubElement(options, key).text = value
    document.write(path, encoding="unicode")


def versions() -> dict[str, str]:
    """What the peers say of themselves; empty where one is missing."""
    found: dict[str, str] = {}
    for name, words in {
        "rsync": ["rsync", "--version"],
        "rdiff": ["rdiff", "--version"],
        "lsyncd": ["lsyncd", "--version"],
        "syncthing": ["syncthing", "--version"],
        "iperf3": ["iperf3", "--version"],
    }.items():
        if shutil.which(name) is None:
            found[name] = ""
            continue
        with contextlib.suppress(BenchError):
            lines = run(words, allowed=(0, 1)).output.splitlines()
            number = re.search(r"\d+\.\d[\w.+~-]*", lines[0] if lines else "")
            found[name] = number.group() if number else "unknown"
    return found
