"""Queries as hostile clients send them, and answers as clients read them (dnspython is the other side)."""

from __future__ import annotations

import itertools
import struct

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from corral.gateway.dns import (
    MAX_DATAGRAM,
    MAX_REASON,
    MAX_STREAM,
    NEGATIVE_TTL,
    TTL,
    Frames,
    FramingError,
    Malformed,
    Outcome,
    Question,
    answer,
    frame,
    read,
    reversed_address,
)
from corral.gateway.names import Names, Pair
from corral.policy.names import canonical_name

PAIR = Pair(bytes((198, 18, 1, 1)), bytes.fromhex("fd636f7272616c00 0000000000010001"))
LONGEST = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])


def query(name: str, kind: str = "A", **options: object) -> bytes:
    return dns.message.make_query(name, kind, id=0x1234, **options).to_wire()  # type: ignore[arg-type]


def wire(*labels: bytes) -> bytes:
    return b"".join(bytes((len(label),)) + label for label in labels) + b"\0"


def message(
    name: bytes = wire(b"a", b"example"),
    tail: bytes = b"\0\1\0\1",
    *,
    flags: int = 0x0100,
    counts: tuple[int, int, int, int] = (1, 0, 0, 0),
    more: bytes = b"",
) -> bytes:
    return struct.pack("!HHHHHH", 0x1234, flags, *counts) + name + tail + more


def opt(ttl: int = 0, data: bytes = b"", *, owner: bytes = b"\0", kind: int = 41, length: int | None = None) -> bytes:
    return owner + struct.pack("!HHIH", kind, 1232, ttl, len(data) if length is None else length) + data


def question(data: bytes, limit: int = MAX_DATAGRAM) -> Question:
    result = read(data, limit=limit)
    assert isinstance(result, Question), result
    return result


def malformed(data: bytes, limit: int = MAX_DATAGRAM) -> Malformed:
    result = read(data, limit=limit)
    assert isinstance(result, Malformed), result
    return result


# ---- queries ----


@pytest.mark.parametrize("kind", ["A", "AAAA", "TXT", "MX", "HTTPS", "SVCB", "SRV", "PTR", "ANY", "NULL", "TYPE65280"])
@pytest.mark.parametrize("edns", [{}, {"use_edns": 0}, {"use_edns": 0, "want_dnssec": True}])
def test_a_query_is_read(kind: str, edns: dict[str, object]) -> None:
    data = query("WwW.eXample.org", kind, **edns)
    read_ = question(data)
    assert (read_.id, read_.name, read_.reason, read_.kind) == (
        0x1234,
        "www.example.org",
        "",
        dns.rdatatype.from_text(kind),
    )
    assert read_.shown == "www.example.org"
    assert b"\3WwW\7eXample\3org\0" in read_.raw
    assert (read_.edns, read_.dnssec) == (bool(edns), "want_dnssec" in edns)


def test_options_of_edns_are_not_looked_at() -> None:
    options = [
        dns.edns.GenericOption(dns.edns.OptionType.make(number), b"x" * 4) for number in (3, 8, 10, 12, 15, 65001)
    ]
    assert question(query("a.example", use_edns=0, options=options)).name == "a.example"
    assert question(message(counts=(1, 0, 0, 1), more=opt(data=b"\xff\xff\xff"))).edns


NO_NAMES = {
    wire(b"a.b", b"example"): "dot within",
    wire(b"evil.test", b"allowed", b"example"): "dot within",
    wire(b"a\0b", b"example"): "cannot be part",
    wire(b"allowed", b"example\0"): "cannot be part",
    wire(b"a b"): "cannot be part",
    wire(b"\xc3\xbc", b"example"): "no ASCII",
    wire(b"\xff"): "no ASCII",
    wire(b"user@host", b"example"): "without the user",
    wire(b"*", b"example"): "everything below",
    wire(b"-a", b"example"): "begins nor ends",
    wire(b"127", b"1"): "ends in a number",
    wire(b"0x7f000001"): "ends in a number",
    wire(b"2130706433"): "ends in a number",
    wire(b"127", b"0", b"0", b"1"): "ends in a number",
    wire(b"xn--a"): "international",
    wire(b"xn--\x80"): "no ASCII",
    wire(b"a\n", b"example"): "cannot be part",
    wire(b"\x1b[2J", b"example"): "cannot be part",
    wire(): "is empty",
    wire(*[b"xn--zca"] * 31): "more than 8 international",
    wire(*[b"XN--zca"] * 9): "more than 8 international",
}


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_without_one_form_is_no_name_and_gets_no_address(name: bytes) -> None:
    read_ = question(message(name))
    assert read_.name is None
    assert NO_NAMES[name] in read_.reason
    assert read_.shown.isascii() and read_.shown.isprintable()
    reply = dns.message.from_wire(answer(read_, PAIR, Outcome.ADDRESS))
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert not reply.answer


