"""Another configuration while a node runs: what goes on, what begins anew, and that nothing is lost or mixed."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from nodes import Pair, until
from trees import differences

from farshore.config import (
    Bandwidth,
    BrakeConfig,
    Consistency,
    Endpoint,
    NodeConfig,
    NodeGroup,
    PathConfig,
    Rpo,
    Verification,
    load,
)
from farshore.control import api, client
from farshore.control.server import LOCAL
from farshore.daemons.node import Node
from farshore.daemons.reload import merge, regrouped
from farshore.dbm.group import BeingReplaced, Group
from farshore.dbm.receiver import Applier
from farshore.dbm.replica.restore import When
from farshore.errors import ConfigError, UsageError

Side = Literal["local", "remote"]
SIDES: tuple[Side, Side] = ("local", "remote")


def plain(value: Any) -> Any:
    """A configuration as YAML has it."""
    if dataclasses.is_dataclass(value):
        found = {each.metadata.get("key", each.name): getattr(value, each.name) for each in dataclasses.fields(value)}
        return {key: plain(each) for key, each in found.items() if each is not None}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def node(pair: Pair, side: Side) -> Node:
    found: Node = getattr(pair, side)
    return found


def web(pair: Pair, side: Side = "local") -> Group:
    return node(pair, side).groups["web"]


async def reload(pair: Pair, side: Side, config: NodeConfig) -> api.ConfigStatus:
    """Give a node another configuration, and return what it says of it."""
    path = pair.base / f"{side}.yml"
    path.write_text(yaml.safe_dump(plain(config), sort_keys=False))
    assert load(path, NodeConfig) == config
    await node(pair, side).reload(path)
    return await told(pair, side)


async def told(pair: Pair, side: Side) -> api.ConfigStatus:
    status = await node(pair, side).handle(api.StatusRequest(), LOCAL)
    assert isinstance(status, api.NodeStatus)
    assert status.config is not None
    return status.config


def regroup(config: NodeConfig, **groups: NodeGroup | None) -> NodeConfig:
    """The configuration with other groups; None: it is gone."""
    merged = config.groups | groups
    return replace(config, groups={name: group for name, group in merged.items() if group is not None})


def changed(pair: Pair, side: Side, **changes: Any) -> NodeConfig:
    """The node's configuration with something else in its group ``web``."""
    config = node(pair, side).config
    return regroup(config, web=replace(config.groups["web"], **changes))


async def in_step(pair: Pair) -> None:
    """All is in the replica's tree, whatever connections have to be made anew for it."""
    await web(pair).flush(60)
    await until(lambda: web(pair, "remote")._record.synced_once, "the replica was not told that it is in step")


@pytest.fixture
async def following(pair: Pair) -> Pair:
    """The pair with the local side as the owner, in step."""
    (pair.local_tree / "a").write_text("1")
    await pair.own("local", 1)
    await in_step(pair)
    return pair


# --- what is decided


def test_what_is_read_at_the_start_stays(pair: Pair) -> None:
    config = pair.local.config
    wanted = replace(config, listen=Endpoint("127.0.0.2", 1), state_dir=Path("/elsewhere"), log_json=True)
    merged = merge(config, wanted)
    assert merged.restart == ("listen", "state_dir")
    assert merged.config == replace(config, log_json=True)
    assert merge(config, config).restart == ()


def test_what_stays_must_go_with_what_is_new(pair: Pair) -> None:
    config = pair.local.config
    inside = replace(config.groups["web"], paths=(PathConfig("/srv/www", str(config.state_dir / "tree")),))
    wanted = replace(regroup(config, web=inside), state_dir=Path("/elsewhere"))
    with pytest.raises(ConfigError, match="without a restart, state_dir stays as it is"):
        merge(config, wanted)


def test_groups_are_told_apart(pair: Pair) -> None:
    config = pair.local.config
    group = config.groups["web"]
    other = regroup(config, web=replace(group, compress=False), new=group)
    assert regrouped(config, other) == ([], ["web"], ["new"])
    assert regrouped(other, config) == (["new"], ["web"], [])
    assert regrouped(config, config) == ([], [], [])


