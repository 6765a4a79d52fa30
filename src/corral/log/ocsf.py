"""What our events are in the Open Cybersecurity Schema Framework: class, activity and the fields that others read.

Everything is made of plain values (:mod:`corral.monitor.plain`), so what was cut there is cut here. What the framework
has no field for is not lost: a record holds the event itself, too.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from corral.actions import Decision, Ending, Flow, Kind, Used, Verdict
from corral.log.events import (
    ApplyEnded,
    Approval,
    Event,
    ExecEnded,
    ExecStarted,
    FilesSet,
    Outcome,
    PayloadKept,
    PolicyChanged,
    SessionEnded,
    SessionStarted,
    SnapshotTaken,
)
from corral.monitor.plain import Bounds

VERSION = "1.8.0"
"""Of the schema. Tests validate every kind of record against it."""
PROFILES = ["host", "security_control"]
_AI = [*PROFILES, "ai_operation"]
FILE, KERNEL, PROCESS, ENTITY, NETWORK, HTTP, DNS, LIFECYCLE, API = (
    1001, 1003, 1007, 3004, 4001, 4002, 4003, 6002, 6003,
)  # fmt: skip
_OTHER = 99
_SEVERITY = {Verdict.ALLOW: 1, Verdict.ASK: 2, Verdict.DENY: 3, Verdict.KILL: 5}
"""Informational, low, medium, critical."""
_FILES = {Kind.FILE_RENAME: 5, Kind.FILE_UNLINK: 4, Kind.FILE_LINK: 1, Kind.FILE_CHMOD: 6}
_NETWORK = {Kind.NET_CONNECT: 1, Kind.NET_SEND: 6, Kind.NET_BIND: 7, Kind.NET_LISTEN: 7}
_METHODS = {"CONNECT": 1, "DELETE": 2, "GET": 3, "HEAD": 4, "OPTIONS": 5, "POST": 6, "PUT": 7, "TRACE": 8, "PATCH": 9}
_MOST = 2**53 - 1
_ASSISTANT = 2
"""Whose message it is: the model's."""
_CALL = 2
"""A kernel resource of the type "system call"."""

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Context:
    """What stands in every record of a session."""

    agent: str
    agent_version: str
    policy: str
    policy_hash: str
    session: str
    sandbox: str
    product_version: str


def fields_of(event: Event, plain: Fields, context: Context, bounds: Bounds) -> Fields:
    """What a record says of its event in OCSF's words. ``plain`` is the event's plain form."""
    if isinstance(event, Decision):
        fields = _decision(event, plain, bounds)
    elif isinstance(event, Flow):
        fields = _flow(plain)
    elif isinstance(event, Used):
        fields = _used(event, plain)
    elif isinstance(event, Approval):
        fields = _approval(event, plain)
    elif isinstance(event, PolicyChanged):
        fields = _policy_changed(plain, context)
    else:
        fields = _life(event, plain, context, bounds)
    fields["type_uid"] = fields["class_uid"] * 100 + fields["activity_id"]
    fields["category_uid"] = fields["class_uid"] // 1000
    return fields


def profiles_of(event: Event) -> list[str]:
    """Of the schema, that a record of it uses."""
    return _AI if isinstance(event, Used) and event.kind is Kind.MODEL_CALL else PROFILES


def common(context: Context) -> Fields:
    """What all records of a session say."""
    return {
        "device": {"type_id": 6, "uid": context.sandbox, "name": "sandbox"},
        "policy": {"name": context.policy, "uid": context.policy_hash},
    }


def actor(context: Context, origin: Fields | None, bounds: Bounds, person: str = "") -> Fields:
    """Who acts: the agent, and the process and the ``person`` who has a part in it, where there are. ``origin`` is
    plain."""
    agent: Fields = {"app_name": context.agent, "app_uid": context.agent_version, "session": {"uid": context.session}}
    if person:
        agent["user"] = {"name": person[: bounds.text]}
    process = origin and origin["process"]
    return {**agent, "process": _process(process, bounds)} if process else agent


def _process(process: Fields, bounds: Bounds) -> Fields:
    return {
        "pid": process["pid"],
        "created_time": process["started"],
        "cmd_line": _command(process["argv"], bounds),
        "file": _file(process["exe"]),
        "ancestry": [{"pid": each["pid"], "path": each["exe"]} for each in process["ancestors"]],
    }


def _command(argv: list[str], bounds: Bounds) -> str:
    return shlex.join(argv)[: bounds.text]


def _file(path: str, digest: str = "") -> Fields:
    file: Fields = {"name": path.rpartition("/")[2] or path, "path": path, "type_id": 0}
    if digest:
        file["hashes"] = [{"algorithm_id": 3, "value": digest}]  # SHA-256
    return file