def test_what_is_shown_of_a_hostile_name_is_escaped_and_cut() -> None:
    shown = question(message(wire(b"\x1b" * 63, b"\r\n" * 30, b"\xff" * 63))).shown
    assert shown.startswith("\\027\\027")
    assert shown.endswith("...")
    assert len(shown) <= 123


def test_some_international_parts_are_read() -> None:
    assert question(message(wire(*[b"XN--zca"] * 8))).name == ".".join(["xn--zca"] * 8)


def test_the_longest_name_is_read_and_answered_within_a_datagram() -> None:
    read_ = question(query(LONGEST, "HTTPS", use_edns=0, want_dnssec=True))
    assert read_.name == LONGEST
    for outcome in Outcome:
        assert len(answer(read_, PAIR, outcome, reason="\U0001f512" * 500)) <= MAX_DATAGRAM


FORMERR, NOTIMP, REFUSED = 1, 4, 5
MALFORMED = {
    "two questions": (message(counts=(2, 0, 0, 0), more=wire(b"b") + b"\0\1\0\1"), FORMERR),
    "two questions, one there": (message(counts=(2, 0, 0, 0)), FORMERR),
    "no question": (message(b"", b"", counts=(0, 0, 0, 0)), FORMERR),
    "no question, EDNS": (message(b"", b"", counts=(0, 0, 0, 1), more=opt()), FORMERR),
    "an answer section": (message(counts=(1, 1, 0, 0), more=opt()), FORMERR),
    "an authority section": (message(counts=(1, 0, 1, 0), more=opt()), FORMERR),
    "an answer that is not there": (message(counts=(1, 1, 0, 0)), FORMERR),
    "an authority that is not there": (message(counts=(1, 0, 1, 0)), FORMERR),
    "OPT with a byte for a name": (message(counts=(1, 0, 0, 1), more=opt(owner=b"\1")), FORMERR),
    "two OPT": (message(counts=(1, 0, 0, 2), more=opt() + opt()), FORMERR),
    "65535 of each": (message(counts=(65535, 65535, 65535, 65535)), FORMERR),
    "OPT that is not there": (message(counts=(1, 0, 0, 1)), FORMERR),
    "OPT cut off": (message(counts=(1, 0, 0, 1), more=opt()[:-1]), FORMERR),
    "OPT longer than the message": (message(counts=(1, 0, 0, 1), more=opt(length=1)), FORMERR),
    "OPT shorter than the message": (message(counts=(1, 0, 0, 1), more=opt(data=b"abcd", length=3)), FORMERR),
    "OPT with a name": (message(counts=(1, 0, 0, 1), more=opt(owner=b"\1a\0")), FORMERR),
    "OPT with a pointer": (message(counts=(1, 0, 0, 1), more=opt(owner=b"\xc0\x0c")), FORMERR),
    "TSIG": (message(counts=(1, 0, 0, 1), more=opt(kind=250)), FORMERR),
    "an address record": (message(counts=(1, 0, 0, 1), more=opt(kind=1, data=b"abcd")), FORMERR),
    "bytes behind the question": (message(more=b"\0"), FORMERR),
    "data behind the question": (message(more=b"secret" * 40), FORMERR),
    "OPT that is not counted": (message(more=opt()), FORMERR),
    "truncated": (message(flags=0x0300), FORMERR),
    "inverse query": (message(flags=1 << 11), NOTIMP),
    "status": (message(flags=2 << 11), NOTIMP),
    "notify": (message(flags=4 << 11), NOTIMP),
    "update": (message(flags=5 << 11), NOTIMP),
    "stateful": (message(flags=6 << 11), NOTIMP),
    "class CH": (message(tail=b"\0\x10\0\3"), REFUSED),
    "class ANY": (message(tail=b"\0\1\0\xff"), REFUSED),
    "class 0": (message(tail=b"\0\1\0\0"), REFUSED),
    "class IN with a bit of mDNS": (message(tail=b"\0\1\x80\1"), REFUSED),
    "AXFR": (message(tail=b"\0\xfc\0\1"), NOTIMP),
    "IXFR": (message(tail=b"\0\xfb\0\1"), NOTIMP),
    "MAILB": (message(tail=b"\0\xfd\0\1"), NOTIMP),
    "type 0": (message(tail=b"\0\0\0\1"), NOTIMP),
    "type OPT": (message(tail=b"\0\x29\0\1"), NOTIMP),
    "type TSIG": (message(tail=b"\0\xfa\0\1"), NOTIMP),
    "name that points to itself": (message(b"\xc0\x0c"), FORMERR),
    "name that points forward": (message(b"\xc0\x10"), FORMERR),
    "name that points into the header": (message(b"\1a\xc0\x04"), FORMERR),
    "name that points at the identifier": (message(b"\xc0\x00"), FORMERR),
    "name that is a pointer cut off": (message(b"\xc0", b""), FORMERR),
    "name of 256 bytes": (message(wire(*[b"a" * 63] * 3, b"a" * 62)), FORMERR),
    "name of 500 bytes": (message(wire(*[b"a"] * 245)), FORMERR),
    "extended label": (message(b"\x41\x01a\0"), FORMERR),
    "label of 64": (message(b"\x40" + b"a" * 64 + b"\0"), FORMERR),
    "label of 128": (message(b"\x80" + b"a" * 128 + b"\0"), FORMERR),
    "name without an end": (message(b"\1a\1b", b""), FORMERR),
    "label cut off": (message(b"\x3fabc", b""), FORMERR),
    "question without a class": (message(tail=b"\0\1"), FORMERR),
    "header only": (message(b"", b""), FORMERR),
    "too long": (message(more=bytes(MAX_DATAGRAM)), FORMERR),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_query_gets_its_error_and_nothing_else(what: str) -> None:
    data, code = MALFORMED[what]
    result = malformed(data)
    assert result.reason
    identifier, flags, questions, *counts = struct.unpack_from("!HHHHHH", result.reply)
    assert identifier == 0x1234
    assert flags & 0xF == code
    assert flags & 0x8000
    assert flags >> 11 & 0xF == data[2] >> 3 & 0xF
    assert counts == [0, 0, 0]
    assert result.reply[12:] == (data[12 : len(result.reply)] if questions else b"")
    reply = dns.message.from_wire(result.reply)  # a client can read it
    assert not reply.sections[1] and not reply.sections[2]


def test_another_version_of_edns_is_answered_with_ours() -> None:
    result = malformed(message(counts=(1, 0, 0, 1), more=opt(ttl=1 << 16)))
    reply = dns.message.from_wire(result.reply)
    assert (reply.rcode(), reply.edns) == (dns.rcode.BADVERS, 0)
    assert str(reply.question[0].name) == "a.example."


@pytest.mark.parametrize("data", [b"", b"\0", message()[:11], message(flags=0x8100), message(flags=0x8000 | 5 << 11)])
def test_what_is_no_query_is_not_answered(data: bytes) -> None:
    assert malformed(data).reply == b""


def test_an_error_is_never_a_query_and_so_never_answered() -> None:
    for data, _ in MALFORMED.values():
        assert malformed(malformed(data).reply).reply == b""


def test_the_limit_is_that_of_the_transport() -> None:
    padded = message(counts=(1, 0, 0, 1), more=opt(data=bytes(MAX_DATAGRAM)))
    assert "longer than 512" in malformed(padded).reason
    longest = message(counts=(1, 0, 0, 1), more=opt(data=bytes(MAX_DATAGRAM - len(message()) - len(opt()))))
    assert len(longest) == MAX_DATAGRAM and question(longest).name == "a.example"
    assert malformed(message(more=bytes(MAX_DATAGRAM + 1 - len(message())))).reason == "is longer than 512 bytes"
    assert question(padded, MAX_STREAM).name == "a.example"
    assert malformed(padded + bytes(MAX_STREAM), MAX_STREAM).reply[3] & 0xF == FORMERR


NAMES = st.lists(st.binary(min_size=1, max_size=20), max_size=12).map(lambda labels: wire(*labels))
PIECES = st.one_of(
    st.binary(max_size=40), NAMES, st.sampled_from([b"\xc0\x0c", b"\xc0\x00", b"\0", opt(), b"\0\1\0\1"])
)


@given(
    st.one_of(
        st.binary(max_size=600),
        st.builds(
            lambda flags, counts, pieces: struct.pack("!HHHHHH", 1, flags, *counts) + b"".join(pieces),
            st.sampled_from([0, 0x0100, 0x0130, 0x0300, 0x8000, 0x2800]) | st.integers(0, 0xFFFF),
            st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 1), st.integers(0, 2)),
            st.lists(PIECES, max_size=6),
        ),
        st.builds(
            lambda name, tail, more: message(name, tail, counts=(1, 0, 0, 1 if more else 0), more=more),
            NAMES,
            st.sampled_from([b"\0\1\0\1", b"\0\x1c\0\1", b"\0\xff\0\1", b"\0\x0c\0\1"]),
            st.sampled_from([b"", opt(), opt(ttl=0x8000)]),
        ),
    )
)
@example(message())
@example(message(wire(b"a.b")))
def test_any_bytes_are_read_and_what_is_read_dnspython_reads_the_same(data: bytes) -> None:
    result = read(data)
    if isinstance(result, Malformed):
        assert result.reason
        assert len(result.reply) <= MAX_DATAGRAM
        if result.reply:
            dns.message.from_wire(result.reply, question_only=True)
        return
    reference = dns.message.from_wire(data, question_only=True)
    asked = reference.question[0]
    assert asked.rdtype == result.kind
    assert asked.rdclass == 1
    assert (asked.name.to_wire() or b"") + data[len(result.raw) + 8 : len(result.raw) + 12] == result.raw
    if result.name is not None:
        assert canonical_name(result.name) == result.name
        assert dns.name.from_text(result.name) == asked.name
    for outcome in Outcome:
        reply = dns.message.from_wire(answer(result, PAIR, outcome, pointer="a.example", reason="x"))
        assert reply.id == result.id
        assert reply.question[0].name == asked.name
        assert not reply.answer or (outcome is Outcome.ADDRESS and result.name is not None)


