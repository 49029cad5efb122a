"""The delta engine: describe new content by the blocks of old content that it still holds.

    signature = sign(old)                                # on the side that has the old content
    encoder = Encoder(signature)                         # on the side that has the new one
    for chunk in encoder.encode(new): ...
    applier = Applier(FdReader(old_fd), out.write)       # where the old one is again
    applier.feed(chunk); ...; applier.finish()

Bytes in, bytes out: no network, no daemon. The algorithm is the paper's (see
:mod:`farshore.delta.reference`), with the aligned comparison before it. Content is read in
windows and never mapped, because other processes may truncate it at any moment.
"""

from __future__ import annotations

from farshore.delta.apply import COPY_PIECE, Applied, Applier, BytesReader, FdReader, RandomReader
from farshore.delta.encode import DeltaStats, Encoder, encode_bytes
from farshore.delta.errors import DeltaCorrupt, DeltaFileError, SignatureCorrupt
from farshore.delta.format import MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, DeltaHeader, parse_header
from farshore.delta.leaves import Leaves
from farshore.delta.signature import (
    BLOCK_SIZE,
    BinaryReader,
    Signature,
    check_block_size,
    preferred_block_size,
    read_full,
    sign,
    skipping_holes,
)

__all__ = [
    "BLOCK_SIZE",
    "COPY_PIECE",
    "MAX_BLOCK_SIZE",
    "MIN_BLOCK_SIZE",
    "Applied",
    "Applier",
    "BinaryReader",
    "BytesReader",
    "DeltaCorrupt",
    "DeltaFileError",
    "DeltaHeader",
    "DeltaStats",
    "Encoder",
    "FdReader",
    "Leaves",
    "RandomReader",
    "Signature",
    "SignatureCorrupt",
    "apply_bytes",
    "check_block_size",
    "encode_bytes",
    "parse_header",
    "preferred_block_size",
    "read_full",
    "sign",
    "skipping_holes",
    "warm_up",
]


def apply_bytes(base: bytes, delta: bytes) -> bytes:
    """Return the content that `delta` makes of `base`; raise DeltaCorrupt."""
    out = bytearray()
    applier = Applier(BytesReader(base), out.extend)
    applier.feed(delta)
    applier.finish()
    return bytes(out)


def warm_up() -> None:
    """Load or compile every kernel, by making and applying one small delta.

    Raises RuntimeError if the result is wrong: then the machine code is not to be trusted.
    """
    import io

    size = MIN_BLOCK_SIZE
    old = bytes(i * i * 7 % 251 for i in range(40 * size + 5))
    new = b"x" + old[: 20 * size] + b"y" * 40 + old[20 * size :]
    signature = sign(io.BytesIO(old), size)
    encoder = Encoder(signature)
    delta = b"".join(encoder.encode(io.BytesIO(new)))
    if apply_bytes(old, delta) != new or encoder.stats.literal_bytes != 41:
        raise RuntimeError("the delta engine's self-test failed")
