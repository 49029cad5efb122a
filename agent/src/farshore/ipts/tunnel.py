"""The state of the tunnel between the gateways, as strongSwan tells it over VICI."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

VICI_SOCKET = Path("/run/charon.vici")


async def state(path: Path = VICI_SOCKET, timeout: float = 2.0) -> str:
    """The tunnel in one line: "up (...)", "down: why", or "unknown: why it can't be told". Never raises."""
    try:
        # The binding blocks; the socket's own limit ends the thread when charon hangs.
        async with asyncio.timeout(timeout + 1.0):
            return await asyncio.to_thread(_ask, path, timeout)
    except TimeoutError:
        return f"unknown: charon did not answer within {timeout:g} s"


def _ask(path: Path, timeout: float) -> str:
    try:
        import vici
    except ImportError:
        return "unknown: the Python package vici is not installed"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(timeout)
        try:
            sock.connect(str(path))
            return describe(list(vici.Session(sock).list_sas()))
        except TimeoutError:
            return f"unknown: charon did not answer within {timeout:g} s"
        except FileNotFoundError:
            return f"down: charon does not run (no {path})"
        except ConnectionRefusedError:
            return f"down: charon does not run (nobody listens on {path})"
        except OSError as error:
            return f"unknown: {path}: {error.strerror or error}"
        except Exception as error:
            # The binding raises exceptions of its own for what charon refuses or garbles.
            return f"unknown: {type(error).__name__}: {error}"


def describe(sas: Iterable[Mapping[str, Any]]) -> str:
    """What ``list-sas`` lists, in one line. The values are bytes, as the binding gives them."""
    children: list[str] = []
    waiting: list[str] = []
    for connections in sas:
        for name, ike in connections.items():
            ike_state = _text(ike.get("state"))
            installed = [
                child for child in ike.get("child-sas", {}).values() if _text(child.get("state")) == "INSTALLED"
            ]
            children += [
                f"{_text(child.get('name'))}: {_text(child.get('bytes-in')) or 0} bytes in,"
                f" {_text(child.get('bytes-out')) or 0} out"
                for child in installed
            ]
            if not installed:
                why = "has no child SA" if ike_state == "ESTABLISHED" else f"is {ike_state or 'in no known state'}"
                waiting.append(f"IKE SA {name} {why}")
    if children:
        return f"up ({'; '.join(children)})"
    return f"down: {'; '.join(waiting) or 'no IKE SA'}"


def _text(value: object) -> str:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value or "")
