"""The options of `corral run`, as one table.

Two readers use it: click, which knows every form and writes the help, and :func:`read_fast`, which understands the
plain forms without importing anything (typer and click take longer to import than a sandbox takes to start). Whatever
`read_fast` is not sure of it leaves to click, so that there is one authority on what is right and on error messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Option(NamedTuple):
    """One option: ``many`` may be repeated; without ``metavar`` it is a flag."""

    name: str
    short: str
    metavar: str
    many: bool
    help: str


RUN_OPTIONS = (
    Option("workspace", "w", "DIR", False, "Directory to work in, shown copy-on-write [default: the current one]."),
    Option("policy", "p", "FILE", False, "Policy file, or the name of a built-in profile (see docs/policy.md)."),
    Option("root", "", "DIR", False, "Unpacked root file system to use instead of the host's system trees."),
    Option("user", "u", "NAME", False, "Who runs the command inside: agent, root, or a number [default: agent]."),
    Option("read", "r", "PATH", True, "Show this host file or directory read-only, at its own place."),
    Option("env", "e", "NAME[=VALUE]", True, "Set a variable inside, or let the caller's pass."),
    Option("service", "", "PORT=IP:PORT", True, "Make a port inside lead to one address outside."),
    Option("net", "", "learn", False, "Let it reach every public name; `corral policy learn` reads the --record."),
    Option("cpu", "", "NUMBER", False, "Processors, such as 1.5."),
    Option("memory", "", "SIZE", False, "Memory, such as 2GiB."),
    Option("processes", "", "NUMBER", False, "Processes and threads."),
    Option("open-files", "", "NUMBER", False, "Open files of one process."),
    Option("disk", "", "SIZE", False, "Size of all changed files together."),
    Option("wall-time", "", "TIME", False, "Kill everything after this time, such as 90s or 15m."),
    Option("label", "", "TEXT", False, "What `corral ps` shows beside the id."),
    Option("terminal", "t", "", False, "Give the command a terminal even where stdin or stdout is none."),
    Option("no-terminal", "T", "", False, "Give the command pipes even on a terminal."),
    Option("on", "", "LAYER", False, "Begin on a kept layer: go on where that run ended."),
    Option("discard", "", "", False, "Drop all changes at the end instead of keeping them as a layer."),
    Option("record", "", "FILE", False, "Write every decision to a new file (JSON lines, at most 1 GiB)."),
    Option(
        "log", "", "DIR", False, "Record everything in the log in this directory, made where missing (docs/log.md)."
    ),
    Option("record-models", "", "FILE", False, "Write every answer of a model to a file, to be given again."),
    Option("replay-models", "", "FILE", False, "Give the answers of that file again; no model is asked."),
    Option("quiet", "q", "", False, "Do not say what was refused, nor where changes were kept."),
    Option("json", "", "", False, "At the end write one JSON object about the run to stderr."),
    Option("json-result", "", "FILE", False, "Write that object to a file instead."),
)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What was given: values by option name, and the command."""

    values: dict[str, str]
    lists: dict[str, tuple[str, ...]]
    flags: frozenset[str]
    command: tuple[str, ...]


def read_fast(words: Sequence[str]) -> Arguments | None:
    """Reads the plain forms (``--name value``, ``--name=value``, ``-n value``, ``--``); None for anything else."""
    by_word = {f"--{option.name}": option for option in RUN_OPTIONS}
    by_word |= {f"-{option.short}": option for option in RUN_OPTIONS if option.short}
    values: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    flags: set[str] = set()
    at = 0
    while at < len(words) and words[at].startswith("-"):
        word = words[at]
        at += 1
        if word == "--":
            break
        name, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        option = by_word.get(name)
        if option is None or (equals and not option.metavar):
            return None
        if not option.metavar:
            flags.add(option.name)
            continue
        if not equals:
            if at == len(words):
                return None
            value = words[at]
            at += 1
        if option.many:
            lists.setdefault(option.name, []).append(value)
        else:
            values[option.name] = value
    if at == len(words):
        return None
    return Arguments(values, {name: tuple(found) for name, found in lists.items()}, frozenset(flags), tuple(words[at:]))
