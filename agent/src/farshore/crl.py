"""Read a certificate revocation list: whom the deployment's CA has taken back (RFC 5280, section 5).

OpenSSL checks the list, and its signature, in each handshake. What it does not tell is which connections that are
open already belong to somebody who is on a new list: hence this reader of the few fields that are needed. The file
is the administrator's own; all the same it is bounded, and whatever is malformed is a CrlError.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from farshore.errors import FarshoreError

#: Bytes of a list; an entry has some 40, so that is half a million certificates.
MAX_BYTES = 20 << 20
_INTEGER, _SEQUENCE, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x02, 0x30, 0x17, 0x18, 0xA0
_TIMES = (_UTC_TIME, _GENERALIZED_TIME)


class CrlError(FarshoreError):
    """not a certificate revocation list: {0}"""


@dataclass(frozen=True, slots=True)
class Crl:
    """A list: ``issuer`` is the CA's name in DER, ``revoked`` are serial numbers.

    Outside of ``this_update`` to ``next_update`` OpenSSL accepts nobody; the latter is None when it is always good.
    """

    issuer: bytes
    this_update: datetime
    next_update: datetime | None
    revoked: frozenset[int]


def parse(pem: bytes) -> Crl:
    """The list in ``pem``, the first one if there are several; raises CrlError."""
    outer = _Der(_body(pem, b"X509 CRL"))
    listed = _Der(_Der(outer.take(_SEQUENCE)).take(_SEQUENCE))
    if listed.next == _INTEGER:
        listed.take(_INTEGER)
    listed.take(_SEQUENCE)  # the signature's algorithm
    issuer = listed.take(_SEQUENCE)
    this_update = _time(listed)
    next_update = _time(listed) if listed.next in _TIMES else None
    revoked = set()
    if listed.next == _SEQUENCE:
        entries = _Der(listed.take(_SEQUENCE))
        while entries.next is not None:
            revoked.add(int.from_bytes(_Der(entries.take(_SEQUENCE)).take(_INTEGER), signed=True))
    return Crl(issuer, this_update, next_update, frozenset(revoked))


def subject(pem: bytes) -> bytes:
    """The name, in DER, that the first certificate in ``pem`` was made for; raises CrlError."""
    certificate = _Der(_Der(_Der(_body(pem, b"CERTIFICATE")).take(_SEQUENCE)).take(_SEQUENCE))
    if certificate.next == _VERSION:
        certificate.take(_VERSION)
    certificate.take(_INTEGER)
    for _ in ("algorithm", "issuer", "validity"):
        certificate.take(_SEQUENCE)
    return certificate.take(_SEQUENCE)


def _body(pem: bytes, kind: bytes) -> bytes:
    if len(pem) > MAX_BYTES:
        raise CrlError(f"{len(pem)} bytes; allowed are {MAX_BYTES}")
    found = re.search(b"-----BEGIN " + kind + b"-----(.*?)-----END " + kind + b"-----", pem, re.DOTALL)
    if found is None:
        raise CrlError(f"there is no {kind.decode()} in PEM")
    try:
        return base64.b64decode(b"".join(found[1].split()), validate=True)
    except binascii.Error as error:
        raise CrlError(str(error)) from None


def _time(der: _Der) -> datetime:
    """UTCTime has two digits for the year, 50 to 49 being 1950 to 2049 (RFC 5280, section 4.1.2.5.1)."""
    tag = der.next
    text = der.take(*_TIMES).decode("ascii", "replace")
    try:
        when = datetime.strptime(text, "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise CrlError(f"{text!r} is not a time") from None
    return when.replace(year=when.year - 100) if tag == _UTC_TIME and when.year >= 2050 else when


class _Der:
    """The elements of a piece of DER, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def next(self) -> int | None:
        """The tag of the next element, None at the end."""
        return self._data[self._at] if self._at < len(self._data) else None

    def take(self, *tags: int) -> bytes:
        """The content of the next element, which has one of ``tags``; raises CrlError."""
        if self.next not in tags:
            raise CrlError(f"tag {self.next} where {' or '.join(map(str, tags))} belongs")
        at = self._at + 2
        length = self._data[at - 1] if at <= len(self._data) else -1
        if length >= 0x80:
            size = length & 0x7F
            length = (
                int.from_bytes(self._data[at : at + size]) if 0 < size <= 4 and at + size <= len(self._data) else -1
            )
            at += size
        if length < 0 or at + length > len(self._data):
            raise CrlError("it is cut short")
        self._at = at + length
        return self._data[at : self._at]
