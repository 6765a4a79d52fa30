"""The authority of a sandbox: clients that trust it take its leaves, for their name, and nobody else does."""

from __future__ import annotations

import datetime
import gc
import os
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import pkcs12

from corral.gateway import authority
from corral.gateway.authority import Authority, environment, upstream_context

SOME_CA = Authority().pem


def trusting(pem: bytes, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=pem.decode())
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """The client's end after it. Raises ssl.SSLError of the side that gives up."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(down, up, server_hostname=name)
    other = server.wrap_bio(up, down, server_side=True)
    done = set()
    for _ in range(10):
        for end in (one, other):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
        if len(done) == 2:
            return one
    raise AssertionError("the handshake does not come to its end")


@pytest.mark.parametrize(
    "name",
    ["web.test", "xn--mnchen-3ya.de", "a_b.test", "a" * 60 + "." + "b" * 60 + ".test", "203.0.113.7", "2001:db8::7"],
)
def test_a_client_that_trusts_the_authority_takes_the_leaf(name: str) -> None:
    made = Authority()
    client = handshake(trusting(made.pem, ("h2", "http/1.1")), made.leaf(name), name)
    assert client.selected_alpn_protocol() == "http/1.1"
    assert client.version() == "TLSv1.3"


def test_a_leaf_is_for_its_name_only() -> None:
    made = Authority()
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(trusting(made.pem), made.leaf("web.test"), "api.test")


def test_no_sandbox_trusts_another_ones_authority() -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(trusting(Authority().pem), Authority().leaf("web.test"), "web.test")


def test_old_tls_is_not_spoken() -> None:
    made = Authority()
    client = trusting(made.pem)
    client.set_ciphers("DEFAULT@SECLEVEL=0")
    client.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning):
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        handshake(client, made.leaf("web.test"), "web.test")
    assert upstream_context().minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_leaf_cannot_sign_and_the_authority_signs_no_other_authority() -> None:
    made = Authority()
    (own,) = x509.load_pem_x509_certificates(made.pem)
    constraints = own.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    der = handshake(trusting(made.pem), made.leaf("web.test"), "web.test").getpeercert(binary_form=True)
    assert der is not None
    leaf = x509.load_der_x509_certificate(der)
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    assert leaf.not_valid_after_utc <= own.not_valid_after_utc
    leaf.verify_directly_issued_by(own)
    now = datetime.datetime.now(datetime.UTC)
    assert own.not_valid_before_utc < now
    assert own.not_valid_after_utc - now <= datetime.timedelta(days=7)


def test_an_authority_out_of_its_time_is_not_trusted() -> None:
    made = Authority(valid=datetime.timedelta(minutes=-1))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(trusting(made.pem), made.leaf("web.test"), "web.test")


def test_leaves_are_kept_but_not_without_end() -> None:
    made = Authority()
    first = made.leaf("first.test")
    assert made.leaf("first.test") is first
    for i in range(authority.MAX_LEAVES - 1):
        made.leaf(f"n{i}.test")
    assert made.leaf("first.test") is first
    made.leaf("one-more.test")
    assert made.leaf("first.test") is first  # it was used, so another one went
    made.leaf("n0.test")
    assert len(made._contexts) == authority.MAX_LEAVES


def test_no_key_is_left_in_a_descriptor_or_shown() -> None:
    made = Authority()
    before = set(os.listdir("/proc/self/fd"))
    made.leaf("web.test")
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before
    assert b"PRIVATE" not in made.pem + made.bundle() + repr(made).encode()


def test_the_bundle_holds_the_authority_and_the_systems(tmp_path: Path) -> None:
    system = tmp_path / "system.pem"
    system.write_bytes(SOME_CA.rstrip(b"\n"))
    made = Authority()
    assert made.bundle(system) == made.pem + SOME_CA
    certificates = x509.load_pem_x509_certificates(made.bundle(system))
    assert len(certificates) == 2
    handshake(trusting(made.bundle(system)), made.leaf("web.test"), "web.test")


@pytest.mark.parametrize("content", [b"", b"no certificate", SOME_CA + b"-----BEGIN PRIVATE KEY-----\n"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, content: bytes) -> None:
    system = tmp_path / "system.pem"
    system.write_bytes(content)
    with pytest.raises(ValueError, match="not a bundle"):
        Authority().bundle(system)


def test_a_bundle_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Authority().bundle(tmp_path / "none")


def test_without_a_system_bundle_the_authority_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "BUNDLES", ("/nowhere/ca.pem",))
    made = Authority()
    assert made.bundle() == made.pem


def test_the_variables_name_the_bundle() -> None:
    variables = environment("/run/corral/ca.pem")
    assert set(variables.values()) == {"/run/corral/ca.pem"}
    assert {"SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO", "PIP_CERT"} <= set(variables)
    java = environment("/a", "/run/corral/ca.p12")["JAVA_TOOL_OPTIONS"]
    assert "-Djavax.net.ssl.trustStore=/run/corral/ca.p12 " in java


def test_the_trust_store_of_java(tmp_path: Path) -> None:
    system = tmp_path / "system.pem"
    system.write_bytes(SOME_CA)
    store = Authority().truststore(system)
    assert len(pkcs12.load_pkcs12(store, b"changeit").additional_certs) == 2
    keytool = shutil.which("keytool")
    if keytool is not None:
        (tmp_path / "ca.p12").write_bytes(store)
        listed = subprocess.run(
            [keytool, "-list", "-keystore", tmp_path / "ca.p12", "-storepass", "changeit"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert listed.count("trustedCertEntry") == 2


# ---- towards the server ----


def test_the_server_is_verified_for_its_name(tmp_path: Path) -> None:
    made = Authority()
    cafile = tmp_path / "ca.pem"
    cafile.write_bytes(made.pem)
    context = upstream_context(str(cafile))
    assert handshake(context, made.leaf("web.test"), "web.test").selected_alpn_protocol() == "http/1.1"
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(context, made.leaf("api.test"), "web.test")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(context, Authority().leaf("web.test"), "web.test")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(upstream_context(), made.leaf("web.test"), "web.test")


def test_no_keys_of_sessions_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    made = Authority()
    cafile = tmp_path / "ca.pem"
    cafile.write_bytes(made.pem)
    handshake(upstream_context(str(cafile)), made.leaf("web.test"), "web.test")
    assert not log.exists()


def test_a_ca_file_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"x")
    for name in (file, tmp_path / "none"):
        with pytest.raises(OSError):
            upstream_context(str(name))


def test_the_key_of_a_leaf_is_not_that_of_the_authority() -> None:
    made = Authority()
    der = handshake(trusting(made.pem), made.leaf("web.test"), "web.test").getpeercert(binary_form=True)
    assert der is not None
    (own,) = x509.load_pem_x509_certificates(made.pem)
    encode = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    leaf_key = x509.load_der_x509_certificate(der).public_key()
    assert leaf_key.public_bytes(*encode) != own.public_key().public_bytes(*encode)
