"""A policy file as strict pydantic models, section by section; the values that they become are in ``model``.

Names and order are those of :mod:`corral.policy.model`. Docstrings are what editors show (``corral policy schema``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, Field

from corral.policy.document import Route, field_name
from corral.policy.fields import (
    MAX_WITNESSES,
    Answer,
    AppliedGlobs,
    Duration,
    FormatVersion,
    KeptContent,
    KeptSize,
    Kinds,
    Label,
    LargeSize,
    PassedVariables,
    PathGlobs,
    Paths,
    Profile,
    SmallSize,
    SnapshotTime,
    Strict,
    SystemCalls,
    Trees,
    Variables,
    Walls,
    Witnesses,
)
from corral.policy.flow_rules import Proxy, Resolvers
from corral.policy.model import Policy
from corral.policy.profiles import DEFAULT_PROFILE
from corral.policy.rules import ApiRules, DataRules, DeniedRules, ExecRuleFile, ExecRules, ModelRules, NetworkRules
from corral.policy.services import Services
from corral.policy.sources import Sources
from corral.policy.upstreams import BudgetFile, Currency, GuardFile, HostedTools, PatienceFile, Prices, Upstreams

_DEFAULT = Policy()


class AgentSection(Strict):
    """Whom this policy is for. Every record names it."""

    name: Label = _DEFAULT.agent.name
    """The agent's name."""
    version: Label = _DEFAULT.agent.version
    """The agent's version, as text."""


class FilesystemSection(Strict):
    """What is shown of the host beside the system trees and the workspace, and what is looked at closer."""

    read: Paths = ()
    """Files and directories that are shown read-only, at their own place."""
    write: Trees = ()
    """Directories that are shown at their own place, copy-on-write: changes go to the layer."""
    deny: Paths = ()
    """What is absent inside, whatever else shows it."""
    ask: PathGlobs = ()
    """Globs of files: to open, rename, ... one of them waits for an answer."""
    watch: PathGlobs = ()
    """Globs of files: to open, rename, ... one of them is recorded."""
    snapshot: SnapshotTime = _DEFAULT.filesystem.snapshot
    """Whether snapshots are taken by themselves: `never`, or at the start and after each `step`."""
    restore_keeps: PathGlobs = ()
    """Globs of programs that go on when the files are set back to a snapshot; all others are killed."""
    rename_directories: bool = _DEFAULT.filesystem.rename_directories
    """Whether directories that were there before can be renamed; every rename then takes a little longer."""


class NetworkSection(Strict):
    """Destinations outside. What no rule names is denied."""

    allow: NetworkRules = ()
    """Destinations that may be reached."""
    ask: NetworkRules = ()
    """Destinations for which an answer is waited."""
    deny: DeniedRules = ()
    """Destinations that may never be reached."""
    loopback: Answer = _DEFAULT.network.loopback
    """Connections between programs of the sandbox, where no rule names them: IP loopback and Unix sockets."""
    listen: Answer = _DEFAULT.network.listen
    """Binding and listening, in the sandbox's own network."""
    resolvers: Resolvers = ()
    """DNS servers that the host asks in place of its own, in this order: addresses, with or without a port."""
    proxy: Proxy | None = None
    """The HTTP proxy through which everything is dialled: `http://ADDRESS:PORT`."""


class ProcessSection(Strict):
    """Programs. What no rule names is denied."""

    allow: ExecRules = tuple(ExecRuleFile(path=rule.path) for rule in _DEFAULT.process.allow)
    """Programs that may run."""
    ask: ExecRules = ()
    """Programs for which an answer is waited."""
    deny: ExecRules = ()
    """Programs that may never run."""


class SyscallsSection(Strict):
    """System calls that are judged beside those that are refused for every sandbox."""

    ask: SystemCalls = ()
    """System calls that wait for an answer."""
    deny: SystemCalls = ()
    """System calls that are refused."""


