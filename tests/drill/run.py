#!/usr/bin/env python3
"""Hold the whole drill on lab hosts: lab up, deploy, disaster, report, lab down. Exit code 0 only when it has passed.

The report and all logs are in build/drill/. The lab is taken down however the drill ends, unless --keep is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "tests" / "lab" / "lab"
PACKAGE = ROOT / "roles" / "drill" / "files"
#: Seconds that anything may take before it counts as hanging.
LONGEST = 1500


class Failed(Exception):
    """A step of the run failed; the report says which and why."""


class Stopped(BaseException):
    """Somebody wants the run to end."""


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--name", default="drill", help="name of the lab (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="leave the lab up")
    parser.add_argument("--reuse", action="store_true", help="use a lab of that name that is up already")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "drill", help="directory for report and logs")
    parser.add_argument("--inventory", default="inventories/example", help="the inventory to deploy")
    parser.add_argument("-e", "--extra-vars", action="append", default=[], help="more variables for the drill")
    return Run(parser.parse_args()).run()


class Run:
    """One run of the drill."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output: Path = options.output.absolute()
        self.began = time.monotonic()
        self.steps: list[dict[str, Any]] = []
        self.inventories = ["-i", options.inventory, "-i", f"/run/farshore-lab/{options.name}/inventory.yml"]
        self.capture = self.output / "internet.pcap"

    def run(self) -> int:
        """All of it; the exit code."""
        if self.output.exists():
            for old in [*self.output.glob("*.log"), *self.output.glob("*.json*"), *self.output.glob("*.html")]:
                old.unlink()
        self.output.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _stop)
        failed: tuple[str, str] | None = None
        try:
            self._all()
        except Failed as error:
            failed = (self.steps[-1]["name"] if self.steps else "The start", str(error))
        except Stopped as error:
            failed = (self.steps[-1]["name"] if self.steps else "The start", f"stopped by {error}")
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            with contextlib.suppress(Failed):
                self._down()
        return self._verdict(failed)

    def _all(self) -> None:
        name = self.options.name
        with self._step("Bring up the lab"):
            self._do("lab", [str(LAB), "up", "--name", name, "--topology", "drill", *self._reuse()])
            with contextlib.suppress(FileNotFoundError):
                self.capture.unlink()
            self._do("lab", [str(LAB), "capture", "--name", name, "start", str(self.capture), "--link", "internet"])
        with self._step("Set up the service that is protected"):
            self._playbook("service", "tests/drill/service.yml")
        with self._step("Deploy Farshore"):
            self._playbook("deploy", "playbooks/deploy.yml")
        (self.output / "before.json").write_text(json.dumps({"steps": self.steps}), encoding="utf-8")
        (self.output / "variables.json").write_text(json.dumps(self._variables(), indent=2), encoding="utf-8")
        self.steps.append({"name": "Rehearse the disaster"})
        extra = [word for each in self.options.extra_vars for word in ("-e", each)]
        self._playbook("drill", "playbooks/drill.yml", "-e", f"@{self.output / 'variables.json'}", *extra)

    def _variables(self) -> Mapping[str, Any]:
        lab = f"'{LAB}'"
        name = f"--name '{self.options.name}'"
        return {
            "drill_group": "web",
            "drill_output_dir": str(self.output),
            "drill_user_host": "user",
            "drill_fail_command": f"{lab} kill {name} web1",
            "drill_restore_command": f"{lab} start {name} web1",
            "drill_capture_stop_command": f"{lab} capture {name} stop '{self.capture}'",
            "drill_capture_file": str(self.capture),
            "drill_churn_dir": "/srv/www/files",
            "drill_damage_dirs": ["/srv/www/files/tree", "/srv/www/files/large", "/srv/www/docs"],
            "drill_needles": ["GNU GENERAL PUBLIC LICENSE", "import sys"],
            "drill_minimum_files": 1000,
        }

    def _reuse(self) -> list[str]:
        return ["--reuse"] if self.options.reuse else []

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[None]:
        step: dict[str, Any] = {"name": name, "start": time.time()}
        self.steps.append(step)
        self._say(f"▸ {name}")
        try:
            yield
            step["result"] = "ok"
        except BaseException as error:
            step |= {"result": "failed", "reason": str(error)}
            raise
        finally:
            step["seconds"] = round(time.time() - step["start"], 3)
            (self.output / "before.json").write_text(json.dumps({"steps": self.steps}), encoding="utf-8")

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        print(f"{minutes:02d}:{seconds:02d}  {text}", flush=True)

    def _playbook(self, log: str, playbook: str, *more: str) -> None:
        beside = Path(sys.executable).with_name("ansible-playbook")
        program = str(beside) if beside.exists() else shutil.which("ansible-playbook") or "ansible-playbook"
        environment = {
            "ANSIBLE_STDOUT_CALLBACK": "farshore.dr.progress",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
            "ANSIBLE_FORCE_COLOR": "1" if sys.stdout.isatty() else "0",
            "PYTHONUNBUFFERED": "1",
        }
        self._do(log, [program, *self.inventories, playbook, *more], environment, show=True)

    def _do(self, log: str, words: list[str], environment: Mapping[str, str] | None = None, show: bool = False) -> None:
        """Run a program with its output in a log, and on the terminal; raises Failed with the output's end."""
        path = self.output / f"{log}.log"
        with path.open("ab") as file:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=os.environ | (environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # An interrupt from the terminal reaches us alone; what we started, we end.
                start_new_session=True,
            )
            timer = threading.Timer(LONGEST, lambda: _end(process))
            timer.start()
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    if show:
                        sys.stdout.buffer.write(line)
                        sys.stdout.flush()
                code = process.wait()
            except BaseException:
                _end(process)
                raise
            finally:
                timer.cancel()
        if code:
            raise Failed(f"{Path(words[0]).name} ended with {code}; {path}:\n{_tail(path)}")

    def _down(self) -> None:
        if self.options.keep:
            self._say(f"▸ The lab stays up; {LAB.relative_to(ROOT)} down --name {self.options.name}")
            return
        self._say("▸ Take the lab down")
        self._do("lab", [str(LAB), "down", "--name", self.options.name])

    def _verdict(self, failed: tuple[str, str] | None) -> int:
        report = self.output / "report.json"
        if not report.exists():
            step, reason = failed or ("The report", "it was not written")
            command = [sys.executable, "-m", "farshore_drill", str(self.output)]
            known = [each["name"] for each in self.steps if each.get("result") == "failed"]
            command += ["--failed-step", known[0] if known else step, "--reason", reason]
            subprocess.run(command, env=os.environ | {"PYTHONPATH": str(PACKAGE)}, check=False)
        passed = False
        with contextlib.suppress(OSError, ValueError):
            passed = json.loads(report.read_text(encoding="utf-8"))["passed"] is True and failed is None
        self._say(
            f"{'✓ The drill has passed' if passed else '✗ The drill has not passed'}: {report.with_suffix('.html')}"
        )
        return 0 if passed else 1


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise Stopped(signal.Signals(number).name)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started; it is the leader of a group of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def _tail(path: Path, lines: int = 12) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main())