@given(st.binary(max_size=600), st.integers(0, 700))
def test_a_query_that_is_cut_off_is_never_read(more: bytes, cut: int) -> None:
    whole = message(counts=(1, 0, 0, 1), more=opt(data=more[:400]))
    cut = min(cut, len(whole) - 1)
    assert isinstance(read(whole[:cut]), Malformed)


# ---- answers ----


def answered(data: bytes, outcome: Outcome, **options: str) -> dns.message.QueryMessage:
    reply = dns.message.from_wire(answer(question(data), PAIR, outcome, **options))
    assert isinstance(reply, dns.message.QueryMessage)
    assert dns.message.from_wire(data).is_response(reply)
    assert reply.flags & (dns.flags.AA | dns.flags.RA) == dns.flags.AA | dns.flags.RA
    assert not reply.flags & (dns.flags.TC | dns.flags.AD)
    return reply


def texts(reply: dns.message.QueryMessage) -> list[str]:
    assert not reply.authority
    return [f"{rrset.ttl} {rrset[0].to_text()}" for rrset in reply.answer]


@pytest.mark.parametrize("edns", [{}, {"use_edns": 0}])
def test_addresses_are_given_for_the_type_asked_for(edns: dict[str, object]) -> None:
    assert texts(answered(query("a.example", "A", **edns), Outcome.ADDRESS)) == [f"{TTL} 198.18.1.1"]
    assert texts(answered(query("a.example", "AAAA", **edns), Outcome.ADDRESS)) == [f"{TTL} fd63:6f72:7261:6c00::1:1"]


