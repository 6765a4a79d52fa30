"""The policy as immutable values, with its defaults.

This module imports nothing heavy: `corral run` without a policy file never pays for pydantic or YAML
(those live in :mod:`corral.policy.load`, the edge where files are read and checked).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from corral.actions import Content, Kind, Verdict

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

DEFAULT_ENVIRONMENT = ("TERM", "COLORTERM", "LANG", "LANGUAGE", "LC_*", "TZ", "NO_COLOR")


class Degradation(Enum):
    """A wall that a policy may do without, by name. Nothing is ever weakened that is not listed."""

    LANDLOCK = "landlock"


@dataclass(frozen=True, slots=True)
class Agent:
    """Whom this policy is for. Every record names it (I10)."""

    name: str = "agent"
    version: str = "0"


@dataclass(frozen=True, slots=True)
class Note:
    """What a rule says for itself beside its pattern."""

    reason: str = ""
    """Why; shown to the agent when the rule refuses something."""
    advice: str = ""
    """What to do instead; shown to the agent."""
    private: bool = False
    """The agent is told neither the rule nor its reason."""


class SnapshotWhen(Enum):
    """When a snapshot is taken without being asked for."""

    NEVER = "never"
    STEP = "step"
    """At the start, and after each step: a command that was run from outside."""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """What the sandbox sees of the host beside its system trees and its workspace, and what is looked at closer."""

    read: tuple[str, ...] = ()
    """Absolute host paths (files or directories) shown read-only, at their own place."""
    write: tuple[str, ...] = ()
    """Absolute host directories shown at their own place, whose changes go to the layer."""
    deny: tuple[str, ...] = ()
    """Absolute paths that are absent inside, whatever else shows them."""
    ask: tuple[str, ...] = ()
    """Globs of absolute paths inside; opening, renaming, ... one of them is held until somebody answers."""
    watch: tuple[str, ...] = ()
    """Globs of absolute paths inside; every such action is recorded."""
    snapshot: SnapshotWhen = SnapshotWhen.NEVER
    """Where one cannot be taken, the sandbox ends."""
    restore_keeps: tuple[str, ...] = ()
    """Globs of programs, by their path inside, that go on when the files are set back; all others are killed."""
    rename_directories: bool = True
    """Whether directories that were there before can be renamed, which the kernel's overlay refuses (EXDEV). Every
    rename then takes some 0.02 to 0.1 ms more."""


class Permit(Enum):
    """What a flow may do only where its rule says so, because it hides or changes what is spoken."""

    CONNECT = "connect"
    """HTTP CONNECT: the server opens a further connection, to wherever the client says."""
    ECH = "ech"
    """A TLS hello whose inner name is encrypted."""
    H2C = "h2c"
    """HTTP/2 in clear, from the start or by upgrade."""
    NO_SNI = "no-sni"
    """A TLS hello without a server name."""
    STARTTLS = "starttls"
    """TLS that begins in the middle of a plain protocol."""
    UPGRADE = "upgrade"
    """HTTP upgrades other than the two that have their own word."""
    WEBSOCKET = "websocket"


class CredentialKind(Enum):
    """How a credential is put into a request."""

    BASIC = "basic"
    """``Authorization: Basic``, of ``user`` and the secret."""
    BEARER = "bearer"
    """``Authorization: Bearer``."""
    GIT = "git"
    """As ``BASIC``, as git over HTTPS wants it; the user is ``x-access-token`` where none is given."""
    HEADER = "header"
    """A header of its own."""


@dataclass(frozen=True, slots=True)
class Credential:
    """Where a secret is found outside, and how it is put into requests. The secret itself is in no policy."""

    kind: CredentialKind
    source: str
    """``env:NAME``, a variable of the controlling process, or ``file:/absolute/path`` on the host."""
    header: str = ""
    """Name of the header in lower case; of ``HEADER`` only."""
    user: str = ""
    """Of ``BASIC`` and ``GIT`` only."""


@dataclass(frozen=True, slots=True)
class RequestRule:
    """HTTP requests, by method and path."""

    methods: tuple[str, ...] = ()
    """Upper case, sorted; none means any."""
    path: str = "/**"
    """A glob of the path, decoded and without its query: see :mod:`corral.policy.requests`."""


@dataclass(frozen=True, slots=True)
class FlowLimits:
    """Upper bounds for the flows of one rule. ``None`` means no bound."""

    connections: int = 256
    """Flows at one time."""
    up: int | None = None
    """Bytes that one flow may send."""
    down: int | None = None
    """Bytes that one flow may receive."""
    idle: float = 3600.0
    """Seconds without a byte in either direction."""
    dial: float = 10.0
    """Seconds until a connection to the outside stands."""
    header: int = 64 * KIB
    """Bytes of one HTTP head, where requests are looked at."""
    body: int | None = None
    """Bytes of one HTTP body, where requests are looked at."""
    session_up: int | None = None
    """Bytes that all flows of the rule together may send in one session."""
    session_down: int | None = None
    """Bytes that they may receive."""


ANY_NAME = "*"
"""Every name. No policy file may say this; a run that learns does (`corral run --net learn`)."""


@dataclass(frozen=True, slots=True)
class NetworkRule:
    """A set of destinations: all that is given must hold. At least one of name and network is given.

    ``name`` is canonical, and ``*.name`` means every name below it, not the name itself. ``network`` is an IP network
    in canonical text (``192.0.2.0/24``). ``ports`` are inclusive ranges; none means any port. ``protocol`` is what is
    spoken, one of ``corral.policy.rules.PROTOCOLS``; None means TLS, and HTTP except at port 443, where the rule
    allows or asks, and everything where it denies.
    """

    name: str | None = None
    network: str | None = None
    ports: tuple[tuple[int, int], ...] = ()
    protocol: str | None = None
    note: Note = field(default_factory=Note)
    permit: tuple[Permit, ...] = ()
    """Sorted by word. Of allow and ask only, as all that follows but ``requests``."""
    intercept: bool = False
    """TLS ends at the gateway, which looks at the requests within. ``requests`` and ``credential`` mean that, too."""
    requests: tuple[RequestRule, ...] = ()
    """Which HTTP requests are meant; none means all."""
    credential: Credential | None = None
    """What the gateway adds to the requests."""
    limits: FlowLimits = field(default_factory=FlowLimits)


@dataclass(frozen=True, slots=True)
class Network:
    """Destinations. What no rule names is denied, except the sandbox's own loopback."""

    allow: tuple[NetworkRule, ...] = ()
    ask: tuple[NetworkRule, ...] = ()
    deny: tuple[NetworkRule, ...] = ()
    loopback: Verdict = Verdict.ALLOW
    """Connections between programs of the sandbox, where no rule names them: IP loopback and Unix sockets."""
    listen: Verdict = Verdict.ALLOW
    """Binding and listening, in the sandbox's own network."""
    resolvers: tuple[str, ...] = ()
    """DNS servers that the host asks, in this order, in place of its own: ``192.0.2.1:53``, ``[2001:db8::1]:53``."""
    proxy: str | None = None
    """The HTTP proxy through which everything is dialled (by CONNECT): ``http://192.0.2.1:3128``."""


