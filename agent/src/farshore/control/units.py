"""Start and stop a group's systemd units, and ask how they are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from farshore.errors import HookFailed

#: Seconds that systemctl may take; units with longer timeouts of their own are rare.
TIMEOUT = 90.0


async def start(units: Sequence[str]) -> None:
    """Start the units and wait until they run; raises HookFailed naming what systemctl said."""
    if units:
        await _systemctl("start", *units)


async def stop(units: Sequence[str]) -> None:
    """Stop the units and wait until they have; raises HookFailed. Only what surely is inactive is passed over."""
    present = [unit for unit, state in (await states(units)).items() if state != "inactive"]
    if present:
        await _systemctl("stop", *present)


async def states(units: Sequence[str]) -> dict[str, str]:
    """``systemctl is-active`` of each unit: active, inactive, failed, ...; "unknown" when it cannot be told."""
    if not units:
        return {}
    try:
        _, out, _ = await _run("is-active", *units)
    except HookFailed:
        return dict.fromkeys(units, "unknown")
    answers = out.split()
    return {unit: answers[i] if i < len(answers) else "unknown" for i, unit in enumerate(units)}


async def _systemctl(verb: str, *units: str) -> None:
    code, _, err = await _run(verb, *units)
    if code:
        raise HookFailed(f"systemctl {verb} {' '.join(units)}", err.strip() or f"exit code {code}")


async def _run(*arguments: str) -> tuple[int, str, str]:
    what = "systemctl " + " ".join(arguments)
    try:
        process = await asyncio.create_subprocess_exec(
            "systemctl",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise HookFailed(what, error.strerror or str(error)) from None
    try:
        async with asyncio.timeout(TIMEOUT):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise HookFailed(what, f"no answer within {TIMEOUT:g} s") from None
    return process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")