def test_the_case_of_letters_comes_back() -> None:
    data = query("A.eXaMPLe")
    reply = answer(question(data), PAIR, Outcome.ADDRESS)
    assert reply[12 : len(data)] == data[12:]
    assert str(dns.message.from_wire(reply).answer[0].name) == "A.eXaMPLe."


@pytest.mark.parametrize(
    "kind", ["HTTPS", "SVCB", "TXT", "MX", "NULL", "SRV", "NS", "SOA", "CNAME", "PTR", "TYPE65280"]
)
@pytest.mark.parametrize("outcome", [Outcome.ADDRESS, Outcome.NO_DATA])
def test_an_allowed_name_has_addresses_and_nothing_else(kind: str, outcome: Outcome) -> None:
    reply = answered(query("a.example", kind), outcome)
    assert reply.rcode() == dns.rcode.NOERROR
    assert not reply.answer
    (soa,) = reply.authority
    assert (soa.rdtype, soa.ttl, soa[0].minimum) == (dns.rdatatype.SOA, NEGATIVE_TTL, NEGATIVE_TTL)
    assert dns.name.from_text("a.example").is_subdomain(soa.name)


@pytest.mark.parametrize("kind", ["A", "AAAA", "TXT", "ANY", "PTR"])
def test_no_data_is_never_an_address(kind: str) -> None:
    assert not answered(query("a.example", kind), Outcome.NO_DATA, pointer="b.example").answer


