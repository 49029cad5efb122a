"""One protection group on one node: source or replica, as the owner and the epoch say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

from farshore.config import NodeGroup, Side
from farshore.control import units
from farshore.control.api import Explanation, GroupStatus, HistoryAnswer, WatchStatus
from farshore.dbm import explain, receiver, roots, wire
from farshore.dbm.explain import Place
from farshore.dbm.index import ROOTS, Index
from farshore.dbm.messages import Hello, Refused, Welcome
from farshore.dbm.owners import Owners
from farshore.dbm.record import Record, load, store
from farshore.dbm.replica import exchange, restore
from farshore.dbm.replica.exchange import CannotRestore
from farshore.dbm.replica.guard import Guard
from farshore.dbm.replica.history import NotRemembered
from farshore.dbm.replica.restore import Prepared, When
from farshore.dbm.replica.view import Progress
from farshore.dbm.sender import Sender
from farshore.dbm.snapshots import Snapshots
from farshore.dbm.unkept import Unkept, texts
from farshore.dbm.verify.verifier import Verifier
from farshore.errors import FarshoreError, NotInTime, PeerUnreachable, StaleEpoch
from farshore.fmm.dirty import DirtySet
from farshore.fmm.factory import make_watcher
from farshore.fmm.feed import Feed
from farshore.fmm.mapped import Mapped
from farshore.fmm.types import Root
from farshore.log import Log
from farshore.tls import Credentials

_log = Log(__name__)
_FEED_SECONDS = 60.0
_RETRY_SECONDS = 0.2
_TEND_SECONDS = 2.0
#: For so long the watcher may be asked before a path is explained.
_EXPLAIN_SECONDS = 5.0
_T = TypeVar("_T")
_FIELDS = tuple(field.name for field in fields(NodeGroup))


class NotOwner(FarshoreError):
    """Group {0} is owned by the {1} side; this node is its {2} side"""

    exit_code = 24


class OwnerDiffers(FarshoreError):
    """Group {0}: epoch {1} belongs to the {2} side already"""

    exit_code = 25


class Paused(FarshoreError):
    """Group {0} is paused"""

    exit_code = 26


class NothingHeld(FarshoreError):
    """Group {0}: nothing is held on this node"""

    exit_code = 28


class BeingReplaced(FarshoreError):
    """Group {0} is given another configuration; ask again in a moment"""

    exit_code = 38


class PathsNotTakenUp(FarshoreError):
    """{0}"""

    exit_code = 39


#: What of a group's configuration is taken up while it goes on: by its source, and by its replica.
_TAKEN_UP: dict[bool, frozenset[str]] = {
    True: frozenset({"units", "rpo", "bandwidth", "compress", "verify", "history", "brake"}),
    False: frozenset({"units", "rpo", "bandwidth", "compress", "verify", "watch"}),
}


class _Turns(asyncio.Lock):
    """One change of a group after the other, and none once it has ended."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self._group = group
        self.ended = False

    async def __aenter__(self) -> None:
        await super().__aenter__()
        if self.ended:
            self.release()
            raise BeingReplaced(self._group)


