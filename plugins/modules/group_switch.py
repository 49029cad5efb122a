#!/usr/bin/python
# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Ansible module: move the service of a protection group to the other site, or home again."""

from __future__ import annotations

DOCUMENTATION = r"""
module: group_switch
short_description: Move the service of a protection group to the other site, or home again
version_added: 0.1.0
description:
  - Tells the monitor on the local gateway an operator's wish, and waits until it has come true.
  - The monitor decides in which order what is done; it refuses what would lose data or make two masters.
author: The Farshore authors
options:
  group:
    description: The group's name, as in C(farshore_groups).
    type: str
    required: true
  action:
    description:
      - V(failover) has the backup server serve the group.
      - V(recover) brings the data that was written or lost meanwhile home, and leaves the switch back to the monitor.
      - V(failback) recovers the data and has the local server serve the group again.
    type: str
    choices: [failover, failback, recover]
    required: true
  wait:
    description: For how many seconds to wait for it.
    type: float
    default: 120
  command:
    description: The agent's command.
    type: path
    default: /usr/local/bin/farshore
attributes:
  check_mode:
    description: Says from the present state whether there is something to do, and does nothing.
    support: full
  diff_mode:
    description: Shows owner and serving side, before and after.
    support: full
  idempotent:
    description: A group that is there already is left alone.
    support: full
"""

EXAMPLES = r"""
- name: The group web is served from the other site
  farshore.dr.group_switch:
    group: web
    action: failover
    wait: 60
"""

RETURN = r"""
before:
  description: The group's state before, as C(farshore status --json) has it.
  returned: always
  type: dict
after:
  description: The group's state after; in check mode that before.
  returned: always
  type: dict
answer:
  description: What the agent said.
  returned: when something was done
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.farshore.dr.plugins.module_utils._agent import Agent, AgentError, groups_of, reached


class Switch:
    """The wish for one group."""

    def __init__(self, agent: Agent, group: str, action: str, wait: float) -> None:
        self._agent, self._group, self._action, self._wait = agent, group, action, wait

    def state(self) -> dict[str, Any]:
        """The group as the monitor has it; raises AgentError."""
        groups = groups_of(self._agent.status())
        if self._group not in groups:
            allowed = ", ".join(sorted(groups)) or "none"
            raise AgentError(f"group {self._group!r} is not known to this gateway; known: {allowed}")
        return groups[self._group]

    def run(self, check_mode: bool) -> dict[str, Any]:
        """Carry the wish out, unless there is nothing to do; raises AgentError."""
        before = after = self.state()
        changed = not reached(self._action, before)
        result: dict[str, Any] = {"changed": changed, "before": before}
        if changed and not check_mode:
            result["answer"] = self._agent.switch(self._action, self._group, self._wait)
            after = self.state()
        return {**result, "after": after, "diff": {"before": _place(before), "after": _place(after)}}


def _place(group: dict[str, Any]) -> str:
    return "".join(f"{key}: {group.get(key)}\n" for key in ("served_by", "owner", "epoch", "phase"))


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "group": {"type": "str", "required": True},
            "action": {"type": "str", "choices": ["failover", "failback", "recover"], "required": True},
            "wait": {"type": "float", "default": 120},
            "command": {"type": "path", "default": "/usr/local/bin/farshore"},
        },
        supports_check_mode=True,
    )
    params = module.params
    agent = Agent(params["command"], lambda argv: module.run_command(argv))
    try:
        result = Switch(agent, params["group"], params["action"], params["wait"]).run(module.check_mode)
    except AgentError as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