@pytest.mark.parametrize("kind", ["A", "AAAA", "TXT", "ANY", "PTR"])
def test_an_unknown_or_refused_name_gets_nothing(kind: str) -> None:
    unknown = answered(query("a.example", kind), Outcome.UNKNOWN, pointer="b.example")
    assert (unknown.rcode(), unknown.answer, len(unknown.authority)) == (dns.rcode.NXDOMAIN, [], 1)
    refused = answered(query("a.example", kind), Outcome.REFUSED, pointer="b.example")
    assert (refused.rcode(), refused.answer, refused.authority) == (dns.rcode.REFUSED, [], [])


def test_no_addresses_are_invented() -> None:
    for kind in ("A", "AAAA"):
        reply = dns.message.from_wire(answer(question(query("a.example", kind)), None, Outcome.ADDRESS))
        assert (reply.rcode(), reply.answer) == (dns.rcode.NOERROR, [])


def test_any_is_answered_with_next_to_nothing() -> None:
    reply = answered(query("a.example", "ANY"), Outcome.ADDRESS)
    assert texts(reply) == [f'{TTL} "RFC8482" ""']


def test_the_address_of_a_name_leads_back_to_it() -> None:
    names = Names()
    pair = names.addresses("www.example.org")
    for packed, text in (
        (pair.ipv4, "1.1.18.198.in-addr.arpa"),
        (pair.ipv6, "1.0.0.0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.C.6.1.6.2.7.2.7.F.6.3.6.d.f.ip6.arpa"),
    ):
        data = query(text, "PTR")
        address = question(data).address
        assert address == packed
        assert texts(answered(data, Outcome.ADDRESS, pointer=names.name_of(address) or "")) == [
            f"{TTL} www.example.org."
        ]
        assert question(query(text, "A")).address is None


@pytest.mark.parametrize(
    "name",
    [
        "in-addr.arpa",
        "18.198.in-addr.arpa",
        "1.1.1.18.198.in-addr.arpa",
        "256.1.18.198.in-addr.arpa",
        "01.1.18.198.in-addr.arpa",
        "0x1.1.18.198.in-addr.arpa",
        "1.1.18.198.in-addr.arpa.example",
        "1.1.18.198.ip6.arpa",
        ".".join("0" * 31) + ".ip6.arpa",
        ".".join("0" * 33) + ".ip6.arpa",
        ".".join("0" * 31 + "g") + ".ip6.arpa",
        ".".join("0" * 31 + " ") + ".ip6.arpa",
        "a.example",
        "",
        "arpa",
    ],
)
def test_parts_of_addresses_and_other_forms_are_none(name: str) -> None:
    assert reversed_address(name) is None


