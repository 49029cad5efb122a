"""What the threads of one connection are handed their work by: bounded queues, and a switch that ends them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Interrupted(Exception):
    """The work is not wanted any more: the owner changes, or the connection is gone."""


class Switch:
    """Wakes the threads of one connection when something has changed, and ends them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.ended = False

    def end(self) -> None:
        """Let all who wait or check end."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def notify(self) -> None:
        """Something that somebody may wait for has changed."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Return once ``ready()``; raises Interrupted when the end comes first."""
        if self.ended:
            raise Interrupted
        if ready():
            return
        with self._changed:
            self._changed.wait_for(lambda: self.ended or ready())
        self.check()

    def check(self) -> None:
        """Raises Interrupted after the end."""
        if self.ended:
            raise Interrupted


class Inbox(Generic[_T]):
    """Hands items from the event loop to one thread; ``limit`` bytes at most wait in it, or one batch of any size."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self._limit = limit
        self._arrived = threading.Condition()
        self._items: list[_T] = []
        self._size = 0
        self._poked = self._ended = self._shut = False
        self._room = asyncio.Event()
        self._room.set()

    def put(self, items: list[_T], size: int) -> bool:
        """Append a batch of so many bytes; returns whether more may follow before ``room``. For the event loop."""
        if self._shut:
            return True
        with self._arrived:
            self._items += items
            self._size += size
            full = self._size > self._limit
            if full:
                self._room.clear()
            self._arrived.notify()
        return not full

    async def room(self) -> None:
        """Wait until more may be put."""
        await self._room.wait()

    def take(self) -> list[_T] | None:
        """All that has arrived, waiting for something or a poke; None after the end. For the thread."""
        with self._arrived:
            while not (self._items or self._poked or self._ended):
                self._arrived.wait()
            self._poked = False
            if self._ended:
                return None
            items, self._items = self._items, []
            full, self._size = self._size > self._limit, 0
        if full:
            self._loop.call_soon_threadsafe(self._room.set)
        return items

    @property
    def empty(self) -> bool:
        """Whether nothing has arrived since ``take``."""
        return not self._items

    def poke(self) -> None:
        """Let ``take`` return, from any thread."""
        with self._arrived:
            self._poked = True
            self._arrived.notify()

    def shut(self) -> None:
        """Nothing more is wanted: what is in it, and what is put from now on, is dropped. For the event loop."""
        self._shut = True
        with self._arrived:
            self._items.clear()
            self._size = 0
        self._room.set()

    def end(self) -> None:
        """Let ``take`` return None from now on; what is in it is dropped."""
        with self._arrived:
            self._ended = True
            self._items.clear()
            self._arrived.notify()
