#!/usr/bin/env python3
"""Users of a service: they write and read documents all the time and remember every answer.

Runs on a host on the Internet side, with nothing but Python. Each document says which one it is, in which version,
and the digest of its body, so that a later reading shows exactly which acknowledged write is there. A document that
exists is read before it is written anew: so it is on record what a server had before a user changed it. After
a change of servers all documents are read once, and all again at the end.

The history has one JSON object a line: ``meta`` first, then ``put`` and ``get`` attempts, ``end`` last. Times
``t0`` and ``t1`` are monotonic seconds, ``w`` is the wall clock at ``t1``; ``s`` is the HTTP status, 0 when nobody
answered.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MAGIC = b"farshore-drill "
RETRY_PAUSE = 0.05
AUDITS_PER_SECOND = 150.0
VERIFY_TRIES = 20


def make_document(doc: int, version: int, marker: str, size: int) -> bytes:
    """One version of a document: a line that describes it, and a body with the marker all over it."""
    chunk = b"\n" + marker.encode() + b"\n"
    body = b"".join(chunk + base64.b64encode(os.urandom(384)) for _ in range(size // 512 + 1))
    head = {"doc": doc, "version": version, "marker": marker, "sha256": hashlib.sha256(body).hexdigest()}
    return MAGIC + json.dumps(head).encode() + b"\n" + body


def read_document(content: bytes, doc: int) -> tuple[int, bool]:
    """The version that ``content`` is, and whether it is whole."""
    head, _, body = content.partition(b"\n")
    try:
        facts = json.loads(head.removeprefix(MAGIC))
        whole = facts["doc"] == doc and facts["sha256"] == hashlib.sha256(body).hexdigest()
        return int(facts["version"]), bool(whole)
    except (ValueError, KeyError, TypeError):
        return 0, False


class Connection:
    """An HTTP connection that is kept while it works; any trouble closes it."""

    def __init__(self, url: str, timeout: float, keep: bool) -> None:
        parts = urlsplit(url)
        self._make: Callable[..., http.client.HTTPConnection] = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._place = (parts.hostname or "", parts.port)
        self.path = parts.path or "/"
        self.base = self.path.rstrip("/") + "/"
        self._timeout, self._keep = timeout, keep
        self._open: http.client.HTTPConnection | None = None

    def ask(self, method: str, path: str, header: str, body: bytes | None = None) -> tuple[int, str, bytes, str]:
        """Status, who answered, content, and what went wrong; the status is 0 when nobody answered."""
        if self._open is None:
            host, port = self._place
            self._open = self._make(host, port, timeout=self._timeout)
        try:
            self._open.request(method, path, body)
            answer = self._open.getresponse()
            content = answer.read()
            result = answer.status, answer.getheader(header, "") or "", content, ""
        except (OSError, http.client.HTTPException) as error:
            result = 0, "", b"", str(error) or type(error).__name__
        if not self._keep or not result[0]:
            self.close()
        return result

    def close(self) -> None:
        """End the connection; the next question opens another."""
        if self._open is not None:
            self._open.close()
            self._open = None


class Users:
    """All users together: their documents, and their history."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._history = open(options.history, "w", encoding="ascii", buffering=1)  # noqa: SIM115 - open as long as we are
        self._documents = 0
        #: The last version of each document that was acknowledged, and the next one to write.
        self.acknowledged: dict[int, int] = {}
        self._next: dict[int, int] = {}
        self.server = ""
        self.changed = threading.Event()
        self.record(
            k="meta",
            mono=time.monotonic(),
            w=time.time(),
            url=options.url,
            marker=options.marker,
            writes=options.writes,
        )

    def record(self, **entry: Any) -> None:
        """Add one line to the history."""
        with self._lock:
            self._history.write(json.dumps(entry, separators=(",", ":")) + "\n")

    def _heard(self, by: str) -> None:
        if by and by != self.server:
            self.server = by
            self.changed.set()

    def new_document(self) -> int:
        """The number of a document that does not exist yet."""
        with self._lock:
            self._documents += 1
            return self._documents

    def get(self, connection: Connection, doc: int, why: str) -> bool:
        """Read a document; True when there was an answer that settles what is there."""
        path = f"{connection.base}{doc:05d}.txt" if doc else connection.path
        t0 = time.monotonic()
        status, by, content, error = connection.ask("GET", path, self.options.header)
        entry: dict[str, Any] = {"k": "get", "why": why, "d": doc, "s": status, "by": by, "t0": t0}
        if status == 200 and doc:
            entry["v"], entry["ok"] = read_document(content, doc)
            entry["sha"] = hashlib.sha256(content).hexdigest()
        elif status == 404 and doc:
            entry["v"] = 0
        if error:
            entry["err"] = error
        self.record(**entry, t1=time.monotonic(), w=time.time())
        self._heard(by)
        return status in (200, 404)

    def put(self, connection: Connection, doc: int) -> bool:
        """Write the next version of a document; True when it was acknowledged."""
        version = self._next.get(doc, 1)
        generator = random.Random(doc * 100003 + version)
        size = 120_000 if generator.random() < 0.02 else generator.randrange(600, 9000)
        content = make_document(doc, version, self.options.marker, size)
        # Each attempt is a version of its own: it differs from the one before, which may still be under way.
        self._next[doc] = version + 1
        t0 = time.monotonic()
        path = f"{connection.base}{doc:05d}.txt"
        status, by, _, error = connection.ask("PUT", path, self.options.header, content)
        entry: dict[str, Any] = {"k": "put", "d": doc, "v": version, "s": status, "by": by, "t0": t0}
        if error:
            entry["err"] = error
        self.record(**entry, sha=hashlib.sha256(content).hexdigest(), t1=time.monotonic(), w=time.time())
        self._heard(by)
        if 200 <= status < 300:
            self.acknowledged[doc] = version
            return True
        return False

    def write(self, number: int) -> None:
        """One user: new documents, and new versions of the own ones, until the end."""
        connection = Connection(self.options.url, self.options.timeout, keep=True)
        chance = random.Random(number)
        mine: list[int] = []
        tick = self.options.users / self.options.rate
        due = time.monotonic() + tick * number / self.options.users
        while not self.stop.wait(max(0.0, due - time.monotonic())):
            due = max(due + tick, time.monotonic())
            old = bool(mine) and chance.random() < 0.45
            doc = chance.choice(mine) if old else self.new_document()
            # Some users come anew for each document, as browsers do; the others keep their connection.
            if number % 2:
                connection.close()
            while not self.stop.is_set():
                if (not old or self.get(connection, doc, "read")) and self.put(connection, doc):
                    break
                self.stop.wait(RETRY_PAUSE)
            else:
                break
            if not old:
                mine.append(doc)

    def read(self) -> None:
        """A user who only reads, on a new connection each time."""
        connection = Connection(self.options.url, self.options.timeout, keep=False)
        chance = random.Random(0)
        while not self.stop.wait(4.0 / self.options.rate):
            documents = list(self.acknowledged)
            self.get(connection, chance.choice(documents) if documents else 0, "read")

    def audit(self) -> None:
        """After each change of servers, see what the new one has of all documents."""
        connection = Connection(self.options.url, self.options.timeout, keep=True)
        while not self.stop.is_set():
            if not self.changed.wait(0.1):
                continue
            self.changed.clear()
            for doc in sorted(self.acknowledged):
                while not (self.get(connection, doc, "audit") or self.stop.wait(RETRY_PAUSE)):
                    pass
                if self.stop.wait(1.0 / AUDITS_PER_SECOND) or self.changed.is_set():
                    break

    def verify(self) -> None:
        """At the end, read everything once more."""
        connection = Connection(self.options.url, self.options.timeout, keep=True)
        for doc in sorted(self._next):
            for _ in range(VERIFY_TRIES):
                if self.get(connection, doc, "verify"):
                    break
                time.sleep(4 * RETRY_PAUSE)

    def run(self) -> None:
        """Be users until SIGTERM, or until the stop file is there; then verify."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop.set())
        threads = [threading.Thread(target=self.read, daemon=True)]
        if self.options.writes:
            threads += [threading.Thread(target=self.write, args=(n,), daemon=True) for n in range(self.options.users)]
            threads.append(threading.Thread(target=self.audit, daemon=True))
        for thread in threads:
            thread.start()
        while not self.stop.wait(0.2):
            if self.options.stop and self.options.stop.exists():
                self.stop.set()
        for thread in threads:
            thread.join(4 * self.options.timeout)
        if self.options.writes:
            self.verify()
        self.record(k="end", mono=time.monotonic(), w=time.time())
        self._history.close()


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="Users who write and read documents over HTTP (PUT and GET).")
    parser.add_argument("--url", required=True, help="where the documents are, such as http://203.0.113.1/docs/")
    parser.add_argument("--history", type=Path, required=True, help="file to write")
    parser.add_argument("--marker", required=True, help="text that all documents contain")
    parser.add_argument("--header", default="X-Served-By", help="response header that names the server")
    parser.add_argument("--stop", type=Path, help="end when this file exists")
    parser.add_argument("--rate", type=float, default=20.0, help="documents written a second (default: %(default)s)")
    parser.add_argument("--users", type=int, default=4, help="users who write (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds to wait for an answer")
    parser.add_argument("--read-only", dest="writes", action="store_false", help="only GET the URL")
    Users(parser.parse_args()).run()


if __name__ == "__main__":
    main()
