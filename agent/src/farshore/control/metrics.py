"""What the daemons tell of themselves, in the Prometheus text format. The only file that knows prometheus_client.

docs/metrics.md describes every metric. Times are seconds since the Unix epoch, durations seconds, sizes bytes. What is
not known is left out, and never told as 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from farshore.config import Side
from farshore.control import api
from farshore.control.state import PHASES, Wanted

#: What a group, a watcher, a verification and a unit may be like. Others are told, too, should there be any.
GROUP_STATES = (
    "unconfirmed", "replicating", "syncing", "disconnected", "paused", "replica", "fenced", "frozen", "held",
    "rejected", "error",
)  # fmt: skip
WATCH_STATES = ("watching", "starting", "partial", "paused", "failed")
VERIFICATION_PHASES = ("waiting", "reading", "comparing", "repairing")
VERIFICATION_RESULTS = ("clean", "repaired", "drift", "failed")
FINDINGS = ("replica", "index", "unseen", "untraced")
UNIT_STATES = ("active", "inactive", "activating", "deactivating", "reloading", "failed", "unknown")
TUNNEL_STATES = ("up", "down", "unknown")
SIDES: tuple[str, ...] = get_args(Side)

_Labels = Mapping[str, str]


class Page(Collector):
    """Collects the samples of all daemons, by metric."""

    def __init__(self) -> None:
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        return self._families.values()

    def text(self) -> bytes:
        """All of it, as a scrape or a file has it."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    # --- making it

    def up(self, daemon: str, answers: bool) -> None:
        """Whether a daemon of this machine answers."""
        self._gauge("up", "Whether the daemon answers (1) or not (0).", {"daemon": daemon}, answers)

    def add(self, status: api.NodeStatus | api.MonitorStatus) -> None:
        """What a daemon has answered."""
        daemon = "node" if isinstance(status, api.NodeStatus) else "monitor"
        self.up(daemon, True)
        labels = {"daemon": daemon, "node": status.node, "version": status.version}
        self._gauge("build_info", "The running daemon: its version, and its node's name. Always 1.", labels, 1)
        self._gauge("uptime_seconds", "Seconds since the daemon began.", {"daemon": daemon}, status.uptime)
        if isinstance(status, api.NodeStatus):
            if status.config is not None:
                self._config(status.config)
            for group in status.groups.values():
                self._group(group)
        else:
            tunnel = status.tunnel.partition(" ")[0].rstrip(":")
            self._one_of("monitor_tunnel_state", "The tunnel between the sites.", {}, TUNNEL_STATES, tunnel)
            for switch in status.groups.values():
                self._switch(switch)

    def _config(self, config: api.ConfigStatus) -> None:
        gauge = self._gauge
        since = "When the configuration in force was read, as seconds since the Unix epoch."
        gauge("config_timestamp_seconds", since, {}, config.since)
        gauge("config_in_force", "Whether the configuration that was read last is in force.", {}, not config.failed)
        restart = "Whether something has changed that counts only after a restart."
        gauge("config_restart_needed", restart, {}, bool(config.restart))

    def _group(self, group: api.GroupStatus) -> None:
        of = {"group": group.group}
        gauge = self._gauge
        self._one_of("group_side", "The group's side that this node is.", of, SIDES, group.side, "side")
        self._one_of("group_state", "How the group is on this node.", of, GROUP_STATES, group.state)
        owns = group.epoch > 0 and group.owner == group.side
        gauge("owner", "Whether this node owns the group: its data is the truth.", of, owns)
        gauge(
            "epoch",
            "The group's epoch, which grows by one when its owner changes; 0 before the first.",
            of,
            group.epoch,
        )
        gauge("connected", "Whether the other side is connected.", of, group.connected)
        gauge("in_step", "Whether this node owns the group and all seen so far is durable there.", of, group.in_step)
        gauge("synced_once", "Whether this replica was ever in step, so that it can take over.", of, group.synced_once)
        gauge(
            "rpo_seconds",
            "Age of the oldest change that is not durable on the other side, on the owner.",
            of,
            group.rpo,
        )
        gauge("backlog_paths", "Paths whose changes are not durable on the other side yet.", of, group.backlog_paths)
        self._count("sent_bytes", "Bytes sent to the other side since this node owns the group.", of, group.sent_bytes)
        gauge(
            "last_transaction", "The last transaction that the replica has made durable, on the owner.", of, group.seq
        )
        gauge("problems", "Problems that 'farshore status' tells.", of, len(group.problems))
        for unit, state in group.units.items():
            self._one_of("unit_state", "A unit of the group on this node.", {**of, "unit": unit}, UNIT_STATES, state)
        self._replica(group, of)
        if group.watch is not None:
            self._watch(group.watch, of)
        if group.verification is not None:
            self._verification(group.verification, of)

    def _replica(self, group: api.GroupStatus, of: _Labels) -> None:
        gauge = self._gauge
        gauge(
            "journal_backlog_bytes",
            "Bytes that the replica has made durable and not applied to its tree yet.",
            of,
            group.backlog_bytes,
        )
        gauge("history_bytes", "Bytes that the replica's history takes.", of, group.history_bytes)
        gauge(
            "history_oldest_timestamp_seconds",
            "The oldest state that the replica can go back to, as seconds since the Unix epoch.",
            of,
            group.history_since,
        )
        gauge("restoring", "Whether a restore is under way.", of, bool(group.restoring))
        gauge(
            "restore_on_promotion",
            "Whether the next promotion takes an earlier state than the last.",
            of,
            group.back_to is not None,
        )
        gauge(
            "restored",
            "Whether something was put back in place since this node owns the group.",
            of,
            group.restored != "",
        )
        gauge("held", "Whether the brake holds changes until the administrator decides.", of, group.held != "")
        gauge("held_transactions", "Transactions that the brake holds.", of, group.held_transactions)
        gauge(
            "held_since_timestamp_seconds",
            "When the brake began to hold, as seconds since the Unix epoch.",
            of,
            group.held_since or None,
        )

    def _watch(self, watch: api.WatchStatus, of: _Labels) -> None:
        gauge = self._gauge
        gauge("watch_info", "The engine that watches the group. Always 1.", {**of, "engine": watch.engine}, 1)
        self._one_of("watch_state", "How the group is watched.", of, WATCH_STATES, watch.state)
        gauge("watch_directories", "Directories that are watched.", of, watch.directories)
        gauge("watch_unwatched_directories", "Directories that are scanned instead.", of, watch.unwatched)
        gauge("watch_waiting_paths", "Paths that were told of and not looked at yet.", of, watch.waiting_files)
        self._count("watch_overflows", "Overflows of the kernel's queue of events.", of, watch.overflows)
        self._count("watch_events", "Events that the kernel has told.", of, watch.events)

    def _verification(self, status: api.VerificationStatus, of: _Labels) -> None:
        gauge = self._gauge
        running = status.run != ""
        gauge("verification_running", "Whether source and replica are being compared.", of, running)
        gauge(
            "verification_due_timestamp_seconds",
            "When the next verification starts by itself, as seconds since the Unix epoch.",
            of,
            status.due,
        )
        if running:
            what = "What the verification that is under way does."
            self._one_of("verification_phase", what, of, VERIFICATION_PHASES, status.phase, "phase")
            gauge("verification_paths", "Paths that the verification under way has done.", of, status.paths)
            for side, read in (("source", status.read_source), ("replica", status.read_replica)):
                gauge(
                    "verification_read_bytes",
                    "Bytes that the verification under way has read.",
                    {**of, "side": side},
                    read,
                )
        if status.last is not None:
            self._report(status.last, of)

    def _report(self, last: api.VerificationReport, of: _Labels) -> None:
        gauge = self._gauge
        gauge(
            "verification_last_timestamp_seconds",
            "When the last verification ended, as seconds since the Unix epoch.",
            of,
            last.ended,
        )
        gauge("verification_last_duration_seconds", "Seconds that it took.", of, last.ended - last.started)
        what = "What came out of the last verification."
        self._one_of("verification_last_result", what, of, VERIFICATION_RESULTS, last.result, "result")
        gauge("verification_last_contents", "Whether it compared what the files hold.", of, last.contents)
        gauge("verification_last_paths", "Paths that it compared.", of, last.paths)
        for side, read in (("source", last.read_source), ("replica", last.read_replica)):
            gauge("verification_last_read_bytes", "Bytes that it read.", {**of, "side": side}, read)
        for finding in dict.fromkeys((*FINDINGS, *last.findings)):
            found = last.findings.get(finding, 0)
            gauge("verification_last_differences", "Paths that differed.", {**of, "finding": finding}, found)
        gauge("verification_last_unrepaired_paths", "Paths that differ still.", of, last.unrepaired)
        gauge("verification_last_busy_paths", "Paths that could not be compared.", of, last.busy)
        gauge("verification_last_withheld_paths", "Paths that cannot be replicated.", of, last.withheld)

    def _switch(self, switch: api.SwitchStatus) -> None:
        of = {"group": switch.group}
        gauge = self._gauge
        self._one_of("monitor_phase", "The group's phase.", of, PHASES, switch.phase, "phase")
        gauge(
            "monitor_phase_since_timestamp_seconds",
            "When the phase began, as seconds since the Unix epoch.",
            of,
            switch.since or None,
        )
        self._one_of("monitor_owner", "The side that owns the group.", of, SIDES, switch.owner, "side")
        self._one_of("monitor_served_by", "The side that the users are sent to.", of, SIDES, switch.served_by, "side")
        gauge("monitor_epoch", "The group's epoch, which grows by one when its owner changes.", of, switch.epoch)
        self._one_of("monitor_wish", "The operator's wish.", of, get_args(Wanted), switch.wish, "wish")
        gauge(
            "monitor_rules_in_place", "Whether the rules that send the users are as wanted.", of, switch.rules_in_place
        )
        for health in switch.health:
            gauge(
                "monitor_service_healthy",
                "Whether a service answers, after rise and fall.",
                {**of, "service": health.service, "target": health.target},
                health.healthy,
            )
        for side, node in (("local", switch.local), ("remote", switch.backup)):
            there = {**of, "side": side}
            gauge("monitor_node_answers", "Whether a node has told how the group is.", there, node is not None)
            if node is not None:
                gauge("monitor_node_in_step", "As farshore_in_step, of a node.", there, node.in_step)
                gauge("monitor_node_rpo_seconds", "As farshore_rpo_seconds, of a node.", there, node.rpo)
                gauge("monitor_node_held", "As farshore_held, of a node.", there, node.held != "")
                gauge("monitor_node_problems", "As farshore_problems, of a node.", there, len(node.problems))

    # --- samples

    def _gauge(self, name: str, what: str, labels: _Labels, value: float | None) -> None:
        if value is None:
            return
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = GaugeMetricFamily(f"farshore_{name}", what, labels=list(labels))
        family.add_metric(list(labels.values()), float(value))

    def _count(self, name: str, what: str, labels: _Labels, value: float) -> None:
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = CounterMetricFamily(f"farshore_{name}", what, labels=list(labels))
        family.add_metric(list(labels.values()), float(value))

    def _one_of(
        self, name: str, what: str, labels: _Labels, values: Sequence[str], value: str, label: str = "state"
    ) -> None:
        """1 for the value that is, 0 for the others, so that none goes stale."""
        what += f" 1 for the {label} that it is in, 0 for the others."
        for each in dict.fromkeys((*values, value)):
            self._gauge(name, what, {**labels, label: each}, each == value)
