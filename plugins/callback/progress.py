# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Ansible callback: one line for each finished task, with the time since the start."""

from __future__ import annotations

DOCUMENTATION = r"""
name: progress
type: stdout
short_description: One line for each finished task
version_added: 0.1.0
description:
  - Prints a line when a task is finished, with the time since the start, how long it took, and which hosts it changed.
  - Says nothing about tasks that were skipped everywhere, and nothing about those that only steer the playbook.
  - Shows failures in full, with the host and the message.
author: The Farshore authors
extends_documentation_fragment:
  - ansible.builtin.default_callback
  - ansible.builtin.result_format_callback
requirements:
  - Set as stdout in the configuration, or C(ANSIBLE_STDOUT_CALLBACK=farshore.dr.progress).
"""

import sys
import time
from typing import Any

from ansible import constants
from ansible.plugins.callback import CallbackBase

#: Actions that only steer a playbook.
_SILENT = {
    *("include_tasks", "import_tasks", "include_role", "import_role", "include_vars", "set_fact", "meta", "assert"),
    *("set_stats", "add_host", "group_by", "validate_argument_spec"),
}
#: What a result holds besides the reason why it is one.
_NOISE = {
    *("_ansible_no_log", "_ansible_verbose_always", "_ansible_delegated_vars", "_ansible_parsed", "invocation"),
    *(
        "changed",
        "failed",
        "msg",
        "stdout_lines",
        "stderr_lines",
        "exception",
        "warnings",
        "deprecations",
        "ansible_facts",
    ),
    *("start", "end", "delta", "results", "ansible_loop_var", "item", "skipped", "unreachable", "failed_when_result"),
}