def _endpoint(endpoint: Fields) -> Fields:
    found: Fields = {}
    if endpoint["name"]:
        found["hostname"] = endpoint["name"]
    if endpoint["address"]:
        found["ip"] = endpoint["address"]
    if endpoint["path"]:
        found["name"] = endpoint["path"]
    if endpoint["port"]:
        found["port"] = endpoint["port"]
    if not found.keys() & {"hostname", "ip", "name"}:
        found["name"] = "unnamed"
    return found


# ---- decisions ----


def _decision(event: Decision, plain: Fields, bounds: Bounds) -> Fields:
    allowed = event.verdict is Verdict.ALLOW
    fields = _about(event, plain, bounds)
    fields["severity_id"] = 1 if allowed or plain["subject"].get("quiet") else _SEVERITY[event.verdict]
    fields["status_id"] = 1 if allowed else 2
    fields["action_id"] = fields["disposition_id"] = 1 if allowed else 2
    fields["count"] = event.count
    if plain["reason"]:
        fields["status_detail"] = plain["reason"]
    fields["firewall_rule"] = {"name": plain["rule"]}
    return fields


def _about(event: Decision, plain: Fields, bounds: Bounds) -> Fields:
    kind, subject = event.action.kind, plain["subject"]
    if kind is Kind.PROCESS_EXEC:
        command = _command([subject["path"], *subject["argv"][1:]], bounds)
        process = {"cmd_line": command, "file": _file(subject["path"], subject["digest"]), **_pid(plain)}
        return {"class_uid": PROCESS, "activity_id": 1, "process": process}
    if kind.value.startswith("file."):
        activity = _FILES.get(kind) or (2 if subject["access"] == "read" else 3)
        fields = {"class_uid": FILE, "activity_id": activity, "file": _file(subject["path"])}
        return {**fields, "file_result": _file(subject["other"])} if subject["other"] else fields
    if kind in _NETWORK:
        return {"class_uid": NETWORK, "activity_id": _NETWORK[kind], "dst_endpoint": _endpoint(subject)}
    if kind is Kind.NET_RESOLVE:
        query = {"hostname": subject["name"] or "."}
        return {"class_uid": DNS, "activity_id": 1, "query": query, "dst_endpoint": _endpoint(subject)}
    if kind is Kind.HTTP_REQUEST:
        endpoint = _endpoint(subject["endpoint"])
        host = endpoint.get("hostname") or endpoint.get("ip", "")
        request = {"http_method": subject["method"], "url": {"path": subject["path"], "hostname": host}}
        activity = _METHODS.get(subject["method"], _OTHER)
        return {"class_uid": HTTP, "activity_id": activity, "http_request": request, "dst_endpoint": endpoint}
    if kind in (Kind.KERNEL, Kind.NET_SOCKET):
        name = subject["name"] if kind is Kind.KERNEL else "socket"
        kernel = {"name": name, "type_id": _CALL, "system_call": name}
        return {"class_uid": KERNEL, "activity_id": 4, "kernel": kernel}
    operation = {"operation": kind.value}
    source = {"uid": plain["origin"]["sandbox"]}
    return {"class_uid": API, "activity_id": _OTHER, "api": operation, "src_endpoint": source}


def _pid(plain: Fields) -> Fields:
    return plain["process"] or {"uid": f"exec-{plain['origin']['exec']}"}


# ---- persons ----


def _approval(event: Approval, plain: Fields) -> Fields:
    """A call of ours, with what was asked for as its resource."""
    allowed = event.verdict is Verdict.ALLOW
    asked, ended = plain["asked_at"] // 1000, plain["ended_at"] // 1000
    sandbox = plain["origin"]["sandbox"]
    fields: Fields = {
        "class_uid": API,
        "activity_id": _OTHER,
        "api": {
            "operation": "approval",
            "request": {"uid": f"{sandbox}-{event.question}"},
            "response": {"message": f"{plain['ending']}: {plain['verdict']}"},
        },
        "src_endpoint": {"uid": sandbox},
        "resources": [{"name": plain["target"], "type": plain["kind"], "uid": event.action}],
        "severity_id": _SEVERITY[event.verdict],
        "status_id": 1 if allowed else 2,
        "action_id": 1 if allowed else 2,
        "disposition_id": 1 if allowed else 2,
        "firewall_rule": {"name": plain["rule"]},
        "start_time": asked,
        "end_time": ended,
        "duration": max(0, ended - asked),
    }
    return {**fields, "status_detail": plain["reason"]} if plain["reason"] else fields


def _policy_changed(plain: Fields, context: Context) -> Fields:
    """An entity that is replaced by another."""

    def entity(uid: str) -> Fields:
        policy = {"name": context.policy, "uid": uid or "unknown"}
        return {"type_id": 5, "name": context.policy, "uid": policy["uid"], "policy": policy}

    fields = {
        "class_uid": ENTITY,
        "activity_id": 3 if plain["old"] else 1,  # update, create
        "severity_id": 3 if plain["old"] else 1,
        "status_id": 1,
        "entity": entity(plain["old"] or plain["new"]),
        "comment": "; ".join(plain["changes"]),
    }
    return {**fields, "entity_result": entity(plain["new"])} if plain["old"] else fields


