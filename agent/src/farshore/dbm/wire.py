"""The wire between two nodes, and between a node and whoever controls it.

A frame is a four-byte big-endian length and that many bytes of MessagePack, one tagged struct. Every
field that arrives is treated as hostile: lengths are bounded before memory is taken, types are checked by
the decoder, paths and epochs by whoever acts on them.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Generic, TypeVar

import msgspec

from farshore.errors import ProtocolError

#: No frame is larger; content is cut into chunks well below it.
MAX_FRAME = 1 << 20
#: Bytes of content in one Chunk frame.
CHUNK = 256 << 10
PROTOCOL = 4

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
M = TypeVar("M")


def frame(message: object) -> bytes:
    """One frame that holds ``message``, a tagged struct; raises ProtocolError when it would be over MAX_FRAME."""
    body = encode(message)
    if len(body) > MAX_FRAME:
        raise ProtocolError("this node", f"a frame of {len(body)} bytes is over {MAX_FRAME}")
    return _LENGTH.pack(len(body)) + body


def encode(message: object) -> bytes:
    """The body of a frame that holds ``message``, however long it is."""
    return _encoder.encode(message)


class Codec(Generic[M]):
    """Decodes the frames of one direction: a union of tagged structs."""

    def __init__(self, kinds: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kinds)

    async def read(self, reader: asyncio.StreamReader, peer: str) -> M | None:
        """The next message, None at the end of the stream; raises ProtocolError on anything malformed."""
        body = await read_frame(reader, peer)
        return None if body is None else self.decode(body, peer)

    def decode(self, body: bytes, peer: str) -> M:
        """Decode a frame's body; raises ProtocolError naming what does not fit."""
        try:
            return self._decoder.decode(body)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            # A tag that is not UTF-8 is a UnicodeDecodeError, which is a ValueError.
            raise ProtocolError(peer, f"malformed frame: {error}") from None


async def read_frame(reader: asyncio.StreamReader, peer: str) -> bytes | None:
    """The body of the next frame, None at the end of the stream; raises ProtocolError."""
    try:
        head = await reader.readexactly(4)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise ProtocolError(peer, "the stream ended within a frame") from None
        return None
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= MAX_FRAME:
        raise ProtocolError(peer, f"a frame of {length} bytes; allowed are 1..{MAX_FRAME}")
    try:
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        raise ProtocolError(peer, "the stream ended within a frame") from None