class CallbackModule(CallbackBase):  # type: ignore[misc]  # Ansible has no types
    """Collects what the hosts did in a task and prints it when the next one begins."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "farshore.dr.progress"

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._tasks: dict[str, _Task] = {}
        self._live = sys.stdout.isatty()
        self._pending = False

    # --- what Ansible tells

    def v2_playbook_on_play_start(self, play: Any) -> None:
        self._finish()
        name = play.get_name().strip()
        if name:
            self._print(f"\n{self._clock()}  {name}", "bright blue")

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        # Under the strategy `free` hosts are at different tasks; a task of before may still be under way.
        self._finish(lambda known: known.idle)
        self._tasks.setdefault(task._uuid, _Task(task))
        self._show_pending(task)

    v2_playbook_on_cleanup_task_start = v2_playbook_on_handler_task_start = lambda self, task: (
        self.v2_playbook_on_task_start(task, False)
    )

    def v2_runner_on_start(self, host: Any, task: Any) -> None:
        self._tasks.setdefault(task._uuid, _Task(task)).started += 1

    def v2_runner_on_ok(self, result: Any) -> None:
        known = self._done(result)
        known.ok += 1
        known.hosts.append(_host(result))
        if result._result.get("changed"):
            known.changed.append(_host(result))
        if known.action == "debug":
            known.texts += _texts(result._result)

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._done(result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        known = self._done(result)
        known.failed += 1
        self._failure(result, "failed, which is ignored" if ignore_errors else "failed")

    def v2_runner_on_unreachable(self, result: Any) -> None:
        known = self._done(result)
        known.failed += 1
        self._failure(result, "is unreachable")

    def v2_on_file_diff(self, result: Any) -> None:
        for each in result._result.get("results", [result._result]):
            if each.get("diff") and each.get("changed"):
                self._print(self._get_diff(each["diff"]))

    def v2_runner_retry(self, result: Any) -> None:
        known = self._tasks.get(result._task._uuid)
        if known:
            known.retries += 1

    def v2_playbook_on_no_hosts_matched(self) -> None:
        self._print("No host of the play is in the inventory", constants.COLOR_SKIP)

    def v2_playbook_on_stats(self, stats: Any) -> None:
        self._finish()
        totals = [(host, stats.summarize(host)) for host in sorted(stats.processed)]
        bad = [host for host, total in totals if total["failures"] or total["unreachable"]]
        changed = sum(total["changed"] for _, total in totals)
        text = f"failed on {', '.join(bad)}" if bad else "done"
        color = constants.COLOR_ERROR if bad else constants.COLOR_OK
        self._print(f"\n{self._clock()}  {text}: {len(totals)} hosts, {changed} changes", color)

    # --- what is printed

    def _done(self, result: Any) -> _Task:
        known = self._tasks.setdefault(result._task._uuid, _Task(result._task))
        known.finished += 1
        return known

    def _finish(self, which: Any = lambda known: True) -> None:
        for key in [key for key, known in self._tasks.items() if which(known)]:
            self._line(self._tasks.pop(key))

    def _line(self, known: _Task) -> None:
        if known.action in _SILENT or not (known.ok or known.failed):
            return
        if known.failed and not known.ok:
            return
        color = constants.COLOR_CHANGED if known.changed else constants.COLOR_OK
        changed = [host for host in dict.fromkeys(known.changed) if host != "localhost"]
        hosts = f"  changed {', '.join(changed)}" if changed else f"  {known.host}" if known.host else ""
        retries = f", {known.retries} tries more" if known.retries else ""
        self._print(f"{self._clock()}  ✓ {known.name} ({known.seconds():.1f} s{retries}){hosts}", color)
        for text in known.texts:
            self._print(f"         {text}")

    def _failure(self, result: Any, what: str) -> None:
        self._print(f"{self._clock()}  ✗ {_name(result._task)}", constants.COLOR_ERROR)
        found = [each for each in result._result.get("results", []) if each.get("failed") or each.get("unreachable")]
        for each in found or [result._result]:
            item = f" (item {each['item']})" if "item" in each else ""
            self._print(
                f"         {_host(result)}{item} {what}: {str(each.get('msg', '')).strip()}", constants.COLOR_ERROR
            )
            if each.get("_ansible_no_log"):
                continue
            for key in ("cmd", "rc", "stdout", "stderr"):
                if each.get(key) not in (None, "", [], 0):
                    text = " ".join(map(str, each[key])) if isinstance(each[key], list) else str(each[key])
                    self._print(
                        "\n".join(f"           {key}: {line}" for line in text.splitlines()), constants.COLOR_ERROR
                    )
            rest = {key: value for key, value in each.items() if key not in _NOISE | {"cmd", "rc", "stdout", "stderr"}}
            if rest and self._display.verbosity:
                self._print(self._dump_results(rest), constants.COLOR_ERROR)
            if each.get("exception") and self._display.verbosity > 1:
                self._print(str(each["exception"]), constants.COLOR_ERROR)

    def _show_pending(self, task: Any) -> None:
        if self._live and task.action.rpartition(".")[2] not in _SILENT:
            self._clear()
            sys.stdout.write(f"{self._clock()}  … {_name(task)}"[:100])
            sys.stdout.flush()
            self._pending = True

    def _clear(self) -> None:
        if self._pending:
            sys.stdout.write("\r\033[K")
            sys.stdout.flush()
            self._pending = False

    def _print(self, text: str, color: str | None = None) -> None:
        self._clear()
        self._display.display(text, color=color)

    def _clock(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        return f"{minutes:02d}:{seconds:02d}"


class _Task:
    """One task on all hosts."""

    def __init__(self, task: Any) -> None:
        self.name = _name(task)
        self.action = task.action.rpartition(".")[2]
        self.began = time.monotonic()
        self.started = self.finished = self.ok = self.failed = self.retries = 0
        self.changed: list[str] = []
        self.hosts: list[str] = []
        self.texts: list[str] = []

    @property
    def idle(self) -> bool:
        """Whether no host is at it."""
        return self.finished >= self.started

    @property
    def host(self) -> str:
        """The only host that was at it, unless that is the controller."""
        return self.hosts[0] if len(self.hosts) == 1 and self.hosts[0] != "localhost" else ""

    def seconds(self) -> float:
        """How long it took until now."""
        return time.monotonic() - self.began


def _name(task: Any) -> str:
    # The role's name is in front of a task's name; a reader wants to know what happens, not where it is written.
    return str(task.get_name()).rpartition(" : ")[2].strip()


def _host(result: Any) -> str:
    """The host at which it was done; that of a task which is delegated anew for each item is the play's."""
    delegated = str((getattr(result, "_task_fields", None) or {}).get("delegate_to") or "")
    return delegated if delegated and "{{" not in delegated else str(result._host.get_name())


def _texts(result: dict[str, Any]) -> list[str]:
    for each in result.get("results", [result]):
        message = each.get("msg", "")
        return [str(line) for line in message] if isinstance(message, list) else str(message).splitlines()
    return []
