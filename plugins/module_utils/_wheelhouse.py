# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Collect the wheels of one kind of target into one archive, on the controller. Private to this collection."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator

#: Part of every key: a change in how archives are made must not find the old ones.
FORMAT = "1"
#: glibc 2.17 is as old as any wheel of ours asks for, 2.36 what Debian 12 has.
_GLIBC = range(17, 37)
_KEPT_ARCHIVES = 3
_MARKER = re.compile(r"python_version\s*(>=|<)\s*[\"'](\d+)\.(\d+)[\"']")


class WheelhouseError(Exception):
    """A wheel could not be built or fetched."""


class Wheelhouse:
    """The wheels for one target, cached by the content of everything they are made from.

    ``source`` is the agent's project directory, ``requirements`` a lock file with exact pins, ``sdists`` the names
    of those pins that are published as source only (pure Python). ``python_version`` is the target's, like 3.11.
    """

    def __init__(
        self, source: str, requirements: str, sdists: list[str], python_version: str, architecture: str, cache: str
    ) -> None:
        self.source, self.requirements = source, requirements
        self.python_version, self.architecture = python_version, architecture
        self.pins = list(_pins(requirements, python_version))
        self.sdists = [pin for pin in self.pins if pin.partition("==")[0] in sdists]
        self.cache = os.path.join(os.path.expanduser(cache), "wheelhouse")
        target = [FORMAT, python_version, architecture, *self.pins]
        self._wheels_key = _digest(*(text.encode() for text in target))
        self._agent_key = _digest(FORMAT.encode(), *_contents(source))
        self.key = _digest(self._wheels_key.encode(), self._agent_key.encode())
        self.version = _version(source)
        python = "cp" + python_version.replace(".", "")
        flavor = os.path.splitext(os.path.basename(requirements))[0]
        self._stem = f"{flavor}-{python}-{architecture}-"
        self.archive = os.path.join(self.cache, f"{self._stem}{self.key}.tar")

    def exists(self) -> bool:
        """Whether the archive is in the cache."""
        return os.path.exists(self.archive)

    def build(self) -> None:
        """Make the archive; raises WheelhouseError."""
        os.makedirs(self.cache, exist_ok=True)
        with self._locked(self._agent_key):
            agent = self._directory(f"agent-{self._agent_key}", self._build_agent)
        with self._locked(self._wheels_key):
            wheels = self._directory(f"wheels-{self._wheels_key}", self._fetch_wheels)
        with tempfile.TemporaryDirectory(dir=self.cache) as scratch:
            partial = os.path.join(scratch, "archive")
            with tarfile.open(partial, "w") as archive:
                for directory in (wheels, agent):
                    for name in sorted(os.listdir(directory)):
                        archive.add(os.path.join(directory, name), arcname=name)
            os.replace(partial, self.archive)
        self._prune()

    def _directory(self, name: str, fill) -> str:
        path = os.path.join(self.cache, name)
        if not os.path.isdir(path):
            scratch = tempfile.mkdtemp(dir=self.cache)
            try:
                fill(scratch)
                os.rename(scratch, path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        os.utime(path)
        return path

    def _build_agent(self, directory: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            # A copy: building leaves files behind, and the checkout may be read-only or in use.
            copy = os.path.join(scratch, "agent")
            shutil.copytree(self.source, copy, ignore=shutil.ignore_patterns(*_IGNORED, "build", "tests"))
            _pip("wheel", "--no-deps", "--wheel-dir", directory, copy)

    def _fetch_wheels(self, directory: str) -> None:
        if self.sdists:
            _pip("wheel", "--no-deps", "--wheel-dir", directory, *self.sdists)
        for name in os.listdir(directory):
            if not name.endswith("-none-any.whl"):
                raise WheelhouseError(f"{name} is not pure Python: it would not run on another machine")
        platforms = [f"manylinux_2_{minor}_{self.architecture}" for minor in reversed(_GLIBC)]
        platforms += [f"manylinux2014_{self.architecture}", f"manylinux2010_{self.architecture}"]
        wheels = [pin for pin in self.pins if pin not in self.sdists]
        _pip(
            "download", "--no-deps", "--only-binary=:all:", "--implementation=cp",
            f"--python-version={self.python_version}", *(f"--platform={name}" for name in platforms),
            "--dest", directory, *wheels,
        )  # fmt: skip

    def _prune(self) -> None:
        mine = [os.path.join(self.cache, name) for name in os.listdir(self.cache) if name.startswith(self._stem)]
        for path in sorted(mine, key=os.path.getmtime, reverse=True)[_KEPT_ARCHIVES:]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with open(os.path.join(self.cache, f".{key}.lock"), "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_IGNORED = ("__pycache__", "*.pyc", "*.nbi", "*.nbc", "*.egg-info", ".*")


def _pins(requirements: str, python_version: str) -> Iterator[str]:
    with open(requirements, encoding="utf-8") as file:
        for line in file:
            pin, _, marker = line.partition("#")[0].partition(";")
            if pin.strip() and _applies(marker, python_version):
                if "==" not in pin:
                    raise WheelhouseError(f"{requirements}: {pin.strip()!r} is not pinned; NAME==VERSION is needed")
                yield pin.strip()


def _applies(marker: str, python_version: str) -> bool:
    # pip evaluates markers for the Python that runs it, not for the one it downloads for.
    if not marker.strip():
        return True
    found = _MARKER.fullmatch(marker.strip())
    if not found:
        raise WheelhouseError(f"marker {marker.strip()!r} is not understood; python_version >= or < is")
    target = tuple(map(int, python_version.split(".")[:2]))
    limit = (int(found[2]), int(found[3]))
    return target >= limit if found[1] == ">=" else target < limit


def _contents(source: str) -> Iterator[bytes]:
    ignore = shutil.ignore_patterns(*_IGNORED)
    for name in ("pyproject.toml", "README.md"):
        with open(os.path.join(source, name), "rb") as file:
            yield file.read()
    for directory, below, names in os.walk(os.path.join(source, "src")):
        ignored = ignore(directory, below + names)
        below[:] = sorted(set(below) - ignored)
        for name in sorted(set(names) - ignored):
            path = os.path.join(directory, name)
            yield os.path.relpath(path, source).encode()
            with open(path, "rb") as file:
                yield file.read()


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(b"%d:" % len(part) + part)
    return total.hexdigest()[:12]


def _version(source: str) -> str:
    with open(os.path.join(source, "pyproject.toml"), encoding="utf-8") as file:
        found = re.search(r'^version = "([^"]+)"', file.read(), re.MULTILINE)
    if not found:
        raise WheelhouseError(f"{source}/pyproject.toml names no version")
    return found[1]


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise WheelhouseError(f"pip {arguments[0]} failed on the controller ({sys.executable}): {reason}")