@dataclass(frozen=True, slots=True)
class ExecRule:
    """Programs by their resolved path inside (a glob) and, optionally, their arguments.

    ``argv`` are globs, one an argument from the program's name on; a last ``**`` stands for any number of arguments.
    """

    path: str
    argv: tuple[str, ...] | None = None
    note: Note = field(default_factory=Note)


@dataclass(frozen=True, slots=True)
class Processes:
    """Which programs may be run. What no rule names is denied."""

    allow: tuple[ExecRule, ...] = (ExecRule("/**"),)
    ask: tuple[ExecRule, ...] = ()
    deny: tuple[ExecRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Syscalls:
    """System calls, by name, that are judged beside those that the table refuses for every sandbox."""

    ask: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelRule:
    """Models by a glob of their name."""

    name: str
    note: Note = field(default_factory=Note)


class ModelApi(Enum):
    """What an upstream speaks."""

    ANTHROPIC = "anthropic"
    """Messages."""
    OPENAI = "openai"
    """Chat Completions and Responses."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where models are outside."""

    name: str
    url: str
    """What comes before the paths of its API, as its own clients want it: ``https://api.openai.example/v1``,
    ``https://api.anthropic.example``."""
    api: ModelApi
    models: tuple[str, ...] = ("*",)
    """Globs of the names by which they are asked for here."""
    credential: Credential | None = None
    """What is put into each request."""
    rename: tuple[tuple[str, str], ...] = ()
    """Names by which they are asked for here, and those that the upstream knows."""


@dataclass(frozen=True, slots=True)
class Price:
    """What models cost, in :attr:`Model.currency` for a million tokens."""

    model: str
    """A glob of the name by which it is asked for; of several the first that matches holds."""
    input: float
    output: float
    cached: float | None = None
    """Input that the upstream had in its cache; None is as ``input``."""
    written: float | None = None
    """Input that it puts into its cache; None is as ``input``."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of models may be used. ``None`` means no bound."""

    tokens: int | None = None
    """Input and output together."""
    money: float | None = None
    """In :attr:`Model.currency`. A model without a price cannot be asked where this is given."""
    requests: int | None = None
    requests_per_minute: int | None = None
    concurrent: int | None = None
    """Requests at one time."""
    wall_time: float | None = None
    """Seconds: of a session from its first request on, of an agent the sum of how long its requests took."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an upstream is waited for, in seconds, and how often it is asked again."""

    connect: float = 10.0
    first: float = 300.0
    """Until the answer begins."""
    idle: float = 120.0
    """Between two pieces of it."""
    total: float = 3600.0
    retries: int = 2
    """Further tries of one upstream, where it cannot be reached or says that it is overloaded; never once an answer has
    begun."""


class Treatment(Enum):
    """What becomes of a request to a model in which something was found."""

    RECORD = "record"
    """It goes on; that it was found is recorded."""
    BLOCK = "block"


@dataclass(frozen=True, slots=True)
class Guard:
    """Who looks at the results of tools before a model does."""

    scanners: tuple[str, ...] = ()
    """By name: ``instructions``, or one that is installed (entry points of ``corral.scanners``)."""
    finding: Treatment = Treatment.BLOCK
    failure: Treatment = Treatment.BLOCK
    """Of a scanner."""


@dataclass(frozen=True, slots=True)
class Model:
    """Which models may be asked, and where they are. What no rule names is denied."""

    allow: tuple[ModelRule, ...] = ()
    ask: tuple[ModelRule, ...] = ()
    deny: tuple[ModelRule, ...] = ()
    upstreams: tuple[Upstream, ...] = ()
    """In the order in which they are tried. Without any there is no model broker."""
    currency: str = "USD"
    prices: tuple[Price, ...] = ()
    session: Budget = field(default_factory=Budget)
    """Of one session."""
    agent: Budget = field(default_factory=Budget)
    """Of all sessions of the agent, by its name, within ``agent_period``."""
    agent_period: float = 86400.0
    """Seconds back from now."""
    patience: Patience = field(default_factory=Patience)
    guard: Guard = field(default_factory=Guard)
    hosted_tools: tuple[str, ...] = ()
    """Globs of the types of tools that an upstream may run itself: ``web_search*``, ``mcp``."""
    remote_content: bool = False
    """A request may point to content that its upstream fetches or keeps."""


@dataclass(frozen=True, slots=True)
class DataRule:
    """Queries of one source: statements (``select``, ...; none means any) over tables (globs; none means any)."""

    source: str
    statements: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    note: Note = field(default_factory=Note)


class Dialect(Enum):
    """What a source of data is."""

    DUCKDB = "duckdb"
    MYSQL = "mysql"
    """And MariaDB."""
    POSTGRESQL = "postgresql"
    SQLITE = "sqlite"


class ColumnUse(Enum):
    """What is seen of a column."""

    DENY = "deny"
    """Nothing; it does not exist."""
    HASH = "hash"
    """A keyed hash: equal values look equal, in one session."""
    MASK = "mask"
    """That there is a value, or none."""
    SHOW = "show"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    name: str
    use: ColumnUse = ColumnUse.SHOW
    personal: bool = False
    """It is about persons; records of queries that touch it say so."""


@dataclass(frozen=True, slots=True)
class TableScope:
    """One table or view of a source, and what of it there is for the agent. What is not named does not exist."""

    name: str
    """As the source has it: ``customers``, ``public.customers``."""
    columns: tuple[Column, ...]
    """In the order in which ``*`` means them."""
    rows: str = ""
    """A condition over its columns, in the source's SQL, that holds of every row that is seen or changed."""
    statements: tuple[str, ...] = ("select",)
    """``select``, ``insert``, ``update``, ``delete``."""


@dataclass(frozen=True, slots=True)
class DataLimits:
    """Upper bounds of the queries of one source. ``None`` means no bound."""

    rows: int = 1000
    """Of one result; also of what one statement may change."""
    bytes: int = MIB
    """Of one result, as it is sent."""
    time: float = 10.0
    """Seconds of one query."""
    cost: float | None = None
    """What the source's own EXPLAIN estimates, in its units. PostgreSQL and MySQL."""
    queries_per_minute: int = 600
    concurrent: int = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A database that may be queried."""

    name: str
    dialect: Dialect
    url: str
    """``postgresql://user@host:5432/database``, ``mysql://...``, always with the port, or the absolute path of a file;
    never a password."""
    password: str = ""
    """Where it is outside: ``env:NAME`` or ``file:/path``."""
    role: str = ""
    """PostgreSQL: the role that is taken (SET ROLE) before anything is done."""
    tables: tuple[TableScope, ...] = ()
    limits: DataLimits = field(default_factory=DataLimits)
    hold_writes: bool = True
    """What is changed waits in its transaction until a person has seen the rows and said yes."""


@dataclass(frozen=True, slots=True)
class Data:
    """Which data may be queried. What no rule names is denied; an allow must cover every table of a query."""

    allow: tuple[DataRule, ...] = ()
    ask: tuple[DataRule, ...] = ()
    deny: tuple[DataRule, ...] = ()
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class ApiRule:
    """Operations of one service, by globs of their ids; none means any."""

    service: str
    operations: tuple[str, ...] = ()
    note: Note = field(default_factory=Note)


@dataclass(frozen=True, slots=True)
class Parameter:
    """What an argument of an operation may be."""

    name: str
    """Of a parameter, or the way to a member of a JSON body: ``body.issue.project``."""
    values: tuple[str, ...]
    """Globs; one must match its text."""


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of a service that there is for the agent."""

    id: str
    """Its ``operationId``, or ``METHOD /path`` as the document has them."""
    parameters: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True)
