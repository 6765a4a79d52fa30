"""The API broker from inside a real sandbox: an unmodified client, a service outside, nothing but what was named."""

from __future__ import annotations

import json

import pytest

from corral.actions import Kind, Verdict
from corral.policy.model import Api, ApiRule, Policy, Service
from tests.contain.conftest import MakeBox
from tests.contain.gateway_boxes import decisions, python
from tests.unit.api_bench import CANARY, CREDENTIAL, DOCUMENT, Upstream, operations

ASK = r"""
import json, os, urllib.error, urllib.request
base = os.environ["CORRAL_API_URL"]
def ask(method, path, value=None, **headers):
    data = None if value is None else json.dumps(value).encode()
    if data: headers["content-type"] = "application/json"
    request = urllib.request.Request(base + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error:
        return [error.code, error.read().decode()]
mcp = {"jsonrpc": "2.0", "id": 1, "method": "tools/call",
       "params": {"name": "tickets_createTicket", "arguments": {"body": {"title": "t"}}}}
print(json.dumps([
    ask("GET", "/tickets/tickets?state=open"),
    ask("DELETE", "/tickets/tickets/1"),
    ask("GET", "/tickets/tickets/..%2fadmin"),
    ask("POST", "/mcp", mcp),
    ask("GET", "/tickets/openapi.json"),
]))
print(dict(os.environ), open("/proc/self/environ").read())
"""


async def test_a_service_is_used_from_inside(make_box: MakeBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKETS_KEY", CANARY)
    upstream = Upstream()
    async with upstream.running():
        service = Service(
            "tickets",
            str(DOCUMENT),
            f"http://127.0.0.1:{upstream.port}/v1",
            operations("listTickets", "createTicket", "deleteTicket"),
            CREDENTIAL,
        )
        allow = (ApiRule("tickets", ("listTickets", "createTicket")),)
        box = await make_box(
            policy=Policy(api=Api(allow, deny=(ApiRule("tickets", ("delete*",)),), services=(service,)))
        )
        result = await python(box, ASK)
        assert result.exit_code == 0, result.stderr
        listed, deleted, confused, called, document = json.loads(result.stdout.splitlines()[0])
        assert listed == [200, '{"ok":true}']
        assert deleted[0] == 403 and "deleteTicket of tickets is not allowed" in deleted[1]
        assert confused[0] == 400
        assert called[0] == 200 and json.loads(called[1])["result"]["structuredContent"] == {"ok": True}
        assert document[0] == 200 and "xyzzy" not in document[1]
        assert [seen.target for seen in upstream.seen] == ["/v1/tickets?state=open", "/v1/tickets"]
        assert all(seen.header("api-key") == CANARY for seen in upstream.seen)
        assert CANARY not in str(result.stdout) + str(result.stderr)
        found = [(str(each.action.subject), each.verdict) for each in decisions(box, Kind.API_CALL)]
        assert found == [
            ("listTickets of tickets", Verdict.ALLOW),
            ("deleteTicket of tickets", Verdict.DENY),
            ("createTicket of tickets", Verdict.ALLOW),
        ]
        origins = {each.action.origin.process for each in decisions(box, Kind.API_CALL)}
        assert all(process is not None and process.exe.startswith("/usr/bin/python3") for process in origins)


async def test_a_document_that_is_missing_is_an_error_before_anything_runs(make_box: MakeBox) -> None:
    from corral.errors import RequestError

    service = Service("tickets", "/nowhere/tickets.yaml", "http://x.example", operations("listTickets"))
    with pytest.raises(RequestError, match=r"api\.services\[0\]: /nowhere/tickets\.yaml: cannot be read"):
        await make_box(policy=Policy(api=Api(services=(service,))))
