# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Ask the agent through its JSON command line. Private to this collection."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Run = Callable[[list[str]], tuple[int, str, str]]


#: The monitor's phases in which a group's users are at the other site.
_AWAY = ("failed_over", "recovering", "recovered")


class AgentError(Exception):
    """The agent gave no answer, or said no."""


class Agent:
    """The agent of this host, asked through ``command``; ``run`` starts a process and gives (code, out, err)."""

    def __init__(self, command: str, run: Run) -> None:
        self._command, self._run = command, run

    def status(self) -> dict[str, Any]:
        """What ``farshore status --json`` says; raises AgentError."""
        return self._ask("status", "--json")

    def switch(self, action: str, group: str, wait: float) -> dict[str, Any]:
        """Wish for ``action`` on ``group`` and wait for it; raises AgentError."""
        return self._ask(action, group, "--wait", f"{wait:g}", "--json")

    def _ask(self, *arguments: str) -> dict[str, Any]:
        code, out, err = self._run([self._command, *arguments])
        try:
            answer = json.loads(out) if out.strip() else {}
        except ValueError:
            answer = {}
        if code:
            reason = answer.get("reason") if isinstance(answer, dict) else ""
            reason = reason or err.strip() or out.strip() or f"exit code {code}"
            raise AgentError(f"farshore {' '.join(arguments)}: {reason}")
        if not isinstance(answer, dict):
            raise AgentError(f"farshore {' '.join(arguments)}: answered {out[:200]!r}, which is not a JSON object")
        return answer


def groups_of(status: dict[str, Any]) -> dict[str, Any]:
    """The groups in a status, by name."""
    groups = status.get("groups") or {}
    return {item["group"]: item for item in groups} if isinstance(groups, list) else groups


def reached(action: str, group: dict[str, Any]) -> bool:
    """Whether ``action`` on a group in this state has nothing left to do."""
    phase, settled = group.get("phase"), bool(group.get("rules_in_place"))
    if action == "failover":
        return phase in _AWAY and group.get("served_by") == "remote" and settled
    if action == "recover" and phase == "recovered":
        return True
    return phase == "normal" and group.get("wish") == "none" and settled
