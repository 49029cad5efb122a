"""Which extended attributes are kept."""

from __future__ import annotations

import pytest

from farshore.fmm.attributes import is_replicated, label


@pytest.mark.parametrize(
    "name",
    [
        "user.a",
        "user.",
        "user.\udcff",
        "trusted.a",
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "security.capability",
        "security.NTACL",
        "system.posix_acl_access",
        "system.posix_acl_default",
    ],
)
def test_what_belongs_to_a_files_meaning_is_kept(name: str) -> None:
    assert is_replicated(name.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    "name",
    [
        "security.selinux",
        "security.sehash",
        "security.SMACK64",
        "security.SMACK64EXEC",
        "security.ima",
        "security.evm",
        "trusted.SGI_ACL_FILE",
        "trusted.overlay.origin",
        "system.nfs4_acl",
        "system.cifs_acl",
        "btrfs.compression",
        "os2.a",
        "userx",
        "",
    ],
)
def test_what_a_host_or_a_filesystem_computes_is_not(name: str) -> None:
    assert not is_replicated(name.encode())


def test_reports_name_what_the_system_knows() -> None:
    assert label(b"security.NTACL") == "xattr security.NTACL"
    assert label(b"user.a\xff") == "xattr user.*"
    assert label(b"trusted.x") == "xattr trusted.*"
    assert len(label(b"x" * 300)) < 100
    assert len(label(b"security." + b"x" * 300)) < 100
