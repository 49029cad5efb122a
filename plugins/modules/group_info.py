#!/usr/bin/python
# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Ansible module: what the agent of a host knows of its protection groups."""

from __future__ import annotations

DOCUMENTATION = r"""
module: group_info
short_description: What the agent of a host knows of its protection groups
version_added: 0.1.0
description:
  - Asks the daemon on the host, through C(farshore status --json).
  - On the local gateway that is the monitor, which knows all groups; on other hosts the node, which knows its own.
author: The Farshore authors
options:
  command:
    description: The agent's command.
    type: path
    default: /usr/local/bin/farshore
  required:
    description: Whether it is an error when no daemon answers.
    type: bool
    default: true
attributes:
  check_mode:
    description: Changes nothing anyway.
    support: full
  diff_mode:
    description: Changes nothing.
    support: none
  idempotent:
    description: Changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: The groups are known
  farshore.dr.group_info:
  register: info

- name: The groups that are not at home are named
  ansible.builtin.debug:
    msg: "{{ info.groups | dict2items | selectattr('value.owner', 'eq', 'remote') | map(attribute='key') }}"
"""

RETURN = r"""
running:
  description: Whether a daemon answered.
  returned: always
  type: bool
groups:
  description: The groups by name, as C(farshore status --json) has them.
  returned: always
  type: dict
status:
  description: The daemon's whole answer.
  returned: always
  type: dict
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.farshore.dr.plugins.module_utils._agent import Agent, AgentError, groups_of


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "command": {"type": "path", "default": "/usr/local/bin/farshore"},
            "required": {"type": "bool", "default": True},
        },
        supports_check_mode=True,
    )
    command = module.params["command"]
    try:
        if not os.path.exists(command):
            raise AgentError(f"{command} is not there: nothing was deployed on this host")
        status = Agent(command, lambda argv: module.run_command(argv)).status()
    except AgentError as error:
        if module.params["required"]:
            module.fail_json(msg=str(error))
        module.exit_json(changed=False, running=False, groups={}, status={})
    module.exit_json(changed=False, running=True, groups=groups_of(status), status=status)


if __name__ == "__main__":
    main()
