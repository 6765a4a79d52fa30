"""Records: entries of a log, one event each, as canonical JSON (RFC 8785) in the shape of OCSF.

``unmapped.corral`` holds the event itself, so that a record can be read back exactly: what it is (``event``), its
fields, the monotonic time, and in ``cut`` the fields that are not exactly what was there, because they were too long,
or no Unicode text (bytes of paths and arguments need not be; they become U+FFFD).

Numbers are integers within 53 bits, since that is what canonical JSON can hold everywhere: times are milliseconds where
OCSF wants them and microseconds elsewhere. With ASCII names and such numbers the encoder of the standard library writes
what RFC 8785 wants; a test compares them. Control characters are escaped by JSON; DEL, C1 and characters that turn the
direction of text are not: whoever prints a record escapes them.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from corral.actions import Action, Decision, Kind, Origin, ToolCall, Used, Verdict
from corral.log.events import WORDS, Approval, Event, PayloadKept
from corral.log.ocsf import VERSION, Context, actor, common, fields_of, profiles_of
from corral.log.tiles import MAX_ENTRY
from corral.monitor.plain import Bounds, from_plain, refuse, subject_type, to_plain, unique

_BOUNDS = (Bounds(), Bounds(text=1024, entries=64, words=4096), Bounds(text=128, entries=16, words=512))
"""What is too long with one is encoded with the next. With the last a record of any event fits."""
_MICRO = 1_000_000
_KEPT = 2048
"""Characters of an origin that is kept for the next record."""
_MOST = 2**53 - 1
"""Canonical JSON has no larger integer."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_NAMES: dict[type[Any], str] = {kind: word for word, kind in WORDS.items()}
_VERDICTS = {verdict.name.lower(): verdict for verdict in Verdict}
_TIMES = {
    "decision": ("at", "held"),
    "flow": ("started", "seconds"),
    "used": ("started", "seconds", "first"),
    "approval": ("asked_at", "ended_at", "timeout"),
}


@dataclass(frozen=True, slots=True)
class Record:
    """What an entry says."""

    event: Event
    context: Context
    sequence: int
    """Of the record in its session, from 1, without gaps."""
    at: int
    """Microseconds since the epoch."""
    monotonic: int
    """Microseconds of the clock that nobody sets."""
    cut: frozenset[str]
    """Fields of the event that are not exactly what was there."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What can be had of an entry without reading all of it."""

    event: str
    session: str
    sandbox: str
    agent: str
    agent_version: str
    policy_hash: str
    sequence: int
    at: int
    class_uid: int
    step: int = 0
    exec: int = 0
    action: str = ""
    verdict: str = ""
    rule: str = ""
    decider: str = ""
    count: int = 1
    pid: int = 0
    exe: str = ""
    destination: str = ""
    path: str = ""
    by: str = ""
    """Which person had a part in it: answered, changed a policy, erased a content."""
    tool: str = ""
    """The tool call that it comes from."""
    unexplained: int = 0
    """1 where no answer of a model explains it."""
    source: str = ""
    """Of a call of a broker, or the question whether it may be: the upstream, source or service."""
    model: str = ""
    """The model, the statement, or the operation."""
    conversation: str = ""
    opened: int = 0
    """The step that it opened."""
    input_tokens: int = 0
    output_tokens: int = 0
    cost: int = 0
    """In billionths of ``currency``."""
    currency: str = ""


