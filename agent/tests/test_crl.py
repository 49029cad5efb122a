"""The reader of revocation lists, against the library that writes them."""

from __future__ import annotations

import contextlib
import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore import crl
from farshore.crl import CrlError

KEY = ec.generate_private_key(ec.SECP256R1())
NAME = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
SERIALS = st.integers(1, (1 << 159) - 1)
TIMES = st.datetimes(datetime.datetime(1960, 1, 1), datetime.datetime(2090, 1, 1)).map(
    lambda t: t.replace(microsecond=0)
)


def made(serials: set[int], first: datetime.datetime, then: datetime.datetime) -> bytes:
    builder = x509.CertificateRevocationListBuilder().issuer_name(NAME).last_update(first).next_update(then)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(first)
        entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags.key_compromise), False)
        builder = builder.add_revoked_certificate(entry.build())
    builder = builder.add_extension(x509.CRLNumber(7), False)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


PLAIN = made({1, 255, 1 << 128}, datetime.datetime(2026, 1, 1), datetime.datetime(2036, 1, 1))


@settings(max_examples=60, deadline=None)
@given(st.sets(SERIALS, max_size=20), TIMES, TIMES)
def test_what_is_written_is_read(serials: set[int], one: datetime.datetime, two: datetime.datetime) -> None:
    first, then = sorted((one, two + datetime.timedelta(seconds=1)))
    if first == then:
        return
    found = crl.parse(b"some words before\n" + made(serials, first, then))
    assert found.revoked == serials
    assert found.issuer == NAME.public_bytes()[-len(found.issuer) :]
    assert found.this_update == first.replace(tzinfo=datetime.UTC)
    assert found.next_update == then.replace(tzinfo=datetime.UTC)


def test_the_name_of_a_certificate_is_that_of_its_list() -> None:
    now = datetime.datetime(2026, 1, 1)
    builder = x509.CertificateBuilder().subject_name(NAME).issuer_name(NAME).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now.replace(year=2030))
    pem = builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    assert crl.subject(pem) == crl.parse(PLAIN).issuer
    with pytest.raises(CrlError, match="no X509 CRL"):
        crl.parse(pem)
    with pytest.raises(CrlError, match="no CERTIFICATE"):
        crl.subject(PLAIN)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_damaged_list_is_an_error_of_ours(data: st.DataObject) -> None:
    lines = PLAIN.splitlines()
    import base64

    body = bytearray(base64.b64decode(b"".join(lines[1:-1])))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    with contextlib.suppress(CrlError):
        crl.parse(b"-----BEGIN X509 CRL-----\n" + base64.b64encode(body) + b"\n-----END X509 CRL-----")


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_ours(data: bytes) -> None:
    for pem in (data, b"-----BEGIN X509 CRL-----" + data + b"-----END X509 CRL-----"):
        with pytest.raises(CrlError):
            crl.parse(pem)


def test_a_list_without_end_is_not_read() -> None:
    with pytest.raises(CrlError, match="allowed are"):
        crl.parse(bytes(crl.MAX_BYTES + 1))