class Service:
    """An HTTP API, as its OpenAPI document describes it."""

    name: str
    document: str
    """Absolute host path."""
    url: str
    """Its server; what the document says of servers is not used."""
    operations: tuple[Operation, ...] = ()
    """What is not named does not exist."""
    credential: Credential | None = None
    requests_per_minute: int = 600
    concurrent: int = 4
    time: float = 30.0
    """Seconds of one request."""
    bytes: int = 10 * MIB
    """Of one answer."""


@dataclass(frozen=True, slots=True)
class Api:
    """Which operations of which services may be used. What no rule names is denied."""

    allow: tuple[ApiRule, ...] = ()
    ask: tuple[ApiRule, ...] = ()
    deny: tuple[ApiRule, ...] = ()
    services: tuple[Service, ...] = ()


@dataclass(frozen=True, slots=True)
class Approvals:
    """How a held action is answered."""

    timeout: float = 300.0
    """Seconds until no answer means no."""
    freeze: bool = False
    """Freeze the whole sandbox while one of its actions is held."""


@dataclass(frozen=True, slots=True)
class Detection:
    """Behaviour rules."""

    rules: tuple[str, ...] = ()
    """Absolute host paths of rule files."""


@dataclass(frozen=True, slots=True)
class Autonomy:
    """How much this agent version may do without asking."""

    level: int = 0
    """0: nothing."""


