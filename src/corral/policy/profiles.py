"""The built-in profiles: policies with a name, from which a policy file can start.

They are constants, not files, because the one that is used without a policy file must cost nothing to read. Each value
that is not the default has its reason beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from corral.actions import Verdict
from corral.policy.model import GIB, MIB, Approvals, Environment, Filesystem, Network, Policy, Resources

DEFAULT_PROFILE = "coding-agent"
"""What a policy file starts from that names no profile, and what is used without one."""

_CODING_AGENT = Policy()
"""The defaults of the values are this profile, see :mod:`corral.policy.model`. Its spirit: an agent may do to its copy
of the project whatever a developer does, because nothing of it leaves the sandbox by itself.

* Every program may run: builds and package scripts start anything, and what can be reached is the same for all.
* Its own loopback is open, and it may listen there: test suites start servers.
* No other destination, no model, no data: each is somebody's, and must be named.
* Nothing is asked for or watched: files that make others execute things are looked at when changes are applied, and
  supervised opens cost every open.
* Memory, processes and disk are bounded generously for one developer's machine; time is not, because people wait.
"""

_RL_ROLLOUT = Policy(
    network=Network(
        # Tasks start servers and test clients against them; nothing of it leaves the sandbox.
        loopback=Verdict.ALLOW,
        listen=Verdict.ALLOW,
    ),
    resources=Resources(
        cpu=1.0,  # equal shares: an episode's outcome must not depend on its neighbours
        memory=2 * GIB,  # hundreds of them share a machine
        processes=256,  # a fork bomb is a common accident of a model that explores
        open_files=1024,  # the usual soft limit of a login
        disk=512 * MIB,  # held in memory, and lost at the end of the episode
        inodes=65_536,
        wall_time=1800.0,  # an episode that hangs must not hold its place for ever
        output=1 * MIB,  # more does not fit a model's context
    ),
    # Tens of thousands of renames are made for each that is of such a directory, and hundreds of sandboxes share one
    # supervisor.
    filesystem=Filesystem(rename_directories=False),
    environment=Environment(
        allow=(),  # the same episode everywhere: nothing of whoever trains shows inside
        set=(("LANG", "C.UTF-8"), ("TZ", "UTC")),
    ),
    # Nobody watches a rollout: what a rule asks for is a "no" as soon as it can be.
    approvals=Approvals(timeout=1.0),
)

_LOCKED = Policy(
    network=Network(
        loopback=Verdict.DENY,  # programs that run here have nothing to say to each other
        listen=Verdict.DENY,  # and nobody to serve
    ),
    # Programs may run: without that there is no sandbox to speak of. Enough to read, search and compute.
    resources=Resources(
        cpu=1.0,
        memory=512 * MIB,
        processes=64,
        open_files=256,
        disk=64 * MIB,  # temporary files; the copy of the workspace is not meant to change
        inodes=4096,
        wall_time=600.0,
        output=1 * MIB,
    ),
    environment=Environment(allow=("LANG", "LANGUAGE", "LC_*", "TZ")),  # what output looks like, and nothing else
    # Others stand still while somebody looks at what one of them wants.
    approvals=Approvals(freeze=True),
)

PROFILES: Mapping[str, Policy] = MappingProxyType(
    {DEFAULT_PROFILE: _CODING_AGENT, "rl-rollout": _RL_ROLLOUT, "locked": _LOCKED}
)
"""By name."""
