"""``farshore restore --on-promotion``, and how it is shown."""

from __future__ import annotations

import argparse
import time
from typing import Any

import pytest

from farshore.cli import history, main, status
from farshore.control import api

GROUP = api.GroupStatus(
    "web", "remote", "local", 1, "replica", "receiving", True, False, None, 0, 0, 0, {}, [], True,
    back_to=911, back_to_time=1_700_000_000.0,
)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[api.Request]:
    """What is asked of the node."""
    requests: list[api.Request] = []

    def ask(arguments: argparse.Namespace, request: Any, timeout: float) -> api.Answer:
        requests.append(request)
        return api.Done("it is done")

    monkeypatch.setattr(history.daemon, "ask_node", ask)
    return requests


def test_it_is_asked_for_and_taken_back(asked: list[api.Request], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["restore", "web", "--at", "911", "--on-promotion"]) == 0
    assert main(["restore", "web", "--on-promotion", "--cancel"]) == 0
    assert asked == [api.RestoreOnPromotion("web", 911), api.RestoreOnPromotion("web", cancel=True)]
    assert capsys.readouterr().out == "it is done\n" * 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["/srv/www/x", "--at", "1", "--on-promotion"], "no PATH is allowed"),
        (["--on-promotion"], "--at is needed"),
        (["--in-place"], "--at is needed"),
        (["--at", "1", "--on-promotion", "--cancel"], "--at and --cancel exclude each other"),
        (["--in-place", "--at", "1", "--cancel"], "--cancel is allowed with --on-promotion only"),
    ],
)
def test_what_makes_no_sense_is_named(
    asked: list[api.Request], capsys: pytest.CaptureFixture[str], options: list[str], error: str
) -> None:
    assert main(["restore", "web", *options]) == 2
    assert error in capsys.readouterr().err
    assert asked == []


@pytest.mark.parametrize("other", [["--in-place"], ["--to", "/x"]])
def test_one_place_is_chosen(asked: list[api.Request], other: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["restore", "web", "--at", "1", "--on-promotion", *other])
    assert caught.value.code == 2
    assert asked == []


def test_the_status_shows_it() -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(GROUP.back_to_time))
    line = f"RESTORE web: the next promotion takes the state after transaction 911 of {since}"
    assert line in "\n".join(status._describe(api.NodeStatus("bak1", "0", 1.0, {"web": GROUP})))
    seen = api.SwitchStatus("web", "normal", "local", 1, "", 0.0, "local", "none", [], None, GROUP, True)
    text = "\n".join(status._describe(api.MonitorStatus("ldrg", "0", 1.0, "up", {"web": seen}, [])))
    assert "RESTORE web on the backup server: the next promotion takes" in text
