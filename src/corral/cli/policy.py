"""`corral policy`: whether a policy is right, what it says of one action, and which would do for a run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from errno import ENOSYS

from corral.actions import Action, KernelCall, Opinion, Reversible, Verdict
from corral.cli.foreground import complain, printable
from corral.errors import PolicyError, RequestError
from corral.policy.canonical import policy_hash
from corral.policy.doors import open_brokers
from corral.policy.expectations import load_expectations, table_beside
from corral.policy.explain import FORMS, find_rule, parse_action
from corral.policy.irreversible import unseen_rules
from corral.policy.judgement import Judgement
from corral.policy.load import load_policy
from corral.policy.loose_ends import loose_ends
from corral.policy.model import Policy
from corral.policy.part import PolicyPart
from corral.policy.profiles import DEFAULT_PROFILE


def _print_json(value: object) -> None:
    print(json.dumps(value))


# ---- check ----


def _summary(policy: Policy) -> str:
    """How many rules there are, in one line."""
    sections = (
        ("network", policy.network),
        ("process", policy.process),
        ("model", policy.model),
        ("data", policy.data),
        ("api", policy.api),
        ("filesystem", policy.filesystem),
        ("syscalls", policy.syscalls),
    )
    parts = []
    for name, section in sections:
        counts = [(word, len(getattr(section, word, ()))) for word in ("allow", "ask", "deny")]
        said = ", ".join(f"{count} {word}" for word, count in counts if count)
        parts += [f"{name} {said}"] if said else []
    brokers = ", ".join(broker.value for broker in open_brokers(policy))
    parts += [f"brokers for {brokers}"] if brokers else []
    return "; ".join(parts) or "no rules: all that is not free is denied"


def check(paths: Sequence[str], *, as_json: bool) -> int:
    """Loads policies and prints their hashes. Returns the exit code: 125 if one has faults, all of which are told."""
    rows = []
    for path in paths:
        try:
            policy = load_policy(path)
        except PolicyError as error:
            problems = list(error.problems)
            rows.append({"file": path, "hash": None, "summary": None, "unseen": [], "loose": [], "problems": problems})
        else:
            unseen = [f"{rule} ({spoken})" for rule, spoken in unseen_rules(policy)]
            known = {"file": path, "hash": policy_hash(policy), "summary": _summary(policy)}
            rows.append({**known, "unseen": unseen, "loose": list(loose_ends(policy)), "problems": []})
    if as_json:
        _print_json(rows)
    else:
        for row in rows:
            if row["hash"]:
                print(f"{printable(str(row['file']))}: {row['hash']}\n  {row['summary']}")
            if row["unseen"]:
                print(f"  nobody is asked about writes that are not seen: under {', '.join(row['unseen'])}")
            for end in row["loose"] or ():
                print(f"  {printable(end)}")
            for problem in row["problems"] or ():
                complain(problem)
    return PolicyError.exit_code if any(row["problems"] for row in rows) else 0


# ---- explain ----


def judge(part: PolicyPart, action: Action) -> Judgement:
    """What the policy says, and of system calls what the table says before anybody is asked."""
    call = action.subject
    if not isinstance(call, KernelCall):
        return part.explain(action.kind, call)
    from corral.supervisor.allowed import allowed_names
    from corral.supervisor.syscalls import DECIDED, REFUSALS

    if any(row.name == call.name for row in DECIDED):
        raise RequestError(
            f"{call.name} is decided by what it is about: explain `connect`, `exec`, ... with that instead"
        )
    rows = [row for row in REFUSALS if row.name == call.name]
    refused = next((row for row in rows if not row.when), None)
    if refused is None and call.name in allowed_names():
        named = {*part.policy.syscalls.ask, *part.policy.syscalls.deny}
        if call.name in named:
            return part.explain(action.kind, call)
        reason = "; ".join(f"refused with some arguments: {row.reason}" for row in rows)
        return Judgement(Opinion(Verdict.ALLOW, "syscalls (free)", reason), ())
    # What the table refuses it refuses whatever a policy says.
    errno, reason = (refused.errno, refused.reason) if refused else (ENOSYS, "it is not one that a sandbox may make")
    return PolicyPart(Policy()).explain(action.kind, KernelCall(call.name, errno, reason))


def explain(path: str | None, words: Sequence[str], *, as_json: bool) -> None:
    """Prints which rule decides an action, and why. Raises RequestError where the words are none."""
    try:
        action = parse_action(shlex.split(words[0]) if len(words) == 1 else words)
    except ValueError as error:
        raise RequestError(f"{error}; an action is written as one of\n{FORMS}") from None
    source = path or DEFAULT_PROFILE
    policy = load_policy(source)
    opinion, matches = judge(PolicyPart(policy), action)
    others = [match for match in matches if match.rule != opinion.rule]
    if as_json:
        _print_json(
            {
                "action": str(action),
                "verdict": opinion.verdict.name.lower(),
                "reversible": action.reversible.value,
                "rule": opinion.rule,
                "where": find_rule(source, opinion.rule, policy),
                "reason": opinion.reason,
                "advice": opinion.advice,
                "private": opinion.private,
                "others": [
                    {
                        "verdict": match.verdict.name.lower(),
                        "rule": match.rule,
                        "where": find_rule(source, match.rule, policy),
                    }
                    for match in others
                ],
            }
        )
        return
    lines = [
        ("action", str(action)),
        ("verdict", opinion.verdict.name.lower()),
        ("rule", _placed(opinion.rule, find_rule(source, opinion.rule, policy))),
        ("reason", opinion.reason),
        ("instead", opinion.advice),
        ("undo", _UNDO[action.reversible]),
        ("private", "the agent is told neither the rule nor its reason" if opinion.private else ""),
        *(
            ("also", f"{match.verdict.name.lower()} by {_placed(match.rule, find_rule(source, match.rule, policy))}")
            for match in others
        ),
    ]
    for name, text in lines:
        if text:
            print(f"{name + ':':<9}{printable(text)}")


_UNDO = {
    Reversible.YES: "",
    Reversible.UNTIL_APPLIED: "until it is applied",
    Reversible.NO: "what it does cannot be taken back",
}


def _placed(rule: str, place: str) -> str:
    return f"{rule}  ({place})" if place else rule


# ---- test ----


def test(path: str, *, as_json: bool) -> int:
    """Compares a policy with its table of expected verdicts. Returns the exit code: 1 if one is another."""
    part = PolicyPart(load_policy(path))
    table = table_beside(path)
    rows = []
    for expectation in load_expectations(table):
        opinion = judge(part, expectation.action).opinion
        rows.append(
            {
                "where": f"{table}:{expectation.line}",
                "action": shlex.join(expectation.words),
                "expected": expectation.verdict.name.lower(),
                "expected_rule": expectation.rule,
                "verdict": opinion.verdict.name.lower(),
                "rule": opinion.rule,
                "passed": expectation.holds(opinion),
            }
        )
    failed = sum(not row["passed"] for row in rows)
    if as_json:
        _print_json(rows)
    else:
        for row in rows:
            said = f"{row['where']}: {row['action']}: {row['verdict']} by {row['rule']}"
            wanted = f", not {row['expected']}" + (f" by {row['expected_rule']}" if row["expected_rule"] else "")
            print(printable(f"ok    {said}" if row["passed"] else f"FAIL  {said}{wanted}"))
        print(f"{len(rows) - failed} of {len(rows)} as expected")
    return 1 if failed else 0


# ---- schema and learn ----


def print_schema() -> None:
    """Prints the JSON Schema of policy files."""
    from corral.policy.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def learn(path: str) -> None:
    """Prints a policy that is proposed from the record of a run. Raises RequestError where it is no record."""
    from corral.monitor.jsonl import read_records
    from corral.policy.learn import learn as propose

    sys.stdout.write(propose((record.decision, "subject" not in record.cut) for record in read_records(path)))
