"""What an agent tries, and what is answered: the values that every enforcer, the monitor and the log share.

An :class:`Action` is one attempt. It says what (``kind`` and ``subject``) and who (``origin``), as an enforcer saw it
at a place that the agent cannot go around. The answer is a :class:`Decision`. Nothing here knows where actions come
from or who decides.

All values are immutable and hashable, so that equal subjects can share one judgement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import MappingProxyType

UNRECORDED = MappingProxyType({"recorded": False})
"""Metadata of a field that is for those who live while the action does, and is in no record."""


class Verdict(IntEnum):
    """The answers, from mildest to hardest. Several are combined by their maximum, so adding one never widens."""

    ALLOW = 0
    ASK = 1
    """Held until a person answers; no answer in time means no."""
    DENY = 2
    KILL = 3
    """The attempt is denied and its sandbox ends."""


class Content(Enum):
    """What can be kept of a session beside its records, which only say that it was there."""

    TERMINAL = "terminal"
    """What a command has written: to its terminal, or to stdout and stderr."""
    DIFF = "diff"
    """What was changed in the workspace, as a patch."""
    REFUSED_FLOW = "refused_flow"
    """The first bytes of a connection that the gateway refused."""
    PROMPT = "prompt"
    """What a model was asked: the body of the request, as it was sent on."""
    RESPONSE = "response"
    """What it answered: the body, as it came."""
    QUERY = "query"
    """A query of data, as it was asked, or the arguments of an operation of a service."""
    FILE = "file"
    """A file that was changed and that the policy names, as it was when the sandbox ended."""


class Reversible(Enum):
    """Whether what an action brings about can be taken back."""

    YES = "yes"
    """It leaves nothing that would have to be: it only reads, or all of it vanishes with the sandbox."""
    UNTIL_APPLIED = "until-applied"
    """It is in the sandbox's layer, which can be dropped as long as it is not applied."""
    NO = "no"
    """It may change something outside that nobody here can change back, or lose what cannot be had again."""


class Kind(Enum):
    """What can be tried. A refused system call is ``KERNEL``; its subject names the call."""

    PROCESS_EXEC = "process.exec"
    FILE_OPEN = "file.open"
    FILE_RENAME = "file.rename"
    FILE_UNLINK = "file.unlink"
    FILE_LINK = "file.link"
    FILE_CHMOD = "file.chmod"
    NET_SOCKET = "net.socket"
    NET_CONNECT = "net.connect"
    NET_BIND = "net.bind"
    NET_LISTEN = "net.listen"
    NET_SEND = "net.send"
    NET_RESOLVE = "net.resolve"
    HTTP_REQUEST = "http.request"
    MODEL_CALL = "model.call"
    DATA_QUERY = "data.query"
    API_CALL = "api.call"
    KERNEL = "kernel"
    SANDBOX_SNAPSHOT = "sandbox.snapshot"
    SANDBOX_RESTORE = "sandbox.restore"
    SANDBOX_FORK = "sandbox.fork"
    SANDBOX_APPLY = "sandbox.apply"
    SANDBOX_UNDO = "sandbox.undo"
    SANDBOX_DISCARD = "sandbox.discard"

    @property
    def reversible(self) -> Reversible:
        """What can be said where no more is known than the kind; :attr:`Action.reversible` says it of one action."""
        return _REVERSIBLE[self]


_REVERSIBLE = {
    Kind.PROCESS_EXEC: Reversible.YES,  # what it does then is asked for by itself
    Kind.FILE_OPEN: Reversible.UNTIL_APPLIED,
    Kind.FILE_RENAME: Reversible.UNTIL_APPLIED,
    Kind.FILE_UNLINK: Reversible.UNTIL_APPLIED,
    Kind.FILE_LINK: Reversible.UNTIL_APPLIED,
    Kind.FILE_CHMOD: Reversible.UNTIL_APPLIED,
    Kind.NET_SOCKET: Reversible.YES,
    Kind.NET_CONNECT: Reversible.YES,  # the connection; what is sent on it is judged where it can be seen
    Kind.NET_BIND: Reversible.YES,
    Kind.NET_LISTEN: Reversible.YES,
    Kind.NET_SEND: Reversible.YES,  # no datagram leaves the sandbox
    Kind.NET_RESOLVE: Reversible.YES,
    Kind.HTTP_REQUEST: Reversible.NO,
    Kind.MODEL_CALL: Reversible.YES,  # the answer is all that there is of it
    Kind.DATA_QUERY: Reversible.NO,
    Kind.API_CALL: Reversible.NO,
    Kind.KERNEL: Reversible.YES,
    Kind.SANDBOX_SNAPSHOT: Reversible.YES,
    Kind.SANDBOX_RESTORE: Reversible.NO,  # what no snapshot has is lost
    Kind.SANDBOX_FORK: Reversible.YES,
    Kind.SANDBOX_APPLY: Reversible.NO,  # undo is for as long as nobody else has touched the files
    Kind.SANDBOX_UNDO: Reversible.NO,  # the layer that could be applied again need not be kept any more
    Kind.SANDBOX_DISCARD: Reversible.NO,
}


