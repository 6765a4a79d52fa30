"""Names, addresses and networks in one form each, so that two ways of writing one thing can never get two verdicts.

What has several readings is refused, not guessed at: ``0x7f.1`` and ``2130706433`` are 127.0.0.1 to one resolver and
names to another. All functions raise ValueError with a message for people, and give back unchanged what they have
given once.

Names follow RFC 1035 (lengths), RFC 5891 and UTS 46 (international names, by the ``idna`` package; Python's own codec
is the withdrawn IDNA 2003) and the WHATWG URL standard, section 3.5 (a name that ends in a number is an address).
Underscores are allowed: they are no part of host names (RFC 952), but of names that are looked up (RFC 8552).
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

MAX_NAME = 253
"""Characters of a name without its last dot; RFC 1035, section 2.3.4 (255 bytes on the wire)."""
MAX_LABEL = 63
MAX_INTERNATIONAL = 8
"""Parts of a name that are not ASCII, or ``xn--``: each takes longer to check than all else of a name."""
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
_DIGITS = frozenset("0123456789")
_HEXADECIMAL = frozenset("0123456789abcdef")
_MAPPED = bytes(10) + b"\xff\xff"
"""::ffff:0:0/96, IPv4 addresses as a socket of IPv6 shows them; RFC 4291, section 2.5.5.2."""


def _shown(text: str) -> str:
    return f"{text[:60]!r}..." if len(text) > 60 else repr(text)


def canonical_name(text: str, *, wildcard: bool = False) -> str:
    """A DNS name in its one form: lower case, international labels as ``xn--``, without the dot of the root.

    With ``wildcard`` it may begin with ``*.``, for every name below.

    Raises:
        ValueError: it is not such a name, or is one that some programs would read as an address.
    """
    pattern = wildcard and text.startswith("*.")
    name = text[2:] if pattern else text
    # Before anything that takes longer than its length. The dot of the root may be there, and is one character.
    if len(name) > (MAX_NAME + 1 if name.isascii() else 4 * MAX_NAME):
        raise ValueError(f"{_shown(text)} is longer than a name can be")
    if name.isascii():
        name = name.lower()
    elif not name.isprintable():
        raise ValueError(f"{_shown(text)} holds a character that cannot be seen")
    else:
        name = _mapped_characters(name, text)
    labels = name.removesuffix(".").split(".")
    if sum(map(_is_international, labels)) > MAX_INTERNATIONAL:
        raise ValueError(f"{_shown(text)} has more than {MAX_INTERNATIONAL} international parts")
    canonical = ".".join(_canonical_label(label, text) for label in labels)
    if len(canonical) > MAX_NAME:
        raise ValueError(f"{_shown(text)} is longer than a name can be ({MAX_NAME} characters)")
    last = canonical.rpartition(".")[2]
    if _DIGITS.issuperset(last) or (last.startswith("0x") and _HEXADECIMAL.issuperset(last[2:])):
        raise ValueError(f"{_shown(text)} ends in a number: that is no name (an address has four decimal numbers)")
    return f"*.{canonical}" if pattern else canonical


def _mapped_characters(name: str, text: str) -> str:
    """UTS 46, section 4, step 1: other cases, widths and dots become the plain ones."""
    import idna  # most policies have ASCII names only

    try:
        return idna.uts46_remap(name, std3_rules=False, transitional=False)
    except UnicodeError as error:
        raise ValueError(f"{_shown(text)} is not an international name: {error}") from None


def _canonical_label(label: str, text: str) -> str:
    if not label:
        what = "is empty" if not text else "has an empty part (two dots, or one at the beginning)"
        raise ValueError(f"{_shown(text)} {what}")
    if len(label) <= MAX_LABEL and _is_international(label):
        label = _international_label(label, text)
    if len(label) > MAX_LABEL:
        raise ValueError(f"{_shown(text)} has a part longer than {MAX_LABEL} characters")
    if not _LETTERS.issuperset(label):
        raise ValueError(f"{_shown(text)} is not a name{_hint(label)}")
    if label.startswith("-") or label.endswith("-"):
        raise ValueError(f"{_shown(text)}: a part of a name neither begins nor ends with `-`")
    return label


def _is_international(label: str) -> bool:
    return not label.isascii() or label.startswith("xn--")


def _international_label(label: str, text: str) -> str:
    """The ``xn--`` form of what the label shows, also where it was written so."""
    import idna

    try:
        return idna.alabel(idna.ulabel(label)).decode("ascii")
    except UnicodeError as error:
        raise ValueError(f"{_shown(text)} is not an international name: {error}") from None


def _hint(label: str) -> str:
    if "@" in label:
        return " (write it without the user before the `@`)"
    if "/" in label or ":" in label:
        return " (write the host alone; a port has its own place)"
    if "*" in label:
        return " (`*` stands only for everything below a name: `*.example.org`)"
    return f" ({next(_shown(c) for c in label if c not in _LETTERS)} cannot be part of one)"


def canonical_address(text: str) -> str:
    """An IP address in its one form: four decimal numbers, or RFC 5952; IPv4-mapped IPv6 becomes IPv4.

    Raises:
        ValueError: it is not an address, has a zone, or is one of the loose forms of inet_aton(3).
    """
    return address_of(_packed(text))


def unmapped(packed: bytes) -> bytes:
    """An address of 4 or 16 bytes; one of IPv4 in IPv6's notation as the IPv4 address that is meant."""
    return packed[12:] if len(packed) == 16 and packed.startswith(_MAPPED) else packed


