"""Logging as key=value lines on stderr, for journald; JSON lines on request."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

# journald reads a leading <N> as the syslog priority of the line (sd-daemon(3)).
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


def _value(value: object) -> str:
    text = os.fsdecode(value) if isinstance(value, bytes) else str(value)
    # Names may hold any byte; an undecodable one must not break the log or forge a line.
    text = text.encode("utf-8", "backslashreplace").decode()
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return json.dumps(text, ensure_ascii=False)


class _Formatter(logging.Formatter):
    def __init__(self, as_json: bool, journal: bool) -> None:
        super().__init__()
        self._json = as_json
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if self._json:
            head = {"time": record.created, "level": record.levelname.lower(), "event": message}
            body = {key: _value(value) for key, value in fields.items()}
            return json.dumps(head | {"room": record.name} | body, ensure_ascii=False)
        pairs = " ".join(f"{key}={_value(value)}" for key, value in fields.items())
        line = f"{record.name.removeprefix('farshore.')}: {message}" + (f" {pairs}" if pairs else "")
        if self._journal:
            prefix = f"<{_PRIORITY.get(record.levelno, 5)}>"
            return "\n".join(prefix + part for part in line.splitlines())
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{stamp} {record.levelname.lower():7} {line}"


def setup(level: str = "info", as_json: bool = False) -> None:
    """Send all log records of the process to stderr. ``level`` is a logging level's name."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(as_json, "JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("numba").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class Log:
    """A logger whose calls take the event and its fields: ``log.info("promoted", group="web")``."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def _emit(self, level: int, event: str, exc: BaseException | None, fields: dict[str, Any]) -> None:
        self._logger.log(level, "%s", event, extra={"fields": fields}, exc_info=exc)

    def debug(self, event: str, **fields: Any) -> None:
        self._emit(logging.DEBUG, event, None, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._emit(logging.INFO, event, None, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._emit(logging.WARNING, event, None, fields)

    def error(self, event: str, exc: BaseException | None = None, **fields: Any) -> None:
        self._emit(logging.ERROR, event, exc, fields)
