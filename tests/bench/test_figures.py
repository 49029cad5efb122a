"""Medians, ratios, verdicts, and the tables and charts made of them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from bench import charts, profile, report, stats
from bench.model import Criterion, Limit, RowResult, Sample
from bench.nodes import parse_ss
from bench.peers import parse_rsync_stats
from bench.rows.rpo import latencies


def test_median_of_even_and_odd_counts() -> None:
    assert stats.median([3, 1, 2]) == 2
    assert stats.median([4, 1, 3, 2]) == 2.5
    with pytest.raises(ValueError, match="no values"):
        stats.median([])


def test_percentiles() -> None:
    values = [float(n) for n in range(101)]
    assert stats.percentile(values, 99) == 99
    assert stats.percentile([1.0, 2.0], 50) == 1.5
    assert stats.percentile([7.0], 99) == 7.0


def test_ratios_are_those_of_pairs_and_not_of_medians() -> None:
    assert stats.pair_ratios([1.0, 10.0, None, 4.0], [2.0, 10.0, 5.0, None]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("value", "better", "verdict"),
    [
        (0.1, "lower", "stretch"),
        (0.15, "lower", "stretch"),
        (0.3, "lower", "must"),
        (0.4, "lower", "missed"),
        (0.4, "higher", "stretch"),
    ],
)
def test_verdict_of_a_figure(value: float, better: Any, verdict: str) -> None:
    assert Criterion("time", "×", (value,), 0.35, 0.15, better).verdict == verdict


def test_verdict_of_a_row_is_its_worst() -> None:
    good, fair = Criterion("a", "×", (0.1,), 0.35, 0.15), Criterion("b", "×", (0.3,), 0.35, 0.15)
    bad, none = Criterion("c", "×", (9.0,), 0.35), Criterion("d", "×", (), 0.35)
    beside = Criterion("e", "×", (9.0,), 0.35, binding=False)

    def verdict(*criteria: Criterion) -> str:
        return RowResult(1, "t", "w", criteria=list(criteria)).verdict

    assert verdict(good, beside) == "stretch"
    assert verdict(good, fair) == "must"
    assert verdict(good, fair, bad) == "missed"
    assert verdict(good, none) == "not measured"
    assert verdict() == "not measured"
    assert RowResult(1, "t", "w", criteria=[good], error="broken").verdict == "not measured"


def results() -> dict[str, Any]:
    """Results with a row of each kind."""
    time = RowResult(1, "pages changed", "1 GiB, 1% of its pages")
    time.runs = {
        "farshore": [Sample(0.5, 0.4, 1000), Sample(0.7, 0.5, 1200)],
        "rsync --no-whole-file": [Sample(2.0, 1.0, 5000), Sample(2.1, 1.0, 5000)],
        "rdiff": [None, None],
    }
    time.compare("farshore", "rsync --no-whole-file", 0.35, 0.15)
    time.limits.append(Limit("memcpy", 9.5, "GB/s"))
    rpo = RowResult(7, "RPO", "200 changes/s")
    rpo.criteria.append(Criterion("p50", "ms", (2.0, 2.5), 20.0, 3.0))
    rpo.series["latency ms"] = {"farshore": [0.5, 1.0, 2.0, 9.0], "lsyncd <delay=1>": [10.0, 800.0, 1200.0, 3000.0]}
    broken = RowResult(13, "tunnel", "bulk", error="no lab\nno tunnel")
    machine = {
        "cores": 2,
        "cpu": "a processor",
        "memory_gib": 24.0,
        "kernel": "6",
        "system": "Debian",
        "farshore": "0",
        "peers": {"rsync": "3.2.7", "rdiff": ""},
    }
    return {
        "started": "today",
        "pairs": 2,
        "scale": 1.0,
        "quick": False,
        "load": 0.1,
        "seconds": 60.0,
        "machine": machine,
        "rows": [row.as_json() for row in (time, rpo, broken)],
    }


def test_table_has_every_row_with_its_verdict() -> None:
    text = report.markdown(results())
    lines = text.splitlines()
    assert any(line.startswith("| 1 |") and "✓ must" in line and "≤ 0.35" in line for line in lines)
    assert any(line.startswith("| 7 |") and "★ stretch" in line for line in lines)
    assert any(line.startswith("| 13 |") and "no lab" in line and "not measured" in line for line in lines)
    widths = {line.replace("\\|", "").count("|") for line in report.table(results()["rows"]).splitlines()}
    assert widths == {9}
    assert "rdiff missing" in text


def test_generated_part_replaces_the_one_before() -> None:
    document = f"# Performance\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
    once = report.put_between(document, "new\n")
    assert "old" not in once and "new" in once and once.endswith("\n\nafter\n")
    assert report.put_between(once, "new\n") == once
    with pytest.raises(ValueError, match="markers"):
        report.put_between("nothing here", "new")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "×", "0.123 ×"),
        (1.0, "", "1.00"),
        (1234.5, "MB/s", "1,234 MB/s"),
        (1.5e6, "B", "1.5 MB"),
        (None, "s", "–"),
    ],
)
def test_figures_have_three_digits(value: float | None, unit: str, text: str) -> None:
    assert report.figure(value, unit) == text


def test_charts_are_well_formed(tmp_path: Path) -> None:
    written = charts.draw(results(), tmp_path)
    assert {path.name for path in written} == {"overview.svg", "row-1.svg", "row-7.svg"}
    for path in written:
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert "nan" not in path.read_text(encoding="utf-8")


def test_a_later_content_covers_the_changes_before_it() -> None:
    written = [(1.0, "a", 1), (2.0, "b", 2), (3.0, "a", 3), (4.0, "c", 4)]
    seen = [(2.5, "b", 2), (5.0, "a", 3), (6.0, "a", 1)]
    found, unseen = latencies(written, seen)
    assert sorted(found) == [0.5, 2.0, 4.0]
    assert unseen == 1


def test_rsync_stats() -> None:
    text = "Literal data: 83,123,456 bytes\nTotal bytes sent: 1,234\nTotal bytes received: 56\n"
    assert parse_rsync_stats(text) == {"Literal data": 83123456, "Total bytes sent": 1234, "Total bytes received": 56}


def test_bytes_of_connections() -> None:
    text = (
        "0 0 127.0.0.1:40000 127.0.0.1:7820 cubic rto:201 bytes_sent:1000 bytes_received:50 rcv_rtt:1\n"
        "0 0 127.0.0.1:40002 127.0.0.1:7820 cubic rto:201\n"
    )
    assert parse_ss(text) == {40000: 1050, 40002: 0}


def test_stages_of_a_profile() -> None:
    assert profile.stage_of(("dbm/receiver.py:_sync_staged:os.fsync(fd)",)) == "sync"
    assert profile.stage_of(("selectors.py:select:x", "asyncio/base_events.py:_run_once:y")) == "wait"
    assert profile.stage_of(("somewhere.py:f:x = 1",)) == "other"
    stacks = [["main", True, ["dbm/index.py:put:self._db.execute(x)"], 50], ["main", False, ["queue.py:get:wait"], 50]]
    text = profile.table("source", [{"rounds": 100, "interval": 0.004, "stacks": stacks}])
    assert "| index | 50% | 0% |" in text and "wait |" not in text
