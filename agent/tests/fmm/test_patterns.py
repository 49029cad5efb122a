"""Which paths a filter protects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.fmm import Root, WatchError
from farshore.fmm.patterns import Filter


def make(include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> Filter:
    return Filter(Root(b"/srv", include, exclude))


def test_without_patterns_everything_but_staging_is_protected() -> None:
    everything = make()
    assert everything.plain
    assert everything.allows(b"", True)
    assert everything.allows(b"a/b", False)
    assert everything.allows(b"\xff\n/\xfe", True)
    for path in (b".farshore-x", b"a/.farshore-x", b"a/.farshore-x/b", b".farshore-"):
        assert not everything.allows(path, False)
        assert not everything.allows(path, True)
    assert everything.allows(b"x.farshore-y", False)
    assert everything.allows(b"a/.farshore", False)


def test_staging_cannot_be_included() -> None:
    assert not make(include=("*",)).allows(b"a/.farshore-1", False)


@pytest.mark.parametrize(
    ("path", "is_dir", "protected"),
    [
        (b"a.tmp", False, False),
        (b"deep/er/a.tmp", False, False),
        (b"a.txt", False, True),
        (b"cache", True, False),
        (b"cache", False, True),  # "cache/" is about directories
        (b"cache/x", False, False),
        (b"deep/cache/x/y", False, False),
        (b"logs", True, False),
        (b"deep/logs", True, True),  # "/logs" is anchored
        (b"", True, True),
    ],
)
def test_exclude(path: bytes, is_dir: bool, protected: bool) -> None:
    assert make(exclude=("*.tmp", "cache/", "/logs")).allows(path, is_dir) is protected


def test_include_wins_over_exclude() -> None:
    chosen = make(include=("keep.tmp",), exclude=("*.tmp",))
    assert chosen.allows(b"keep.tmp", False)
    assert chosen.allows(b"d/keep.tmp", False)
    assert not chosen.allows(b"other.tmp", False)


def test_include_reaches_into_an_excluded_directory() -> None:
    chosen = make(include=("cache/keep/*.db",), exclude=("cache/", "junk/"))
    assert chosen.allows(b"cache", True), "it must exist to hold what is included"
    assert chosen.allows(b"cache/keep", True)
    assert chosen.allows(b"cache/keep/a.db", False)
    assert not chosen.allows(b"cache/keep/a.txt", False)
    assert not chosen.allows(b"cache/other", True)
    assert not chosen.allows(b"cache/other/a.db", False)
    assert not chosen.allows(b"cache/x", False)
    assert not chosen.allows(b"junk", True), "no include reaches there"


def test_included_directory_is_included_with_all_below() -> None:
    chosen = make(include=("cache/keep/",), exclude=("cache/",))
    assert chosen.allows(b"cache/keep", True)
    assert chosen.allows(b"cache/keep/a/b", False)


def test_include_without_a_slash_may_match_anywhere() -> None:
    chosen = make(include=("*.keep",), exclude=("cache/",))
    assert chosen.allows(b"cache/a/b", True)
    assert chosen.allows(b"cache/a/b/c.keep", False)
    assert not chosen.allows(b"cache/a/b/c", False)


def test_negation_in_exclude() -> None:
    chosen = make(exclude=("*.tmp", "!good.tmp", "cache/", "!cache/x"))
    assert chosen.allows(b"good.tmp", False)
    assert not chosen.allows(b"bad.tmp", False)
    assert not chosen.allows(b"cache/x", False), "it cannot reach into an excluded directory"


def test_undecodable_and_odd_names() -> None:
    chosen = make(exclude=("*.tmp", "secret"))
    assert not chosen.allows(b"\xff\n.tmp", False)
    assert not chosen.allows(b"a\nb/\xff/c.tmp", False)
    assert chosen.allows(b"secret\n", False), "a newline does not end a name"
    assert chosen.allows(b"\xff", False)
    assert not make(exclude=("a?b",)).allows("aäb".encode(), False)


@pytest.mark.parametrize("pattern", ["!", "a\\", "a[z-a]"])
def test_wrong_pattern_names_the_root(pattern: str) -> None:
    with pytest.raises(WatchError, match="/srv") as caught:
        make(exclude=("fine", pattern))
    assert pattern in caught.value.reason
    assert caught.value.root == b"/srv"


def test_very_deep_paths() -> None:
    chosen = make(exclude=("x",))
    path = b"/".join([b"a"] * 5000)
    assert chosen.allows(path, True)
    assert not chosen.allows(path + b"/x/" + path, False)


parts = st.sampled_from([b"a", b"b", b"cache", b"x.tmp", b"\xff", b"k\n", b"keep"])


@given(st.lists(parts, min_size=1, max_size=6), st.booleans())
def test_what_is_protected_has_protected_parents(names: list[bytes], is_dir: bool) -> None:
    chosen = make(include=("cache/keep/", "b/*.tmp"), exclude=("cache/", "*.tmp", "b", "!a/b"))
    if chosen.allows(b"/".join(names), is_dir):
        for end in range(1, len(names)):
            assert chosen.allows(b"/".join(names[:end]), True)


@pytest.mark.parametrize(
    ("path", "is_dir", "decided"),
    [
        (b"a.txt", False, None),
        (b"a.tmp", False, ("exclude", 1, "*.tmp", b"a.tmp")),
        (b"d/keep.tmp", False, ("include", 1, "keep.tmp", b"d/keep.tmp")),
        (b"x.log", False, ("exclude", 3, "*.log", b"x.log")),
        (b"good.log", False, None),  # taken back by a later line
        (b"deep/cache/x/y", False, ("exclude", 5, "cache/", b"deep/cache")),
        (b"deep/cache", True, ("include", 1, "keep.tmp", b"deep/cache")),  # which could be below
        (b"cache", False, None),
        (b"", True, None),
    ],
)
def test_the_pattern_that_decides_is_named(path: bytes, is_dir: bool, decided: tuple[object, ...] | None) -> None:
    chosen = make(
        include=("# exceptions", "keep.tmp", "/only/here"),
        exclude=("", "*.tmp", "# logs", "*.log", "!good.log", "cache/"),
    )
    found = chosen.decision(path, is_dir)
    assert (None if found is None else (found.option, found.index, found.pattern, found.at)) == decided


def test_a_directory_that_is_entered_for_an_include_is_decided_by_that() -> None:
    chosen = make(include=("cache/keep/*.db",), exclude=("cache/",))
    found = chosen.decision(b"cache", True)
    assert found is not None and (found.option, found.pattern) == ("include", "cache/keep/*.db")
    found = chosen.decision(b"cache/keep/x", False)
    assert found is not None and (found.option, found.pattern, found.at) == ("exclude", "cache/", b"cache")
    found = chosen.decision(b"x/cache/y/z", False)
    assert found is not None and (found.pattern, found.at) == ("cache/", b"x/cache")


_PATTERNS = st.lists(st.sampled_from(["*.t", "a", "a/", "/a/b", "!a", "*", "!b.t", "a/*/c", "#x", ""]), max_size=4)


@given(_PATTERNS, _PATTERNS, st.lists(st.sampled_from(["a", "b", "c", "b.t"]), min_size=1, max_size=4), st.booleans())
def test_who_decides_agrees_with_what_is_decided(
    include: list[str], exclude: list[str], parts: list[str], is_dir: bool
) -> None:
    chosen = make(tuple(include), tuple(exclude))
    path = "/".join(parts).encode()
    found = chosen.decision(path, is_dir)
    if chosen.allows(path, is_dir):
        assert found is None or found.option == "include"
    else:
        assert found is not None and found.option == "exclude" and exclude[found.index] == found.pattern
