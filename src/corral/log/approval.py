"""What is recorded of a question to persons that has come to its end."""

from __future__ import annotations

import json
import sys
from hashlib import sha256

from corral.actions import Action
from corral.approvals.queue import Ended
from corral.approvals.waiting import title
from corral.log.events import Approval
from corral.monitor.plain import Bounds, to_plain

_WHOLE = Bounds(text=sys.maxsize, entries=sys.maxsize, words=sys.maxsize)


def action_hash(action: Action) -> str:
    """What names an action whoever tries it: ``sha256:`` and, in hexadecimal, the SHA-256 of the canonical JSON (RFC
    8785) of ``{"kind": ..., "subject": ...}``, both as the record of its decision has them. Nothing is cut here, and
    bytes that are no text count as what they are (UTF-8 of a lone surrogate), not as U+FFFD.
    """
    subject, _ = to_plain(action.subject, _WHOLE)
    values = {"kind": action.kind.value, "subject": subject}
    form = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f"sha256:{sha256(form.encode('utf-8', 'surrogatepass')).hexdigest()}"


def approval_of(ended: Ended) -> Approval:
    """The event of a question's end."""
    question, answer = ended.question, ended.answer
    action = question.action
    return Approval(
        origin=action.origin,
        question=question.number,
        kind=action.kind,
        action=action_hash(action),
        target=title(action),
        rule=question.opinion.rule,
        ending=ended.ending,
        verdict=answer.verdict,
        scope=ended.scope,
        through=ended.through,
        by=answer.by,
        reason=answer.reason,
        asked_at=question.asked_at,
        ended_at=ended.at,
        timeout=ended.timeout,
    )