# --- what goes on


async def test_a_broken_configuration_changes_nothing(
    following: Pair, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    group, sender = web(following), web(following)._sender
    path = tmp_path / "broken.yml"
    data = plain(following.local.config)
    data["groups"]["web"]["rpo"]["warn"] = "soon"
    path.write_text(yaml.safe_dump(data))
    await following.local.reload(path)
    assert "groups.web.rpo.warn" in (await told(following, "local")).failed
    assert any("the configuration is broken" in record.getMessage() for record in caplog.records)
    assert web(following) is group and group._sender is sender
    (following.local_tree / "b").write_text("2")
    await in_step(following)
    assert differences(following.local_tree, following.remote_tree) == []
    path.unlink()
    await following.local.reload(path)
    assert "No such file" in (await told(following, "local")).failed
    assert (await reload(following, "local", following.local.config)).failed == ""


async def test_a_group_that_did_not_change_is_not_touched(following: Pair) -> None:
    group, sender = web(following), web(following)._sender
    config = following.local.config
    more = replace(config.groups["web"], paths=(PathConfig("/srv/db", str(following.base / "local-db")),))
    (following.base / "local-db").mkdir()
    told = await reload(following, "local", regroup(replace(config, gateways=("other",)), db=more))
    assert (told.failed, told.restart) == ("", [])
    assert web(following) is group and group._sender is sender
    assert sender is not None and sender.connected
    assert list(following.local.groups) == ["web", "db"]


async def test_what_is_only_looked_at_now_and_then_is_taken_up_at_once(following: Pair) -> None:
    group, sender = web(following), web(following)._sender
    assert sender is not None
    limit = Bandwidth("80kB/s")
    changes = {"rpo": Rpo(1, 2), "bandwidth": limit, "verify": Verification("never"), "brake": BrakeConfig("warn")}
    told = await reload(following, "local", changed(following, "local", **changes))
    assert told.failed == ""
    assert web(following) is group and group._sender is sender and sender.connected
    assert group.config.rpo == Rpo(1, 2)
    assert sender._pacer.piece() <= 4096
    verification = (await following.local.status()).groups["web"].verification
    assert verification is not None and verification.due is None


async def test_what_needs_a_restart_is_told_and_the_rest_is_taken_up(following: Pair) -> None:
    port = following.local.port
    wanted = replace(changed(following, "local", rpo=Rpo(3, 4)), listen=Endpoint("127.0.0.1", 1), log_level="warning")
    told = await reload(following, "local", wanted)
    assert told.restart == ["listen"]
    assert following.local.port == port
    assert (web(following).config.rpo, following.local.config.log_level) == (Rpo(3, 4), "warning")
    told = await reload(following, "local", following.local.config)
    assert told.restart == []


async def test_whoever_is_no_gateway_any_more_may_order_nothing(following: Pair) -> None:
    request = api.Flush(1.0, "web")
    await following.local.handle(request, "gateway")
    await reload(following, "local", replace(following.local.config, gateways=()))
    with pytest.raises(Exception, match="not for gateway"):
        await following.local.handle(request, "gateway")


# --- what begins anew


@pytest.mark.parametrize("first", SIDES)
async def test_other_patterns(following: Pair, first: Side) -> None:
    (following.local_tree / "x.log").write_text("old")
    await in_step(following)
    (following.local_tree / "y.tmp").write_text("not protected yet")
    sides = SIDES if first == "local" else SIDES[::-1]
    for side in sides:
        paths = (replace(node(following, side).config.groups["web"].paths[0], exclude=("*.log",)),)
        # What happens in between, and nobody watches, is found.
        (following.local_tree / f"between-{side}").write_text(side)
        assert (await reload(following, side, changed(following, side, paths=paths))).failed == ""
    (following.local_tree / "x.log").write_text("new")
    (following.local_tree / "z.log").write_text("new")
    (following.local_tree / "after").write_text("3")
    await in_step(following)
    there = {path.name: path.read_text() for path in following.remote_tree.iterdir()}
    # What was protected and is not any more is left alone there.
    assert there == {
        "a": "1", "x.log": "old", "y.tmp": "not protected yet", "between-local": "local", "between-remote": "remote",
        "after": "3",
    }  # fmt: skip


async def test_a_flush_goes_on_across_a_reload(following: Pair) -> None:
    await following.remote.stop()
    (following.local_tree / "b").write_text("2")
    flushing = asyncio.create_task(following.local.handle(api.Flush(60.0, "web"), LOCAL))
    sender = web(following)._sender
    assert sender is not None
    await until(lambda: sender._wanted > 0, "the flush does not wait")
    paths = (replace(following.local.config.groups["web"].paths[0], exclude=()),)
    await reload(following, "local", changed(following, "local", paths=paths))
    assert not flushing.done()
    following.remote = Node(following.remote.config)
    await following.remote.start(None)
    assert isinstance(await flushing, api.Done)
    assert (following.remote_tree / "b").read_text() == "2"


async def test_another_consistency(following: Pair) -> None:
    await reload(following, "local", changed(following, "local", consistency=Consistency("snapshot", interval=0.2)))
    (following.local_tree / "b").write_text("2")
    assert web(following).config.consistency.mode == "snapshot"
    await reload(following, "local", changed(following, "local", consistency=Consistency()))
    await in_step(following)
    assert differences(following.local_tree, following.remote_tree) == []


async def test_a_group_that_is_paused_stays_paused(following: Pair) -> None:
    await web(following).pause()
    paths = (replace(following.local.config.groups["web"].paths[0], exclude=()),)
    await reload(following, "local", changed(following, "local", paths=paths))
    assert web(following).paused
    await web(following).resume()
    await in_step(following)


async def test_groups_come_and_go_and_come_back(following: Pair) -> None:
    for side in SIDES:
        config = node(following, side).config
        tree = following.base / f"{side}-db"
        tree.mkdir()
        more = replace(config.groups["web"], paths=(PathConfig("/srv/db", str(tree)),))
        await reload(following, side, regroup(config, db=more))
    await following.remote.groups["db"].set_owner("local", 1, False)
    await following.local.groups["db"].set_owner("local", 1, False)
    (following.base / "local-db" / "row").write_text("1")
    await following.local.groups["db"].flush(60)
    assert (following.base / "remote-db" / "row").read_text() == "1"
    old = {side: node(following, side).groups["db"] for side in SIDES}
    kept = {side: node(following, side).config for side in SIDES}
    for side in SIDES:
        await reload(following, side, regroup(kept[side], db=None))
        assert list(node(following, side).groups) == ["web"]
        assert (following.base / f"{side}-state" / "groups" / "db" / "group.json").exists()
        with pytest.raises(BeingReplaced):
            await old[side].set_owner("local", 2, False)
        with pytest.raises(UsageError, match="'db' is not known"):
            await node(following, side).handle(api.Flush(1.0, "db"), LOCAL)
    (following.base / "local-db" / "row").write_text("2")
    (following.local_tree / "b").write_text("2")
    await in_step(following)
    assert (following.base / "remote-db" / "row").read_text() == "1"
    for side in SIDES:
        await reload(following, side, kept[side])
    await following.local.groups["db"].flush(60)
    assert (following.base / "remote-db" / "row").read_text() == "2"


async def test_a_group_that_cannot_begin_does_not_stand_in_the_way_of_others(following: Pair) -> None:
    config = following.local.config
    more = replace(config.groups["web"], paths=(PathConfig("/srv/db", str(following.base / "local-db")),))
    state = following.base / "local-state" / "groups" / "db"
    state.mkdir()
    (state / "group.json").write_text("{")
    told = await reload(following, "local", regroup(config, db=more))
    assert "group db cannot begin" in told.failed and "is damaged" in told.failed
    await in_step(following)
    (state / "group.json").unlink()
    assert (await reload(following, "local", following.local.config)).failed == ""
    assert list(following.local.groups) == ["web", "db"]


# --- other paths


def trees(pair: Pair, side: Side, names: str) -> tuple[PathConfig, ...]:
    return tuple(PathConfig(f"/srv/{name}", str(pair.base / side / name)) for name in names)


def fill(pair: Pair, names: str, text: str) -> None:
    """The same names in each tree, with other contents."""
    for name in names:
        tree = pair.base / "local" / name
        (tree / "d").mkdir(parents=True, exist_ok=True)
        (tree / "same").write_text(f"{name} {text}")
        (tree / "d" / "large").write_text(f"{name} {text} " * 30_000)


def same(pair: Pair, names: str) -> None:
    for name in names:
        assert differences(pair.base / "local" / name, pair.base / "remote" / name) == [], name


@pytest.mark.parametrize("first", SIDES)
@pytest.mark.parametrize("after", ["ba", "bca", "b", "c"])
async def test_paths_that_come_go_and_change_places(pair: Pair, first: Side, after: str) -> None:
    for side in SIDES:
        (pair.base / side).mkdir()
        await reload(pair, side, changed(pair, side, paths=trees(pair, side, "ab")))
    fill(pair, "abc", "first")
    await pair.own("local", 1)
    await in_step(pair)
    fill(pair, "abc", "second")
    await web(pair).flush(60)
    sides = SIDES if first == "local" else SIDES[::-1]
    for number, side in enumerate(sides):
        if number == 1:
            # As long as one of them has other paths, nothing goes over.
            fill(pair, "abc", "between")
            with pytest.raises(Exception, match=r"paths .* are sent, but .* are configured|not done within"):
                await web(pair).flush(1)
        assert (await reload(pair, side, changed(pair, side, paths=trees(pair, side, after)))).failed == ""
    fill(pair, "abc", "third")
    await in_step(pair)
    same(pair, after)
    for name in set("ab") - set(after):
        # Nobody has touched what is not protected any more.
        assert (pair.base / "remote" / name / "same").read_text() in (f"{name} second", f"{name} between")
    assert not (pair.base / "remote" / "c").exists() or "c" in after
    # What is remembered of a path is of that path, whatever its number is now.
    for name in set("ab") & set(after):
        path = f"{pair.base}/remote/{name}/same"
        versions = (await web(pair, "remote").history(path, 100)).versions
        assert [version.was for version in versions][-1] == "nothing"
        files = [version.seq for version in versions if version.was == "file"]
        to = pair.base / f"back-{name}"
        to.mkdir()
        await web(pair, "remote").restore(path, When(files[-1] - 1, None), str(to))
        assert [each.read_text() for each in to.rglob("same")] == [f"{name} first"]
    fill(pair, "abc", "fourth")
    await pair.restart("remote")
    await pair.restart("local")
    await in_step(pair)
    same(pair, after)


async def test_what_was_acknowledged_goes_to_the_paths_that_it_was_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in SIDES:
        (pair.base / side).mkdir()
        await reload(pair, side, changed(pair, side, paths=trees(pair, side, "ab")))
    fill(pair, "ab", "first")
    await pair.own("local", 1)
    await in_step(pair)
    with monkeypatch.context() as patch:
        # It is in the journal, and in no tree.
        patch.setattr(Applier, "work", lambda self: None)
        fill(pair, "ab", "second")
        (pair.base / "local" / "a" / "same").rename(pair.base / "local" / "a" / "moved")
        await web(pair).flush(60, durable=True)
        assert (pair.base / "remote" / "b" / "same").read_text() == "b first"
        config = changed(pair, "remote", paths=trees(pair, "remote", "cba"))
        await pair.remote.stop()
    pair.remote = Node(config)
    # The source never comes back: what it had been promised must be there.
    await pair.local.stop()
    await pair.remote.start(None)
    assert (pair.base / "remote" / "b" / "same").read_text() == "b second"
    assert (pair.base / "remote" / "a" / "moved").read_text() == "a second"
    assert not (pair.base / "remote" / "a" / "same").exists()
    assert not (pair.base / "remote" / "c").exists()
    pair.local = Node(pair.local.config)
    await pair.local.start(None)


async def test_paths_wait_for_the_brake(pair: Pair) -> None:
    for side in SIDES:
        (pair.base / side).mkdir()
        brake = BrakeConfig("hold", least_files=1)
        await reload(pair, side, changed(pair, side, paths=trees(pair, side, "ab"), brake=brake))
    fill(pair, "ab", "first")
    await pair.own("local", 1)
    await in_step(pair)
    fill(pair, "ab", "second")
    replica = web(pair, "remote")
    await until(lambda: replica._applier is not None and replica._applier.held is not None, "nothing was held")
    for side in SIDES:
        # What comes after the approval is not held once more.
        config = changed(pair, side, paths=trees(pair, side, "ba"), brake=BrakeConfig("off"))
        await reload(pair, side, config)
    status = (await pair.remote.status()).groups["web"]
    assert "its paths have changed, and those from before stay in force: the brake holds" in status.problems[0]
    assert status.held
    assert (pair.base / "remote" / "a" / "same").read_text() == "a first"
    await web(pair, "remote").approve()
    await in_step(pair)
    same(pair, "ab")
    assert (await pair.remote.status()).groups["web"].problems == []


# --- the daemon


@pytest.fixture
def told_systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """What the daemon tells its service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(60)
        yield sock


def daemon(base: Path, path: Path) -> subprocess.Popen[bytes]:
    """``farshore-node`` as its unit runs it."""
    code = "import farshore.daemons.node as node, sys; sys.exit(node.main())"
    environment = os.environ | {"NOTIFY_SOCKET": str(base / "notify")}
    with (base / "log").open("w") as log:
        return subprocess.Popen([sys.executable, "-c", code, "--config", str(path)], env=environment, stderr=log)


async def test_a_daemon_reloads_when_it_is_told(pair: Pair, told_systemd: socket.socket) -> None:
    await pair.local.stop()
    config = replace(pair.local.config, runtime_dir=pair.base / "run")
    path = pair.base / "node.yml"
    path.write_text(yaml.safe_dump(plain(config)))
    process = daemon(pair.base, path)
    try:

        async def message() -> list[str]:
            while (told := await asyncio.to_thread(told_systemd.recv, 4096)) == b"WATCHDOG=1":
                pass
            return told.decode().splitlines()

        assert (await message())[0] == "READY=1"

        async def signalled() -> api.NodeStatus:
            process.send_signal(signal.SIGHUP)
            told = await message()
            assert told[0] == "RELOADING=1"
            assert told[1].startswith("MONOTONIC_USEC=") and int(told[1].partition("=")[2]) > 0
            assert (await message())[0] == "READY=1"
            status = await client.ask_socket(pair.base / "run" / client.NODE_SOCKET, api.StatusRequest(), 30)
            assert isinstance(status, api.NodeStatus) and status.config is not None
            return status

        path.write_text(yaml.safe_dump(plain(config) | {"listen": {"adress": "::1"}}))
        status = await signalled()
        assert status.config is not None and "listen.adress" in status.config.failed
        assert "listen.adress" in (pair.base / "log").read_text()
        (pair.base / "local-db").mkdir()
        more = replace(config.groups["web"], paths=(PathConfig("/srv/db", str(pair.base / "local-db")),))
        path.write_text(yaml.safe_dump(plain(regroup(config, db=more)), sort_keys=False))
        status = await signalled()
        assert status.config is not None and status.config.failed == ""
        assert list(status.groups) == ["web", "db"]
        process.terminate()
        assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    pair.local = Node(pair.local.config)
    await pair.local.start(None)