class ResourcesSection(Strict):
    """Upper bounds for the whole sandbox."""

    cpu: Annotated[float, Field(ge=0.01, le=8192, allow_inf_nan=False)] | None = _DEFAULT.resources.cpu
    """Processors: 1.5 is one and a half."""
    memory: LargeSize = _DEFAULT.resources.memory
    """Memory, swap off; what is written to files counts too."""
    processes: Annotated[int, Field(ge=1, le=4_194_304)] = _DEFAULT.resources.processes
    """Processes and threads."""
    open_files: Annotated[int, Field(ge=1, le=1_048_576)] = _DEFAULT.resources.open_files
    """Open files of one process."""
    disk: LargeSize = _DEFAULT.resources.disk
    """All changes to files together; held in memory while the sandbox lives."""
    inodes: Annotated[int, Field(ge=1, le=1_000_000_000)] = _DEFAULT.resources.inodes
    """Files, directories and links that all changes together may hold."""
    wall_time: Duration | None = _DEFAULT.resources.wall_time
    """From start to forced end."""
    output: SmallSize = _DEFAULT.resources.output
    """Kept of each captured stream of one exec; the rest is dropped and marked."""


class LayersSection(Strict):
    """What may be kept of changes, and for how long."""

    keep_for: Duration | None = _DEFAULT.layers.keep_for
    """How long a layer or a snapshot is kept; then it may be removed."""
    snapshot_bytes: LargeSize | None = _DEFAULT.layers.snapshot_bytes
    """All snapshots of one session together."""
    total_bytes: LargeSize | None = _DEFAULT.layers.total_bytes
    """All layers in the work area together, whosoever they are."""


class EnvironmentSection(Strict):
    """Variables of the programs inside."""

    allow: PassedVariables = _DEFAULT.environment.allow
    """Variables of the caller that pass in: names, or prefixes that end in `*`."""
    set: Variables = Field(default_factory=lambda: dict(_DEFAULT.environment.set))
    """Variables and their values; stronger than `allow`."""


class ModelSection(Strict):
    """Which models may be asked, where they are, and how much of them may be used. What no rule names is denied."""

    allow: ModelRules = ()
    """Models that may be asked."""
    ask: ModelRules = ()
    """Models for which an answer is waited."""
    deny: ModelRules = ()
    """Models that may never be asked."""
    upstreams: Upstreams = ()
    """Where models are outside, in the order in which they are tried. Without any there is no model broker."""
    currency: Currency = _DEFAULT.model.currency
    """Of all prices and budgets."""
    prices: Prices = ()
    """What models cost; of several the first that names a model holds."""
    session: BudgetFile = Field(default_factory=BudgetFile)
    """How much one session may use."""
    agent: BudgetFile = Field(default_factory=BudgetFile)
    """How much all sessions of the agent may use together, within `agent_period`."""
    agent_period: Duration = _DEFAULT.model.agent_period
    """Back from now, for the budget of the agent."""
    patience: PatienceFile = Field(default_factory=PatienceFile)
    """How long upstreams are waited for."""
    guard: GuardFile = Field(default_factory=GuardFile)
    """Who looks at the results of tools before a model does."""
    hosted_tools: HostedTools = ()
    """Types of tools that an upstream may run itself, as globs (`web_search*`, `mcp`). Left out: none."""
    remote_content: bool = _DEFAULT.model.remote_content
    """Let requests point to content that an upstream fetches or keeps: pictures by their address, files by their id."""


class DataSection(Strict):
    """Which data may be queried, and where it is. What no rule names is denied."""

    allow: DataRules = ()
    """Queries that may be made; one rule must cover every table of a query."""
    ask: DataRules = ()
    """Queries for which an answer is waited."""
    deny: DataRules = ()
    """Queries that may never be made."""
    sources: Sources = ()
    """Databases, and what of them there is. Without any there is no data broker."""


class ApiSection(Strict):
    """Which operations of which services may be used. What no rule names is denied."""

    allow: ApiRules = ()
    """Operations that may be used."""
    ask: ApiRules = ()
    """Operations for which an answer is waited."""
    deny: ApiRules = ()
    """Operations that may never be used."""
    services: Services = ()
    """Services, and what of them there is. Without any there is no API broker."""


