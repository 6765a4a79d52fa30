"""Records in the forms that others read: one record is one line, whatever it holds.

* ``jsonl``: the number, and the record as it stands in the log.
* ``ocsf``: the record alone.
* ``cef``: ArcSight Common Event Format, revision 25.
* ``syslog``: RFC 5424, with the event as structured data.
* ``otlp``: OpenTelemetry logs as JSON (``ExportLogsServiceRequest``, one a line), with GenAI attributes.

Texts of an agent stand in all of them. Each form's own escapes are used, and on top of that everything that could move
a cursor or turn the direction of text is escaped as Python writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from corral.log.records import Summary, summary
from corral.version import VERSION

Entries = Iterable[tuple[int, bytes]]
_SEVERITIES = {
    "allow": (1, 6, 9, "INFO"),
    "ask": (3, 5, 10, "INFO2"),
    "deny": (6, 4, 13, "WARN"),
    "kill": (10, 2, 17, "ERROR"),
}
"""Of a verdict: for CEF (0 to 10), syslog (RFC 5424, table 2), OpenTelemetry (number and text)."""
_FACILITY = 13
"""Log audit (RFC 5424, table 1)."""
_ENTERPRISE = 32473
"""The private enterprise number for documentation and examples (RFC 5612)."""
_MOST = 1000
"""Characters of one text in CEF and syslog, whose readers have bounds of their own."""


def jsonl(entries: Entries) -> Iterator[str]:
    """Numbers and records, as JSON in ASCII."""
    for number, entry in entries:
        yield _ascii({"number": number, "record": json.loads(entry)})


def ocsf(entries: Entries) -> Iterator[str]:
    """Records, as JSON in ASCII."""
    for _, entry in entries:
        yield _ascii(json.loads(entry))


def cef(entries: Entries) -> Iterator[str]:
    """Events of the Common Event Format."""
    for number, entry in entries:
        found = summary(entry)
        severity = _SEVERITIES.get(found.verdict, _SEVERITIES["allow"])[0]
        name = f"{found.action} {found.verdict}".strip()
        head = "|".join(_cef_head(each) for each in ("Corral", "Corral", VERSION, found.action, name))
        pairs = (("rt", str(found.at // 1000)), ("externalId", str(number)), *_cef_fields(found))
        extension = " ".join(f"{key}={_cef_value(value)}" for key, value in pairs if value)
        yield f"CEF:0|{head}|{severity}|{extension}"


def _cef_fields(found: Summary) -> Iterator[tuple[str, str]]:
    yield "act", found.verdict
    yield "reason", found.rule
    yield "suser", f"{found.agent} {found.agent_version}"
    yield "spid", str(found.pid) if found.pid else ""
    yield "sproc", found.exe
    yield "filePath", found.path
    yield "dhost", found.destination
    yield "cnt", str(found.count)
    for at, (label, value) in enumerate(
        (
            ("session", found.session),
            ("policy", found.policy_hash),
            ("step", str(found.step)),
            ("by", found.by),
            ("tool", found.tool),
            ("conversation", found.conversation),
        ),
        1,
    ):
        yield f"cs{at}Label", label
        yield f"cs{at}", value
    yield "request", f"{found.source} {found.model}".strip()
    numbers = (("inputTokens", found.input_tokens), ("outputTokens", found.output_tokens))
    for at, (label, number) in enumerate((*numbers, ("unexplained", found.unexplained)), 1):
        if number:
            yield f"cn{at}Label", label
            yield f"cn{at}", str(number)


def _cef_head(text: str) -> str:
    return _plain(text).replace("\\", "\\\\").replace("|", "\\|")


def _cef_value(text: str) -> str:
    return _plain(text).replace("\\", "\\\\").replace("=", "\\=")


def syslog(entries: Entries) -> Iterator[str]:
    """Messages of RFC 5424, without a transport's framing."""
    for number, entry in entries:
        found = summary(entry)
        priority = _FACILITY * 8 + _SEVERITIES.get(found.verdict, _SEVERITIES["allow"])[1]
        moment = datetime.fromtimestamp(found.at / 1e6, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        values = {
            "number": str(number),
            "session": found.session,
            "agent": found.agent,
            "version": found.agent_version,
            "policy": found.policy_hash,
            "step": str(found.step),
            "verdict": found.verdict,
            "rule": found.rule,
            "exe": found.exe,
            "path": found.path,
            "destination": found.destination,
            "by": found.by,
            "tool": found.tool,
            "unexplained": "yes" if found.unexplained else "",
            "source": found.source,
            "model": found.model,
            "conversation": found.conversation,
            "opened": str(found.opened or ""),
            "inputTokens": str(found.input_tokens or ""),
            "outputTokens": str(found.output_tokens or ""),
            "cost": f"{found.cost}e-9 {found.currency}" if found.cost else "",
        }
        data = " ".join(f'{name}="{_syslog_value(value)}"' for name, value in values.items() if value)
        words = _plain(
            " ".join(each for each in (found.action, found.verdict, found.path, found.destination, found.model) if each)
        )
        head = f"<{priority}>1 {moment} - corral {found.pid or '-'} {_syslog_name(found.action)}"
        yield f"{head} [corral@{_ENTERPRISE} {data}] {words}"


def _syslog_value(text: str) -> str:
    return _plain(text).replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")


def _syslog_name(text: str) -> str:
    """What can be a MSGID: at most 32 printable ASCII characters."""
    return "".join(each if "!" <= each <= "~" else "?" for each in text[:32]) or "-"


def otlp(entries: Entries) -> Iterator[str]:
    """Log records of OpenTelemetry, each with its resource."""
    for number, entry in entries:
        found, record = summary(entry), json.loads(entry)
        _, _, severity, word = _SEVERITIES.get(found.verdict, _SEVERITIES["allow"])
        attributes: dict[str, str | int | list[str]] = {
            "event.name": f"corral.{found.event}",
            "gen_ai.agent.name": found.agent,
            "gen_ai.agent.version": found.agent_version,
            "gen_ai.conversation.id": found.conversation or found.session,
            "gen_ai.operation.name": _operation(found),
            "gen_ai.tool.call.id": found.tool,
            **_gen_ai(found, record),
            "corral.session": found.session,
            "corral.unexplained": found.unexplained,
            "corral.number": number,
            "corral.step": found.step,
            "corral.exec": found.exec,
            "corral.action": found.action,
            "corral.verdict": found.verdict,
            "corral.rule": found.rule,
            "corral.policy": found.policy_hash,
            "corral.by": found.by,
            "process.pid": found.pid,
            "process.executable.path": found.exe,
            "file.path": found.path,
            "server.address": found.destination,
        }
        log_record = {
            "timeUnixNano": str(found.at * 1000),
            "severityNumber": severity,
            "severityText": word,
            "body": {"stringValue": json.dumps(record, ensure_ascii=False)},
            "attributes": [_attribute(name, value) for name, value in attributes.items() if value not in ("", 0, [])],
        }
        resource = {"attributes": [_attribute("service.name", "corral"), _attribute("service.version", VERSION)]}
        scope = {"scope": {"name": "corral.log"}, "logRecords": [log_record]}
        yield _ascii({"resourceLogs": [{"resource": resource, "scopeLogs": [scope]}]})


def _operation(found: Summary) -> str:
    if found.action == "model.call":
        return "chat"
    return "execute_tool" if found.event.startswith("exec.") or found.action == "process.exec" else ""


def _gen_ai(found: Summary, record: dict[str, Any]) -> dict[str, str | int | list[str]]:
    """What OpenTelemetry's semantic conventions for generative AI have names for, and what they have not."""
    if found.action not in ("model.call", "data.query", "api.call"):
        return {}
    if found.action != "model.call":
        return {"gen_ai.data_source.id": found.source, "corral.operation": found.model}
    if found.event != "used":
        return {"gen_ai.request.model": found.model}
    used = record["unmapped"]["corral"]["fields"]
    return {
        "gen_ai.request.model": found.model,
        "gen_ai.provider.name": found.source,
        "gen_ai.response.finish_reasons": [used["finish"]] if used["finish"] else [],
        "gen_ai.usage.input_tokens": found.input_tokens,
        "gen_ai.usage.output_tokens": found.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": used["cached_tokens"],
        "gen_ai.usage.cache_creation.input_tokens": used["written_tokens"],
        "error.type": used["ending"] if used["ending"] != "answered" else "",
        "http.response.status_code": used["status"],
        "corral.cost": found.cost,
        "corral.currency": found.currency,
        "corral.opened": found.opened,
        "corral.parent": used["parent"],
    }


def _attribute(name: str, value: str | int | list[str]) -> dict[str, Any]:
    if isinstance(value, list):
        return {"key": name, "value": {"arrayValue": {"values": [{"stringValue": each} for each in value]}}}
    kind = {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}
    return {"key": name, "value": kind}


def _ascii(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _plain(text: str) -> str:
    """Bounded, and everything escaped that is not printable."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text[:_MOST]
    )


FORMS: dict[str, Callable[[Entries], Iterator[str]]] = {
    "jsonl": jsonl,
    "ocsf": ocsf,
    "cef": cef,
    "syslog": syslog,
    "otlp": otlp,
}
"""By the name that a user gives them."""
