#!/usr/bin/python
# Copyright: The Farshore authors
# GNU General Public License v3.0 or later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Ansible module: install a version of the Farshore runtime and make it the current one."""

from __future__ import annotations

DOCUMENTATION = r"""
module: runtime
short_description: Install a version of the Farshore runtime and make it the current one
version_added: 0.1.0
description:
  - Installs an archive of wheels, made by M(farshore.dr.wheelhouse), into a directory of its own; needs no network.
  - Then switches the C(current) link to it, in one step, and removes old versions.
author: The Farshore authors
options:
  root:
    description: The directory that holds the versions.
    type: path
    default: /opt/farshore
  release:
    description: Names the version; also the name of its directory.
    type: str
    required: true
  archive:
    description: The archive's path on the host. Needed only when the version is not installed yet.
    type: path
    required: true
  command:
    description: Where the C(farshore) command is linked.
    type: path
    default: /usr/local/bin/farshore
  keep:
    description: How many versions are kept, with the current one.
    type: int
    default: 2
  warm_up:
    description: Python code that is run once after the installation, before the version becomes the current one.
    type: str
    default: ""
  cache:
    description: The directory for code that the warm-up compiles.
    type: path
    default: /var/cache/farshore/numba
attributes:
  check_mode:
    description: Says what would be done, and does nothing.
    support: full
  diff_mode:
    description: Shows the version that is current and the one that will be.
    support: full
  idempotent:
    description: A version that is complete and current is left alone.
    support: full
"""

EXAMPLES = r"""
- name: The runtime is installed
  farshore.dr.runtime:
    release: 0.1.0-0123456789ab
    archive: /var/tmp/farshore.tar
"""

RETURN = r"""
steps:
  description: What was done, of install, switch, link and prune.
  returned: always
  type: list
  elements: str
release:
  description: The version that is current now.
  returned: always
  type: str
"""

import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.farshore.dr.plugins.module_utils._runtime import Runtime, RuntimeInstallError


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "default": "/opt/farshore"},
            "release": {"type": "str", "required": True},
            "archive": {"type": "path", "required": True},
            "command": {"type": "path", "default": "/usr/local/bin/farshore"},
            "keep": {"type": "int", "default": 2},
            "warm_up": {"type": "str", "default": ""},
            "cache": {"type": "path", "default": "/var/cache/farshore/numba"},
        },
        supports_check_mode=True,
    )
    runtime = Runtime(**module.params)
    link = os.path.join(runtime.root, "current")
    before = os.readlink(link) if os.path.islink(link) else "none"
    try:
        steps = runtime.pending()
        if steps and not module.check_mode:
            runtime.apply()
    except (RuntimeInstallError, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(
        changed=bool(steps),
        steps=steps,
        release=runtime.release,
        diff={"before": f"{before}\n", "after": f"{runtime.release}\n"},
    )


if __name__ == "__main__":
    main()