# ---- subjects: what exactly ----


class Transport(Enum):
    """What carries a connection."""

    TCP = "tcp"
    UDP = "udp"
    UNIX = "unix"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address in the sandbox's network, or a Unix socket.

    ``address`` is the canonical text of an IP address (IPv4-mapped IPv6 as IPv4, no zone), or ``""``. ``name`` is the
    DNS name for which this address was handed out, or that was asked for, in canonical form (see
    :mod:`corral.policy.names`). ``path`` is a Unix socket: absolute inside the sandbox, ``@name`` for an abstract one,
    ``""`` for an unnamed one. ``protocol`` is what is spoken (``tls``, ``ssh``, ...), where an enforcer knows.
    """

    transport: Transport
    address: str = ""
    port: int = 0
    name: str | None = None
    path: str = ""
    protocol: str | None = None
    protected: bool = False
    """Only a rule that names this address allows it: it is private, special, or the host's own."""

    def __str__(self) -> str:
        if self.transport is Transport.UNIX:
            return self.path or "an unnamed socket"
        host = self.name or (f"[{self.address}]" if ":" in self.address else self.address)
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Socket:
    """A kind of socket that was asked for (socket(2), socketpair(2))."""

    family: int
    type: int
    protocol: int

    def __str__(self) -> str:
        return f"family {self.family}, type {self.type}, protocol {self.protocol}"


@dataclass(frozen=True, slots=True)
class Program:
    """A program that is to run: ``path`` is the file itself, links resolved, as the sandbox names it."""

    path: str
    argv: tuple[str, ...] = ()
    """Bounded: see ``truncated``."""
    truncated: bool = False
    interpreter: str = ""
    """The program that runs a script (its ``#!`` line), links resolved."""
    digest: str = ""
    """SHA-256 of the content in hexadecimal, or empty where it could not be read."""
    interpreter_digest: str = ""
    """The same of a script's interpreter, where it is no script itself and the policy has rules about programs."""

    def __str__(self) -> str:
        return " ".join((self.path, *self.argv[1:]))  # the name that argv claims is the caller's word


class Access(Enum):
    """What is wanted of a file."""

    READ = "read"
    WRITE = "write"
    """Anything that changes content, name or metadata."""


@dataclass(frozen=True, slots=True)
class File:
    """A file by its resolved path inside the sandbox; ``other`` is the second name of a rename or link."""

    path: str
    access: Access
    other: str = ""

    def __str__(self) -> str:
        return f"{self.path} -> {self.other}" if self.other else self.path


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A system call that the table refuses. ``reason`` is the table's, ``errno`` what the caller gets."""

    name: str
    errno: int
    reason: str
    quiet: bool = False
    """Programs try this as a matter of course and go on without it: recorded, but not told to the agent."""

    def __str__(self) -> str:
        return self.name


class Meaning(Enum):
    """What a request is for, beside what its method says."""

    METHOD = "method"
    """That, and nothing else that could be seen."""
    FETCH = "fetch"
    """A POST by which a well-known tool reads, as git does: see :func:`corral.policy.irreversible.fetches`."""
    OVERRIDDEN = "overridden"
    """Its head or its query names another method or path, which some servers take for the request's own."""
    BODY = "body"
    """It has a body although its method gives none a meaning (RFC 9110, sections 9.3.1 and 9.3.2)."""


_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS", "TRACE"))
"""RFC 9110, section 9.2.1. Methods are told apart by their case (section 9.1): ``get`` is some other one."""


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request to a named host."""

    endpoint: Endpoint
    method: str
    path: str
    meaning: Meaning = Meaning.METHOD

    @property
    def reversible(self) -> Reversible:
        """Whether it only reads, as far as its head says: a server may do with a GET what it likes."""
        reads = self.meaning is Meaning.FETCH or (self.meaning is Meaning.METHOD and self.method in _SAFE_METHODS)
        return Reversible.YES if reads else Reversible.NO

    def __str__(self) -> str:
        meaning = "" if self.meaning is Meaning.METHOD else f" ({self.meaning.value})"
        return f"{self.method} {self.endpoint}{self.path}{meaning}"


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A question to a model."""

    model: str

    def __str__(self) -> str:
        return self.model


