"""Writes the seeds of the gateway's parsers: what programs send, what attacks send, and what is just within a bound.

    PYTHONPATH=src:. .venv/bin/python tests/fuzz/make_gateway_corpus.py   # into tests/fuzz/corpus/PARSER

The seeds are committed, beside what fuzzing has found (fuzz_gateway.py); run this again when one is added. They depend
on nothing of the machine: equal sources, equal bytes.
"""

from __future__ import annotations

from pathlib import Path

import dns.message
import dns.name
import dns.rdatatype

from tests.unit.hellos import alpn, body, chrome, hello, message, records, server_name, vector

CORPUS = Path(__file__).parent / "corpus"


def _head(*lines: str) -> bytes:
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def _query(name: str, kind: str = "A", *, edns: bool = False) -> bytes:
    query = dns.message.make_query(name, dns.rdatatype.from_text(kind), use_edns=edns, want_dnssec=edns)
    query.id = 0x1234
    return query.to_wire()


def _dns() -> dict[str, bytes]:
    plain = _query("api.github.com.")
    reverse = dns.name.from_text("2.1.18.198.in-addr.arpa.")
    return {
        "a": plain,
        "https_edns": _query("api.github.com.", "HTTPS", edns=True),
        "any": _query("example.org.", "ANY"),
        "ptr": _query(reverse.to_text(), "PTR"),
        "longest_name": _query(".".join(("a" * 63, "b" * 63, "c" * 63, "d" * 61)) + "."),
        "international": _query(".".join(["xn--mnchen-3ya"] * 8) + "."),
        "pointer_to_header": plain[:12] + b"\xc0\x00" + plain[-4:],
        "two_questions": plain[:4] + b"\0\2" + plain[6:] + plain[12:],
    }


def _hello() -> dict[str, bytes]:
    binders = (41, vector(vector(b"ticket") + bytes(4)) + vector(vector(bytes(32), 1)))
    return {
        "plain": hello(),
        "fragments": hello(fragment=7),
        "chrome": chrome(),
        "chrome_padded": chrome(ech=False),
        "no_extensions": records(message(body(None))),
        "pre_shared_key": hello(alpn(b"h2"), (42, b""), binders),
        "two_names": hello(server_name(b"other.example")),
    }


def _http_request() -> dict[str, bytes]:
    host = "Host: api.example"
    return {
        "get": _head("GET /repos/a%2Fb?q=1 HTTP/1.1", host, "Accept: */*"),
        "post": _head("POST /x HTTP/1.1", host, "Content-Length: 5", "Expect: 100-continue"),
        "chunked": _head("PUT /x HTTP/1.1", host, "Transfer-Encoding: chunked", "Connection: close, x-a", "X-A: 1"),
        "websocket": _head("GET /ws HTTP/1.1", host, "Connection: Upgrade", "Upgrade: websocket"),
        "h2c": _head(
            "GET / HTTP/1.1", host, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: A"
        ),
        "connect": _head("CONNECT [2001:db8::1]:443 HTTP/1.1", "Host: [2001:db8::1]:443"),
        "smuggling": _head("POST / HTTP/1.1", host, "Content-Length: 4", "Transfer-Encoding: chunked"),
        "folded": _head("GET /a/../%2e%2e/%252f HTTP/1.1", host, " folded: 1", "Content_Length: 4"),
    }


def _http_response() -> dict[str, bytes]:
    return {
        "ok": _head("HTTP/1.1 200 OK", "Content-Length: 5", "Content-Type: text/plain", "Alt-Svc: h3"),
        "chunked": _head("HTTP/1.1 200 ", "Transfer-Encoding: chunked", "Connection: close"),
        "interim": _head("HTTP/1.1 103 Early Hints", "Link: </a>; rel=preload"),
        "switching": _head("HTTP/1.1 101 Switching Protocols", "Connection: upgrade", "Upgrade: websocket"),
        "old": _head("HTTP/1.0 204"),
        "echo": _head(
            "HTTP/1.1 200 OK", "X-Echo: hunter2/+secret", "X-Coded: aHVudGVyMi8rc2VjcmV0, hunter2%2F%2Bsecret"
        ),
    }


def _recognise() -> dict[str, bytes]:
    return {
        "tls": hello(),
        "request": _head("GET / HTTP/1.1", "Host: a.example", "Connection: Upgrade", "Upgrade: websocket"),
        "connect": _head("CONNECT evil.test:443 HTTP/1.1"),
        "ssh": b"SSH-2.0-OpenSSH_9.2p1\r\n\0\0\5",
        "socks5": b"\5\2\0\2",
        "socks4a": b"\4\1\1\xbb\0\0\0\1\0evil.test\0",
        "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "mining": b'{"id": 1, "method": "\\u006dining.subscribe", "params": [["cgminer/4.10"]]}\n',
        "yamux": b"\0\1\0\1\0\0\0\1\0\4\0\0",
        "openvpn": b"\0\x0e\x38" + bytes(range(8)) + b"\0\0\0\0\0",
        "plain": b"EHLO a.example\r\nSTARTTLS\r\n\n\5\1\0\5\1\0\1",
    }


SEEDS = {
    "dns": _dns(),
    "hello": _hello(),
    "http_request": _http_request(),
    "http_response": _http_response(),
    "recognise": _recognise(),
}


if __name__ == "__main__":
    for parser, seeds in SEEDS.items():
        (CORPUS / parser).mkdir(parents=True, exist_ok=True)
        for name, seed in seeds.items():
            (CORPUS / parser / name).write_bytes(seed)
