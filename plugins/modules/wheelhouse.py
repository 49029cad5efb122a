#!/usr/bin/python
# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Ansible module: the wheels of the Farshore runtime for one kind of host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: wheelhouse
short_description: Collect the wheels of the Farshore runtime for one kind of host
version_added: 0.1.0
description:
  - Builds the runtime and fetches what it needs, for the Python and the machine of the hosts, into one archive.
  - Runs on the controller. What was built once for the same sources, pins and Python is taken from the cache.
author: The Farshore authors
options:
  source:
    description: The runtime's project directory.
    type: path
    required: true
  requirements:
    description: A file of exact pins, C(NAME==VERSION), a line each.
    type: path
    required: true
  sdists:
    description: Names of the pins that are published as source only. They must be pure Python.
    type: list
    elements: str
    default: []
  python_version:
    description: The hosts' Python, for example V(3.11).
    type: str
    required: true
  architecture:
    description: The hosts' machine, for example V(x86_64).
    type: str
    required: true
  cache:
    description: The directory to keep wheels and archives in.
    type: path
    required: true
attributes:
  check_mode:
    description: Says what would be built, and builds nothing.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
  idempotent:
    description: The same sources, pins and target give the same archive, which is built once.
    support: full
"""

EXAMPLES = r"""
- name: The wheels for Debian 12 are there
  farshore.dr.wheelhouse:
    source: agent
    requirements: roles/agent_runtime/files/requirements-node.txt
    sdists: [pyinotify]
    python_version: "3.11"
    architecture: x86_64
    cache: ~/.cache/farshore
  delegate_to: localhost
"""

RETURN = r"""
archive:
  description: The archive's path on the controller.
  returned: always
  type: str
key:
  description: Names the content; changes with sources, pins and target.
  returned: always
  type: str
version:
  description: The runtime's version.
  returned: always
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.farshore.dr.plugins.module_utils._wheelhouse import Wheelhouse, WheelhouseError


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "path", "required": True},
            "requirements": {"type": "path", "required": True},
            "sdists": {"type": "list", "elements": "str", "default": []},
            "python_version": {"type": "str", "required": True},
            "architecture": {"type": "str", "required": True},
            "cache": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    try:
        wheelhouse = Wheelhouse(**module.params)
        changed = not wheelhouse.exists()
        if changed and not module.check_mode:
            wheelhouse.build()
    except (WheelhouseError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=changed, archive=wheelhouse.archive, key=wheelhouse.key, version=wheelhouse.version)


if __name__ == "__main__":
    main()