class ApprovalsSection(Strict):
    """How a held action is answered."""

    timeout: Duration = _DEFAULT.approvals.timeout
    """How long an answer is waited for; none in time means no."""
    freeze: bool = _DEFAULT.approvals.freeze
    """Freeze the whole sandbox while one of its actions is held."""


class LogSection(Strict):
    """How decisions are recorded, where there is a log."""

    asynchronous: Kinds = _DEFAULT.log.asynchronous
    """Actions that go on before their record is durable; all others wait for it."""
    keep: KeptContent = {}
    """What is kept beside the log, and for how long: what commands write, changes, files that were changed, refused
    connections, what is asked of brokers and what models answer."""
    keep_bytes: KeptSize = _DEFAULT.log.keep_bytes
    """How much of one such content is kept."""
    files: PathGlobs = ()
    """Globs of files: what is in one of them that was changed is kept when the session ends (`keep: {file: ...}`)."""


class ApplySection(Strict):
    """What it takes to make changes real outside the sandbox (`corral apply`)."""

    ask: AppliedGlobs = ()
    """Globs of paths below the workspace: a person must look at a change of them, as at hooks and rc files."""
    witnesses: Witnesses = ()
    """Public keys of the witnesses of the log."""
    cosignatures: Annotated[int, Field(ge=0, le=MAX_WITNESSES)] = _DEFAULT.apply.cosignatures
    """How many of them must have cosigned the log, as it is then, before anything is applied."""


class DetectionSection(Strict):
    """Behaviour rules."""

    rules: Paths = ()
    """Rule files, or directories of them."""


class AutonomySection(Strict):
    """How much this agent version may do without asking."""

    level: Annotated[int, Field(ge=0, le=9)] = _DEFAULT.autonomy.level
    """0: nothing."""


class PolicyFile(Strict):
    """What one sandbox may see, use and know. See docs/policy.md."""

    version: FormatVersion = 1
    """The version of this format."""
    profile: Profile = DEFAULT_PROFILE
    """What this policy starts from: a built-in profile, or the path of another policy file."""
    agent: AgentSection = Field(default_factory=AgentSection)
    filesystem: FilesystemSection = Field(default_factory=FilesystemSection)
    network: NetworkSection = Field(default_factory=NetworkSection)
    process: ProcessSection = Field(default_factory=ProcessSection)
    syscalls: SyscallsSection = Field(default_factory=SyscallsSection)
    resources: ResourcesSection = Field(default_factory=ResourcesSection)
    layers: LayersSection = Field(default_factory=LayersSection)
    environment: EnvironmentSection = Field(default_factory=EnvironmentSection)
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    api: ApiSection = Field(default_factory=ApiSection)
    approvals: ApprovalsSection = Field(default_factory=ApprovalsSection)
    log: LogSection = Field(default_factory=LogSection)
    apply: ApplySection = Field(default_factory=ApplySection)
    detection: DetectionSection = Field(default_factory=DetectionSection)
    autonomy: AutonomySection = Field(default_factory=AutonomySection)
    irreversible: Answer = _DEFAULT.irreversible
    """What writes outside for good (POST, PUT, DELETE, `git push`, `insert`, ...) and is allowed by no rule that names
    its method, statement or operation."""
    allow_degraded: Walls = ()
    """Walls that may be missing on this machine. Never inherited."""


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _walk(route: Route, model: type[BaseModel]) -> Iterator[tuple[Route, type[BaseModel]]]:
    yield route, model
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            yield from _walk((*route, name), inner)


MAPPINGS: dict[Route, type[BaseModel]] = dict(_walk((), PolicyFile))
"""The model of each mapping that a policy file may hold, by the way to it, positions in lists left out."""


def homes(name: str) -> list[str]:
    """The fields of that name, of the file and of its sections, written in full."""
    return [
        field_name((*route, name)) for route, model in MAPPINGS.items() if len(route) < 2 and name in model.model_fields
    ]
