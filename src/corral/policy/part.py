"""The policy as a part of the monitor: one action in, one opinion out.

The same order for every kind of action: what a ``deny`` names is denied; of the rest, what an ``ask`` names is asked
for; of the rest, what an ``allow`` names is allowed; and what no rule names is denied. A deny or an ask holds for what
it *may* name, an allow for what it surely names (see :mod:`corral.policy.matching`). So the order of rules does not
matter, and one more deny never makes a verdict milder.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property

from corral.actions import (
    Action,
    Endpoint,
    File,
    KernelCall,
    Kind,
    ModelCall,
    Operation,
    Opinion,
    Program,
    Query,
    Request,
    Reversible,
    Socket,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.policy.destinations import UNHEARD, Destinations
from corral.policy.doors import is_reserved, open_brokers
from corral.policy.entrances import at_door
from corral.policy.irreversible import (
    REASON,
    RULE,
    UNSEEN,
    NamedWrites,
    names_operation,
    names_statement,
    passes_unseen,
)
from corral.policy.judgement import Judgement, Match, cut, judged, listed, refused
from corral.policy.matching import AppliedPaths, Models, Operations, Paths, Programs, Queries, packed_address
from corral.policy.model import NetworkRule, Note, Policy
from corral.policy.terms import Terms, combined, credentials

MAX_CACHED = 1024
"""Judgements that are kept; then all are forgotten."""
MAX_CACHED_PATH = 1024
"""Characters of a path; with a longer one a judgement is not kept. That of a request may have 16 KiB."""

_IPV4_LOOPBACK, _IPV6_LOOPBACK = bytes((127, 0, 0, 1)), bytes(15) + b"\x01"
_UNSPECIFIED = {bytes(4): _IPV4_LOOPBACK, bytes(16): _IPV6_LOOPBACK}
"""Connecting to an unspecified address reaches the host itself: ip(7), and tcp_v4_connect() in the kernel."""
_RESOLVER_PORT = 53
RESOLVER_RULE = "built-in: queries go to the gateway"
"""Whatever address a DNS query is sent to, the gateway gets it and judges the name."""
_FILES = frozenset(kind for kind in Kind if kind.value.startswith("file."))
_VERBS = frozenset(kind for kind in Kind if kind.value.startswith("sandbox."))
_REAL = frozenset({Kind.SANDBOX_APPLY, Kind.SANDBOX_UNDO})
"""What changes files outside."""


class _Place:
    """Where a destination is."""

    __slots__ = ("endpoint", "inside", "named", "reached")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.named = packed_address(endpoint.address) if endpoint.address else None
        self.reached = self.named if self.named is None else _UNSPECIFIED.get(self.named, self.named)
        reached = self.reached
        loopback = reached is not None and (reached == _IPV6_LOOPBACK or (len(reached) == 4 and reached[0] == 127))
        self.inside = loopback and not endpoint.protected
        """The sandbox's own loopback; a protected one is the host's."""

    @property
    def is_loopback(self) -> bool:
        """Whether ``network.loopback`` is about it. No name that is handed out inside has such an address: behind one
        it would be the host's."""
        return self.inside and self.endpoint.name is None

    @property
    def is_resolver(self) -> bool:
        """Whether this is a DNS server that was named by its address, before anybody heard what is spoken there."""
        return (
            self.endpoint.port == _RESOLVER_PORT
            and self.named is not None
            and not self.inside
            and self.endpoint.name is None
            and self.endpoint.protocol is None
            and not self.endpoint.protected
        )


