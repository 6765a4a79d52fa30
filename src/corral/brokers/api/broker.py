"""The API broker at its door: which service and which operation a request is for, as HTTP and as tools of MCP.

/                            what there is
/SERVICE/openapi.json        the document of a service, cut down to what there is of it
/SERVICE/PATH...             its operations
/mcp                         each operation as a tool
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from corral.actions import Origin
from corral.brokers.api.asking import read as read_request
from corral.brokers.api.calling import PROBLEM, Answer, Calls, Ready, problem
from corral.brokers.api.cut import Cutter
from corral.brokers.api.document import parsed, read
from corral.brokers.api.paths import PathFault, read_path
from corral.brokers.api.reading import Declared, Reader
from corral.brokers.api.shapes import told
from corral.brokers.api.tools import Described, described
from corral.brokers.api.upstream import Client
from corral.brokers.api.values import Operation
from corral.brokers.http import Answering, Request
from corral.brokers.mcp import Mcp, Tool, ToolResult
from corral.brokers.outward import tls_context
from corral.brokers.setting import Opening, Setting
from corral.brokers.strict_json import Json, NotJson, is_short, parse, write
from corral.credentials.secret import load as load_secret
from corral.errors import RequestError
from corral.policy.doors import Broker
from corral.policy.model import Policy, Service
from corral.version import VERSION

MAX_BODY = 4 << 20
DOCUMENT = "/openapi.json"
MAX_KEPT = 16
"""Documents that are understood once for all sandboxes of a controlling process."""
MAX_STRUCTURED = 1 << 20
"""Bytes of an answer that a tool gives as values, too."""
_SERVICE = re.compile(r"/([^/]+)(/.*)?")


def prepare(policy: Policy, environment: Mapping[str, str]) -> Opening:
    """``environment`` is the controlling process's, where secrets may be.

    Raises RequestError where a document, an operation or a secret is missing or not understood.
    """
    tools: set[str] = set()
    services = tuple(_ready(service, index, environment, tools) for index, service in enumerate(policy.api.services))
    tls = tls_context(environment)
    return lambda setting: ApiBroker(services, setting, tls)


def _ready(service: Service, index: int, environment: Mapping[str, str], taken: set[str]) -> Ready:
    rule = f"api.services[{index}]"
    secret = None if service.credential is None else load_secret(service.credential, environment)
    url = f"{Broker.API.url}/{service.name}"
    try:
        header = "" if secret is None else secret.header.decode("ascii")
        understood = _understood(service, rule, header, url)
    except RequestError as error:
        raise RequestError(f"{rule}: {service.document}: {error}") from None
    tools = tuple(described(service.name, understood.declared.operations, taken))
    return Ready(service, understood.declared, secret, rule, url, understood.cut, understood.title, tools)


@dataclass(frozen=True, slots=True)
class _Understood:
    """What a document comes to for one service."""

    declared: Declared
    cut: bytes
    title: str


_kept: OrderedDict[tuple[bytes, Service, str, str], _Understood] = OrderedDict()
_lock = threading.Lock()


def _understood(service: Service, rule: str, header: str, url: str) -> _Understood:
    """A document is read each time, but understood only when it is another: a large one takes seconds, and a pool of
    sandboxes has one for all. Raises RequestError."""
    data = read(service.document)
    key = (hashlib.sha256(data).digest(), service, rule, header)
    with _lock:
        found = _kept.get(key)
    if found is None:
        document = parsed(data)
        declared = Reader(document, service, rule, header).read()
        cut = Cutter(document).cut(declared.operations, url)
        info = cut.get("info")
        title = told(info.get("title"), 200) if isinstance(info, dict) else ""
        found = _Understood(declared, write(cut), title)
    with _lock:
        _kept[key] = found
        _kept.move_to_end(key)
        while len(_kept) > MAX_KEPT:
            _kept.popitem(last=False)
    return found


def _after_fork() -> None:
    """A lock that another thread held stays locked in a child."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class ApiBroker:
    """A :class:`corral.brokers.setting.Handler`."""

    max_body = MAX_BODY

    def __init__(self, services: tuple[Ready, ...], setting: Setting, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._client_made: Client | None = None
        self._services = {ready.service.name: Calls(ready, setting, self._client) for ready in services}
        tools = [
            Tool(each.name, each.description, each.input_schema, partial(self._tool, calls, each), each.schema)
            for calls in self._services.values()
            for each in calls.ready.tools
        ]
        self._mcp = Mcp("corral-api", VERSION, tools)
        self._listed: dict[str, Json] = {
            "services": [_listed(calls.ready) for calls in self._services.values()],
            "mcp": f"{Broker.API.url}/mcp",
        }

    def _client(self) -> Client:
        if self._client_made is None:
            self._client_made = Client(self._tls)
        return self._client_made

    async def handle(self, request: Request, answer: Answering) -> None:
        """As :meth:`corral.brokers.setting.Handler.handle`."""
        if request.path == "/mcp":
            await self._mcp.handle(request, answer)
            return
        given = await self._answer(request)
        await answer.answer(given.status, given.body, given.content_type, given.headers)

    async def close(self) -> None:
        """As :meth:`corral.brokers.setting.Handler.close`."""
        if self._client_made is not None:
            await self._client_made.close()

    async def _answer(self, request: Request) -> Answer:
        if request.path == "/":
            return _document(request, write(self._listed))
        found = _SERVICE.fullmatch(request.path)
        calls = self._services.get(found[1]) if found else None
        if found is None or calls is None:
            return problem(404, f"There is no such service here. {Broker.API.url}/ says which there are.")
        path = found[2] or ""
        if path in ("", "/"):
            return _document(request, write(_listed(calls.ready)))
        if path == DOCUMENT:
            return _document(request, calls.ready.cut)
        return await self._operation(calls, request, path)

    async def _operation(self, calls: Calls, request: Request, path: str) -> Answer:
        ready = calls.ready
        try:
            means = ready.declared.paths.find(read_path(path))
        except PathFault as fault:
            return problem(400, f"{fault}.".capitalize())
        if means is None:
            return problem(404, f"{ready.service.name} has no such path. {ready.url}{DOCUMENT} says which there are.")
        template, arguments = means
        here = [each for each in ready.declared.operations if each.template.text == template.text]
        for operation in here:
            if operation.method == request.method:
                ask = partial(read_request, operation, request, arguments)
                return await calls.call(operation, ask, request.origin, aside=not is_short(request.body))
        if ready.declared.has(template.text, request.method):
            return await calls.refuse(f"{request.method} {template.text}", request.method, request.origin)
        allowed = ", ".join(sorted(each.method for each in here)).encode("ascii")
        if not here:
            return problem(404, f"{ready.service.name} has no such operation.")
        return problem(405, "This path has no such method.", ((b"allow", allowed),))

    async def _tool(self, calls: Calls, tool: Described, arguments: Mapping[str, Json], origin: Origin) -> ToolResult:
        return _result(await calls.call(tool.operation, partial(tool.asked, arguments), origin))


def _document(request: Request, body: bytes) -> Answer:
    if request.method not in ("GET", "HEAD"):
        return problem(405, "This can only be read.", ((b"allow", b"GET, HEAD"),))
    return Answer(200, "application/json", body)


def _listed(ready: Ready) -> dict[str, Json]:
    return {
        "name": ready.service.name,
        "title": ready.title,
        "url": ready.url,
        "document": ready.url + DOCUMENT,
        "operations": [_operation(each) for each in ready.declared.operations],
    }


def _operation(operation: Operation) -> Json:
    return {
        "id": operation.id,
        "method": operation.method,
        "path": operation.template.text,
        "description": operation.description.partition("\n")[0],
    }


def _result(answer: Answer) -> ToolResult:
    """For a model: what there is to read, and whether it is an error."""
    is_error = answer.status >= 400
    if answer.problem:
        return ToolResult(answer.problem, is_error=True)
    status = f"HTTP {answer.status}\n" if is_error else ""
    try:
        text = answer.body.decode("utf-8")
    except UnicodeDecodeError:
        return ToolResult(
            f"{status}({len(answer.body):,} bytes of {answer.content_type}, which is no text)", None, is_error
        )
    if not text:
        return ToolResult(f"HTTP {answer.status}, without content", None, is_error)
    return ToolResult(f"{status}{text}", _structured(answer), is_error)


def _structured(answer: Answer) -> Mapping[str, Json] | None:
    kind = answer.content_type.partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (kind.endswith("+json") and kind != PROBLEM)
    if not is_json or len(answer.body) > MAX_STRUCTURED:
        return None
    try:
        value = parse(answer.body)
    except NotJson:
        return None
    return value if isinstance(value, dict) else {"value": value}
