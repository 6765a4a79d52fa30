"""The certificates of hosts whose TLS is ended at the gateway, and the trust in them inside.

Each sandbox has an authority of its own that lives as long as its gateway: no other sandbox and nothing on the host
trusts it, and its private key is nowhere but in this process. Keys of leaves pass through a file without a name
(memfd_create(2)), because the ssl module reads them from nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import ssl
import warnings
from collections import OrderedDict
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = datetime.timedelta(days=7)
"""How long an authority and its leaves are good; a sandbox that lives longer must be given another."""
EARLIER = datetime.timedelta(hours=1)
"""Clocks inside and outside are one, but what is made now must not be of the future to anybody."""
MAX_LEAVES = 256
MAX_COMMON_NAME = 64
"""Characters; RFC 5280, appendix A.1 (ub-common-name)."""
MAX_BUNDLE = 8 * 1024 * 1024
PASSWORD = "changeit"  # noqa: S105 - what Java expects; the store holds nothing secret
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Where systems keep what they trust: Debian and Arch, Fedora, SUSE, Alpine."""

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL, so Python's ssl, Ruby, Rust's native-certs; Go
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "DENO_CERT",
    "CARGO_HTTP_CAINFO",
)


class Authority:
    """The authority of one sandbox. For one thread."""

    def __init__(self, *, valid: datetime.timedelta = VALID) -> None:
        self._from = datetime.datetime.now(datetime.UTC) - EARLIER
        self._until = self._from + EARLIER + valid
        self._key = ec.generate_private_key(ec.SECP256R1())
        # All leaves share a key: they are for one party, and each differs in nothing but the name.
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: OrderedDict[str, ssl.SSLContext] = OrderedDict()
        serial = x509.random_serial_number()
        self._name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"Corral sandbox {serial:x}"[:MAX_COMMON_NAME])]
        )
        public = self._key.public_key()
        self._certificate = (
            self._builder(self._name, public, serial)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def __repr__(self) -> str:
        return f"Authority({self._name.rfc4514_string()})"

    @property
    def pem(self) -> bytes:
        """Its own certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def leaf(self, name: str) -> ssl.SSLContext:
        """The server's side of TLS for a canonical name, or an address in canonical text. HTTP/1.1 is all it speaks."""
        context = self._contexts.get(name)
        if context is None:
            context = _server_context(self._leaf_key, self._issue(name))
            self._contexts[name] = context
            if len(self._contexts) > MAX_LEAVES:
                self._contexts.popitem(last=False)
        else:
            self._contexts.move_to_end(name)
        return context

    def _issue(self, name: str) -> x509.Certificate:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        shown = name if len(name) <= MAX_COMMON_NAME else name[-MAX_COMMON_NAME:].partition(".")[2]
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, shown or "corral")])
        return (
            self._builder(subject, self._leaf_key.public_key(), x509.random_serial_number())
            .add_extension(x509.SubjectAlternativeName([_general_name(name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _builder(self, subject: x509.Name, public: ec.EllipticCurvePublicKey, serial: int) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(serial)
            .not_valid_before(self._from)
            .not_valid_after(self._until)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )

    # ---- trust inside ----

    def bundle(self, system: str | os.PathLike[str] | None = None) -> bytes:
        """This authority and all that the system trusts, in PEM. ``system`` is the system's bundle; None looks at the
        usual places, and where there is none, the authority is alone.

        Raises OSError where ``system`` cannot be read, ValueError where it is no bundle.
        """
        found = _read_bundle(Path(system)) if system is not None else _first_bundle()
        return self.pem + found

    def truststore(self, system: str | os.PathLike[str] | None = None) -> bytes:
        """The same for Java: PKCS #12 with the password ``changeit``. Raises as :meth:`bundle`."""
        certificates = _certificates(self.bundle(system))
        named = [pkcs12.PKCS12Certificate(each, f"{i}".encode()) for i, each in enumerate(certificates)]
        encryption = (
            serialization.PrivateFormat.PKCS12.encryption_builder()
            .kdf_rounds(10_000)
            .key_cert_algorithm(pkcs12.PBES.PBESv2SHA256AndAES256CBC)
            .hmac_hash(hashes.SHA256())
            .build(PASSWORD.encode())
        )
        return pkcs12.serialize_java_truststore(named, encryption)


def _certificates(bundle: bytes) -> list[x509.Certificate]:
    """Those of a bundle that can be read: systems carry some that are older than the rules."""
    found = []
    with warnings.catch_warnings(action="ignore"):
        for block in _PEM.findall(bundle):
            with contextlib.suppress(ValueError):
                found.append(x509.load_pem_x509_certificate(block))
    return found


def environment(path: str, truststore: str | None = None) -> dict[str, str]:
    """The variables by which programs inside find the bundle at ``path``, and Java its trust store.

    The JVM says on standard error that it picked ``JAVA_TOOL_OPTIONS`` up, so there is one only where asked for.
    """
    variables = dict.fromkeys(_VARIABLES, path)
    if truststore is not None:
        store = f"-Djavax.net.ssl.trustStore={truststore} -Djavax.net.ssl.trustStoreType=PKCS12"
        variables["JAVA_TOOL_OPTIONS"] = f"{store} -Djavax.net.ssl.trustStorePassword={PASSWORD}"
    return variables


def upstream_context(cafile: str | None = None) -> ssl.SSLContext:
    """The client's side of TLS towards the real server: its certificate is verified for the name given to
    ``wrap_bio(server_hostname=...)``, against ``cafile`` or what the host trusts. Takes milliseconds: keep it.

    Raises OSError where ``cafile`` cannot be read or holds no certificate (ssl.SSLError).
    """
    # Not create_default_context(): that writes session keys where SSLKEYLOGFILE says.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if cafile is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        context.load_verify_locations(cafile=cafile)
    return _hardened(context)


def _server_context(key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    unencrypted = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, unencrypted)
    with os.fdopen(os.memfd_create("corral-leaf", os.MFD_CLOEXEC), "wb") as file:
        file.write(pem + certificate.public_bytes(serialization.Encoding.PEM))
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0  # resumption would outlive what was checked of the first hello
    return _hardened(context)


def _hardened(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # One group that everybody has, and no finite fields: a handshake over ffdhe8192, which costs the other end nothing,
    # takes a tenth of a second here, in which nobody else is served.
    context.set_ecdh_curve("prime256v1")
    context.set_ciphers("DEFAULT:!DHE:!kRSA:!PSK")
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    return context


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _first_bundle() -> bytes:
    for place in BUNDLES:
        with contextlib.suppress(OSError, ValueError):
            return _read_bundle(Path(place))
    return b""


def _read_bundle(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(MAX_BUNDLE + 1)
    if len(data) > MAX_BUNDLE or b"-----BEGIN CERTIFICATE-----" not in data or b"PRIVATE KEY" in data:
        raise ValueError(f"{path} is not a bundle of certificates")
    return data if data.endswith(b"\n") else data + b"\n"