class Group:
    """Runs ``config`` on this node, with its state below ``state``. All methods belong to the event loop."""

    def __init__(self, name: str, config: NodeGroup, context: ssl.SSLContext | Credentials, state: Path) -> None:
        self.name = name
        self.config = config
        self._context = context
        self._state = state
        self._record_path = state / "group.json"
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._record = load(self._record_path)
        #: The roots that are configured, and those that the state is of, which count until it is brought along.
        self._wanted: roots.Roots = [(item.source, item.root()) for item in config.paths]
        there = roots.load(state)
        self._roots = self._wanted if there is None or not roots.differ(there, self._wanted) else there
        #: Why the configured roots do not count yet.
        self._not_taken_up = ""
        self._change = _Turns(name)
        #: Set when the group ends.
        self._over = asyncio.Event()
        self._snapshots = self._make_snapshots()
        self._dirty = DirtySet()
        self._feed: Feed | None = None
        self._sender: Sender | None = None
        self._sender_task: asyncio.Task[None] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=f"replica-{name}")
        self._applier: receiver.Applier | None = None
        #: What the roots were when the applier was used last.
        self._applier_roots: tuple[int, ...] = ()
        self._session: asyncio.Task[None] | None = None
        self._tending: asyncio.Task[None] | None = None
        self._aside_index: Index | None = None
        self._confirmed = False
        self._paused = False
        self._fenced_by = 0
        self._unkept = Unkept(state / "unkept")
        self._owners = Owners(config.side, config.owner_map, state / "owners.json") if config.owners == "name" else None
        self._kept_aside = 0
        self._restoring: Progress | None = None
        #: Ends a restore.
        self._ending = threading.Event()
        #: The epoch of the promotion that is under way, 0 when none is.
        self._promoting = 0
        #: Why the exchange that is on record cannot be finished.
        self._half_done = ""

    @property
    def owns(self) -> bool:
        """True when this node's data is the truth for the group."""
        return self._record.epoch > 0 and self._record.owner == self.config.side

    @property
    def epoch(self) -> int:
        """The highest epoch known here."""
        return self._record.epoch

    def _make_snapshots(self) -> Snapshots:
        return Snapshots(self.name, self.config.consistency, [root for _, root in self._roots], self._state)

    # --- life

    async def recover(self) -> None:
        """Bring what was acknowledged before this node ended into the tree: before that, nobody is told how it is.

        As owner, finish a restore that was cut off in the middle.
        """
        if self.owns:
            try:
                await self._finish_exchange()
            except FarshoreError as error:
                # Neither watched nor served until it is: it is tried again when this node is told its role.
                _log.error("a restore cannot be finished", error, group=self.name)
        await self._take_up_paths()
        if not self.owns and self._record.epoch and (self._state / "journal").exists():
            await self._in_worker(self._open_applier)
            await self._in_worker(self._work)

    async def start(self) -> None:
        """Take up the role that is on record."""
        # Whatever the role: a process that died may have left somebody frozen. A new snapshot comes after that.
        self._snapshots.thread.submit(self._snapshots.recover)
        async with self._change:
            self._tending = asyncio.create_task(self._tend(), name=f"tend {self.name}")
            if self._record.was_in_step:
                # Whoever wrote while we were away did not ask, and what was not synced may be lost: the promise of the
                # freeze is over.
                self._store(replace(self._record, was_in_step=False))
            if not self.owns or self._sender is not None or self._record.exchange:
                return
            self._start_source()
            if self.config.side == "remote" and not self._record.frozen:
                # On the backup server the units are not started at boot, so that they never run beside the owner.
                with contextlib.suppress(FarshoreError):
                    await units.start(self.config.units)

    async def _take_up_paths(self) -> None:
        """Bring the state along when other paths are configured than it is of; what stands in the way is a problem."""
        try:
            if self._record.exchange and self._roots is not self._wanted:
                raise PathsNotTakenUp("a restore is half done")
            renumbered = await self._in_worker(self._prepare_paths)
            if renumbered:
                added = len(roots.mapping(self._roots, self._wanted)) < len(self._wanted)
                self._store(
                    replace(
                        self._record,
                        lineage=secrets.token_hex(16) if self._record.lineage else "",
                        was_in_step=False,
                        synced_once=self._record.synced_once and not added,
                        roots=(),
                    )
                )
                await self._in_worker(roots.change, self._state, self._roots, self._wanted)
        except (FarshoreError, OSError) as error:
            text = f"its paths have changed, and those from before stay in force: {error}"
            if text != self._not_taken_up:
                _log.error("paths are not taken up", reason=error, group=self.name)
            self._not_taken_up = text
            return
        self._not_taken_up = ""
        if self._roots is not self._wanted:
            self._roots = self._wanted
            # What a process that died has left lies at the roots from before.
            self._snapshots.thread.submit(self._snapshots.recover)
            self._snapshots.thread.shutdown(wait=False)
            self._snapshots = self._make_snapshots()
            _log.info("other paths are protected now", group=self.name, paths=[name for name, _ in self._roots])

    def _prepare_paths(self) -> bool:
        """In the worker: make ready for other roots; returns whether there are any. Raises FarshoreError, OSError."""
        roots.finish(self._state)
        there = roots.load(self._state)
        if there is None or not roots.differ(there, self._wanted):
            self._roots = self._wanted
            if there != self._wanted:
                roots.store(self._state, self._wanted)
            return False
        self._roots = there
        if not (self._state / "history").exists():
            return True
        self._close_applier()
        applier = receiver.Applier(self._roots, self._state, self.config.history) if self.owns else self._open_applier()
        try:
            if applier.held is not None:
                raise PathsNotTakenUp(
                    f"the brake holds changes; 'farshore approve {self.name}' or, for what was rejected, a change of "
                    "the owner comes first"
                )
            applier.drain()
            applier.set_aside("what was not complete when the paths changed is not applied")
            applier.history.renumber(roots.mapping(self._roots, self._wanted), self._state / roots.NEW_HISTORY)
        finally:
            if self._applier is not None:
                self._close_applier()
            else:
                applier.close()
        return True

    async def _try_paths_again(self) -> None:
        async with self._change:
            was_source = self._sender is not None
            await self._stop_source()
            await self._end_session()
            await self._take_up_paths()
            if was_source:
                self._start_source()

    def adopt(self, config: NodeGroup) -> bool:
        """Go on with another configuration; False, and nothing is done, when the group must begin anew for it."""
        changed = {name for name in _FIELDS if getattr(config, name) != getattr(self.config, name)}
        if not changed <= _TAKEN_UP[self._sender is not None] or self._not_taken_up:
            return False
        more = [unit for unit in config.units if unit not in self.config.units]
        self.config = config
        if self._sender is not None:
            self._sender.adopt(config.bandwidth, config.compress)
            if self._sender.verifier is not None:
                self._sender.verifier.adopt(config.verify)
        if more and self._record.epoch and not self._record.frozen:
            self._adopting = asyncio.create_task(self._take_up_units(more))
        return True

    async def _take_up_units(self, more: list[str]) -> None:
        """Units that are new run on the owner, and nowhere else."""
        try:
            async with self._change:
                await (units.start(more) if self.owns else units.stop(more))
        except FarshoreError as error:
            _log.error("a unit that is new is not as it should be", reason=error, group=self.name)

    @property
    def paused(self) -> bool:
        """True while the administrator has it neither watch nor send."""
        return self._paused

    async def stop(self, hurry: bool = True) -> None:
        """End all work; the role stays on record. Without ``hurry``, a restore that is under way is waited for."""
        if self._tending is not None:
            self._tending.cancel()
        if hurry:
            self._ending.set()
        async with self._change:
            self._change.ended = True
            self._over.set()
            await self._stop_source()
            await self._stop_replica()
            self._worker.shutdown(wait=True)
            self._snapshots.thread.shutdown(wait=False)

    def _start_source(self) -> None:
        self._dirty = DirtySet()
        self._sender = Sender(
            self.name,
            self._record.epoch,
            self.config.peer,
            self._context,
            self._roots,
            self._state / "index.db",
            self._dirty,
            self._on_confirmed,
            self._on_stale,
            self.config.bandwidth,
            self.config.compress,
            self._snapshots if self.config.consistency.mode == "snapshot" else None,
            self._marked,
            self._owners,
            self._watched,
        )
        roots = [root for _, root in self._roots]
        self._sender.verifier = Verifier(
            self.name,
            self._record.epoch,
            roots,
            self._state,
            self.config.verify,
            self._events_are_marked,
            lambda: self._feed is not None and self._feed.watching and not self._paused,
            self._owners,
        )
        engine, cookies = self.config.watch.engine, self._state / "cookies"
        self._feed = Feed(
            lambda: make_watcher(engine, roots, cookies=cookies),
            self._dirty,
            self._sender.wake,
            Mapped(roots) if self.config.watch.mapped else None,
        )
        self._feed.start()
        self._sender_task = asyncio.create_task(self._sender.run(), name=f"send {self.name}")
        self._sender_task.add_done_callback(self._sender_ended)

    def _sender_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("the sender ended", error, group=self.name)
            if self._sender is not None:
                self._sender.reason = f"internal error: {error}"

    async def _stop_source(self) -> None:
        task, self._sender_task = self._sender_task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        feed, self._feed = self._feed, None
        if feed is not None:
            await asyncio.to_thread(feed.close)
        if self._sender is not None and self._sender.verifier is not None:
            self._sender.verifier.close()
        self._sender = None
        self._paused = False

    async def _end_session(self) -> None:
        """End the source's stream, if there is one; what can be gone on with is kept for the next."""
        session, self._session = self._session, None
        if session is not None:
            session.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await session

    async def _stop_replica(self) -> None:
        if self._applier is not None:
            self._applier.interrupt()
        await self._end_session()
        await self._in_worker(self._close_applier)

    async def _finish_replica(self) -> Prepared | None:
        """As ``_stop_replica``, with all in the tree that was acknowledged; raises StateError when that cannot be.

        Returns the state that the trees are to be put back to, if that was asked for. Raises CannotRestore when it
        cannot be had. Then nothing is set aside, and this node can go on as replica.
        """
        if self._applier is not None:
            self._applier.interrupt()
        await self._end_session()
        made = None
        if self._record.back_to is not None or (self._state / "journal").exists():
            try:
                made = await self._in_worker(self._drain)
            except (FarshoreError, OSError):
                await self._in_worker(self._reopen_applier)
                raise
        await self._in_worker(self._close_applier)
        return made

    def _reopen_applier(self) -> None:
        """In the worker: one that was interrupted does nothing any more."""
        try:
            self._close_applier()
            self._open_applier()
        except (FarshoreError, OSError) as error:
            _log.error("the replica cannot go on now", error, group=self.name)

    def _drain(self) -> Prepared | None:
        applier = self._open_applier()
        applier.drain()
        made = None
        if self._record.back_to is not None:
            made = self._prepare_back(applier, self._record.back_to)
        applier.set_aside("what was held, or not complete, when the owner changed is not applied")
        if applier.guard is not None:
            applier.guard.forget()
        return made

    def _prepare_back(self, applier: receiver.Applier, seq: int) -> Prepared:
        progress = self._restoring = Progress()
        try:
            return restore.prepare_exactly(applier, seq, progress, self._check_ending)
        except (FarshoreError, OSError) as error:
            raise self._not_promoted(seq, error) from error
        finally:
            self._restoring = None

    def _not_promoted(self, seq: int, error: Exception) -> CannotRestore:
        return CannotRestore(
            self.name,
            f"not promoted, as it was to take the state after transaction {seq}, and that fails: {error}; "
            f"'farshore restore {self.name} --on-promotion --cancel' here lets it be promoted as it is",
        )

    def _check_ending(self) -> None:
        if self._ending.is_set():
            raise CannotRestore(self.name, "the node ends, or the owner changes")

    async def _tend(self) -> None:
        """What a replica has to do now and then."""
        while True:
            await asyncio.sleep(_TEND_SECONDS)
            if self._applier is None and not self._not_taken_up:
                continue
            with contextlib.suppress(RuntimeError, BeingReplaced):
                await self._in_worker(self._work)
                applier = self._applier
                if self._not_taken_up and not (applier is not None and (applier.held is not None or applier.stalled)):
                    await self._try_paths_again()

    def _work(self) -> None:
        """In the worker."""
        applier = self._applier
        if applier is None:
            return
        try:
            applier.tend()
        except Exception as error:
            _log.error("tending the replica failed", error, group=self.name)

    async def _in_worker(self, call: Callable[..., _T], *args: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, call, *args)

    def _on_confirmed(self) -> None:
        self._confirmed = True
        self._fenced_by = 0

    def _on_stale(self, epoch: int) -> None:
        """The other side has a newer epoch: this server came back from the dead. It must not serve stale data."""
        _log.warning("fenced: the other side has a newer epoch", group=self.name, mine=self.epoch, theirs=epoch)
        self._fenced_by = epoch
        task = asyncio.create_task(self._stop_units())
        self._fencing = task

    async def _stop_units(self) -> None:
        try:
            await units.stop(self.config.units)
        except FarshoreError as error:
            _log.error("fencing", error, group=self.name)

    def _store(self, record: Record) -> None:
        store(self._record_path, record)
        self._record = record

    # --- what may be asked

    async def set_owner(self, owner: Side, epoch: int, with_units: bool) -> str:
        """Take up a role at ``epoch``; raises StaleEpoch, OwnerDiffers, or HookFailed of the units. Idempotent."""
        if 0 < self._promoting < epoch:
            # That promotion is over before it is done: nobody waits for it, and it would serve beside another owner.
            self._ending.set()
        async with self._change:
            known = max(self._record.epoch, self._fenced_by)
            if epoch < known or epoch < 1:
                raise StaleEpoch(self.name, epoch, known)
            if epoch == self._record.epoch and owner != self._record.owner:
                raise OwnerDiffers(self.name, epoch, self._record.owner)
            mine = owner == self.config.side
            if epoch > self._record.epoch:
                self._ending.set()
                await self._in_worker(self._ending.clear)
                await (self._become_owner(epoch, with_units) if mine else self._become_replica(epoch, with_units))
            elif mine:
                if self._record.exchange:
                    await self._finish_exchange()
                    if self._sender is None:
                        self._start_source()
                if with_units and not self._record.frozen:
                    await units.start(self.config.units)
            elif with_units:
                await units.stop(self.config.units)
            self._on_confirmed()
            return f"{owner} owns {self.name} at epoch {epoch}"

    async def _become_owner(self, epoch: int, with_units: bool) -> None:
        was_owner = self.owns
        await self._stop_source()
        self._promoting = epoch
        try:
            made = await self._finish_replica()
        finally:
            self._promoting = 0
        keep = self._record.keep_aside if was_owner else True
        record = replace(
            self._record,
            epoch=epoch,
            owner=self.config.side,
            frozen=False,
            was_in_step=False,
            keep_aside=keep,
            lineage="",
            owner_since_ns=self._record.owner_since_ns if was_owner else time.time_ns(),
            back_to=None,
            back_to_ns=0,
        )
        if made is not None:
            # As soon as this node is the owner, the exchange is on record, and finished by whoever starts next.
            await self._exchange(record, made)
        else:
            self._store(record)
            # One that was cut off when this node was the owner already.
            await self._finish_exchange()
        _log.info("owner", group=self.name, epoch=epoch)
        self._start_source()
        if with_units:
            await units.start(self.config.units)

    async def _become_replica(self, epoch: int, with_units: bool) -> None:
        was_owner = self.owns
        if with_units:
            await units.stop(self.config.units)
        await self._stop_source()
        await self._stop_replica()
        other: Side = "remote" if self.config.side == "local" else "local"
        if self._record.exchange:
            # All of it is compared with the new owner's now.
            _log.warning("a restore stays half done", group=self.name, what=self._record.restored)
        record = replace(
            self._record, epoch=epoch, owner=other, frozen=False, exchange="", exchange_roots=(), restored=""
        )
        self._half_done = ""
        if was_owner or not record.lineage:
            # A switch in good order begins with a freeze, which ends in step: then this tree has everything.
            complete = was_owner and self._record.frozen and self._record.was_in_step
            record = replace(
                record,
                lineage=secrets.token_hex(16),
                synced_once=complete,
                was_in_step=complete,
                keep_aside=True,
            )
        self._store(record)
        self._kept_aside = 0
        _log.info("replica", group=self.name, epoch=epoch)

    async def freeze(self, epoch: int, timeout: float) -> str:
        """Stop the units and return when all is durable on the other side; raises what ``flush`` raises."""
        started = time.monotonic()
        async with self._change:
            self._check_current(epoch)
            if not self._record.frozen:
                self._store(replace(self._record, frozen=True))
            await units.stop(self.config.units)
        await self.flush(max(0.1, timeout - (time.monotonic() - started)))
        async with self._change:
            self._check_current(epoch)
            self._store(replace(self._record, was_in_step=self._record.frozen))
        return f"{self.name} is frozen and durable on {self.config.peer.node}"

    async def thaw(self, epoch: int) -> str:
        """Take a freeze back."""
        async with self._change:
            self._check_current(epoch)
            if self._record.frozen:
                self._store(replace(self._record, frozen=False, was_in_step=False))
            await units.start(self.config.units)
        return f"{self.name} runs again"

    def _check_current(self, epoch: int) -> None:
        known = max(self._record.epoch, self._fenced_by)
        if epoch != known:
            raise StaleEpoch(self.name, epoch, known)
        if not self.owns:
            raise NotOwner(self.name, self._record.owner, self.config.side)

    async def flush(self, timeout: float, durable: bool = False) -> str:
        """Return when the other side's tree has all changes made before the call; with ``durable``, its journal does.

        Raises NotOwner, Paused, NotInTime with what is missing, or BeingReplaced.
        """
        flushing = asyncio.create_task(self._flush(timeout, durable))
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait([flushing, over], return_when=asyncio.FIRST_COMPLETED)
            if not self._over.is_set():
                return flushing.result()
        finally:
            over.cancel()
            flushing.cancel()
            await asyncio.gather(flushing, return_exceptions=True)
        raise BeingReplaced(self.name)

    async def _flush(self, timeout: float, durable: bool) -> str:
        sender, feed = self._sender, self._feed
        if sender is None or feed is None:
            raise NotOwner(self.name, self._record.owner, self.config.side)
        if self._paused:
            raise Paused(self.name)
        started = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                mark = await self._barrier(feed, with_mapped=True)
        except TimeoutError:
            why = "; ".join(feed.problems()) or "the watcher is still starting"
            raise NotInTime(f"flush of group {self.name}", timeout, why) from None
        left = max(0.05, timeout - (time.monotonic() - started))
        await sender.wait_durable(mark, left, applied=not durable)
        return f"all of {self.name} is durable on {self.config.peer.node}"

    def verify(self, contents: bool, repair: bool, from_source: bool, rate: float | None) -> str:
        """Begin a verification, or join the one that is under way; raises NotOwner, or UnderWay for another one."""
        if self._sender is None or self._sender.verifier is None:
            raise NotOwner(self.name, self._record.owner, self.config.side)
        return self._sender.verifier.request(contents, repair, from_source, rate)

    def roots(self) -> list[tuple[int, Root]]:
        """The protected paths, by their numbers."""
        return list(enumerate(root for _, root in self._roots))

    async def explain(self, place: Place) -> Explanation:
        """Whether and why a path of this group is protected, and how its copy is."""
        root = self._roots[place.root][1]
        sender, feed = self._sender, self._feed
        state, reason = self._state_and_reason()
        if sender is None or feed is None:
            facts = await asyncio.to_thread(explain.look, root, place)
            return explain.on_replica(facts, self.name, self.config.peer.node, reason)
        with contextlib.suppress(TimeoutError):
            # What happened until now is marked then, unless nobody watches.
            async with asyncio.timeout(_EXPLAIN_SECONDS if feed.watching and not self._paused else 0):
                await self._barrier(feed)
        facts = await asyncio.to_thread(explain.look, root, place)
        number, path = place.root, place.below
        wait = self._dirty.waits(number, path)
        below = self._dirty.count_below(number, path) if facts.is_directory else 0
        copy = None
        if sender.compared and (sender.connected or not sender.comparing):
            with contextlib.suppress(PeerUnreachable):
                copy = await sender.with_index(lambda index, planner: explain.ask(index, planner, number, path))
        line = explain.Line(
            connected=sender.connected and sender.compared and feed.watching and not self._paused,
            reason="" if state in ("replicating", "frozen") else reason,
            acknowledged=sender.all_acknowledged,
            stalled=sender.stalled,
            absent=sender.why_absent(number),
            now=time.monotonic(),
        )
        return explain.judge(facts, copy, wait, below, line, self.name, self.config.peer.node)

    async def _events_are_marked(self) -> None:
        """Return when all that changed before the call is marked dirty."""
        if self._feed is not None:
            await self._barrier(self._feed)

    async def _marked(self) -> int:
        """Return when all that changed before is marked as dirty; raises FarshoreError when nothing is watched."""
        if self._feed is None:
            raise NotOwner(self.name, self._record.owner, self.config.side)
        if self._paused:
            raise Paused(self.name)
        return await asyncio.wrap_future(self._feed.barrier())

    async def _watched(self) -> None:
        """Return when the watcher has put all in doubt, or cannot."""
        if self._feed is not None:
            # Who gives up waiting does not end it for others.
            await asyncio.shield(asyncio.wrap_future(self._feed.began))

    @staticmethod
    async def _barrier(feed: Feed, with_mapped: bool = False) -> int:
        """Ask until the watcher can answer: a root that is missing may come back any moment."""
        while True:
            try:
                return await asyncio.wrap_future(feed.barrier(with_mapped=with_mapped))
            except FarshoreError:
                await asyncio.sleep(_RETRY_SECONDS)

    async def pause(self) -> str:
        """Stop watching and sending until ``resume``."""
        async with self._change:
            if self._feed is None:
                raise NotOwner(self.name, self._record.owner, self.config.side)
            self._paused = True
            try:
                async with asyncio.timeout(_FEED_SECONDS):
                    await asyncio.wrap_future(self._feed.pause())
            except BaseException:
                # What is not watched now will be watched anew.
                self._paused = False
                raise
        return f"{self.name} is paused"

    async def resume(self) -> str:
        """Watch and send again; what changed in between is found."""
        async with self._change:
            if self._feed is None:
                raise NotOwner(self.name, self._record.owner, self.config.side)
            async with asyncio.timeout(_FEED_SECONDS):
                await asyncio.wrap_future(self._feed.resume())
            self._paused = False
        return f"{self.name} is watched again"

    # --- the brake

    # --- the past

    async def history(self, path: str, limit: int) -> HistoryAnswer:
        """What can be gone back to, or what changed at ``path``; raises UsageError, StateError."""

        def look(applier: receiver.Applier) -> HistoryAnswer:
            if path:
                return HistoryAnswer([], restore.versions(applier, path, limit))
            return HistoryAnswer(restore.spans(applier), [])

        async with self._change:
            return await self._in_worker(self._with_past, look)

    async def restore(self, path: str, when: When, to: str) -> str:
        """Bring back what was at ``path``, to the directory ``to`` or, if that is "", in place.

        Raises CannotRestore, NotRemembered, UsageError, StateError. Nothing is applied to the tree meanwhile.
        """
        if not to and not self.owns:
            raise CannotRestore(
                self.name,
                f"{self.config.peer.node} owns it, and would send its own state again; restore to a directory, or make "
                "this side the owner first",
            )
        if self._restoring is not None:
            raise CannotRestore(self.name, "another restore is under way")
        progress = self._restoring = Progress()
        newest = self._record.owner_since_ns if self.owns else 0

        def bring(applier: receiver.Applier) -> str:
            with self._said():
                return restore.restore_to(applier, path, when, to, newest, progress, self._check_ending)

        def prepare(applier: receiver.Applier) -> Prepared:
            with self._said():
                return restore.prepare(applier, path, when, newest, progress, self._check_ending)

        try:
            if to:
                text: str = await self._in_worker(self._with_past, bring)
            else:
                epoch = self.epoch
                async with self._change:
                    # What would be looked at is a mixture.
                    await self._finish_exchange()
                made = await self._in_worker(self._with_past, prepare)
                async with self._change:
                    if not self.owns or self.epoch != epoch:
                        self._worker.submit(exchange.clear, self._places, self._record.exchange)
                        raise CannotRestore(self.name, "the owner has changed")
                    await self._exchange(self._record, made)
                text = made.text
        finally:
            if self._restoring is progress:
                self._restoring = None
        _log.info("restored", group=self.name, what=text)
        return text

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """What the system refuses is said as what a restore cannot do."""
        try:
            yield
        except OSError as error:
            raise CannotRestore(os.fsdecode(error.filename or self.name), error.strerror) from error

    @property
    def _places(self) -> list[tuple[bytes, Path]]:
        return [(root.path, self._state / str(number)) for number, (_, root) in enumerate(self._roots)]

    async def _exchange(self, record: Record, made: Prepared) -> None:
        """Store ``record`` together with an exchange, and carry that out; raises CannotRestore.

        Then the record and the trees are what they were, or, if they can be neither the one nor the other, the exchange
        stays on record.
        """
        before = self._record
        self._store(replace(record, exchange=made.name, exchange_roots=made.roots, restored=made.text))
        try:
            await self._in_worker(exchange.carry_out, self._places, made.name, made.roots, True)
        except CannotRestore as error:
            if before.back_to is None:
                self._store(before)
                self._worker.submit(exchange.clear, self._places)
                raise
            # What was held is set aside by now.
            self._store(replace(before, lineage=secrets.token_hex(16), was_in_step=False))
            self._worker.submit(exchange.clear, self._places)
            self._worker.submit(self._reopen_applier)
            raise self._not_promoted(before.back_to, error) from error
        except OSError as error:
            raise self._is_half_done(error) from error
        self._exchanged()

    async def _finish_exchange(self) -> None:
        """Finish an exchange that was cut off, if one was; raises CannotRestore."""
        record = self._record
        if not record.exchange:
            return
        try:
            await self._in_worker(exchange.carry_out, self._places, record.exchange, record.exchange_roots, False)
        except (CannotRestore, OSError) as error:
            raise self._is_half_done(error) from error
        _log.info("a restore that was cut off is finished", group=self.name, what=record.restored)
        self._exchanged()

    def _is_half_done(self, error: Exception) -> CannotRestore:
        self._half_done = f"a restore is half done, and cannot be finished: {error}"
        return CannotRestore(self.name, self._half_done)

    def _exchanged(self) -> None:
        self._half_done = ""
        self._store(replace(self._record, exchange="", exchange_roots=()))
        self._worker.submit(exchange.clear, self._places)

    async def restore_on_promotion(self, when: When) -> str:
        """Have the trees put back when this node becomes the owner; raises CannotRestore, NotRemembered, StateError."""

        def look(applier: receiver.Applier) -> tuple[int, int]:
            with self._said():
                seq = when.resolve(applier)
                restore.check_whole(applier, seq)
                return seq, applier.history.time_of(seq)

        async with self._change:
            if self.owns:
                raise CannotRestore(self.name, "this node owns it already; restore it --in-place")
            seq, time_ns = await self._in_worker(self._with_past, look)
            self._store(replace(self._record, back_to=seq, back_to_ns=time_ns))
        _log.info("the next promotion goes back", group=self.name, transaction=seq)
        return f"{self.name}: when this node becomes the owner, it takes the state after {restore.named(seq, time_ns)}"

    async def cancel_on_promotion(self) -> str:
        """Take that back."""
        async with self._change:
            if self._record.back_to is None:
                return f"{self.name}: nothing is to be restored when this node becomes the owner"
            self._store(replace(self._record, back_to=None, back_to_ns=0))
        _log.info("the next promotion takes the last state", group=self.name)
        return f"{self.name}: when this node becomes the owner, it takes its last state"

    def _with_past(self, call: Callable[[receiver.Applier], _T]) -> _T:
        """In the worker: have ``call`` look at the replica's history, also when this node is the owner now."""
        if self._applier is not None:
            return call(self._applier)
        if not (self._state / "history").exists():
            raise NotRemembered(self.name, "this node has never been its replica")
        applier = receiver.Applier(self._roots, self._state, self.config.history)
        try:
            return call(applier)
        finally:
            applier.close()

    async def approve(self) -> str:
        """Apply what the brake holds, or drop what was rejected and compare anew; raises NothingHeld, StateError."""
        async with self._change:
            applier = self._applier
            held = None if applier is None or self.owns else await self._in_worker(applier.approve)
            if applier is None or held is None:
                raise NothingHeld(self.name)
            self._worker.submit(self._work)
            if held.rejected:
                # The source must hear of it.
                await self._end_session()
                return f"{self.name}: the rejected changes are dropped, and the source's data is compared anew"
        return f"{self.name}: what was held is applied"

    async def reject(self) -> str:
        """Set aside what the brake holds, and take nothing more; raises NothingHeld, StateError."""
        async with self._change:
            guard = None if self._applier is None or self.owns else self._applier.guard
            if guard is None or await self._in_worker(guard.reject) is None:
                raise NothingHeld(self.name)
            await self._end_session()
        return f"{self.name}: the held changes are rejected; nothing more is received until approve"

    # --- as replica

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str, hello: Hello) -> None:
        """Serve the source's stream; a stream that was served before is ended, as its peer has come anew."""
        refusal = self._refusal(hello)
        if refusal is not None:
            writer.write(wire.frame(refusal))
            return
        async with self._change:
            await self._end_session()
            refusal = self._refusal(hello)
            if refusal is not None:
                writer.write(wire.frame(refusal))
                return
            if self._record.synced_once and self._record.roots not in ((), self._root_marks()):
                self._store(
                    replace(self._record, lineage=secrets.token_hex(16), synced_once=False, was_in_step=False, roots=())
                )
                _log.warning("the tree is not the one that was filled; it is compared in full", group=self.name)
            self._session = asyncio.current_task()
            applier = await self._in_worker(self._open_applier)
            if applier.diverged:
                self._store(replace(self._record, lineage=secrets.token_hex(16), synced_once=False, was_in_step=False))
                _log.warning("the tree is compared in full", group=self.name, reason=applier.diverged)
                applier.diverged = ""
            lineage = bytes.fromhex(self._record.lineage)

            def welcome() -> Welcome:
                return Welcome(
                    wire.PROTOCOL,
                    lineage,
                    applier.started,
                    self._record.was_in_step,
                    applier.suspended(),
                    applier.applied,
                    applier.doubts,
                )

            greeting = await self._in_worker(welcome)
        self._on_confirmed()
        writer.write(wire.frame(greeting))
        _log.info("receiving", group=self.name, source=peer, epoch=hello.epoch)
        try:
            await receiver.serve(reader, writer, peer, applier, self, self._worker, self.config.compress)
        finally:
            self._applier_roots = self._root_marks()
            if self._session is asyncio.current_task():
                self._session = None
            _log.info("the source's stream ended", group=self.name, source=peer)

    def _refusal(self, hello: Hello) -> Refused | None:
        epoch = self._record.epoch
        if hello.protocol != wire.PROTOCOL:
            return Refused(f"protocol {hello.protocol}; this node speaks {wire.PROTOCOL}", False, epoch)
        names = [name for name, _ in self._roots]
        if hello.roots != names:
            return Refused(f"paths {hello.roots} are sent, but {names} are configured here", False, epoch)
        held = self._applier.held if self._applier is not None else None
        if held is not None and held.rejected:
            return Refused(f"the administrator has rejected its changes: {held.reason}", False, epoch)
        if hello.epoch < epoch or (hello.epoch == epoch and self.owns):
            return Refused(f"epoch {hello.epoch} is older than {epoch}", True, epoch)
        if hello.epoch > epoch:
            return Refused(f"epoch {hello.epoch} has not been announced here; known is {epoch}", False, epoch)
        return None

    def _root_marks(self) -> tuple[int, ...]:
        """One number for each root: a directory's inode, 0 for a single file, -1 for nothing."""
        marks = []
        for _, root in self._roots:
            try:
                status = os.stat(root.path)
            except OSError:
                marks.append(-1)
            else:
                marks.append(status.st_ino if stat.S_ISDIR(status.st_mode) else 0)
        return tuple(marks)

    def _open_applier(self) -> receiver.Applier:
        if self._applier is not None and self._root_marks() != self._applier_roots:
            # Another filesystem, perhaps: what was found out about it is worth nothing.
            self._close_applier()
        if self._applier is None:
            self._applier_roots = self._root_marks()
            places = [root.path for _, root in self._roots]
            guard = Guard(self.name, self.config.brake, places, self._state, armed=self._record.synced_once)
            self._applier = receiver.Applier(
                self._roots, self._state, self.config.history, guard=guard, unkept=self._unkept, owners=self._owners
            )
            if self._record.keep_aside:
                self._aside_index = self._index_of_these()
                self._applier.keep_aside(self._state / "aside" / f"epoch-{self._record.epoch}", self._only_here)
        return self._applier

    def _index_of_these(self) -> Index | None:
        """What this node knew of the other side when it was the source of the same roots."""
        path = self._state / "index.db"
        index = Index(path) if path.exists() else None
        if index is not None and index.get_fact(ROOTS) != roots.names_of(self._roots):
            index.close()
            return None
        return index

    def _close_applier(self) -> None:
        applier, self._applier = self._applier, None
        if applier is not None:
            self._kept_aside = max(self._kept_aside, applier.kept_aside)
            applier.close()
        if self._aside_index is not None:
            self._aside_index.close()
            self._aside_index = None

    def _only_here(self, root: int, path: bytes, there: os.stat_result) -> bool:
        """True unless the other side acknowledged just this state when this node was the source."""
        known = self._aside_index.get(root, path) if self._aside_index is not None else None
        return known is None or (known.size, known.mtime_ns, known.ino) != (
            there.st_size,
            there.st_mtime_ns,
            there.st_ino,
        )

    def _end_aside(self) -> None:
        if self._applier is not None:
            self._kept_aside = max(self._kept_aside, self._applier.kept_aside)
            self._applier.keep_aside(None, self._only_here)
        if self._aside_index is not None:
            self._aside_index.close()
            self._aside_index = None

    # Gate of the receiver

    def check_epoch(self, epoch: int) -> None:
        """Raises StaleEpoch when this node is not the replica of a source at ``epoch``."""
        if epoch != self._record.epoch or self.owns:
            raise StaleEpoch(self.name, epoch, self._record.epoch)

    def in_step(self) -> None:
        """The source has sent everything: this tree can stand in for it."""
        marks = self._root_marks()
        if not self._record.synced_once or self._record.keep_aside or self._record.roots != marks:
            self._store(replace(self._record, synced_once=True, keep_aside=False, was_in_step=False, roots=marks))
            self._worker.submit(self._end_aside)
            _log.info("in step with the source", group=self.name)

    # --- status

    async def status(self) -> GroupStatus:
        """How the group is on this node."""
        sender = self._sender
        oldest = sender.oldest() if sender is not None else None
        problems = self._not_kept()
        if sender is not None:
            problems += sender.problems() + (self._feed.problems() if self._feed else [])
        applier = self._applier
        if applier is not None and applier.history.problem:
            problems.append(f"the history: {applier.history.problem}")
        if self._half_done:
            problems.insert(0, self._half_done)
        if self._not_taken_up:
            problems.insert(0, self._not_taken_up)
        if applier is not None and applier.stalled:
            problems.insert(0, f"what was received cannot be applied: {applier.stalled}")
        kept = max(self._kept_aside, self._applier.kept_aside if self._applier else 0)
        if kept:
            problems.append(f"{kept} files that only this side had are kept in {self._state / 'aside'}")
        held = applier.held if applier is not None else None
        state, reason = self._state_and_reason()
        if held is not None:
            state, reason = held.state, held.reason
        if applier is not None and applier.guard is not None and applier.guard.warning:
            problems.append(f"an unusual change: {applier.guard.warning}")
        since = applier.history.since_ns if applier is not None else None
        return GroupStatus(
            group=self.name,
            side=self.config.side,
            owner=self._record.owner,
            epoch=self._record.epoch,
            state=state,
            reason=reason,
            connected=sender.connected if sender is not None else self._session is not None,
            in_step=self._in_step(),
            rpo=None if sender is None else (0.0 if oldest is None else max(0.0, time.monotonic() - oldest)),
            backlog_paths=self._dirty.count() if sender is not None else 0,
            seq=sender.seq if sender is not None else 0,
            sent_bytes=sender.sent_bytes if sender is not None else 0,
            units=await units.states(self.config.units),
            problems=problems,
            synced_once=self._record.synced_once,
            backlog_bytes=applier.backlog if applier is not None else 0,
            history_since=None if since is None else since / 1e9,
            history_bytes=applier.history.kept if applier is not None else 0,
            restoring="" if self._restoring is None else f"{self._restoring.files} files",
            back_to=self._record.back_to,
            back_to_time=self._record.back_to_ns / 1e9,
            restored=self._record.restored if not self._record.exchange else "",
            held=held.reason if held is not None else "",
            held_transactions=applier.waiting if applier is not None and held is not None else 0,
            held_since=held.since if held is not None else 0.0,
            verification=sender.verifier.status() if sender is not None and sender.verifier is not None else None,
            watch=self._watch_status(),
        )

    def _watch_status(self) -> WatchStatus | None:
        feed = self._feed
        if feed is None:
            return None
        counts = feed.counts()
        if self._paused:
            state = "paused"
        elif feed.failed:
            state = "failed"
        elif not feed.watching:
            state = "starting"
        else:
            state = "partial" if counts.unwatched else "watching"
        return WatchStatus(
            engine=counts.engine,
            state=state,
            directories=counts.directories,
            unwatched=counts.unwatched,
            overflows=counts.overflows,
            events=counts.events,
            waiting_files=self._dirty.waiting(),
            reason="; ".join(feed.problems()),
        )

    def _not_kept(self) -> list[str]:
        """What this side lacks of its files' metadata, of which it is, or was, the replica."""
        causes = self._unkept.causes() + (self._owners.unkept.causes() if self._owners is not None else [])
        return [text if self._sender is None else f"since this side was the replica: {text}" for text in texts(causes)]

    def _in_step(self) -> bool:
        """True when everything is watched and everything seen is durable on the other side."""
        sender, feed = self._sender, self._feed
        return sender is not None and feed is not None and sender.in_step and feed.watching and not self._paused

    def _state_and_reason(self) -> tuple[str, str]:
        peer = self.config.peer.node
        if self._record.epoch == 0:
            return "unconfirmed", "no gateway has said yet who owns the group"
        if self._fenced_by:
            return "fenced", f"epoch {self._record.epoch} is over: {peer} has epoch {self._fenced_by}"
        sender = self._sender
        if sender is None:
            if self._half_done:
                # Not confirmed: then it is told its role again, and tries it again.
                return ("error" if self._confirmed else "unconfirmed"), self._half_done
            if self._promoting and self._record.back_to is not None:
                return "replica", f"it becomes the owner with the state after transaction {self._record.back_to}"
            if self.owns:
                return "error", "not sending"
            return "replica", f"receiving from {peer}" if self._session else f"waiting for {peer}"
        if self._paused:
            return "paused", "paused by the administrator"
        if self._record.frozen:
            return "frozen", "units are stopped for a switch"
        if not sender.connected and not sender.comparing:
            return ("disconnected" if self._confirmed else "unconfirmed"), sender.reason
        if sender.stuck:
            return "error", sender.stuck
        if sender.comparing or not sender.compared:
            return "syncing", f"comparing with {peer} in full, {sender.looked_at} paths done"
        if self._feed is not None and not self._feed.watching:
            return "error", "; ".join(self._feed.problems()) or "the watcher is still starting"
        if sender.in_step:
            return "replicating", f"{peer} has everything"
        if self._dirty.count() == 0:
            return "error", "a protected path is missing"
        return "replicating", f"{self._dirty.count()} paths on their way to {peer}"
