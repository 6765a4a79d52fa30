"""One connection, several rules: permissions and credentials are those of the request, not of its neighbours."""

from __future__ import annotations

import ssl

import pytest

from corral.actions import Endpoint, Request, Transport
from corral.gateway.authority import Authority, upstream_context
from corral.gateway.http import Ask, HttpProxy, Refused, ToClient, ToUpstream
from corral.gateway.rules import Rules
from corral.policy.load import parse_policy
from corral.policy.model import Credential, CredentialKind, Permit

TOKEN = Credential(CredentialKind.BEARER, "env:TOKEN")


def rules(text: str) -> Rules:
    return Rules(parse_policy(f"network:\n  allow: {text}\n", source="test.yaml"))


def to(name: str, port: int = 443, protocol: str = "tls") -> Endpoint:
    return Endpoint(Transport.TCP, name=name, port=port, protocol=protocol)


def test_a_credential_is_for_the_requests_of_its_rule() -> None:
    found = rules(
        """[{name: api.test, requests: ["GET /**"], credential: {type: bearer, from: "env:TOKEN"}},
            {name: api.test, requests: ["POST /graphql"]}]"""
    )
    connection = to("api.test")
    assert found.terms(connection).credential == TOKEN  # its echoes are looked for in every answer
    assert found.terms(Request(connection, "GET", "/repos")).credential == TOKEN
    assert found.terms(Request(connection, "POST", "/graphql")).credential is None


def test_two_credentials_for_one_place_are_none() -> None:
    found = rules(
        """[{name: api.test, credential: {type: bearer, from: "env:TOKEN"}},
            {name: api.test, requests: ["POST /**"], credential: {type: bearer, from: "env:OTHER"}}]"""
    )
    terms = found.terms(to("api.test"))
    assert terms.several and terms.credential is None


def test_a_permission_is_for_the_requests_of_its_rule() -> None:
    found = rules(
        """[{name: api.test, requests: ["GET /live"], permit: [websocket]}, {name: api.test, requests: ["GET /**"]}]"""
    )
    connection = to("api.test")
    assert Permit.WEBSOCKET in found.terms(Request(connection, "GET", "/live")).permit
    assert Permit.WEBSOCKET not in found.terms(Request(connection, "GET", "/else")).permit


def sent(proxy: HttpProxy, request: bytes, *, injecting: bool) -> bytes:
    [ask] = proxy.client_bytes(request)
    assert isinstance(ask, Ask)
    return b"".join(c.data for c in proxy.decided(True, injecting=injecting) if isinstance(c, ToUpstream))


@pytest.mark.parametrize("injecting", [True, False])
def test_the_secret_is_put_into_its_own_requests_only(injecting: bool) -> None:
    from corral.credentials.secret import load

    secret = load(TOKEN, {"TOKEN": "a-secret-of-some-length"})
    proxy = HttpProxy("api.test", 443, secure=True, secret=secret)
    request = b"GET / HTTP/1.1\r\nHost: api.test\r\nAccept-Encoding: gzip\r\n\r\n"
    upstream = sent(proxy, request, injecting=injecting)
    assert (b"a-secret-of-some-length" in upstream) == injecting
    assert b"identity" in upstream and b"gzip" not in upstream  # or its echo could come packed
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\na-secret-of-some-length"
    heard = b"".join(c.data for c in proxy.upstream_bytes(answer) if isinstance(c, ToClient))
    assert b"a-secret-of-some-length" not in heard


@pytest.mark.parametrize("upgrade", ["h2c", "something"])
def test_an_upgrade_does_not_hide_requests_that_are_judged(upgrade: str) -> None:
    proxy = HttpProxy("api.test", 80, secure=False, permits=tuple(Permit), judged=True)
    request = f"GET / HTTP/1.1\r\nHost: api.test\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n\r\n".encode()
    commands = proxy.client_bytes(request)
    assert any(isinstance(command, Refused) and "would hide" in command.reason for command in commands)
    assert not any(isinstance(command, Ask | ToUpstream) for command in commands)


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> str:
    """What a client and a server agree on."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    cipher = ends[0].cipher()
    return cipher[0] if cipher else ""


def test_no_handshake_over_finite_fields() -> None:
    """A hello that costs its sender nothing would hold the gateway up for a tenth of a second."""
    server = Authority().leaf("web.test")
    client = ssl.create_default_context()
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    assert handshake(client, server, "web.test")
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    client.set_ciphers("DHE")
    with pytest.raises(ssl.SSLError):
        handshake(client, server, "web.test")
    for context in (server, upstream_context()):
        assert not [each["name"] for each in context.get_ciphers() if each["name"].startswith(("DHE", "EDH"))]
