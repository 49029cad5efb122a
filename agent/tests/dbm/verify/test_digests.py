"""The digests by which trees are compared: equal for equal trees, and for no others."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from farshore.dbm.index import Known
from farshore.dbm.messages import Item, Meta
from farshore.dbm.verify import digests
from farshore.fmm.types import FileKind, Observed

NAMES = st.sampled_from([b"a", b"b", b"ab", b"a b", b"\xff", b"\0\0\0\1a"])
METAS = st.builds(
    Meta,
    st.sampled_from([0o644, 0o600]),
    st.integers(0, 1),
    st.integers(0, 1),
    st.integers(0, 3),
    st.integers(-1, 1),
    st.lists(st.tuples(st.sampled_from([b"user.a", b"user.b"]), st.binary(max_size=2)), max_size=2),
)
FILES = st.tuples(st.just(FileKind.FILE), METAS, st.binary(max_size=2))
#: A tree: a directory's metadata and what is in it, or a file's kind, metadata and content.
TREES: Any = st.deferred(lambda: st.tuples(METAS, st.dictionaries(NAMES, FILES | TREES, max_size=3)))


def below(tree: Any) -> bytes:
    """The digest of what lies in a directory of a tree."""
    items = []
    for name, each in reversed(tree[1].items()):
        if each[0] is FileKind.FILE:
            items.append(Item(name, digests.own_digest(*each[:2], len(each[2]), 0, None, each[2]), None))
        else:
            own = digests.own_digest(FileKind.DIRECTORY, each[0], 4096, 0, None, None)
            items.append(Item(name, own, below(each)))
    return digests.directory_digest(items)


def plain(tree: Any) -> Any:
    """A tree in a form to be compared, without access times."""
    found = {}
    for name, each in tree[1].items():
        is_file = each[0] is FileKind.FILE
        meta = replace(each[1] if is_file else each[0], atime_ns=0)
        found[name] = (meta, each[2]) if is_file else (meta, plain(each))
    return found


@given(TREES, TREES)
def test_digests_are_equal_for_equal_trees_only(left: Any, right: Any) -> None:
    assert (below(left) == below(right)) == (plain(left) == plain(right))


@given(TREES)
def test_the_order_of_names_does_not_matter(tree: Any) -> None:
    meta, entries = tree
    assert below((meta, dict(reversed(entries.items())))) == below(tree)


@given(st.dictionaries(st.binary(min_size=1, max_size=4), st.binary(min_size=16, max_size=16)), st.data())
def test_one_name_changes_one_bucket(names: dict[bytes, bytes], data: st.DataObject) -> None:
    items = [Item(name, own, None) for name, own in names.items()]
    before = {each.name: each.own for each in digests.buckets(items)}
    assert set(before) == {bytes([digests.bucket_of(name)]) for name in names}
    changed = data.draw(st.sampled_from(sorted(names))) if names else b"new"
    after = {
        each.name: each.own
        for each in digests.buckets([*(i for i in items if i.name != changed), Item(changed, b"?" * 16, b"b" * 16)])
    }
    differing = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert differing == {bytes([digests.bucket_of(changed)])}


META = Meta(0o644, 1, 2, 99, 5, [(b"user.a", b"x")])


def test_what_the_index_knows_has_the_digest_of_what_was_seen() -> None:
    seen = Observed(0, b"a", FileKind.FILE, 0o644, 1, 2, 3, 99, 5, 6, 7, 8, 2, 0, 8, None, ((b"user.a", b"x"),))
    known = Known(0, b"a", FileKind.FILE, 0o644, 1, 2, 3, 5, 0, 0, 0, 1, 0, None, ((b"user.a", b"x"),), b"c" * 32)
    for content in (None, b"c" * 32):
        own = digests.own_digest(FileKind.FILE, META, 3, 0, None, content)
        assert digests.of_known(known, content) == digests.of_observed(seen, content) == own


def test_sizes_count_for_files_and_device_numbers_for_devices() -> None:
    def own(kind: FileKind, size: int, rdev: int) -> bytes:
        return digests.own_digest(kind, META, size, rdev, None, None)

    assert own(FileKind.DIRECTORY, 1, 1) == own(FileKind.DIRECTORY, 2, 2)
    assert own(FileKind.FILE, 1, 1) == own(FileKind.FILE, 1, 2) != own(FileKind.FILE, 2, 2)
    assert own(FileKind.BLOCK_DEVICE, 1, 1) == own(FileKind.BLOCK_DEVICE, 2, 1) != own(FileKind.BLOCK_DEVICE, 2, 2)
    assert own(FileKind.FIFO, 1, 1) != own(FileKind.DIRECTORY, 1, 1)