def address_of(packed: bytes) -> str:
    """The same for the 4 or 16 bytes of an address in network order, as the kernel has it."""
    packed = unmapped(packed)
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def _packed(text: str) -> bytes:
    try:
        return inet_pton(AF_INET6 if ":" in text else AF_INET, text)
    except (OSError, ValueError):
        pass
    if "%" in text:
        raise ValueError(f"{_shown(text)}: an address with a zone (`%...`) means another one on each machine")
    raise ValueError(f"{_shown(text)} is not an address (write 192.0.2.1 or 2001:db8::1, in full and in decimal)")


def canonical_network(text: str) -> str:
    """An IP network in its one form, ``192.0.2.0/24``; an address alone becomes the network that holds it only.

    Raises:
        ValueError: it is not a network, or its address lies inside the network and is not its beginning.
    """
    address, slash, length = text.partition("/")
    packed = _packed(address)
    bits = 8 * len(packed)
    if slash and not (length.isascii() and length.isdecimal() and str(int(length[:4])) == length):
        raise ValueError(f"{_shown(text)}: write the length of the network in bits, such as /{bits - 8}")
    prefix = int(length) if slash else bits
    if prefix > bits:
        raise ValueError(f"{_shown(text)}: a network of this kind has at most /{bits}")
    if bits == 128 and packed.startswith(_MAPPED):
        if prefix < 96:
            raise ValueError(f"{_shown(text)} mixes IPv4 and IPv6 (write one network of each)")
        packed, bits, prefix = packed[12:], 32, prefix - 96
    number = int.from_bytes(packed, "big")
    first = number >> (bits - prefix) << (bits - prefix)
    canonical = f"{address_of(first.to_bytes(bits // 8, 'big'))}/{prefix}"
    if first != number:
        raise ValueError(f"{_shown(text)} is not the beginning of its network (did you mean {canonical}?)")
    return canonical


def address_and_port(text: str, default: int | None = None) -> tuple[str, int]:
    """``192.0.2.1:53`` or ``[2001:db8::1]:53`` as the address in its one form, and the port; an address alone, IPv6
    with or without its brackets, has the port ``default``.

    Raises:
        ValueError: it is none of these, or has no port and there is no default.
    """
    host, bracket, rest = text[1:].partition("]") if text.startswith("[") else ("", "", "")
    if bracket and ":" in host and (not rest or rest.startswith(":")):
        port: str | None = rest[1:] if rest else None
    elif text.count(":") > 1:
        host, port = text, None
    else:
        host, colon, after = text.partition(":")
        port = after if colon else None
    address = canonical_address(host)
    if port is None:
        if default is None:
            raise ValueError(f"{_shown(text)} has no port (write ADDRESS:PORT)")
        return address, default
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError(f"{_shown(text)}: {_shown(port)} is not a port (1 to 65535)")
    return address, int(port)


def joined(address: str, port: int) -> str:
    """An address and a port as one text: what :func:`address_and_port` reads."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
