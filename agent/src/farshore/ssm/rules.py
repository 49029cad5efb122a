"""The rule sets of service switching: text for iptables-restore, and the comparison with what is in the kernel.

Pure: no process is started here. The chains are Farshore's own; other people's rules are neither read for
meaning nor written. The gateway's base rules (publication of the local servers, the drop of traffic between the
sites outside the tunnel) belong to the ``gateway_firewall`` role, in chains of its own that are jumped to after
these.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from farshore.config import MonitorConfig


@dataclass(frozen=True, slots=True)
class Chain:
    """One of our chains: its table, its name, and the built-in chain whose first rule jumps to it."""

    table: str
    name: str
    parent: str


DNAT = Chain("nat", "FARSHORE-DNAT", "PREROUTING")
SNAT = Chain("nat", "FARSHORE-SNAT", "POSTROUTING")
HOLD = Chain("filter", "FARSHORE-HOLD", "FORWARD")
CHAINS = (DNAT, SNAT, HOLD)

#: The wanted rules of each of our chains, in order, each as the text after ``-A CHAIN``.
RuleSet = Mapping[Chain, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Flow:
    """What users reach: the destination of the packets as they arrive."""

    protocol: str
    address: str
    port: int


def wanted(config: MonitorConfig, switched: Collection[str], held: Collection[str] = ()) -> RuleSet:
    """The rule set in which ``switched`` groups are served by their backup servers.

    New connections to ``held`` groups are dropped, so that users wait, rather than be refused, during a freeze.
    """
    rules: dict[Chain, list[str]] = {chain: [] for chain in CHAINS}
    gateway = config.gateway
    for name, group in sorted(config.groups.items()):
        label = f'-m comment --comment "farshore {name}"'
        for service in group.services:
            proto, backend = service.protocol, service.backend_port
            if name in switched:
                rules[DNAT].append(
                    f"-d {gateway.public_address}/32 -p {proto} -m {proto} --dport {service.port} {label}"
                    f" -j DNAT --to-destination {group.backup.address}:{backend}"
                )
                # Without it the backup server would answer the users past this gateway, from an address they
                # never asked.
                rules[SNAT].append(
                    f"-d {group.backup.address}/32 -p {proto} -m {proto} --dport {backend}"
                    f" -m conntrack --ctstate DNAT {label} -j SNAT --to-source {gateway.lan_address}"
                )
            if name in held:
                rules[HOLD].append(
                    f"-p {proto} -m {proto} -m conntrack --ctstate NEW --ctorigdst {gateway.public_address}"
                    f" --ctorigdstport {service.port} {label} -j DROP"
                )
    return {chain: tuple(lines) for chain, lines in rules.items() if chain is not HOLD or lines}


def flows(config: MonitorConfig, group: str) -> tuple[Flow, ...]:
    """What users of ``group`` reach."""
    return tuple(
        Flow(service.protocol, config.gateway.public_address, service.port) for service in config.groups[group].services
    )


@dataclass(frozen=True, slots=True)
class Actual:
    """What ``iptables-save`` shows of our chains: their rules, and where the jumps to them stand."""

    rules: Mapping[Chain, tuple[str, ...]]
    #: Positions, from 0, of the jumps among the rules of the parent chain.
    jumps: Mapping[Chain, tuple[int, ...]]


def parse(saved: str) -> Actual:
    """Read the output of ``iptables-save``, with or without counters; a chain that is missing is not in ``rules``."""
    ours = {(chain.table, chain.name): chain for chain in CHAINS}
    rules: dict[Chain, list[str]] = {}
    jumps: dict[Chain, list[int]] = {chain: [] for chain in CHAINS}
    count: dict[tuple[str, str], int] = {}
    table = ""
    for raw in saved.splitlines():
        line = raw.strip()
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chain = ours.get((table, line[1:].split(" ", 1)[0]))
            if chain:
                rules.setdefault(chain, [])
        else:
            if line.startswith("["):
                line = line.partition("] ")[2]
            if not line.startswith("-A "):
                continue
            name, _, rest = line[3:].partition(" ")
            position = count.get((table, name), 0)
            count[table, name] = position + 1
            own = ours.get((table, name))
            if own:
                rules.setdefault(own, []).append(rest)
                continue
            for chain in CHAINS:
                if (chain.table, chain.parent) == (table, name) and canonical(rest) == canonical(f"-j {chain.name}"):
                    jumps[chain].append(position)
    return Actual(
        {chain: tuple(lines) for chain, lines in rules.items()},
        {chain: tuple(positions) for chain, positions in jumps.items()},
    )


def canonical(rule: str) -> frozenset[tuple[str, ...]]:
    """A rule's meaning, whatever order and spelling a version of iptables-save prints it in."""
    options: list[list[str]] = []
    negated = False
    for word in shlex.split(rule):
        if word == "!":
            negated = True
        elif word.startswith("-") and len(word) > 1 and not word[1:].isdigit():
            options.append((["!"] if negated else []) + [_LONG.get(word, word)])
            negated = False
        elif options:
            options[-1].append(word.removesuffix("/32"))
        else:
            options.append([word])
    # Which modules are loaded follows from the options, and versions differ in naming them.
    return frozenset(tuple(option) for option in options if option[0] != "-m")


