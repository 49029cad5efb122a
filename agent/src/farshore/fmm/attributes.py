"""Which extended attributes belong to a file's meaning, and so are observed and kept on the replica.

All that a process may read and write is kept, but for what a host or a filesystem computes by itself: there it would be
wrong on any other.
"""

from __future__ import annotations

#: Access and default ACLs; they hold numeric owners (acl(5), linux/posix_acl_xattr.h).
ACL_ACCESS = b"system.posix_acl_access"
ACL_DEFAULT = b"system.posix_acl_default"
CAPABILITY = b"security.capability"

_SPACES = (b"user.", b"trusted.", b"security.")
#: Of ``system.``, only these are stored; ``system.nfs4_acl``, ``system.cifs_acl`` and the like are views of a server's.
_SYSTEM = frozenset({ACL_ACCESS, ACL_DEFAULT})
_OWN = (
    # Labels: the policy of each host gives them (restorecon).
    b"security.selinux",
    b"security.sehash",
    b"security.SMACK64",
    b"security.apparmor",
    # Hashes of content, the latter with the inode's number and the filesystem's UUID in them.
    b"security.ima",
    b"security.evm",
    # XFS shows its ACLs under these names, too.
    b"trusted.SGI_",
    # File handles and UUIDs of the lower layers. The others (opaque, redirect, ...) are a layer's meaning.
    b"trusted.overlay.origin",
    b"trusted.overlay.upper",
    b"trusted.overlay.uuid",
)


def is_replicated(name: bytes) -> bool:
    """True for the extended attributes that are kept on the replica."""
    if name.startswith(b"user."):
        return True
    return name in _SYSTEM or (name.startswith(_SPACES) and not name.startswith(_OWN))


def label(name: bytes) -> str:
    """How a report speaks of an attribute: by its full name where the system knows it, else by its namespace."""
    space, _, _ = name.partition(b".")
    if space in (b"system", b"security") and len(name) <= 64:
        return "xattr " + name.decode("utf-8", "backslashreplace")
    return f"xattr {space[:64].decode('utf-8', 'backslashreplace')}.*"
