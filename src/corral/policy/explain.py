"""Actions as people write them, and where in a policy file the rule stands that decides one.

The words are those of `corral policy explain` and of tables of expected verdicts: ``connect github.com:443``,
``exec /usr/bin/git push origin``, ``open /work/.env --write``, ``query warehouse select orders``, ``api tickets
createTicket POST``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from corral.actions import (
    Access,
    Action,
    Endpoint,
    File,
    KernelCall,
    Kind,
    Meaning,
    ModelCall,
    Operation,
    Origin,
    Program,
    Query,
    Request,
    Subject,
    Transport,
    Verb,
)
from corral.policy.document import Route, Tree, check_text, quoted
from corral.policy.doors import Broker, opened_by
from corral.policy.entrances import name_of
from corral.policy.irreversible import fetches
from corral.policy.names import canonical_address, canonical_name
from corral.policy.notation import Rule
from corral.policy.profiles import PROFILES
from corral.policy.rules import PROTOCOLS
from corral.policy.schema import PolicyFile

FORMS = """\
connect HOST:PORT [--udp] [--protocol NAME] [--at ADDRESS] [--protected]    send HOST:PORT    resolve NAME
request METHOD HOST:PORT/PATH [--protocol NAME] [--at ADDRESS] [--protected]
connect /path/of/a/socket                      listen PORT
exec PROGRAM [ARGUMENT...]                     open PATH [--write]         rename PATH PATH
unlink PATH                                    link PATH PATH              chmod PATH
syscall NAME                                   model NAME                  query SOURCE STATEMENT [TABLE...]
api SERVICE OPERATION METHOD                   apply [PATH...]"""
"""The forms of an action in words."""

_NOBODY = Origin("explain", "explain")


def parse_action(words: Sequence[str]) -> Action:
    """The action that words describe. Names and addresses are brought into their one form.

    Raises:
        ValueError: they describe none; :data:`FORMS` has what is understood.
    """
    verb, *rest = words or [""]
    reader = _READERS.get(verb)
    if reader is None:
        raise ValueError(f"{quoted(verb)} is not an action (known: {', '.join(_READERS)})")
    try:
        kind, subject = reader(rest)
    except IndexError:
        raise ValueError(f"{verb}: a word is missing") from None
    except ValueError as error:
        raise ValueError(f"{verb}: {error}") from None
    return Action(kind, subject, _NOBODY)


def _only(words: Sequence[str], count: int) -> Sequence[str]:
    if len(words) != count:
        raise ValueError(f"{count} word{'s' if count != 1 else ''} must follow")
    return words


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError(f"{quoted(text)} is not a port (1 to 65535)")
    return int(text)


def _endpoint(text: str) -> Endpoint:
    """``HOST:PORT``, ``[ADDRESS]:PORT``, a path, or ``@name`` of an abstract socket."""
    if text.startswith(("/", "@")):
        return Endpoint(Transport.UNIX, path=text)
    host, colon, port = text.rpartition(":")
    if not colon:
        raise ValueError(f"{quoted(text)} has no port (write HOST:PORT)")
    if host.startswith("[") and host.endswith("]"):
        return Endpoint(Transport.TCP, address=canonical_address(host[1:-1]), port=_port(port))
    if ":" in host:
        raise ValueError("an IPv6 address with a port is written [2001:db8::1]:443")
    try:
        return Endpoint(Transport.TCP, address=canonical_address(host), port=_port(port))
    except ValueError:
        return Endpoint(Transport.TCP, name=canonical_name(host), port=_port(port))


def _with_options(endpoint: Endpoint, words: Sequence[str], *known: str) -> Endpoint:
    """``--protocol`` and ``--at`` say what the gateway knows when it dials: what is spoken, and the real address."""
    rest = list(words)
    while rest:
        option = rest.pop(0)
        if option not in known:
            raise ValueError(f"{quoted(option)} is not understood here (known: {', '.join(known)})")
        if option == "--udp":
            endpoint = replace(endpoint, transport=Transport.UDP)
        elif option == "--protected":
            endpoint = replace(endpoint, protected=True)
        elif option == "--at":
            endpoint = replace(endpoint, address=canonical_address(rest.pop(0)))
        elif (protocol := rest.pop(0)) in PROTOCOLS:
            endpoint = replace(endpoint, protocol=protocol)
        else:
            raise ValueError(f"{quoted(protocol)} is not a protocol (known: {', '.join(PROTOCOLS)})")
    return endpoint


def _connection(kind: Kind) -> Callable[[Sequence[str]], tuple[Kind, Subject]]:
    def read(words: Sequence[str]) -> tuple[Kind, Subject]:
        known = ("--udp", "--protocol", "--at", "--protected")
        return kind, _with_options(_endpoint(words[0]), words[1:], *known)

    return read


def _request(words: Sequence[str]) -> tuple[Kind, Subject]:
    method, target, options = words[0], words[1], words[2:]
    host, slash, path = target.partition("?")[0].partition("/")  # no rule is about the query
    endpoint = _endpoint(host)
    if endpoint.transport is Transport.UNIX:
        raise ValueError(f"{quoted(target)} is not HOST:PORT/PATH")
    endpoint = replace(endpoint, protocol="tls" if endpoint.port == 443 else "http")
    endpoint = _with_options(endpoint, options, "--protocol", "--at", "--protected")
    meaning = Meaning.FETCH if fetches(method, slash + path) else Meaning.METHOD  # taken for git's own
    return Kind.HTTP_REQUEST, Request(endpoint, method, slash + path, meaning)


def _exec(words: Sequence[str]) -> tuple[Kind, Subject]:
    path = words[0]
    if not path.startswith("/"):
        raise ValueError(f"{quoted(path)}: a program is its path inside, such as /usr/bin/git")
    return Kind.PROCESS_EXEC, Program(path, (os.path.basename(path), *words[1:]))


def _paths(words: Sequence[str], count: int) -> Sequence[str]:
    for path in _only(words, count):
        if not path.startswith("/"):
            raise ValueError(f"{quoted(path)}: a file is its path inside, such as /work/.env")
    return words


def _open(words: Sequence[str]) -> tuple[Kind, Subject]:
    writes = "--write" in words[1:]
    (path,) = _paths(words[:1] if writes and len(words) == 2 else words, 1)
    return Kind.FILE_OPEN, File(path, Access.WRITE if writes else Access.READ)


def _change(kind: Kind, count: int) -> Callable[[Sequence[str]], tuple[Kind, Subject]]:
    def read(words: Sequence[str]) -> tuple[Kind, Subject]:
        path, *other = _paths(words, count)
        return kind, File(path, Access.WRITE, *other)

    return read


def _query(words: Sequence[str]) -> tuple[Kind, Subject]:
    return Kind.DATA_QUERY, Query(words[0], words[1].lower(), tuple(words[2:]))


def _operation(words: Sequence[str]) -> tuple[Kind, Subject]:
    service, operation, method = _only(words, 3)
    if not (method.isascii() and method.isalpha()):
        raise ValueError(f"{quoted(method)} is not the method of a request (write for example POST)")
    return Kind.API_CALL, Operation(service, operation, method.upper())


_READERS: dict[str, Callable[[Sequence[str]], tuple[Kind, Subject]]] = {
    "connect": _connection(Kind.NET_CONNECT),
    "send": _connection(Kind.NET_SEND),
    "resolve": lambda words: (
        Kind.NET_RESOLVE,
        Endpoint(Transport.UDP, name=canonical_name(_only(words, 1)[0])),
    ),
    "listen": lambda words: (Kind.NET_LISTEN, Endpoint(Transport.TCP, "0.0.0.0", _port(_only(words, 1)[0]))),  # noqa: S104
    "request": _request,
    "exec": _exec,
    "open": _open,
    "rename": _change(Kind.FILE_RENAME, 2),
    "link": _change(Kind.FILE_LINK, 2),
    "unlink": _change(Kind.FILE_UNLINK, 1),
    "chmod": _change(Kind.FILE_CHMOD, 1),
    "syscall": lambda words: (Kind.KERNEL, KernelCall(_only(words, 1)[0], 1, "")),
    "model": lambda words: (Kind.MODEL_CALL, ModelCall(_only(words, 1)[0])),
    "query": _query,
    "api": _operation,
    "apply": lambda words: (Kind.SANDBOX_APPLY, Verb(tuple(words))),
}


# ---- where it is written ----


def find_rule(path: str | os.PathLike[str], rule: str, policy: object) -> str:
    """``file:line`` of a rule of ``policy`` as :class:`~corral.policy.part.PolicyPart` names it, or an empty text where
    it is in no file (built in). ``path`` is the file that the policy was loaded from, and has no faults."""
    route, wanted = _locate(rule, policy)
    source = os.fspath(path)
    for _ in range(16):  # more than files can start from one another
        if not route or source in PROFILES:
            break
        tree, file = _read(source)
        place = _place(tree, file, route, wanted)
        if place is not None:
            return f"{source}:{place}"
        source = file.profile
    return ""


def _locate(rule: str, policy: object) -> tuple[Route, object]:
    """The way to the rule's list or field, and the rule's value."""
    field, _, index = rule.partition("[")
    broker = next((each for each in Broker if rule == name_of(each)), None)
    field = field if broker is None else opened_by(broker)
    route = tuple(field.split("."))
    value: object = policy
    for name in route:
        value = getattr(value, name, None)
    if index and isinstance(value, tuple):
        value = value[int(index.removesuffix("]"))]
    known = len(route) == 2 or rule == "irreversible"
    return (route if known and value is not None else ()), value


def _read(source: str) -> tuple[Tree, PolicyFile]:
    with open(source, encoding="utf-8-sig") as file:
        text = file.read()
    check_text(text, [])
    tree = Tree([])
    checked = PolicyFile.model_validate(tree.read(text), context={"directory": os.path.dirname(source)})
    return tree, checked


def _place(tree: Tree, file: PolicyFile, route: Route, wanted: object) -> int | None:
    """The line where this file says it, if it does: lists of several files are joined, so rules are told by value."""
    written: object = file
    for name in route:
        written = getattr(written, str(name))
    if not isinstance(written, tuple) or isinstance(wanted, tuple):
        return tree.place(route)[0] if tree.is_value(route) else None
    for index, entry in enumerate(written):
        value = entry.value() if isinstance(entry, Rule) else entry
        if value == wanted and tree.is_value((*route, index)):  # not a default
            return tree.place((*route, index))[0]
    return None