INSIDE = (
    Kind.FILE_CHMOD,
    Kind.FILE_LINK,
    Kind.FILE_OPEN,
    Kind.FILE_RENAME,
    Kind.FILE_UNLINK,
    Kind.KERNEL,
    Kind.NET_BIND,
    Kind.NET_LISTEN,
    Kind.NET_SOCKET,
    Kind.PROCESS_EXEC,
)
"""What has effects inside the sandbox only, which vanish with it."""


@dataclass(frozen=True, slots=True)
class Log:
    """How decisions are recorded, where there is a log."""

    asynchronous: tuple[Kind, ...] = INSIDE
    """Actions that go on before their record is durable. All others wait for it."""
    keep: tuple[tuple[Content, float], ...] = ()
    """Content that is kept beside the log, and for how many seconds."""
    keep_bytes: int = 8 * MIB
    """Of one such content; the rest is cut off."""
    files: tuple[str, ...] = ()
    """Globs of absolute paths inside: which of the files that a session has changed are content to keep."""


@dataclass(frozen=True, slots=True)
class Apply:
    """What it takes to make changes real outside the sandbox."""

    ask: tuple[str, ...] = ()
    """Globs of paths, ``/`` being the workspace: a person must look at a change of what they name, or of what lies
    below that, as at hooks and rc files. Small and capital letters are the same."""
    witnesses: tuple[str, ...] = ()
    """Public keys (C2SP tlog-cosignature) of those who cosign the log."""
    cosignatures: int = 0
    """How many of them must have cosigned it, as it is then, before anything is applied."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Upper bounds for the whole sandbox. ``None`` means no bound."""

    cpu: float | None = None
    """Processors, as a number: 1.5 is one and a half."""
    memory: int = 4 * GIB
    """Bytes of memory, swap off; what is written to files counts here too, see ``disk``."""
    processes: int = 1024
    """Processes and threads."""
    open_files: int = 4096
    """Open files of one process."""
    disk: int = 2 * GIB
    """Bytes of all changes to files together; the layer is held in memory while the sandbox lives."""
    inodes: int = 262_144
    """Number of files, directories and links that all changes together may hold."""
    wall_time: float | None = None
    """Seconds from start to forced end."""
    output: int = 10 * MIB
    """Bytes kept of each captured stream of one exec; the rest is dropped and marked."""


