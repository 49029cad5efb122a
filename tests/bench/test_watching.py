"""Rows 8 to 11: what changes the files, and what is made of what was seen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from bench import charts, data, held, stats
from bench.model import RowResult, Sample
from bench.nodes import environment
from bench.processes import memory_of, sysctl
from bench.rows import QUICK, families, heldopen, million
from bench.rows import storm as storm_row
from bench.storm import Storm


def test_every_row_is_there_once() -> None:
    numbers = [number for family in families() for number in family.rows]
    assert sorted(numbers) == list(range(1, 14))
    assert set(QUICK) < set(numbers)


@pytest.mark.parametrize("kind", ["append", "mapped"])
def test_each_change_of_a_held_file_has_its_place(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    size, numbers = path.stat().st_size, range(20)
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.held", kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment(),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            offset = held.offset_of(kind, number, size)
            assert not held.arrived(path, offset, number)
            before = time.monotonic()
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            assert before <= float(process.stdout.readline()) <= time.monotonic()
            assert held.arrived(path, offset, number)
        assert all(held.arrived(path, held.offset_of(kind, number, size), number) for number in numbers)
    finally:
        process.stdin.close()
        assert process.wait(30) == 0
        process.stdout.close()
    assert not held.arrived(tmp_path / "missing", 0, 0)


def test_no_page_is_hit_twice() -> None:
    pages = held.MAPPED // held.PAGE
    assert len({held.offset_of("mapped", number, held.MAPPED) for number in range(pages)}) == pages


def test_what_never_came_counts_as_late() -> None:
    found = heldopen.figures("append", [0.1, 0.2], 3)
    assert found == {"appended p50 s": heldopen.PATIENCE, "appended worst s": heldopen.PATIENCE, "appended unseen": 3.0}
    assert heldopen.figures("mapped", [1.0, 4.0, 2.0], 0)["mapped p50 s"] == 2.0


def test_curves_are_percentiles_in_milliseconds() -> None:
    assert stats.curve_ms([]) == []
    curve = stats.curve_ms([0.001, 0.003], 2)
    assert curve == [1.0, 2.0, 3.0]


def test_a_forest_has_its_files(tmp_path: Path) -> None:
    data.forest(tmp_path / "forest", 2500, 10)
    assert data.count_tree(tmp_path / "forest") == 2500
    parts = [data.count_tree(part) for part in (tmp_path / "forest").iterdir()]
    assert parts == [250] * data.PARTS
    contents = {path.read_bytes() for path in (tmp_path / "forest").rglob("f*")}
    assert {len(content) for content in contents} == {10}


def test_a_storm_leaves_what_it_says(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    for name in names:
        (tmp_path / name).mkdir()
    storm = Storm(str(tmp_path), 7, names)
    kinds = {storm.step() for _ in range(2000)}
    assert kinds == {1, 2, 3}
    assert storm.names() == {name: sorted(os.listdir(tmp_path / name)) for name in names}


@pytest.mark.skipif(not shutil.which("rsync"), reason="rsync is not installed")
def test_differences_are_counted(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for tree in (source, target):
        tree.mkdir()
        (tree / "same").write_bytes(b"1")
        os.utime(tree / "same", ns=(0, 0))
        (tree / "content").write_bytes(tree.name[:1].encode())
        os.utime(tree / "content", ns=(0, 0))
        os.utime(tree, ns=(0, 0))
    assert storm_row.differences(source, target, "-a") == 0
    assert storm_row.differences(source, target, "-a", "--checksum") == 1
    (target / "more").write_bytes(b"")
    os.utime(target, ns=(0, 0))
    assert storm_row.differences(source, target, "-a") == 1


def test_memory_of_processes() -> None:
    found = memory_of([os.getpid()])
    assert 1 < found["pss"] <= found["rss"] * 1.1
    assert memory_of([]) == {"rss": 0.0, "pss": 0.0, "peak": 0.0}


def test_a_number_of_the_kernel_that_fits_is_left_alone() -> None:
    path = Path("/proc/sys/fs/inotify/max_queued_events")
    before = path.read_text()
    with sysctl("fs.inotify.max_queued_events", lambda now: now) as value:
        assert value == int(before) == int(path.read_text())
    assert path.read_text() == before


def rows() -> list[dict[str, Any]]:
    """Results of rows 8 to 11."""
    held_open = RowResult(8, "files held open", "w")
    held_open.series["latency ms"] = {"farshore, appended": [5.0, 9.0, 20.0], "farshore, mapped": [900.0, 4000.0]}
    idle = RowResult(9, "at rest", "w")
    idle.runs = {"farshore, inotify": [Sample(60.0, 0.01, None, {"MB (PSS)": 200.0})], "lsyncd": [None]}
    restart = RowResult(10, "restart", "w")
    restart.runs = {"farshore, inotify": [Sample(5.0), Sample(6.0)], million.RSYNC: [Sample(8.0), Sample(9.0)]}
    storm = RowResult(11, "storm", "w")
    storm.runs = {"farshore, inotify": [Sample(20.0, 9.0, None, {"s until the same": 8.0, "differences": 0.0})]}
    return [row.as_json() for row in (held_open, idle, restart, storm)]


def test_charts_of_these_rows_are_well_formed(tmp_path: Path) -> None:
    written = charts.draw({"rows": rows()}, tmp_path)
    assert {path.name for path in written} == {"overview.svg", *(f"row-{number}.svg" for number in range(8, 12))}
    for path in written:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert "nan" not in path.read_text(encoding="utf-8")


def test_no_difference_is_what_must_be() -> None:
    def verdict(differences: float) -> str:
        row = RowResult(11, "t", "w")
        row.runs = {
            "farshore, inotify": [Sample(20.0, 9.0, None, {"s until the same": 8.0, "differences": differences})]
        }
        storm_row.judge(row, 1000)
        return row.verdict

    assert (verdict(0.0), verdict(1.0)) == ("must", "missed")