class PolicyPart:
    """Judges by one policy. Rules are compiled when a first action needs them. May be used from several threads."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._cache: dict[tuple[str, Hashable], Opinion] = {}

    def judge(self, action: Action) -> Opinion:
        """As :class:`corral.monitor.parts.Part`."""
        kind = action.kind
        key: tuple[str, Hashable] = (kind._value_, action.subject)
        if kind is Kind.PROCESS_EXEC and isinstance(action.subject, Program):
            if not self._by_path_alone:  # arguments may be long, and are seldom the same
                return self.explain(kind, action.subject).opinion
            key = (kind._value_, (action.subject.path, action.subject.interpreter))
        opinion = self._cache.get(key)
        if opinion is None:
            opinion = self.explain(kind, action.subject).opinion
            if len(getattr(action.subject, "path", "")) <= MAX_CACHED_PATH:
                if len(self._cache) >= MAX_CACHED:
                    self._cache.clear()
                self._cache[key] = opinion
        return opinion

    def explain(self, kind: Kind, subject: Subject) -> Judgement:
        """The same, with all rules that name it."""
        if kind in _FILES and isinstance(subject, File):
            return judged(self._file(subject), "filesystem", f"{subject.access.value} {cut(subject)}")
        if kind in _VERBS and isinstance(subject, Verb):
            verdict = Verdict.ASK if kind in _REAL else Verdict.ALLOW
            doing = f"{kind.value.removeprefix('sandbox.')} {cut(subject)}".rstrip()
            named = self._applied.all(*subject.names) if kind is Kind.SANDBOX_APPLY else []
            asked = listed(Verdict.ASK, "apply.ask", named, self.policy.apply.ask)
            return judged([*asked, Match(verdict, "built-in")], "built-in", doing)
        if isinstance(subject, Endpoint | Request) and is_reserved(_name_of(subject)):
            return at_door(self.policy, kind, subject)
        match kind, subject:
            case Kind.NET_CONNECT, Endpoint():
                return judged(self._connection(subject), "network", f"connect to {cut(subject)}")
            case Kind.NET_SEND, Endpoint():
                return judged(self._connection(subject), "network", f"send to {cut(subject)}")
            case Kind.HTTP_REQUEST, Request():
                return judged(self._request(subject), "network", f"send the request {cut(subject)}")
            case Kind.NET_RESOLVE, Endpoint():
                return judged(self._name(subject.name), "network", f"look up {cut(subject.name)}")
            case ((Kind.NET_BIND | Kind.NET_LISTEN), Endpoint()):
                listen = Match(self.policy.network.listen, "network.listen")
                return judged([listen], "network", f"serve at {cut(subject)}")
            case Kind.NET_SOCKET, Socket():
                return refused(Match(Verdict.DENY, "syscalls"), f"This kind of socket is refused here: {subject}.")
            case Kind.KERNEL, KernelCall():
                return self._kernel(subject)
            case Kind.PROCESS_EXEC, Program():
                return judged(self._program(subject), "process", f"run {cut(subject.path)}")
            case Kind.MODEL_CALL, ModelCall():
                return judged(self._model(subject), "model", f"ask the model {cut(subject)}")
            case Kind.DATA_QUERY, Query():
                return judged(self._query(subject), "data", f"query: {cut(subject)}")
            case Kind.API_CALL, Operation():
                return judged(self._call(subject), "api", f"use {cut(subject)}")
        return judged([], "policy", "do what its policy has no words for")

    # ---- destinations ----

    @cached_property
    def _networks(self) -> tuple[Destinations, Destinations, Destinations]:
        network = self.policy.network
        return (
            Destinations(network.allow),
            Destinations(network.ask, ask=True),
            Destinations(network.deny, deny=True),
        )

    def _connection(self, endpoint: Endpoint) -> list[Match]:
        network = self.policy.network
        loopback = Match(network.loopback, "network.loopback")
        if endpoint.transport is Transport.UNIX:
            return [loopback]
        place = _Place(endpoint)
        deny, ask, allow = self._found(place)
        if not place.inside:
            # Rules about some requests: those are judged one by one, so the connection for them must be possible.
            deny = [index for index in deny if not network.deny[index].requests]
            reachable = [index for index in ask if network.ask[index].requests]
            ask = [index for index in ask if not network.ask[index].requests]
        else:  # nobody looks at requests here, so each may be one of them
            reachable = []
            allow = [index for index in allow if not network.allow[index].requests]
        denied = listed(Verdict.DENY, "network.deny", deny, network.deny)
        if place.is_resolver and (network.allow or network.ask or open_brokers(self.policy)):
            return [*denied, Match(Verdict.ALLOW, RESOLVER_RULE)]
        matches = [
            *denied,
            *listed(Verdict.ASK, "network.ask", ask, network.ask),
            *listed(Verdict.ALLOW, "network.allow", allow, network.allow),
            *listed(Verdict.ALLOW, "network.ask", reachable, network.ask),
        ]
        if place.is_loopback and not matches:
            return [loopback]
        if self.policy.irreversible is Verdict.DENY and matches and not place.inside:
            rules = (*(network.ask[index] for index in (*ask, *reachable)), *(network.allow[index] for index in allow))
            if passes_unseen(rules, endpoint, intercepted=self.terms(endpoint).intercept):
                matches.append(Match(Verdict.DENY, RULE, Note(UNSEEN)))
        return matches

    def _request(self, request: Request) -> list[Match]:
        network, endpoint = self.policy.network, request.endpoint
        if endpoint.transport is Transport.UNIX:
            return [Match(network.loopback, "network.loopback")]
        place = _Place(endpoint)
        deny, ask, allow = self._found(place, request)
        matches = [
            *listed(Verdict.DENY, "network.deny", deny, network.deny),
            *listed(Verdict.ASK, "network.ask", ask, network.ask),
            *listed(Verdict.ALLOW, "network.allow", allow, network.allow),
        ]
        rules = [*(network.ask[index] for index in ask), *(network.allow[index] for index in allow)]
        if len(credentials(rules, endpoint.protocol)) > 1:
            note = Note("The rules that name this request would put different credentials into it.")
            matches.append(Match(Verdict.DENY, "network (several credentials)", note))
        writes = request.reversible is Reversible.NO and not place.inside
        if matches and writes and not self._named_writes.name(request, place.reached):
            matches += self._irreversible("method", f"`requests: [{cut(request.method, 32)} /PATH]`")
        return [Match(network.loopback, "network.loopback")] if place.is_loopback and not matches else matches

    @cached_property
    def _named_writes(self) -> NamedWrites:
        return NamedWrites(self.policy)

    def _irreversible(self, what: str, rule: str) -> list[Match]:
        """What the policy says of a write that no rule names; to be added to what allows it, never in its place."""
        verdict = self.policy.irreversible
        return [] if verdict is Verdict.ALLOW else [Match(verdict, RULE, Note(REASON.format(what=what, rule=rule)))]

    def _found(self, place: _Place, request: Request | None = None) -> tuple[list[int], list[int], list[int]]:
        """The rules of deny, ask and allow that name it."""
        endpoint = place.endpoint
        allow, ask, deny = self._networks
        hard = []
        for list_ in (deny, ask):
            found = set(list_.all(endpoint, place.reached, protocol=endpoint.protocol, request=request))
            if place.named != place.reached:
                found.update(list_.all(endpoint, place.named, protocol=endpoint.protocol, request=request))
            hard.append(sorted(found))
        # Outside there is only the gateway, which asks again when it hears what is spoken. Inside nobody listens.
        spoken = UNHEARD if place.inside and endpoint.protocol is None else endpoint.protocol
        return hard[0], hard[1], allow.all(endpoint, place.reached, protocol=spoken, request=request)

    def terms(self, subject: Endpoint | Request) -> Terms:
        """On what terms the gateway lets it through, if it is let through: see :class:`~corral.policy.terms.Terms`.

        Of a request these may be others than of its connection; the limits are the connection's.
        """
        request = subject if isinstance(subject, Request) else None
        endpoint = subject.endpoint if isinstance(subject, Request) else subject
        if endpoint.transport is Transport.UNIX or is_reserved(endpoint.name):
            return Terms()
        _, ask, allow = self._found(_Place(endpoint), request)
        deny, _, _ = self._found(_Place(endpoint))
        network = self.policy.network
        named: list[tuple[str, NetworkRule]] = [(f"network.ask[{index}]", network.ask[index]) for index in ask]
        named += [(f"network.allow[{index}]", network.allow[index]) for index in allow]
        return combined(named, (network.deny[index] for index in deny), endpoint.protocol)

    def _name(self, name: str | None) -> list[Match]:
        """What may be reached may be looked up, also where the connection will have to be asked for."""
        allow, ask, deny = self._networks
        network = self.policy.network
        return [
            *listed(Verdict.DENY, "network.deny", deny.naming(name, wholly=True), network.deny),
            *listed(Verdict.ALLOW, "network.ask", ask.naming(name, wholly=False), network.ask),
            *listed(Verdict.ALLOW, "network.allow", allow.naming(name, wholly=False), network.allow),
        ]

    # ---- programs and files ----

    @cached_property
    def _by_path_alone(self) -> bool:
        """Whether no rule about programs looks at arguments."""
        process = self.policy.process
        return all(rule.argv is None for rule in (*process.allow, *process.ask, *process.deny))

    @cached_property
    def _programs(self) -> tuple[Programs, Programs, Programs]:
        process = self.policy.process
        return Programs(process.allow), Programs(process.ask), Programs(process.deny)

    def _program(self, program: Program) -> list[Match]:
        allow, ask, deny = self._programs
        process = self.policy.process
        return [
            *listed(Verdict.DENY, "process.deny", deny.all(program, certain=False), process.deny),
            *listed(Verdict.ASK, "process.ask", ask.all(program, certain=False), process.ask),
            *listed(Verdict.ALLOW, "process.allow", allow.all(program, certain=True), process.allow),
        ]

    @cached_property
    def _paths(self) -> tuple[Paths, Paths]:
        return Paths(self.policy.filesystem.ask), Paths(self.policy.filesystem.watch)

    def _file(self, file: File) -> list[Match]:
        ask, watch = self._paths
        filesystem = self.policy.filesystem
        return [
            *listed(Verdict.ASK, "filesystem.ask", ask.all(file.path, file.other), filesystem.ask),
            *listed(Verdict.ALLOW, "filesystem.watch", watch.all(file.path, file.other), filesystem.watch),
            # What may be read and written at all is not decided here: mounts and Landlock hold it.
            Match(Verdict.ALLOW, "filesystem"),
        ]

    @cached_property
    def _applied(self) -> AppliedPaths:
        return AppliedPaths(self.policy.apply.ask)

    # ---- system calls ----

    def _kernel(self, call: KernelCall) -> Judgement:
        syscalls = self.policy.syscalls
        why = f"The system call {call.name} is refused here: {call.reason or 'the policy denies it'}."
        if call.name in syscalls.deny:
            return refused(Match(Verdict.DENY, f"syscalls.deny[{syscalls.deny.index(call.name)}]"), why)
        if call.name in syscalls.ask:
            asked = Match(Verdict.ASK, f"syscalls.ask[{syscalls.ask.index(call.name)}]")
            return judged([asked], "syscalls", f"make the system call {call.name}")
        return refused(Match(Verdict.DENY, "syscalls"), why)

    # ---- models, data and services ----

    @cached_property
    def _models(self) -> tuple[Models, Models, Models]:
        model = self.policy.model
        return Models(model.allow), Models(model.ask), Models(model.deny)

    def _model(self, call: ModelCall) -> list[Match]:
        allow, ask, deny = self._models
        model = self.policy.model
        return [
            *listed(Verdict.DENY, "model.deny", deny.all(call.model), model.deny),
            *listed(Verdict.ASK, "model.ask", ask.all(call.model), model.ask),
            *listed(Verdict.ALLOW, "model.allow", allow.all(call.model), model.allow),
        ]

    @cached_property
    def _queries(self) -> tuple[Queries, Queries, Queries]:
        data = self.policy.data
        return Queries(data.allow), Queries(data.ask), Queries(data.deny)

    def _query(self, query: Query) -> list[Match]:
        allow, ask, deny = self._queries
        data = self.policy.data
        asked, allowed = ask.all(query, certain=False), allow.all(query, certain=True)
        matches = [
            *listed(Verdict.DENY, "data.deny", deny.all(query, certain=False), data.deny),
            *listed(Verdict.ASK, "data.ask", asked, data.ask),
            *listed(Verdict.ALLOW, "data.allow", allowed, data.allow),
        ]
        rules = (*(data.ask[index] for index in asked), *(data.allow[index] for index in allowed))
        if matches and query.reversible is Reversible.NO and not names_statement(rules):
            matches += self._irreversible("statement", f"`statements: [{cut(query.statement, 32)}]`")
        return matches

    @cached_property
    def _operations(self) -> tuple[Operations, Operations, Operations]:
        api = self.policy.api
        return Operations(api.allow), Operations(api.ask), Operations(api.deny)

    def _call(self, call: Operation) -> list[Match]:
        allow, ask, deny = self._operations
        api = self.policy.api
        asked, allowed = ask.all(call), allow.all(call)
        matches = [
            *listed(Verdict.DENY, "api.deny", deny.all(call), api.deny),
            *listed(Verdict.ASK, "api.ask", asked, api.ask),
            *listed(Verdict.ALLOW, "api.allow", allowed, api.allow),
        ]
        rules = (*(api.ask[index] for index in asked), *(api.allow[index] for index in allowed))
        if matches and call.reversible is Reversible.NO and not names_operation(rules, call):
            matches += self._irreversible("operation", f"`operations: [{cut(call.operation, 32)}]`")
        return matches


def _name_of(subject: Endpoint | Request) -> str | None:
    return subject.endpoint.name if isinstance(subject, Request) else subject.name
