"""Programs that work on files as hard as they can, each until it is ended: what ``soak.py`` runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Programs that must be there, and their Debian packages.
NEEDED = {"stress-ng": "stress-ng", "fs_mark": "fsmark", "git": "git", "dpkg-deb": "dpkg"}
_MOST_DEB = 40 << 20
_PR_SET_PDEATHSIG = 1

Words = Sequence[str]


@dataclass(frozen=True)
class Workload:
    """A program that changes files below a directory until it is ended.

    ``words``: how it is called for a directory, a seed, and a directory of its own elsewhere. ``maps``: it may write
    through a mapping, which nobody is told of before the mapping ends.
    """

    words: Callable[[Path, int, Path], Words]
    maps: bool = False


def _stress(*options: str, maps: bool = False) -> Workload:
    def words(directory: Path, seed: int, elsewhere: Path) -> Words:
        common = ["--temp-path", str(directory), "--seed", str(seed), "--timeout", "600", "--quiet"]
        return ["stress-ng", *common, *options]

    return Workload(words, maps)


def _shell(text: str, last: Callable[[Path], Path] = lambda elsewhere: elsewhere) -> Workload:
    """A script; its arguments are the directory, the seed, and what ``last`` makes of the directory elsewhere."""

    def words(directory: Path, seed: int, elsewhere: Path) -> Words:
        return ["bash", "-eu", "-c", text, "-", str(directory), str(seed), str(last(elsewhere))]

    return Workload(words)


def _python(text: str, *, maps: bool = False) -> Workload:
    return Workload(lambda directory, seed, _: [sys.executable, "-c", text, str(directory), str(seed)], maps)


@functools.cache
def package(elsewhere: Path) -> Path:
    """A large Debian package: the largest that apt has kept, within reason, or one that is made of what is here."""
    kept = [path for path in Path("/var/cache/apt/archives").glob("*.deb") if path.stat().st_size < _MOST_DEB]
    if kept:
        return max(kept, key=lambda path: path.stat().st_size)
    tree, made = elsewhere / "package", elsewhere / "soak.deb"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: soak\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: for a test\n"
    )
    ignore = shutil.ignore_patterns("site-packages", "dist-packages")
    shutil.copytree(os.path.dirname(os.__file__), tree / "usr/lib/python", ignore=ignore)
    subprocess.run(["dpkg-deb", "-Zgzip", "--build", str(tree), str(made)], check=True, capture_output=True)
    shutil.rmtree(tree)
    return made


_GIT = """
cd "$1"; RANDOM=$(( $2 % 32768 ))
gc='-c gc.auto=20 -c gc.autoDetach=false'
git() { command git -c user.name=a -c user.email=a@b $gc -c advice.detachedHead=false "$@"; }
git init -q -b main .
for version in 1 2 3 4 5 6; do
  for part in $(seq 40); do
    mkdir -p "d$((part % 7 * version % 5))/e$((part % 3))"
    head -c $((RANDOM % 20000)) /dev/urandom | base64 >"d$((part % 7 * version % 5))/e$((part % 3))/f$part"
  done
  [ $version != 3 ] || git mv -k d1 moved
  git rm -q --ignore-unmatch "d$((version % 5))/e1/*" >/dev/null 2>&1 || true
  git add -A; git commit -qm "$version"
done
while :; do git checkout -qf "main~$((RANDOM % 6))"; git clean -qfd; [ $((RANDOM % 9)) != 0 ] || git gc -q; done
"""

_UNPACK = """
cd "$1"; RANDOM=$(( $2 % 32768 ))
while :; do
  rm -rf new old; dpkg-deb -x "$3" new; [ ! -e here ] || mv here old; mv new here
  [ $((RANDOM % 3)) != 0 ] || chmod -R go-w here
done
"""

_FSMARK = """
cd "$1"; RANDOM=$(( $2 % 32768 ))
while :; do
  mkdir -p a b
  fs_mark -d a -d b -n 300 -s $((RANDOM % 9000)) -L 2 -D 12 -N 20 -S $((RANDOM % 7)) -k -l "$3/fs_mark.log" >/dev/null
  rm -rf a; mv b a
done
"""

_REMOVE = """
cd "$1"; RANDOM=$(( $2 % 32768 ))
while :; do
  cp -r /usr/include/linux "t$RANDOM"; cp -al t* "l$RANDOM" 2>/dev/null || true
  [ $(ls | wc -l) -lt 4 ] || rm -rf -- *
done
"""

_TAR = """
cd "$1"
while :; do
  tar -C /usr/include -cf - linux asm-generic | tar -xf -
  find . -type f -newer linux -exec touch -d @7 {} +
