"""The test CA and the certificates of the far end. Made in a few milliseconds (P-256), used for a day."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.internet.places import CERTIFIED, PLACES

DAY = datetime.timedelta(days=1)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


class Authority:
    """A CA that names what it makes; writes everything below ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("Corral test CA")
        self.certificate = self._make(self._name, self._key.public_key(), self._name, self._key, ("",), authority=True)
        self.path = directory / "ca.pem"
        self.path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _make(
        self,
        subject: x509.Name,
        public: ec.EllipticCurvePublicKey,
        issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: tuple[str, ...],
        *,
        authority: bool = False,
        age: datetime.timedelta = datetime.timedelta(hours=1),
    ) -> x509.Certificate:
        start = datetime.datetime.now(datetime.UTC) - age
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(start + DAY)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False),
                critical=True,
            )
        )
        if not authority:
            general = [x509.DNSName(name) for name in names]
            builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
            )
        return builder.sign(key, hashes.SHA256())

    def context(
        self,
        label: str,
        names: tuple[str, ...],
        alpn: tuple[str, ...] = ("http/1.1",),
        *,
        own: bool = False,
        age: datetime.timedelta = datetime.timedelta(hours=1),
        maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> ssl.SSLContext:
        """A server's context with a certificate for these names; ``own``: signed by itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(names[0])
        signer, issuer = (key, subject) if own else (self._key, self._name)
        certificate = self._make(subject, key.public_key(), issuer, signer, names, age=age)
        path = self._directory / f"{label}.pem"
        path.touch(0o600)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        context.maximum_version = maximum
        if alpn:
            context.set_alpn_protocols(list(alpn))
        (self._directory / f"{label}.sha256").write_text(certificate.fingerprint(hashes.SHA256()).hex())
        return context

    def contexts(self) -> dict[str, ssl.SSLContext]:
        """Service -> context."""
        both = ("h2", "http/1.1")
        return {
            "https": self.context("https", CERTIFIED, both),
            "https1": self.context("https1", CERTIFIED),
            "tls12": self.context("tls12", PLACES["tls12"].names, maximum=ssl.TLSVersion.TLSv1_2),
            "expired": self.context("expired", PLACES["expired"].names, age=datetime.timedelta(days=30)),
            "wrongname": self.context("wrongname", ("other.test",)),
            "selfsigned": self.context("selfsigned", PLACES["selfsigned"].names, own=True),
        }