@dataclass(frozen=True, slots=True)
class Query:
    """A query of a named data source: ``statement`` is select, insert, ...; ``tables`` all that it touches."""

    source: str
    statement: str
    tables: tuple[str, ...] = ()
    preview: str = field(default="", metadata=UNRECORDED)
    """What it changes, for the person who is asked: the statement, how many rows, the first of them as they were and as
    they would be. They are data of the source, so no record has them. Two changes that are shown differently are
    different."""

    @property
    def reversible(self) -> Reversible:
        """Only ``select`` reads; a broker that cannot tell must say another word."""
        return Reversible.YES if self.statement.lower() == "select" else Reversible.NO

    def __str__(self) -> str:
        return f"{self.statement} {', '.join(self.tables)} of {self.source}"


@dataclass(frozen=True, slots=True)
class Operation:
    """A call of one operation of a service that its OpenAPI document describes."""

    service: str
    operation: str
    """Its id."""
    method: str
    """Of the request that is sent, upper case."""
    preview: str = field(default="", metadata=UNRECORDED)
    """The request that is sent, without its credential, for the person who is asked. What it says may be anybody's
    data, so no record has it. Two that are not the same are shown differently."""

    @property
    def reversible(self) -> Reversible:
        """As of a request: what its method says."""
        return Reversible.YES if self.method in _SAFE_METHODS else Reversible.NO

    def __str__(self) -> str:
        return f"{self.operation} of {self.service}"


@dataclass(frozen=True, slots=True)
class Verb:
    """One of the sandbox's own verbs, with what it is about (paths of an apply, the name of a snapshot)."""

    names: tuple[str, ...] = ()
    source: str = ""
    """Where it takes that from: the layer of an apply, the apply of an undo."""
    digest: str = ""
    """Of an apply or undo: the hash of exactly what would be changed, to what."""
    target: str = ""
    """Where it goes, if not into files: the branch that an apply becomes."""

    def __str__(self) -> str:
        return ", ".join(self.names)


Subject = Endpoint | Socket | Program | File | KernelCall | Request | ModelCall | Query | Operation | Verb


# ---- who ----


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A process that the actor descends from, as it was when it was first seen."""

    pid: int
    """Inside the sandbox."""
    exe: str


@dataclass(frozen=True, slots=True)
class Process:
    """The process that acts."""

    pid: int
    """Outside: of the thread group, in the supervisor's PID namespace."""
    inner_pid: int
    """Inside: what the agent sees."""
    started: int
    """Clock ticks after boot (proc(5), stat, field 22): with ``pid`` it names one process for ever."""
    exe: str
    argv: tuple[str, ...] = ()
    ancestors: tuple[Ancestor, ...] = ()
    """From the parent outwards, the sandbox's first process left out."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an action comes from."""

    sandbox: str
    session: str
    step: int = 0
    """The step it belongs to; 0 where none is open."""
    exec: int = 0
    """The exec whose command this process descends from; 0 where that is not one of ours."""
    process: Process | None = None
    tool: str = ""
    """Of the step, the id of the tool call that it comes from; empty where that is not known."""
    unexplained: bool = False
    """A model is asked in this session, and no answer of it explains the action: no step is open for its process."""


# ---- the attempt and the answer ----


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that an agent tries."""

    kind: Kind
    subject: Subject
    origin: Origin

    @property
    def name(self) -> str:
        """The kind as rules and records name it: ``net.connect``, ``kernel.mount``."""
        return f"kernel.{self.subject.name}" if isinstance(self.subject, KernelCall) else self.kind.value

    @property
    def reversible(self) -> Reversible:
        """Whether what it brings about can be taken back."""
        subject = self.subject
        if isinstance(subject, Request | Query | Operation):
            return subject.reversible
        if isinstance(subject, File) and subject.access is Access.READ:
            return Reversible.YES
        return _REVERSIBLE[self.kind]

    def __str__(self) -> str:
        subject = "" if isinstance(self.subject, KernelCall) else f" {self.subject}"
        return f"{self.name}{subject}"


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one part of the monitor says of an action."""

    verdict: Verdict
    rule: str
    """Where it is written: ``network.deny[2]``, ``network (nothing allows it)``."""
    reason: str = ""
    """One sentence that a person and a model understand."""
    advice: str = ""
    """What to do instead, in the same words."""
    private: bool = False
    """The rule and its reason are not for the agent: it is told only that it may not."""
    asked: tuple[str, ...] = ()
    """Where the verdict is ASK: all rules that ask; none stands for ``rule`` alone."""


