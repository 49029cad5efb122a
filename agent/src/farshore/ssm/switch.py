"""Switches users between the sites, level-triggered: what is in the kernel is compared with what is wanted.

A change is one ``iptables-restore --noflush`` on chains of our own; then just the connections that it concerns
are taken out of the connection table, because NAT rules see only the first packet of each (iptables(8),
conntrack(8)). Works with iptables-nft and iptables-legacy, whichever ``iptables`` is on the host.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass

from farshore.config import MonitorConfig
from farshore.errors import FarshoreError, HookFailed, NotInTime
from farshore.log import Log
from farshore.ssm import rules

_log = Log(__name__)

#: Seconds that one iptables or conntrack command may take, waiting for the lock of iptables included.
COMMAND_TIMEOUT = 10.0
_LOCK_WAIT = "5"


@dataclass(frozen=True, slots=True)
class Output:
    """What a command ended with."""

    code: int
    stdout: str
    stderr: str


#: Runs a command with an input to its end; raises HookFailed when it cannot start, NotInTime when it hangs.
Runner = Callable[[Sequence[str], str], Awaitable[Output]]


async def run_command(command: Sequence[str], stdin: str = "") -> Output:
    """Run ``command`` with a time limit; raises HookFailed when it is missing, NotInTime when it hangs."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise HookFailed(command[0], error.strerror or str(error)) from None
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT):
            stdout, stderr = await process.communicate(stdin.encode())
    except TimeoutError:
        raise NotInTime(command[0], COMMAND_TIMEOUT, "it did not end") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return Output(process.returncode or 0, stdout.decode(errors="replace"), stderr.decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Repair:
    """What ``ensure`` found and did."""

    changed: frozenset[str] = frozenset()
    #: Chains that were not as wanted.
    chains: tuple[str, ...] = ()


class Switch:
    """Keeps the gateway's rules as wanted for all groups together."""

    def __init__(self, config: MonitorConfig, run: Runner = run_command) -> None:
        self._config = config
        self._run = run
        self._switched: set[str] = set()
        self._held: set[str] = set()
        self._lock = asyncio.Lock()
        self._swept: set[str] = set()
        #: Groups whose connections still have to be taken out of the connection table.
        self._pending: set[str] = set()
        #: Why the last ``ensure`` did not reach the wanted state; "" when it did.
        self.problem = "not applied yet"

    def want(self, group: str, switched: bool, held: bool = False) -> None:
        """Set what the next ``ensure`` brings about for ``group``; ``held`` makes its new users wait."""
        (self._switched.add if switched else self._switched.discard)(group)
        (self._held.add if held else self._held.discard)(group)

    def in_place(self, group: str) -> bool:
        """Whether the rules of ``group`` were as wanted when last looked at, or made so."""
        return not self.problem and group not in self._pending

    async def ensure(self) -> Repair:
        """Compare the rules with the wanted ones and repair them; raises HookFailed or NotInTime.

        At the first call for a group, connections that lead to the wrong side are ended, which completes a switch
        that a crash had cut short, and leaves those alone that are right.
        """
        async with self._lock:
            try:
                return await self._ensure()
            except FarshoreError as error:
                self.problem = str(error)
                raise

    async def _ensure(self) -> Repair:
        switched = frozenset(self._switched)
        want = rules.wanted(self._config, switched, self._held)
        actual = rules.parse(await self._save())
        wrong = rules.differs(actual, want)
        changed: frozenset[str] = frozenset()
        if wrong:
            before, after = rules.rules_by_group(actual.rules), rules.rules_by_group(want)
            changed = frozenset(group for group in self._config.groups if before.get(group) != after.get(group))
            if any(chain in wrong and actual.jumps.get(chain) != (0,) for chain in (rules.DNAT, rules.SNAT)):
                # The rules were there and nothing led to them: the groups that they serve are concerned as well.
                changed |= switched & self._config.groups.keys()
            # Remembered before the change, so that a failure after it is made up for at the next call.
            self._pending |= changed
            await self._restore(rules.restore_text(actual, want, wrong))
            left = rules.differs(rules.parse(await self._save()), want)
            if left:
                raise HookFailed("iptables-restore", f"it left {_names(left)} other than wanted")
            _log.info("rules set", chains=_names(wrong), switched=",".join(sorted(switched)) or "none")
        for group in sorted(self._pending):
            for flow in rules.flows(self._config, group):
                await self._forget(flow)
            self._pending.discard(group)
            self._swept.add(group)
        for group in sorted(self._config.groups.keys() - self._swept):
            config = self._config.groups[group]
            other = config.local if group in switched else config.backup
            for flow in rules.flows(self._config, group):
                await self._forget(flow, "--reply-src", other.address)
            self._swept.add(group)
        self.problem = ""
        return Repair(changed, tuple(sorted(chain.name for chain in wrong)))

    async def _save(self) -> str:
        return await _checked(self._run, ["iptables-save"])

    async def _restore(self, text: str) -> None:
        await _checked(self._run, ["iptables-restore", "-w", _LOCK_WAIT, "--noflush"], text)

    async def _forget(self, flow: rules.Flow, *more: str) -> None:
        await _forget(self._run, flow, *more)


async def remove_all(run: Runner = run_command) -> bool:
    """Delete our chains, the jumps to them, and the connections they made; False when there was nothing.

    Users then reach what the base rules say: the local servers.
    """
    actual = rules.parse(await _checked(run, ["iptables-save"]))
    ours = rules.differs(actual, {})
    if not ours:
        return False
    await _checked(
        run,
        ["iptables-restore", "-w", _LOCK_WAIT, "--noflush"],
        rules.restore_text(actual, {}, ours),
    )
    for flow in rules.dnat_flows(actual):
        await _forget(run, flow)
    return True


async def _checked(run: Runner, command: Sequence[str], stdin: str = "") -> str:
    output = await run(command, stdin)
    if output.code != 0:
        raise HookFailed(command[0], _first_line(output.stderr) or f"exit code {output.code}")
    return output.stdout


async def _forget(run: Runner, flow: rules.Flow, *more: str) -> None:
    command = ["conntrack", "-D", "-p", flow.protocol, "--orig-dst", flow.address]
    output = await run([*command, "--orig-port-dst", str(flow.port), *more], "")
    # conntrack ends with 1 when there was nothing to delete.
    if output.code != 0 and " 0 flow entries" not in output.stderr:
        raise HookFailed("conntrack", _first_line(output.stderr) or f"exit code {output.code}")


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _names(chains: Collection[rules.Chain]) -> str:
    return ",".join(sorted(chain.name for chain in chains))
