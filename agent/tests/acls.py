"""For tests: ACLs and capabilities as the kernel shows them."""

from __future__ import annotations

import struct

#: CAP_NET_BIND_SERVICE, effective.
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
#: Two users and a group, as (tag, rights, id).
NAMED = (2, 6, 1234), (2, 4, 2345), (8, 6, 3456)


def acl(*named: tuple[int, int, int], group: int = 5, mask: int = 7) -> bytes:
    """An ACL: user::rwx, the ``named`` entries (tag, rights, id), group::, mask::, other::r-x."""
    entries = [
        (1, 7, 0xFFFFFFFF),
        *[entry for entry in named if entry[0] == 2],
        (4, group, 0xFFFFFFFF),
        *[entry for entry in named if entry[0] == 8],
        (0x10, mask, 0xFFFFFFFF),
        (0x20, 5, 0xFFFFFFFF),
    ]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