done
"""

#: A database that sorts in files, with both kinds of journals; the shared memory of WAL is a mapped file.
_SQLITE = """
import os, random, sqlite3, sys
directory, seed = sys.argv[1], int(sys.argv[2])
os.chdir(directory)
os.environ["SQLITE_TMPDIR"] = directory
chance = random.Random(seed)
while True:
    database = sqlite3.connect("data.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=" + chance.choice(["DELETE", "TRUNCATE", "PERSIST", "WAL"]))
    database.execute("PRAGMA temp_store=FILE")
    database.execute("PRAGMA cache_size=20")
    database.execute("CREATE TABLE IF NOT EXISTS t (a INTEGER PRIMARY KEY, b BLOB)")
    for _ in range(chance.randrange(1, 20)):
        database.execute("BEGIN")
        for _ in range(50):
            database.execute("INSERT INTO t (b) VALUES (?)", (chance.randbytes(chance.randrange(3000)),))
        database.execute(chance.choice(["COMMIT", "COMMIT", "ROLLBACK"]))
        database.execute("CREATE TEMP TABLE IF NOT EXISTS s (b BLOB)")
        database.execute("INSERT INTO s SELECT b FROM t ORDER BY b DESC LIMIT 500")
        database.execute("DELETE FROM s")
        database.execute("DELETE FROM t WHERE a % 3 = ?", (chance.randrange(3),))
    if chance.random() < 0.2:
        database.execute("VACUUM")
    database.close()
"""

#: Logs that are appended to and turned over, as logrotate does it: by a new name, or in place.
_LOGS = """
import os, random, sys, time
os.chdir(sys.argv[1])
chance = random.Random(int(sys.argv[2]))
logs = [open(f"log{n}", "ab", buffering=0) for n in range(5)]
while True:
    at = chance.randrange(len(logs))
    logs[at].write(chance.randbytes(chance.randrange(400)))
    if chance.random() < 0.002:
        if chance.random() < 0.5:
            os.replace(f"log{at}", f"log{at}.1")
            logs[at] = open(f"log{at}", "ab", buffering=0)
        else:
            logs[at].truncate(0)
    if chance.random() < 0.05:
        time.sleep(0.001)
"""


#: What may run in a round. Files are small, as both trees are compared as a whole.
WORKLOADS: dict[str, Workload] = {
    "aio": _stress("--aio", "1"),
    "chmod": _stress("--chmod", "2"),
    "chown": _stress("--chown", "2"),
    "dentry": _stress("--dentry", "1", "--dentries", "500"),
    "dir": _stress("--dir", "1", "--dir-dirs", "500"),
    "dirdeep": _stress("--dirdeep", "1", "--dirdeep-dirs", "1", "--dirdeep-inodes", "300", "--dirdeep-files", "1"),
    "dirmany": _stress("--dirmany", "1", "--dirmany-ops", "3000"),
    "fallocate": _stress("--fallocate", "1", "--fallocate-bytes", "8M"),
    "file-ioctl": _stress("--file-ioctl", "1"),
    "filename": _stress("--filename", "1", "--filename-opts", "ext"),
    "fpunch": _stress("--fpunch", "1"),
    "hdd": _stress("--hdd", "1", "--hdd-bytes", "8M"),
    "iomix": _stress("--iomix", "1", "--iomix-bytes", "8M", maps=True),
    "link": _stress("--link", "1"),
    "locks": _stress("--flock", "1", "--lockf", "1", "--lease", "1"),
    "mknod": _stress("--mknod", "1"),
    "mmap": _stress("--mmap", "1", "--mmap-file", "--mmap-bytes", "8M", maps=True),
    "msync": _stress("--msync", "1", "--msync-bytes", "8M", maps=True),
    "open": _stress("--open", "1", "--open-max", "200"),
    "rename": _stress("--rename", "2"),
    "revio": _stress("--revio", "1", "--revio-bytes", "8M"),
    "seek": _stress("--seek", "1", "--seek-size", "8M", "--seek-punch"),
    "sendfile": _stress("--sendfile", "1", "--sendfile-size", "4M"),
    "symlink": _stress("--symlink", "1"),
    "sync-file": _stress("--sync-file", "1", "--sync-file-bytes", "8M"),
    "touch": _stress("--touch", "2"),
    "utime": _stress("--utime", "1"),
    "xattr": _stress("--xattr", "1"),
    "fs_mark": _shell(_FSMARK),
    "git checkout": _shell(_GIT),
    "rm -rf": _shell(_REMOVE),
    "tar": _shell(_TAR),
    "dpkg": _shell(_UNPACK, package),
    "logs": _python(_LOGS),
    "sqlite": _python(_SQLITE, maps=True),
}


class Running:
    """A workload that runs, in a session of its own; what it says is in ``log``."""

    def __init__(self, name: str, directory: Path, seed: int, elsewhere: Path, log: Path) -> None:
        self.name = name
        self.log = log
        directory.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                WORKLOADS[name].words(directory, seed, elsewhere),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=elsewhere,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    @property
    def ended(self) -> int | None:
        """Its exit code, when it has ended by itself."""
        return self._process.poll()

    def hold(self) -> None:
        """Stop all its processes where they stand."""
        for _ in range(3):
            # One that was being started has its turn next time.
            self._signal(signal.SIGSTOP)
            time.sleep(0.05)

    def kill(self) -> None:
        """End all its processes, and wait until none is left."""
        while self._signal(signal.SIGKILL):
            self._process.poll()
            time.sleep(0.01)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> bool:
        found = _session(self._process.pid)
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return bool(found)


def _session(leader: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            state, _, _, session = (
                Path(f"/proc/{int(name)}/stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            )
            if int(session) == leader and state not in "ZX":
                found.append(int(name))
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
