"""The notification protocol of systemd: READY=1, RELOADING=1, STATUS=, WATCHDOG=1 (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(address)
            sock.sendall(message.encode())
        except OSError:
            # The manager may be restarting; the daemon's work does not depend on it.
            return


def ready(status: str = "") -> None:
    """Tell the service manager that start-up is finished."""
    _send(f"READY=1\nSTATUS={status}")


def reloading() -> None:
    """Tell the service manager that another configuration is taken up; ``ready`` ends it."""
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    _send(f"RELOADING=1\nMONOTONIC_USEC={microseconds}")


def status(text: str) -> None:
    """Set the one-line status that ``systemctl status`` shows."""
    _send(f"STATUS={text}")


def stopping() -> None:
    """Tell the service manager that shutdown began."""
    _send("STOPPING=1")


def watchdog() -> None:
    """Feed the watchdog; call it from the work loop, so that a stuck loop is noticed."""
    _send("WATCHDOG=1")


def watchdog_interval() -> float | None:
    """Seconds between feedings (half of WatchdogSec), or None when no watchdog is set."""
    usec = os.environ.get("WATCHDOG_USEC")
    pid = os.environ.get("WATCHDOG_PID")
    if not usec or (pid and pid != str(os.getpid())):
        return None
    return int(usec) / 2e6