@given(st.text(max_size=100))
def test_reading_a_reversed_address_never_raises(name: str) -> None:
    assert reversed_address(name) is None
    assert reversed_address(f"{name}.in-addr.arpa") is None or len(name) <= 15


@given(st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16))
def test_every_reversed_address_is_read(packed: bytes) -> None:
    if len(packed) == 4:
        name = ".".join(str(byte) for byte in reversed(packed)) + ".in-addr.arpa"
    else:
        name = ".".join(reversed(packed.hex())) + ".ip6.arpa"
    assert reversed_address(name) == packed


@pytest.mark.parametrize(("outcome", "code"), [(Outcome.REFUSED, 18), (Outcome.UNKNOWN, 15)])
def test_a_refusal_says_why_to_who_understands(outcome: Outcome, code: int) -> None:
    reply = answered(query("a.example", use_edns=0, want_dnssec=True), outcome, reason="nothing allows a.example")
    (option,) = reply.options
    assert isinstance(option, dns.edns.EDEOption)
    assert (option.code, option.text) == (code, "nothing allows a.example")
    assert reply.ednsflags & dns.flags.DO
    assert not answered(query("a.example", use_edns=0), outcome).options
    assert answered(query("a.example"), outcome, reason="nothing allows it").edns == -1
    assert not answered(query("a.example", use_edns=0), Outcome.ADDRESS, reason="nothing").options


def test_a_reason_is_one_short_line() -> None:
    reply = answered(query("a.example", use_edns=0), Outcome.REFUSED, reason="a\r\n\x1b[2J" + "\u00e4" * 500)
    (option,) = reply.options
    assert isinstance(option, dns.edns.EDEOption) and option.text
    assert option.text.startswith("a???[2J\u00e4")
    assert len(option.text.encode()) <= MAX_REASON


@pytest.mark.parametrize("flags", [0x0000, 0x0100, 0x0110, 0x0130, 0x01F0])
def test_the_answer_repeats_what_the_query_wanted(flags: int) -> None:
    reply = answer(question(message(flags=flags)), PAIR, Outcome.ADDRESS)
    assert int.from_bytes(reply[2:4], "big") == 0x8480 | flags & 0x0110


# ---- TCP ----


@given(st.lists(st.binary(min_size=12, max_size=300), max_size=8), st.lists(st.integers(0, 2500), max_size=12))
def test_a_stream_is_the_same_however_it_is_split(messages: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frame(message_) for message_ in messages)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    frames = Frames()
    got = [m for start, end in itertools.pairwise(places) for m in frames.feed(stream[start:end])]
    assert got == messages
    assert frames.pending == 0


def test_a_stream_byte_by_byte() -> None:
    frames = Frames()
    got = [m for byte in frame(message()) * 3 for m in frames.feed(bytes((byte,)))]
    assert got == [message()] * 3


@pytest.mark.parametrize("length", [0, 1, 11, 513, 65535])
def test_a_length_that_no_message_has_ends_the_stream_before_its_bytes_come(length: int) -> None:
    with pytest.raises(FramingError, match=str(length)):
        Frames(limit=512).feed(length.to_bytes(2, "big"))


def test_a_stream_holds_less_than_one_message() -> None:
    frames = Frames()
    assert frames.feed(frame(bytes(MAX_STREAM))[:-1]) == []
    assert frames.pending == MAX_STREAM + 1
    assert frames.feed(b"\0") == [bytes(MAX_STREAM)]
    assert frames.pending == 0


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_stream_ends_in_messages_or_the_error(parts: list[bytes]) -> None:
    frames = Frames(limit=100)
    try:
        for part in parts:
            assert all(12 <= len(m) <= 100 for m in frames.feed(part))
            assert frames.pending <= 101
    except FramingError:
        pass
