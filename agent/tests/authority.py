"""For tests: a certificate authority in a directory, laid out as that of ``farshore mirror``; it takes back, too."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from farshore.config import Tls

DAY = datetime.timedelta(days=1)


class Authority:
    """``ca.crt``, ``ca.crl``, and for each name its ``.crt`` and ``.key``."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self._serials: dict[str, int] = {}
        own = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        constraints = x509.BasicConstraints(True, 0)
        certificate = self._certificate(self._name, self._key, (constraints, True), (own, False), (usage, True))
        self._write("ca.crt", certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, dns: str | None = None) -> Tls:
        """Give ``name`` a certificate, anew if it has one; ``dns`` is what it says, if that is another name."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.DNSName(name if dns is None else dns)] if dns != "" else []
        alternatives = x509.SubjectAlternativeName([*names, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        constraints = x509.BasicConstraints(False, None)
        made = self._certificate(_name(name), key, (constraints, True), (alternatives, False), (issuer, False))
        self._serials[name] = made.serial_number
        self._write(f"{name}.crt", made.public_bytes(serialization.Encoding.PEM))
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        self._write(f"{name}.key", key.private_bytes(serialization.Encoding.PEM, *form))
        return self.tls(name)

    def tls(self, name: str, crl: bool = True) -> Tls:
        """The files of ``name``."""
        at = self.directory
        return Tls(at / "ca.crt", at / f"{name}.crt", at / f"{name}.key", at / "ca.crl" if crl else None)

    def revoke(self, *names: str, days: float = 3650) -> None:
        """Write a list with the present certificates of ``names`` on it, and nobody else's; good for ``days``."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._name)
            .last_update(now - DAY)
            .next_update(now + days * DAY)
        )
        for name in names:
            entry = x509.RevokedCertificateBuilder().serial_number(self._serials[name]).revocation_date(now)
            builder = builder.add_revoked_certificate(entry.build())
        self._write("ca.crl", builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: tuple[x509.ExtensionType, bool]
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + 10 * DAY)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> None:
        # As Ansible does it: nobody reads half of it.
        new = self.directory / f".{name}.new"
        new.write_bytes(data)
        os.replace(new, self.directory / name)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
