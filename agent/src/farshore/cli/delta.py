"""``farshore delta``: signatures and deltas of files, by hand.

The three steps are those of ``rdiff``: ``signature`` of the old file, ``encode`` the new file
against it, ``apply`` the delta to the old file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

_READ_PIECE = 1 << 20


def add_parser(subparsers: Any) -> None:
    """Add ``delta`` and its commands to what ``add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "delta",
        help="signatures and deltas of files",
        description="Describe a new file by the blocks it shares with an old one.",
    )
    commands = parser.add_subparsers(dest="delta_command", metavar="COMMAND", required=True)

    command = commands.add_parser("signature", help="sign a file")
    command.add_argument("base", metavar="BASE", help="the old file; - for stdin")
    command.add_argument("signature", metavar="SIG", help="where to write; - for stdout")
    command.add_argument(
        "--block-size",
        type=int,
        metavar="BYTES",
        help="a power of two from 1024 to 1048576; default: 4096, larger for files over 16 GiB",
    )
    _finish(command, _signature)

    command = commands.add_parser("encode", help="make a delta")
    command.add_argument("signature", metavar="SIG", help="the old file's signature; - for stdin")
    command.add_argument("new", metavar="NEW", help="the new file; - for stdin")
    command.add_argument("delta", metavar="DELTA", help="where to write; - for stdout")
    _finish(command, _encode)

    command = commands.add_parser("apply", help="make the new file of the old one and a delta")
    command.add_argument("base", metavar="BASE", help="the old file")
    command.add_argument("delta", metavar="DELTA", help="the delta; - for stdin")
    command.add_argument("out", metavar="OUT", help="where to write; - for stdout")
    _finish(command, _apply)


def _finish(command: argparse.ArgumentParser, handler: Any) -> None:
    command.add_argument(
        "--stats",
        action="store_true",
        help="print what was done as JSON on stdout (on stderr when the result goes to stdout)",
    )
    command.set_defaults(func=handler)


def _signature(arguments: argparse.Namespace) -> int:
    from farshore.delta import check_block_size, sign
    from farshore.errors import UsageError

    size = arguments.block_size
    if size is not None:
        try:
            check_block_size(size)
        except ValueError as error:
            raise UsageError(f"--{error}".replace("block size", "block-size")) from None
    started = time.monotonic()
    with _files(), _reading(arguments.base) as base, _writing(arguments.signature) as out:
        length = os.fstat(base.fileno()).st_size
        signature = sign(base, size, length_hint=length)
        data = signature.to_bytes()
        out.write(data)
    _report(
        arguments,
        arguments.signature,
        started,
        signature.length,
        block_size=signature.block_size,
        blocks=len(signature),
        base_bytes=signature.length,
        signature_bytes=len(data),
        ratio=_ratio(len(data), signature.length),
        digest=signature.digest.hex(),
    )
    return 0


def _encode(arguments: argparse.Namespace) -> int:
    from farshore.delta import Encoder, Signature
    from farshore.errors import UsageError

    if arguments.signature == arguments.new == "-":
        raise UsageError("only one of SIG and NEW can be stdin")
    started = time.monotonic()
    with _files():
        with _reading(arguments.signature) as source:
            signature = Signature.from_bytes(source.read())
        encoder = Encoder(signature, sign_new=False)
        with _reading(arguments.new) as new, _writing(arguments.delta) as out:
            for chunk in encoder.encode(new):
                out.write(chunk)
    stats = encoder.stats
    _report(
        arguments,
        arguments.delta,
        started,
        encoder.length,
        block_size=encoder.block_size,
        base_bytes=signature.length,
        new_bytes=encoder.length,
        delta_bytes=stats.delta_bytes,
        literal_bytes=stats.literal_bytes,
        copied_bytes=stats.copied_bytes,
        literals=stats.literals,
        copies=stats.copies,
        false_alarms=stats.false_alarms,
        ratio=_ratio(stats.delta_bytes, encoder.length),
        digest=encoder.digest.hex(),
    )
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    from farshore.delta import Applier, FdReader
    from farshore.errors import UsageError

    if arguments.base == "-":
        raise UsageError("BASE must be a file: it is read at random places")
    started = time.monotonic()
    taken = 0
    with (
        _files(),
        _reading(arguments.base) as base,
        _reading(arguments.delta) as delta,
        _writing(arguments.out) as out,
    ):
        applier = Applier(FdReader(base.fileno()), out.write)
        while chunk := delta.read(_READ_PIECE):
            taken += len(chunk)
            applier.feed(chunk)
        applied = applier.finish()
    _report(
        arguments,
        arguments.out,
        started,
        applied.length,
        delta_bytes=taken,
        new_bytes=applied.length,
        ratio=_ratio(taken, applied.length),
        digest=applied.digest.hex(),
    )
    return 0


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _report(arguments: argparse.Namespace, target: str, started: float, work: int, **values: Any) -> None:
    if not arguments.stats:
        return
    seconds = time.monotonic() - started
    values["seconds"] = round(seconds, 6)
    values["bytes_per_second"] = round(work / seconds) if seconds > 0 else None
    print(
        json.dumps({"command": arguments.delta_command, **values}),
        file=sys.stderr if target == "-" else sys.stdout,
    )


@contextlib.contextmanager
def _files() -> Iterator[None]:
    """Turn the system's errors about files into one of ours."""
    from farshore.delta import DeltaFileError

    try:
        yield
    except OSError as error:
        name = error.filename if error.filename is not None else "input or output"
        raise DeltaFileError(name, error.strerror or error) from error


@contextlib.contextmanager
def _reading(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    with open(path, "rb", buffering=0) as file:
        yield file


@contextlib.contextmanager
def _writing(path: str) -> Iterator[BinaryIO]:
    """Give a file that takes the name `path` only when the block has succeeded, and is then
    durable; pipes and devices, which can't be replaced, are written directly."""
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = os.path.realpath(path)
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
    if mode is not None and not stat.S_ISREG(mode):
        with open(path, "wb") as file:
            yield file
        return
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name[:200]}.{secrets.token_hex(6)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(fd, "wb") as file:
            if mode is not None:
                os.fchmod(fd, stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
