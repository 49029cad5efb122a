"""How the modules read what the agent says."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def test_a_refusal_is_said_with_its_reason(agent: ModuleType) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str]) -> tuple[int, str, str]:
        asked.append(argv)
        return 23, "", "failover of web: given up: bak1 does not answer\n"

    with pytest.raises(agent.AgentError, match="bak1 does not answer"):
        agent.Agent("farshore", run).switch("failover", "web", 60)
    assert asked == [["farshore", "failover", "web", "--wait", "60", "--json"]]


@pytest.mark.parametrize(
    ("action", "phase", "served_by", "done"),
    [
        ("failover", "normal", "local", False),
        ("failover", "failed_over", "remote", True),
        ("failover", "recovered", "remote", True),
        ("failback", "failed_over", "remote", False),
        ("failback", "recovered", "remote", False),
        ("failback", "normal", "local", True),
        ("recover", "failed_over", "remote", False),
        ("recover", "recovered", "remote", True),
        ("recover", "normal", "local", True),
    ],
)
def test_what_is_done_is_not_done_again(agent: ModuleType, action: str, phase: str, served_by: str, done: bool) -> None:
    group: dict[str, Any] = {"phase": phase, "served_by": served_by, "rules_in_place": True, "wish": "none"}
    assert agent.reached(action, group) is done
    assert agent.reached(action, {**group, "rules_in_place": False}) is (action == "recover" and phase == "recovered")