_LONG = {
    "--source": "-s",
    "--destination": "-d",
    "--protocol": "-p",
    "--match": "-m",
    "--jump": "-j",
    "--destination-port": "--dport",
    "--in-interface": "-i",
    "--out-interface": "-o",
}


def differs(actual: Actual, want: RuleSet) -> frozenset[Chain]:
    """Our chains that are not as wanted: other rules, no jump, more than one, or not in its place.

    A chain that is not wanted at all differs when it exists.
    """
    wrong = set()
    for chain in CHAINS:
        if chain not in want:
            if chain in actual.rules or actual.jumps.get(chain):
                wrong.add(chain)
        elif (
            chain not in actual.rules
            or [canonical(rule) for rule in actual.rules[chain]] != [canonical(rule) for rule in want[chain]]
            or actual.jumps.get(chain) != (0,)
        ):
            wrong.add(chain)
    return frozenset(wrong)


def restore_text(actual: Actual, want: RuleSet, chains: Collection[Chain]) -> str:
    """Input of ``iptables-restore --noflush`` that makes ``chains`` as wanted, in one transaction per table.

    Declaring a chain empties it, so the text describes the whole chain. A chain that is not in ``want`` is deleted.
    """
    parts: list[str] = []
    for table in dict.fromkeys(chain.table for chain in CHAINS):
        here = [chain for chain in CHAINS if chain.table == table and chain in chains]
        if not here:
            continue
        lines = [f"*{table}"]
        # Also the chains that go: -X needs a chain that exists and is empty, and a declaration makes it both.
        lines += [f":{chain.name} - [0:0]" for chain in here]
        for chain in here:
            jumps = actual.jumps.get(chain, ())
            if chain not in want or jumps != (0,):
                # By their text, not their position: someone else may have changed the chain since we looked.
                lines += [f"-D {chain.parent} -j {chain.name}"] * len(jumps)
            if chain not in want:
                lines.append(f"-X {chain.name}")
                continue
            if jumps != (0,):
                lines.append(f"-I {chain.parent} 1 -j {chain.name}")
            lines += [f"-A {chain.name} {rule}" for rule in want[chain]]
        lines.append("COMMIT")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n" if parts else ""


def rules_by_group(rules: RuleSet) -> dict[str, frozenset[tuple[str, frozenset[tuple[str, ...]]]]]:
    """Each group's rules in canonical form, so that a change can be told to be of this group and no other."""
    found: dict[str, set[tuple[str, frozenset[tuple[str, ...]]]]] = {}
    for chain in (DNAT, SNAT):
        for rule in rules.get(chain, ()):
            for group in _labels((rule,)):
                found.setdefault(group, set()).add((chain.name, canonical(rule)))
    return {group: frozenset(items) for group, items in found.items()}


def dnat_flows(actual: Actual) -> tuple[Flow, ...]:
    """The flows that the rules in the kernel send to backup servers."""
    found = []
    for rule in actual.rules.get(DNAT, ()):
        options = {option[0]: option[1] for option in canonical(rule) if len(option) == 2}
        try:
            found.append(Flow(options["-p"], options["-d"], int(options["--dport"])))
        except (KeyError, ValueError):
            # Not one of ours; it goes with the chain all the same.
            continue
    return tuple(found)


def _labels(rules: Collection[str]) -> list[str]:
    labels = []
    for rule in rules:
        for option in canonical(rule):
            if option[0] == "--comment" and option[1:] and option[1].startswith("farshore "):
                labels.append(option[1].removeprefix("farshore "))
    return labels