def encode(event: Event, context: Context, *, sequence: int, at: float, monotonic_ns: int) -> bytes:
    """The entry of an event that happened ``at`` (seconds since the epoch)."""
    for bounds in _BOUNDS:
        entry = _encode(event, context, sequence, round(at * _MICRO), monotonic_ns // 1000, bounds)
        if len(entry) <= MAX_ENTRY:
            return entry
    raise ValueError("an event does not fit into an entry")  # no event is so large; a log that fails stops its sandbox


def _encode(event: Event, context: Context, sequence: int, at: int, monotonic: int, bounds: Bounds) -> bytes:
    fields, cut = _plain(event, bounds)
    origin = event.action.origin if isinstance(event, Decision) else getattr(event, "origin", None)
    # An agent decides how long its arguments are, so long ones are not kept.
    who = _who if _is_short(origin) else _who.__wrapped__
    actor, own_origin, is_whole = who(context, origin, bounds, getattr(event, "by", ""))
    values = fields_of(event, fields | _of_origin(origin), context, bounds)
    if origin is not None:
        fields["origin"] = _Mark.ORIGIN
        cut += [] if is_whole else ["origin"]
    own = {"event": _NAMES[type(event)], "fields": fields, "monotonic": monotonic, "at": at, "cut": sorted(cut)}
    metadata = {"version": VERSION, "sequence": sequence, "correlation_uid": context.session, "is_truncated": bool(cut)}
    values |= {
        "time": at // 1000,
        "actor": _Mark.ACTOR,
        "device": _Mark.DEVICE,
        "policy": _Mark.POLICY,
        "metadata": metadata | {"product": _Mark.PRODUCT, "profiles": profiles_of(event)},
        "unmapped": {"corral": own},
    }
    fragments = {_Mark.ACTOR: actor, _Mark.ORIGIN: own_origin, **_common(context)}
    try:
        return _spliced(values, fragments).encode()
    except UnicodeEncodeError:
        damaged = {name for name, value in fields.items() if _SURROGATES.search(_json(value))}
        own["cut"] = sorted({*cut, *damaged, *(["origin"] if _SURROGATES.search(own_origin) else [])})
        metadata["is_truncated"] = True
        values["metadata"] = metadata | {"product": _Mark.PRODUCT, "profiles": profiles_of(event)}
        return _SURROGATES.sub("\ufffd", _spliced(values, fragments)).encode()


_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


class _Mark:
    """Texts in whose place something stands that is JSON already: what a session, or a process, has in all its records.

    Nobody who wants to have something put into a record can guess them.
    """

    ACTOR, DEVICE, ORIGIN, POLICY, PRODUCT = (secrets.token_hex(16) for _ in range(5))


def _spliced(values: dict[str, Any], fragments: dict[str, str]) -> str:
    text = _json(values)
    for mark, fragment in fragments.items():
        text = text.replace(f'"{mark}"', fragment, 1)
    return text


@lru_cache(maxsize=64)
def _common(context: Context) -> dict[str, str]:
    parts = common(context)
    product = {"name": "Corral", "vendor_name": "Corral", "version": context.product_version}
    return {
        _Mark.DEVICE: _json(parts["device"]),
        _Mark.POLICY: _json(parts["policy"]),
        _Mark.PRODUCT: _json(product),
    }


def _is_short(origin: Origin | None) -> bool:
    """Whether what is kept of it is at most some ten thousand bytes."""
    if origin is None:
        return True
    if len(origin.tool) > _KEPT:
        return False
    process = origin.process
    if process is None:
        return True
    texts = len(process.exe) + sum(map(len, process.argv)) + sum(len(each.exe) for each in process.ancestors)
    return texts + 8 * len(process.argv) + 32 * len(process.ancestors) <= _KEPT


@lru_cache(maxsize=1024)
def _who(context: Context, origin: Origin | None, bounds: Bounds, person: str = "") -> tuple[str, str, bool]:
    """The actor and the origin as JSON, and whether the latter is whole."""
    plain, is_whole = to_plain(origin, bounds)
    return _json(actor(context, plain, bounds, person)), _json(plain), is_whole


def _of_origin(origin: Origin | None) -> dict[str, Any]:
    """What is said of an origin elsewhere in a record."""
    if origin is None:
        return {}
    process = {"pid": origin.process.pid} if origin.process is not None else None
    return {"origin": {"sandbox": origin.sandbox, "exec": origin.exec}, "process": process}


def _plain(event: Event, bounds: Bounds) -> tuple[dict[str, Any], list[str]]:
    """The fields of an event but for its origin, and which of them are not whole."""
    if isinstance(event, Decision):
        action = event.action
        values: dict[str, Any] = {
            "kind": action.kind,
            "reversible": action.reversible,
            "subject": action.subject,
            "verdict": event.verdict.name.lower(),
            "rule": event.rule,
            "reason": event.reason,
            "advice": event.advice,
            "decider": event.decider,
            "number": event.number,
            "private": event.private,
            "count": event.count,
            "answered_by": event.answered_by,
        }
    else:
        values = {name: getattr(event, name) for name in type(event).__dataclass_fields__ if name != "origin"}
    plain: dict[str, Any] = {}
    cut: list[str] = []
    if isinstance(event, Used):
        values = {name: min(value, _MOST) if type(value) is int else value for name, value in values.items()}
        values["tools"], is_whole = _short_tools(event.tools, bounds)
        cut += [] if is_whole else ["tools"]
    for name, value in values.items():
        plain[name], whole = to_plain(value, bounds)
        if not whole and name not in cut:
            cut.append(name)
    if isinstance(event, Approval):
        plain["verdict"] = event.verdict.name.lower()
    for name in _TIMES.get(_NAMES[type(event)], ()):
        plain[name] = round(getattr(event, name) * _MICRO)
    return plain, cut


def _short_tools(tools: tuple[ToolCall, ...], bounds: Bounds) -> tuple[tuple[ToolCall, ...], bool]:
    """Tool calls of which each is there, its arguments as far as all of them have room, and whether they are whole.

    The whole is in the answer, which may be kept beside the log."""
    kept = tools[: bounds.entries]
    overhead = 64 + max((len(each.id[: bounds.text]) + len(each.name[: bounds.text]) for each in kept), default=0)
    room = max(0, bounds.words // max(1, len(kept)) - 2 * overhead) // 2  # escapes of JSON count too
    if len(kept) == len(tools) and all(len(each.arguments) <= room for each in kept):
        return tools, True
    return tuple(replace(each, arguments=each.arguments[:room]) for each in kept), False


# ---- reading ----


def _loaded(entry: bytes) -> dict[str, Any]:
    values = json.loads(entry.decode(), object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    return values


def decode(entry: bytes) -> Record:
    """What an entry says. Raises ValueError (or RecursionError) for what :func:`encode` has not written."""
    values = _loaded(entry)
    try:
        return _decoded(values)
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError("it is no record: a field is missing, or of another type") from None


def _decoded(values: dict[str, Any]) -> Record:
    own, metadata = values["unmapped"]["corral"], values["metadata"]
    if metadata["version"] != VERSION:
        raise ValueError(f"it is of another version of OCSF than {VERSION}")
    cut = frozenset(from_plain(tuple[str, ...], own["cut"]))
    word, fields = from_plain(str, own["event"]), dict(own["fields"])
    kind = WORDS.get(word)
    if kind is None:
        raise ValueError("it is of no event that is known here")
    times = {name: from_plain(int, fields.pop(name)) / _MICRO for name in _TIMES.get(word, ())}
    if kind is Decision:
        action_kind = from_plain(Kind, fields.pop("kind"))
        subject = from_plain(subject_type(action_kind), fields.pop("subject"))
        times["action"] = Action(action_kind, subject, from_plain(Origin, fields.pop("origin")))
        fields.pop("reversible", None)  # said for readers; it follows from the subject, and older records lack it
        times["asked"] = ()
    if kind in (Decision, Approval):
        times["verdict"] = _VERDICTS[fields.pop("verdict")]
    if kind is PayloadKept:
        fields = {"call": 0, **fields}  # which older records lack
    event = from_plain(kind, fields, **times)
    actor, policy = values["actor"], values["policy"]
    context = Context(
        from_plain(str, actor["app_name"]),
        from_plain(str, actor["app_uid"]),
        from_plain(str, policy["name"]),
        from_plain(str, policy["uid"]),
        from_plain(str, metadata["correlation_uid"]),
        from_plain(str, values["device"]["uid"]),
        from_plain(str, metadata["product"]["version"]),
    )
    sequence, at, monotonic = (from_plain(int, each) for each in (metadata["sequence"], own["at"], own["monotonic"]))
    return Record(event, context, sequence, at, monotonic, cut)


def summary(entry: bytes) -> Summary:
    """What an index needs of an entry. Raises ValueError (or RecursionError) for what is no record."""
    values = _loaded(entry)
    try:
        return _summary(values)
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError("it is no record: a field is missing, or of another type") from None


def _summary(values: dict[str, Any]) -> Summary:
    own, metadata, actor = values["unmapped"]["corral"], values["metadata"], values["actor"]
    fields = own["fields"]
    origin: dict[str, Any] = fields.get("origin") or {}
    process = origin.get("process") or {}
    subject = fields.get("subject") or {}
    endpoint = fields.get("endpoint") or subject.get("endpoint") or ("transport" in subject and subject) or {}
    word = own["event"]
    action = fields["kind"] if word in ("decision", "used") else word
    return Summary(
        event=word,
        session=metadata["correlation_uid"],
        sandbox=values["device"]["uid"],
        agent=actor["app_name"],
        agent_version=actor["app_uid"],
        policy_hash=values["policy"]["uid"],
        sequence=metadata["sequence"],
        at=own["at"],
        class_uid=values["class_uid"],
        step=origin.get("step", fields.get("step", 0) if word in ("exec.started", "exec.ended") else 0),
        exec=origin.get("exec", fields.get("exec", 0)),
        action=f"kernel.{subject['name']}" if action == Kind.KERNEL.value else action,
        verdict=fields.get("verdict", ""),
        rule=fields.get("rule", ""),
        decider=fields.get("decider", ""),
        count=fields.get("count", 1),
        pid=process.get("pid", 0),
        exe=process.get("exe", ""),
        destination=_destination(endpoint),
        path=subject.get("path", "") if "transport" not in subject else "",
        by=fields.get("by", fields.get("answered_by", "")),
        tool=origin.get("tool", ""),
        unexplained=int(origin.get("unexplained", False)),
        **_of_broker(word, fields, subject),
    )


def _of_broker(word: str, fields: dict[str, Any], subject: dict[str, Any]) -> dict[str, Any]:
    """What is known of a call of a broker, or of the question whether it may be."""
    if word == "used":
        names = ("source", "conversation", "opened", "input_tokens", "output_tokens", "cost", "currency")
        return {"model": fields["name"], **{name: fields[name] for name in names}}
    if word == "decision" and fields["kind"] == Kind.MODEL_CALL.value:
        return {"model": subject["model"]}
    if word == "decision" and fields["kind"] == Kind.DATA_QUERY.value:
        return {"source": subject["source"], "model": subject["statement"]}
    if word == "decision" and fields["kind"] == Kind.API_CALL.value:
        return {"source": subject["service"], "model": subject["operation"]}
    return {}


def _destination(endpoint: dict[str, Any]) -> str:
    if not endpoint:
        return ""
    if endpoint["transport"] == "unix":
        return f"unix:{endpoint['path']}"
    host = endpoint["name"] or endpoint["address"]
    return f"[{host}]:{endpoint['port']}" if ":" in host else f"{host}:{endpoint['port']}"