@dataclass(frozen=True, slots=True)
class Decision:
    """An action with what was decided. ``count`` is above 1 where equal decisions in a row make one record."""

    action: Action
    verdict: Verdict
    rule: str
    reason: str
    advice: str
    decider: str
    """The part of the monitor that decided: policy, behaviour, risk, autonomy, approvals, or monitor for its faults; or
    enforcer, where what it saw itself was worse."""
    number: int
    """Of this decision in its session, from 1."""
    at: float
    """Seconds since the epoch."""
    private: bool = False
    count: int = 1
    held: float = 0.0
    """Seconds for which the action was held."""
    answered_by: str = field(default="")
    """Who answered an ``ask``."""
    asked: tuple[str, ...] = ()
    """All rules that asked, as in the opinion; the answer was to all of them. Not recorded."""

    @property
    def allowed(self) -> bool:
        return self.verdict is Verdict.ALLOW


@dataclass(frozen=True, slots=True)
class Attempt:
    """A connection, or the sending of a datagram, that was let through and is on its way to another enforcer."""

    transport: Transport
    local: tuple[bytes, int]
    """The caller's own address (4 or 16 bytes; IPv4-mapped as IPv4) and port."""
    remote: tuple[bytes, int]
    """Where to, as the kernel was told."""
    decision: Decision


@dataclass(frozen=True, slots=True)
class Flow:
    """One connection that went out, or was to: what it was when it ended. It is an account, not a decision."""

    origin: Origin
    endpoint: Endpoint
    """Name, port, protocol as recognised, and the address that was dialled (``""`` where none was)."""
    rule: str
    """What let it through."""
    started: float
    """Seconds since the epoch."""
    seconds: float
    """How long it lived."""
    bytes_up: int = 0
    """From the sandbox, as far as they were sent on."""
    bytes_down: int = 0
    packets_up: int = 0
    """TCP segments with data on the outer connection (tcp_info)."""
    packets_down: int = 0
    tls_name: str = ""
    """The server name of the client's hello."""
    ja4: str = ""
    """Fingerprint of the client's hello."""
    certificate: str = ""
    """SHA-256 of the server's certificate in hexadecimal, where it could be seen."""
    intercepted: bool = False
    close: str = ""
    """Why it ended."""


# ---- what was used ----


class Ending(Enum):
    """How a call of a broker ended."""

    ANSWERED = "answered"
    """The upstream gave its whole answer, be it an error."""
    REFUSED = "refused"
    """By the policy, a budget or a scanner: nothing was sent."""
    FAILED = "failed"
    """The upstream could not be reached, or broke off, or was too slow, or too much."""
    ABANDONED = "abandoned"
    """Whoever asked was gone before the end."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a model wants done."""

    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it."""


@dataclass(frozen=True, slots=True)
class Used:
    """What one call of a broker came to: the account that the log, the meter and the budgets share."""

    origin: Origin
    """Its step is the one in which the call was made."""
    kind: Kind
    """MODEL_CALL, DATA_QUERY or API_CALL."""
    source: str
    """The upstream, source or service."""
    name: str
    """The model as it was asked for; the statement; the operation."""
    rule: str
    """What let it through, or refused it."""
    started: float
    """Seconds since the epoch."""
    seconds: float
    ending: Ending
    first: float = 0.0
    """Seconds until the answer began."""
    status: int = 0
    """Of HTTP, as it was answered inside."""
    reason: str = ""
    """Why it ended so; our own words."""
    input_tokens: int = 0
    """All of them, with those that were cached or are now."""
    output_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    cost: int = 0
    """In billionths of the policy's currency."""
    currency: str = ""
    rows: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    personal: tuple[str, ...] = ()
    """Columns about persons that it touched: ``source.table.column``."""
    opened: int = 0
    """The step that a model's answer opened; 0 where it asked for no tool."""
    conversation: str = ""
    """Hash of how the conversation began."""
    parent: str = ""
    """The conversation whose tool call began this one, where that is known."""
    tools: tuple[ToolCall, ...] = ()
    finish: str = ""
    """Why the model stopped, in its API's word."""
    estimated: bool = False
    """The upstream has not said what was used; the tokens are our estimate."""
    call: int = 0
    """Its number in its session, from 1: what is kept of it beside the log (:class:`corral.monitor.records.Keeper`)
    bears it too, which ties them together. 0 where it has none."""
