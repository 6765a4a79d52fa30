"""The environment of commands inside: nothing of the caller's but what the policy names."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from corral.policy.model import Environment
from corral.sandbox.identity import ROOT_ID
from corral.sandbox.view import HOME


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


def make_environment(
    caller: Mapping[str, str],
    policy: Environment,
    *,
    user: int,
    path: str,
    hints: Mapping[str, str],
    secrets: Collection[str] = (),
) -> dict[str, str]:
    """The variables of a command that ``user`` runs inside.

    ``path`` is the PATH that fits what is shown, ``hints`` the variables that shown tools need.
    ``secrets`` are variables of the caller whose values are put in outside: none of them passes in under any name (I8).
    """
    name, home = ("root", "/root") if user == ROOT_ID else ("agent", HOME)
    held = {caller[name] for name in secrets if caller.get(name)}
    environment = {
        key: value
        for key, value in caller.items()
        if key not in secrets and value not in held and _allowed(key, policy.allow)
    }
    environment.setdefault("LANG", "C.UTF-8")
    environment |= {
        "PATH": path,
        "HOME": home,
        "USER": name,
        "LOGNAME": name,
        "SHELL": "/bin/bash",
        "TMPDIR": "/tmp",
        "CORRAL": "1",
    }
    environment |= hints
    environment |= dict(policy.set)
    return environment
