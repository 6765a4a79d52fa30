"""Rules as people write them: short, as one text, or in full, as a mapping. Both become the same values."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from corral.policy.document import quoted
from corral.policy.doors import ZONE, is_reserved
from corral.policy.fields import (
    MAX_ENTRIES,
    Filled,
    Label,
    argument_globs,
    nearest,
    program_glob,
    statement,
    whole_glob,
    word_glob,
)
from corral.policy.flow_rules import CredentialFile, LimitsFile, Permits, RequestRules
from corral.policy.model import ApiRule, DataRule, ExecRule, ModelRule, NetworkRule, Permit, RequestRule
from corral.policy.names import canonical_address, canonical_name, canonical_network
from corral.policy.notation import Rule

PROTOCOLS = ("tls", "ssh", "http", "tcp", "udp", "socks", "connect", "stratum", "tor", "tunnel")
"""What may be named as ``protocol`` of a destination."""
_WITH_REQUESTS = (None, "tls", "http")
MAX_ARGUMENTS = 256
"""Patterns in one ``argv``."""
MAX_OPERATION = 255
"""Characters of a glob of operations."""


# --- Destinations ---------------------------------------------------------------------------------------------------

_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_PORT_EXAMPLE = '443, "8000-8100", or a list of these'


def read_ports(written: object) -> tuple[tuple[int, int], ...]:
    """Port ranges, sorted, and joined where they touch: however they were written, equal sets look alike."""
    items = written if isinstance(written, tuple) else (written,)
    if not items or len(items) > MAX_ENTRIES:
        raise ValueError(f"an empty or endless list of ports (write {_PORT_EXAMPLE}; leave it out to mean all)")
    ranges: list[tuple[int, int]] = []
    for low, high in sorted(_port_range(item) for item in items):
        if ranges and low <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], max(high, ranges[-1][1]))
        else:
            ranges.append((low, high))
    return tuple(ranges)


def _port_range(item: object) -> tuple[int, int]:
    if type(item) is int:
        low = high = item
    elif isinstance(item, str):
        found = _PORTS.fullmatch(item)
        if not found:
            raise ValueError(f"{quoted(item)} is not a port (write {_PORT_EXAMPLE})")
        low, high = int(found[1]), int(found[2] or found[1])
    else:
        raise ValueError(f"must be a port (write {_PORT_EXAMPLE})")
    if not 1 <= low <= high <= 65535:
        raise ValueError(f"{low if low == high else f'{low}-{high}'} is not within 1 to 65535, smaller number first")
    return low, high


def _protocol(name: object) -> object:
    if not isinstance(name, str):
        raise ValueError(f"must be a name (known: {', '.join(PROTOCOLS)})")
    if name not in PROTOCOLS:
        raise ValueError(f"{quoted(name)} is not a protocol that is known ({nearest(name, list(PROTOCOLS))})")
    return name


def _name(text: str) -> str:
    if text == "*":
        raise ValueError('"*" is every destination: write the networks `0.0.0.0/0` and `::/0` if that is meant')
    name = canonical_name(text, wildcard=True)
    if is_reserved(name.removeprefix("*.")):
        opened = "`model.upstreams`, `data.sources` and `api.services`"
        raise ValueError(f"`{ZONE}` and what is below it are brokers, which {opened} open (remove the rule)")
    return name


def _address(text: str) -> str:
    return canonical_network(canonical_address(text))


_PORT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1, "maximum": 65535},
        {"type": "string", "pattern": f"^{_PORTS.pattern}$"},
    ]
}
_PORTS_SCHEMA = {"anyOf": [*_PORT_SCHEMA["anyOf"], {"type": "array", "items": _PORT_SCHEMA, "minItems": 1}]}


class DeniedRuleFile(Rule):
    """Destinations: all that is given must hold. One of `name`, `ip` and `cidr` at least."""

    name: Annotated[str, AfterValidator(_name)] | None = None
    """A DNS name, or `*.name` for every name below it (not the name itself)."""
    ip: Annotated[str, AfterValidator(_address)] | None = None
    """One IP address."""
    cidr: Annotated[str, AfterValidator(canonical_network)] | None = None
    """An IP network, such as 192.0.2.0/24."""
    port: Annotated[tuple[tuple[int, int], ...], BeforeValidator(read_ports), WithJsonSchema(_PORTS_SCHEMA)] = ()
    """A port, a range, or a list of these. Left out: any port."""
    protocol: Annotated[str, BeforeValidator(_protocol), WithJsonSchema({"enum": list(PROTOCOLS)})] | None = None
    """What is spoken there. Left out: `tls`, and `http` except at port 443; where the rule denies, anything."""
    requests: RequestRules = ()
    """HTTP requests. Left out: any; given: TLS ends at the gateway, and each request is judged."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "HOST or HOST:PORT, where HOST is a name, *.name, an address or a network, IPv6 in [].",
        "examples": ["github.com:443", "*.github.com", "192.0.2.0/24:8000-8100", "[2001:db8::1]:443"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        host, port = _host_and_port(text)
        fields: dict[str, object] = {} if port is None else {"port": port}
        if "/" in host:
            return fields | {"cidr": host}
        return fields | {"ip" if ":" in host or _is_address(host) else "name": host}

    @model_validator(mode="after")
    def _names_something(self) -> DeniedRuleFile:
        if self.name is None and self.ip is None and self.cidr is None:
            raise ValueError("names no destination (write `name`, `ip` or `cidr`)")
        if self.ip is not None and self.cidr is not None:
            raise ValueError("has both `ip` and `cidr` (keep one)")
        if self.requests and self.protocol not in _WITH_REQUESTS:
            raise ValueError(f"`requests` need `protocol: tls` or `http`, and there are none in `{self.protocol}`")
        return self

    def value(self) -> NetworkRule:
        return NetworkRule(
            self.name,
            self.ip or self.cidr,
            self.port,
            self.protocol,
            self.note(),
            requests=_request_set(self),
        )


class NetworkRuleFile(DeniedRuleFile):
    """Destinations that may be reached, and how. One of `name`, `ip` and `cidr` at least."""

    permit: Permits = ()
    """What hides or changes what is spoken, and may be done here nevertheless."""
    intercept: bool = False
    """End TLS at the gateway and judge each request, as with `requests` and `credential`."""
    credential: CredentialFile | None = None
    """What the gateway puts into each request."""
    limits: LimitsFile = Field(default_factory=LimitsFile)
    """Upper bounds for the flows of this rule."""

    @model_validator(mode="after")
    def _can_be_done(self) -> NetworkRuleFile:
        if self.intercept and self.protocol not in (None, "tls"):
            raise ValueError(f"`intercept` ends TLS, and there is none in `{self.protocol}`")
        if self.credential is not None:
            if self.name is None or self.name.startswith("*."):
                raise ValueError("`credential` needs one exact `name`: a secret is for one host")
            if self.protocol not in _WITH_REQUESTS:
                raise ValueError("`credential` needs TLS (or `protocol: http`, which sends it in clear)")
        if self._intercepts() and Permit.ECH in self.permit:
            raise ValueError("`ech` cannot be permitted where TLS ends at the gateway")
        return self

    def _intercepts(self) -> bool:
        within = bool(self.requests) or self.credential is not None
        return self.intercept or (within and self.protocol != "http")

    def value(self) -> NetworkRule:
        return NetworkRule(
            self.name,
            self.ip or self.cidr,
            self.port,
            self.protocol,
            self.note(),
            tuple(sorted(set(self.permit), key=lambda permit: permit.value)),
            self._intercepts(),
            _request_set(self),
            None if self.credential is None else self.credential.value(),
            self.limits.value(),
        )


def _request_set(rule: DeniedRuleFile) -> tuple[RequestRule, ...]:
    return tuple(sorted({each.value() for each in rule.requests}, key=lambda each: (each.path, each.methods)))


def _host_and_port(text: str) -> tuple[str, str | None]:
    shown = quoted(text)
    if "://" in text:
        raise ValueError(f"{shown} is a URL (write the host alone, or HOST:PORT)")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or ":" not in host:
            raise ValueError(f"{shown} is not understood (an IPv6 address with a port is written [2001:db8::1]:443)")
        return host, rest[1:] if rest else None
    if text.count(":") > 1:  # IPv6 without a port
        return text, None
    host, colon, port = text.partition(":")
    return host, port if colon else None


def _is_address(host: str) -> bool:
    try:
        canonical_address(host)
    except ValueError:
        return False
    return True


# --- Programs -------------------------------------------------------------------------------------------------------

_PROGRAM = Annotated[str, AfterValidator(program_glob)]
_ARGUMENTS = Annotated[tuple[str, ...], Field(max_length=MAX_ARGUMENTS), *Filled, AfterValidator(argument_globs)]


class ExecRuleFile(Rule):
    """Programs by their path inside and, optionally, their arguments."""

    path: _PROGRAM
    """A glob of the program's own path, links resolved; a bare name means that name in any directory."""
    argv: _ARGUMENTS | None = None
    """Globs, one an argument, from the program's name on; a last `**` is any number of further arguments."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "A glob of a program's path, or a bare name, which means that name in any directory.",
        "examples": ["git", "/usr/bin/python3*", "/usr/bin/**"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        if " " in text:
            raise ValueError(
                f"{quoted(text)} has a blank in it (arguments go in a mapping: `path: git`, `argv: [...]`)"
            )
        return {"path": text}

    def value(self) -> ExecRule:
        # Any arguments at all: nothing that would have to be looked at.
        argv = None if self.argv == ("**",) else self.argv
        return ExecRule(self.path, argv, self.note())


# --- Models, data and services ----------------------------------------------------------------------------------------

_STATEMENT = Annotated[str, AfterValidator(statement)]
_WORD_GLOB = Annotated[str, AfterValidator(word_glob)]


class ModelRuleFile(Rule):
    """Models by name."""

    name: _WORD_GLOB
    """A glob of the model's name."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "A glob of a model's name.",
        "examples": ["claude-*"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        return {"name": text}

    def value(self) -> ModelRule:
        return ModelRule(self.name, self.note())


class DataRuleFile(Rule):
    """Queries of one data source."""

    source: Label
    """The source's name."""
    statements: Annotated[tuple[_STATEMENT, ...], Field(max_length=64), *Filled] = ()
    """Kinds of query, such as select. Left out: any."""
    tables: Annotated[tuple[_WORD_GLOB, ...], Field(max_length=MAX_ENTRIES), *Filled] = ()
    """Globs of the tables that a query touches. Left out: any."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "A source's name: every query of it.",
        "examples": ["warehouse"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        return {"source": text}

    def value(self) -> DataRule:
        return DataRule(self.source, _set(self.statements), _set(self.tables), self.note())


def _operation_glob(text: str) -> str:
    if not text or not text.isprintable() or text != text.strip() or len(text) > MAX_OPERATION:
        raise ValueError(f"{quoted(text)} is not a glob of operations (such as `list*`, or `GET /tickets/*`)")
    return whole_glob(text)


class ApiRuleFile(Rule):
    """Operations of one service."""

    service: Label
    """The service's name."""
    operations: Annotated[
        tuple[Annotated[str, AfterValidator(_operation_glob)], ...], Field(max_length=MAX_ENTRIES), *Filled
    ] = ()
    """Globs of the ids by which `api.services` names them. Left out: any."""

    short = {
        "type": "string",
        "minLength": 1,
        "description": "A service's name: every operation of it.",
        "examples": ["tickets"],
    }

    @classmethod
    def from_text(cls, text: str) -> dict[str, object]:
        return {"service": text}

    def value(self) -> ApiRule:
        return ApiRule(self.service, _set(self.operations), self.note())


def _set(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(words)))


DeniedRules = Annotated[tuple[DeniedRuleFile, ...], Field(max_length=MAX_ENTRIES)]
NetworkRules = Annotated[tuple[NetworkRuleFile, ...], Field(max_length=MAX_ENTRIES)]
ExecRules = Annotated[tuple[ExecRuleFile, ...], Field(max_length=MAX_ENTRIES)]
ModelRules = Annotated[tuple[ModelRuleFile, ...], Field(max_length=MAX_ENTRIES)]
ApiRules = Annotated[tuple[ApiRuleFile, ...], Field(max_length=MAX_ENTRIES)]
DataRules = Annotated[tuple[DataRuleFile, ...], Field(max_length=MAX_ENTRIES)]
