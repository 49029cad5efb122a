# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Install the runtime from an archive of wheels into a versioned directory. Private to this collection."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator

_COMPLETE = ".complete"


class RuntimeInstallError(Exception):
    """The runtime could not be installed."""


class Runtime:
    """One version of the runtime below ``root``, and the links to it.

    A version is used only when it is complete: installed, compiled and warm. ``current`` is switched last, in one
    step, so that a host always has a runtime that works.
    """

    def __init__(
        self, root: str, release: str, archive: str, command: str, keep: int, warm_up: str, cache: str
    ) -> None:
        self.root, self.release, self.archive = root, release, archive
        self.command, self.keep, self.warm_up, self.cache = command, keep, warm_up, cache
        self.directory = os.path.join(root, release)

    def pending(self) -> list[str]:
        """What is not as wanted, as words for a person; empty when nothing is to be done."""
        steps = []
        if not os.path.exists(os.path.join(self.directory, _COMPLETE)):
            steps.append("install")
        if _target(os.path.join(self.root, "current")) != self.release:
            steps.append("switch")
        if _target(self.command) != os.path.join(self.root, "current/bin/farshore"):
            steps.append("link")
        if self._superfluous():
            steps.append("prune")
        return steps

    def apply(self) -> None:
        """Do what is pending; raises RuntimeInstallError."""
        if "install" in self.pending():
            self._install()
        _link(self.release, os.path.join(self.root, "current"))
        _link(os.path.join(self.root, "current/bin/farshore"), self.command)
        for name in self._superfluous():
            shutil.rmtree(os.path.join(self.root, name))

    def _install(self) -> None:
        # Installed where it will stay: a virtual environment cannot be moved. What an earlier try left goes first.
        shutil.rmtree(self.directory, ignore_errors=True)
        os.makedirs(self.root, mode=0o755, exist_ok=True)
        python = os.path.join(self.directory, "bin/python")
        with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
            wheels = list(_unpack(self.archive, scratch))
            pip = [wheel for wheel in wheels if os.path.basename(wheel).startswith("pip-")]
            if not pip:
                raise RuntimeInstallError(f"{self.archive} has no pip in it")
            _run(sys.executable, "-m", "venv", "--without-pip", self.directory)
            # pip runs from its own wheel: the host needs neither pip nor ensurepip. The pins are complete: no resolver.
            _run(
                python, f"{pip[0]}/pip", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "install",
                "--no-index", "--no-deps", "--no-compile", *(wheel for wheel in wheels if wheel not in pip),
            )  # fmt: skip
        # Compiled now, as the daemons may not write here. The big libraries are compiled by the warm-up, which
        # imports just what is used of them.
        library = os.path.join(self.directory, "lib")
        _run(python, "-m", "compileall", "-q", "-x", r"/(numba|numpy|llvmlite|netaddr)/", library)
        if self.warm_up:
            os.makedirs(self.cache, mode=0o755, exist_ok=True)
            _run(python, "-c", self.warm_up, environment={"NUMBA_CACHE_DIR": self.cache})
        with open(os.path.join(self.directory, _COMPLETE), "w", encoding="ascii"):
            pass

    def _superfluous(self) -> list[str]:
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        old = [
            name
            for name in names
            if name != self.release
            and not name.startswith(".")
            and os.path.isdir(os.path.join(self.root, name))
            and not os.path.islink(os.path.join(self.root, name))
        ]
        old.sort(key=lambda name: os.path.getmtime(os.path.join(self.root, name)), reverse=True)
        return old[max(0, self.keep - 1) :]


def _unpack(archive: str, directory: str) -> Iterator[str]:
    # Flat, and nothing but files; extractall(filter=) is younger than Debian 12's Python.
    with tarfile.open(archive) as tar:
        for member in tar:
            source = tar.extractfile(member)
            path = os.path.join(directory, os.path.basename(member.name))
            if source is None or os.path.basename(member.name) != member.name:
                raise RuntimeInstallError(f"{archive} has {member.name!r} in it, which is not a plain file")
            with source, open(path, "xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            yield path


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _link(target: str, link: str) -> None:
    if _target(link) == target:
        return
    fresh = f"{link}.farshore"
    if os.path.lexists(fresh):
        os.unlink(fresh)
    os.symlink(target, fresh)
    os.replace(fresh, link)


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise RuntimeInstallError(f"{' '.join(command[:4])} failed: {reason}")