@dataclass(frozen=True, slots=True)
class Layers:
    """What may be kept of changes, and for how long. ``None`` means no bound but the disk's own."""

    keep_for: float | None = None
    """Seconds from when it was kept; then it may be removed."""
    snapshot_bytes: int | None = None
    """Of all snapshots of one session together."""
    total_bytes: int | None = None
    """Of all layers in the work area together, whosoever they are."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Which variables of the caller pass in, and which are set."""

    allow: tuple[str, ...] = DEFAULT_ENVIRONMENT
    """Names, or prefixes ending in ``*``."""
    set: tuple[tuple[str, str], ...] = ()
    """Name and value pairs, stronger than ``allow``."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy. The defaults are the built-in policy."""

    agent: Agent = field(default_factory=Agent)
    filesystem: Filesystem = field(default_factory=Filesystem)
    network: Network = field(default_factory=Network)
    process: Processes = field(default_factory=Processes)
    syscalls: Syscalls = field(default_factory=Syscalls)
    resources: Resources = field(default_factory=Resources)
    layers: Layers = field(default_factory=Layers)
    environment: Environment = field(default_factory=Environment)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    api: Api = field(default_factory=Api)
    approvals: Approvals = field(default_factory=Approvals)
    log: Log = field(default_factory=Log)
    apply: Apply = field(default_factory=Apply)
    detection: Detection = field(default_factory=Detection)
    autonomy: Autonomy = field(default_factory=Autonomy)
    irreversible: Verdict = Verdict.ASK
    """What becomes of requests, queries and operations that change something outside for good, where they are allowed
    by rules that do not name their method, statement or operation."""
    allow_degraded: frozenset[Degradation] = frozenset()
