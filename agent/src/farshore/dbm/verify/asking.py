"""What the source of a verification asks the replica, over one connection."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from farshore.dbm import wire
from farshore.dbm.messages import Digests, EndSurvey, Entry, Item, Look, Seen, Survey, Surveyed, WantDigests
from farshore.errors import FarshoreError, ProtocolError

#: Questions for directories that are on their way at once.
AT_ONCE = 16
_MOST_ITEMS = 10_000_000
#: No two questions of this process have the same number, so that no late answer is taken for another's.
_NUMBERS = itertools.count(1)


class ReplicaFailed(FarshoreError):
    """The replica cannot go on: {0}"""


class Question:
    """A question whose answer comes in parts."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parts: list[Digests | Seen] = []
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Asking:
    """Asks by ``send``, for the verification ``run``. Every question raises ReplicaFailed, ProtocolError, and what
    ``send`` raises when the connection is gone."""

    def __init__(self, send: Callable[[list[bytes]], Awaitable[None]], run: bytes) -> None:
        self._send = send
        self._run = run
        self._questions: dict[int, Question] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._surveyed: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        #: Bytes of content that the replica has read since the survey was asked for.
        self.read = 0

    async def begin_survey(self, contents: bool, rate: float) -> None:
        """Have the replica go over its trees, reading at most ``rate`` bytes/s (0: any)."""
        await self._send([wire.frame(Survey(self._run, contents, rate))])

    async def surveyed(self, roots: int) -> list[bytes]:
        """The digests of all below each of so many roots, when the replica has gone over them."""
        found = await self._surveyed
        if len(found) != roots:
            raise ProtocolError("the replica", f"{len(found)} roots of {roots}")
        return found

    async def end_survey(self) -> None:
        """The replica may forget what it remembers for this run."""
        await self._send([wire.frame(EndSurvey())])

    async def digests(self, root: int, path: bytes, bucket: int = -1) -> tuple[bool, list[Item]]:
        """What lies in a directory, or in one bucket of it; and whether that is told by buckets only."""
        async with self._slots:
            question = self._question()
            await self._send([wire.frame(WantDigests(question.number, root, path, bucket))])
            await question.answered
        items: list[Item] = []
        in_buckets = False
        for part in question.parts:
            if not isinstance(part, Digests):
                raise ProtocolError("the replica", f"{type(part).__name__} instead of Digests")
            in_buckets = part.buckets
            items += part.items
            if len(items) > _MOST_ITEMS:
                raise ProtocolError("the replica", f"a directory with more than {_MOST_ITEMS} names")
        if in_buckets and any(len(item.name) != 1 for item in items):
            raise ProtocolError("the replica", "a bucket that is none")
        return in_buckets, items

    async def send_look(self, root: int, paths: list[bytes]) -> Question:
        """Ask what is at ``paths`` behind all that was sent before; ``seen`` waits for the answer."""
        question = self._question()
        await self._send([wire.frame(Look(question.number, root, paths))])
        return question

    async def seen(self, question: Question, root: int, paths: list[bytes]) -> dict[bytes, Entry]:
        """What is there, of the paths that were asked for."""
        await question.answered
        wanted = set(paths)
        found: dict[bytes, Entry] = {}
        for part in question.parts:
            if not isinstance(part, Seen):
                raise ProtocolError("the replica", f"{type(part).__name__} instead of Seen")
            for entry in part.entries:
                if entry.root != root or entry.path not in wanted:
                    raise ProtocolError("the replica", f"it tells of {entry.path!r}, which nobody asked for")
                found[entry.path] = entry
        return found

    def answered(self, message: Surveyed | Digests | Seen) -> None:
        """The replica has told something; what nobody waits for any more is ignored."""
        if isinstance(message, Surveyed):
            if message.run != self._run:
                return  # of a run before, which has ended
            self.read = max(self.read, message.read)
            if message.problem:
                self._give_up(ReplicaFailed(message.problem))
            elif message.done and not self._surveyed.done():
                self._surveyed.set_result(message.roots)
            return
        question = self._questions.get(message.number)
        if question is None:
            return
        if isinstance(message, Seen):
            self.read = max(self.read, message.read)
        question.parts.append(message)
        if message.last:
            del self._questions[message.number]
            if not question.answered.done():
                question.answered.set_result(None)

    def _give_up(self, error: ReplicaFailed) -> None:
        waiting: list[asyncio.Future[Any]] = [self._surveyed]
        waiting += [question.answered for question in self._questions.values()]
        for each in waiting:
            if not each.done():
                each.set_exception(error)
                each.exception()  # Whoever waits for it is told; nobody may be.

    def _question(self) -> Question:
        number = next(_NUMBERS)
        question = self._questions[number] = Question(number)
        return question