# ---- flows ----


def _flow(plain: Fields) -> Fields:
    started, lasted = plain["started"] // 1000, plain["seconds"] // 1000  # both are microseconds here
    traffic = {
        "bytes_out": plain["bytes_up"],
        "bytes_in": plain["bytes_down"],
        "packets_out": plain["packets_up"],
        "packets_in": plain["packets_down"],
    }
    fields: Fields = {
        "class_uid": NETWORK,
        "activity_id": 2,
        "severity_id": 1,
        "status_id": 1,
        "dst_endpoint": _endpoint(plain["endpoint"]),
        "traffic": traffic,
        "start_time": started,
        "end_time": started + lasted,
        "duration": lasted,
    }
    if plain["close"]:
        fields["status_detail"] = plain["close"]
    if plain["ja4"]:
        fields["ja4_fingerprint_list"] = [{"type_id": 1, "value": plain["ja4"]}]
    return fields


# ---- calls of brokers ----

_ENDED = {Ending.ANSWERED: 1, Ending.REFUSED: 3, Ending.FAILED: 2, Ending.ABANDONED: 1}
"""How severe each is."""


def _used(event: Used, plain: Fields) -> Fields:
    """A call of an interface, whose answer may be that it is refused."""
    started, lasted = plain["started"] // 1000, plain["seconds"] // 1000
    done = event.ending is Ending.ANSWERED and event.status < 400
    action = 2 if event.ending is Ending.REFUSED else 1
    api: Fields = {"operation": plain["kind"], "service": {"name": plain["source"] or "unknown"}}
    api["response"] = {"code": plain["status"], "message": plain["ending"]}
    fields: Fields = {
        "class_uid": API,
        "activity_id": _OTHER,
        "severity_id": _ENDED[event.ending],
        "status_id": 1 if done else 2,
        "action_id": action,
        "disposition_id": action,
        "firewall_rule": {"name": plain["rule"]},
        "src_endpoint": {"uid": plain["origin"]["sandbox"]},
        "api": api,
        "start_time": started,
        "end_time": started + lasted,
        "duration": lasted,
    }
    if plain["reason"]:
        fields["status_detail"] = plain["reason"]
    if event.kind is Kind.MODEL_CALL:
        fields["ai_model"] = {"name": plain["name"], "ai_provider": plain["source"] or "unknown"}
        fields["message_context"] = {
            "uid": plain["conversation"] or "unknown",
            "service": api["service"],
            "ai_role_id": _ASSISTANT,
            "prompt_tokens": plain["input_tokens"],
            "completion_tokens": plain["output_tokens"],
            "total_tokens": min(plain["input_tokens"] + plain["output_tokens"], _MOST),
        }
    else:
        fields["resources"] = [{"name": plain["name"], "type": plain["kind"]}]
    return fields


# ---- life ----


def _life(event: Event, plain: Fields, context: Context, bounds: Bounds) -> Fields:
    if isinstance(event, ExecStarted | ExecEnded):
        process: Fields = {"uid": f"exec-{event.exec}"}
        if isinstance(event, ExecStarted):
            process |= {"cmd_line": _command(plain["argv"], bounds), "working_directory": plain["directory"]}
            return {"class_uid": PROCESS, "activity_id": 1, "severity_id": 1, "process": process}
        fields = {"class_uid": PROCESS, "activity_id": 2, "severity_id": 1, "process": process}
        return {**fields, "exit_code": event.status, "status_id": 2 if event.status or event.error else 1}
    if isinstance(event, ApplyEnded):
        failed = event.outcome in (Outcome.ROLLED_BACK, Outcome.FORGOTTEN)
        fields = {"class_uid": LIFECYCLE, "activity_id": _OTHER, "severity_id": 2 if failed else 1}
        fields |= {"app": {"name": context.agent, "version": context.agent_version}, "status_id": 2 if failed else 1}
        return {**fields, "status_detail": plain["error"]} if plain["error"] else fields
    if isinstance(event, SnapshotTaken | FilesSet):
        app = {"name": context.agent, "version": context.agent_version}
        return {"class_uid": LIFECYCLE, "activity_id": _OTHER, "severity_id": 1, "app": app}
    if isinstance(event, SessionStarted | SessionEnded):
        app = {"name": context.agent, "version": context.agent_version}
        activity = 3 if isinstance(event, SessionStarted) else 4
        return {"class_uid": LIFECYCLE, "activity_id": activity, "severity_id": 1, "app": app}
    app = {"name": "log", "vendor_name": "Corral"}
    severity = 1 if isinstance(event, PayloadKept) else 3
    return {"class_uid": LIFECYCLE, "activity_id": _OTHER, "severity_id": severity, "app": app}
