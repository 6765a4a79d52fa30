"""Corral: the place where AI agents work and learn without being able to get out.

Names are loaded when they are first used, so that `corral run` starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from corral.version import VERSION

if TYPE_CHECKING:
    from corral.errors import CorralError as CorralError
    from corral.errors import ExecError as ExecError
    from corral.errors import PolicyError as PolicyError
    from corral.errors import RequestError as RequestError
    from corral.errors import SandboxClosed as SandboxClosed
    from corral.errors import WallError as WallError
    from corral.policy.load import load_policy as load_policy
    from corral.policy.model import Policy as Policy
    from corral.sandbox.box import Sandbox as Sandbox
    from corral.sandbox.denials import Denial as Denial
    from corral.sandbox.options import Listener as Listener
    from corral.sandbox.process import Process as Process
    from corral.sandbox.results import CommandFailed as CommandFailed
    from corral.sandbox.results import ExecResult as ExecResult
    from corral.sandbox.sync import SyncProcess as SyncProcess
    from corral.sandbox.sync import SyncSandbox as SyncSandbox


__version__ = VERSION

_HOMES = {
    "CommandFailed": "corral.sandbox.results",
    "CorralError": "corral.errors",
    "Denial": "corral.sandbox.denials",
    "ExecError": "corral.errors",
    "ExecResult": "corral.sandbox.results",
    "Listener": "corral.sandbox.options",
    "Policy": "corral.policy.model",
    "PolicyError": "corral.errors",
    "Process": "corral.sandbox.process",
    "RequestError": "corral.errors",
    "Sandbox": "corral.sandbox.box",
    "SandboxClosed": "corral.errors",
    "SyncProcess": "corral.sandbox.sync",
    "SyncSandbox": "corral.sandbox.sync",
    "WallError": "corral.errors",
    "load_policy": "corral.policy.load",
}

__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'corral' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
