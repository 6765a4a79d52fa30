"""The kinds of field that a policy file has: each checks what was written and makes it definite.

All checks raise ValueError with a message for people: what is wrong, and in parentheses what to do. What they echo is
escaped and bounded.
"""

from __future__ import annotations

import base64
import os
import pwd
import re
import unicodedata
from difflib import get_close_matches
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema

from corral.actions import Content, Kind, Verdict
from corral.policy.document import quoted
from corral.policy.matching import escape_glob
from corral.policy.model import GIB, KIB, MIB, Degradation, SnapshotWhen
from corral.policy.profiles import PROFILES
from corral.policy.units import DURATION, SIZE, TIB, Size, read_duration

MAX_ENTRIES = 1024
"""Entries of one list, and names of one mapping."""
MAX_WITNESSES = 64
MAX_LINE = 500
"""Characters of a text that people read: a reason, an advice."""
_LONGEST_NAME = 255
_LONGEST_VALUE = 128 * KIB - _LONGEST_NAME - 2  # the kernel's bound for `name=value` with its NUL
_LONGEST_PATH = 4095
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+:-]*")
_WILDCARD = re.compile(r"[*?]")
_GLOB = re.compile(r"[*?\\]")


class Strict(BaseModel):
    """A mapping of the file: its fields and no others, nothing converted that was not written so."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def nearest(name: str, known: list[str]) -> str:
    """The end of a message about an unknown word."""
    near = get_close_matches(name[:60], known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"


def _has_control(text: str) -> bool:
    return any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text)


def filled(values: object) -> object:
    """Refuses an empty list where that would have to mean all, or nothing."""
    if values == ():
        raise ValueError("is an empty list (leave it out to mean all)")
    return values


# --- Paths ----------------------------------------------------------------------------------------------------------


def host_path(path: str, info: ValidationInfo) -> str:
    """An absolute, normalised path. ``..`` is resolved by its text: links are not followed here."""
    if _WILDCARD.search(path):
        raise ValueError(f"{quoted(path)}: patterns are not supported (name the file or directory itself)")
    return _absolute(path, info)


def _absolute(path: str, info: ValidationInfo) -> str:
    shown = quoted(path)
    if not path or path != path.strip():
        raise ValueError(f"{shown} is not a path (it is empty, or has blanks around it)")
    if _has_control(path):
        raise ValueError(f"{shown} holds a control character")
    if path.startswith("$"):
        raise ValueError(f"{shown}: variables are not expanded (write `~/` for the home directory)")
    if path == "~" or path.startswith("~/"):
        full = _home() + path[1:]
    elif path.startswith("~"):
        raise ValueError(f"{shown}: only `~/` is expanded (write the path in full, or `./~...` for such a file)")
    else:
        try:
            context: Any = info.context
            full = os.path.abspath(os.path.join(context["directory"], path))
        except OSError as error:
            raise ValueError(f"{shown}: there is no current directory to start from: {error.strerror}") from None
    full = "/" + os.path.normpath(full).lstrip("/")
    if _has_control(full):
        raise ValueError(f"{shown} lies in a directory whose name holds a control character")
    if full == "/":
        raise ValueError(f"{shown} is the whole file system `/` (name the directories that are meant)")
    return _bounded_path(full, shown)


def _bounded_path(path: str, shown: str) -> str:
    if len(os.fsencode(path)) > _LONGEST_PATH or any(
        len(os.fsencode(part)) > _LONGEST_NAME for part in path.split("/")
    ):
        raise ValueError(f"{shown} is longer than a path can be")
    return path


def _home() -> str:
    home = os.environ.get("HOME", "")
    if not home.startswith("/"):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:
            home = ""
    if not home.startswith("/"):
        raise ValueError("`~/` cannot be expanded: there is no home directory (set HOME, or write the path in full)")
    return home


def path_glob(pattern: str, info: ValidationInfo) -> str:
    """An absolute glob of paths inside: anchored like a path up to its first wildcard, or at any depth (``**/...``)."""
    found = _GLOB.search(pattern)
    if not found:
        return escape_glob(_absolute(pattern, info))
    if pattern.startswith("**/"):
        return checked_glob(f"/{pattern}")
    before = pattern[: found.start()]
    fixed = before[: before.rfind("/") + 1]
    directory = "" if fixed and not fixed.strip("/") else escape_glob(_absolute(fixed or ".", info))
    return checked_glob(f"{directory}/{pattern[len(fixed) :]}")


def applied_glob(pattern: str) -> str:
    """A glob of paths below a workspace, which is its ``/``: a bare name means that name in any directory."""
    shown = quoted(pattern)
    if pattern.startswith("!"):
        raise ValueError(rf"{shown}: there are no exceptions (remove it; a name that begins so is written `\!...`)")
    if pattern.startswith("~"):
        raise ValueError(rf"{shown}: it is a path below the workspace (a name that begins so is written `\~...`)")
    glob = pattern.rstrip("/") if pattern.strip("/") else pattern
    if glob == "**":
        return "/**"
    return checked_glob(f"/{glob.removeprefix('/')}" if "/" in glob else f"/**/{glob}")


def whole_glob(glob: str) -> str:
    """A glob that does not end in the middle of something."""
    if (len(glob) - len(glob.rstrip("\\"))) % 2:
        raise ValueError(rf"{quoted(glob)}: `\` takes the meaning from the next character, and there is none (`\\`?)")
    return glob


def checked_glob(pattern: str) -> str:
    """An absolute glob of paths, as it is."""
    shown = quoted(pattern)
    if pattern != pattern.strip() or _has_control(pattern):
        raise ValueError(f"{shown} has blanks around it, or holds a control character")
    parts = pattern.split("/")[1:]
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{shown} has an empty part, `.` or `..` in it (write it as the resolved path looks)")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError(f"{shown}: `**` stands for whole parts of a path (write for example `/src/**/*.py`)")
    return _bounded_path(whole_glob(pattern), shown)


def program_glob(pattern: str) -> str:
    """A glob of program paths: an absolute one, or a bare name, which means that name in any directory."""
    if pattern in ("", ".", "..", "**"):
        raise ValueError(f"{quoted(pattern)} is not a program (`/**` means every program)")
    if "/" not in pattern:
        return checked_glob(f"/**/{pattern}")
    if not pattern.startswith("/"):
        shown = quoted(pattern)
        raise ValueError(f"{shown}: a program is an absolute path inside, or a bare name (`git`: in any directory)")
    return checked_glob(pattern)


def profile(name: str, info: ValidationInfo) -> str:
    """The name of a built-in profile, or the path of another policy file, which holds a ``/``."""
    if "/" in name:
        return host_path(name, info)
    if name not in PROFILES:
        hint = f"{nearest(name, list(PROFILES))}; another policy file is named with a `/`, as in `./{name[:40]}`"
        raise ValueError(f"{quoted(name)} is not a built-in profile ({hint})")
    return name


# --- Words ----------------------------------------------------------------------------------------------------------


def line(text: str) -> str:
    """One line that people and models read."""
    if len(text) > MAX_LINE:
        raise ValueError(f"is longer than {MAX_LINE} characters (say it in a sentence)")
    if not text.isprintable():
        raise ValueError(f"{quoted(text)} is not one printable line")
    return text


def label(text: str) -> str:
    """A name or a version that records carry."""
    if not _WORD.fullmatch(text) or len(text) > 64:
        raise ValueError(f"{quoted(text)}: use up to 64 letters, digits and `._+:-`, a letter or digit first")
    return text


def word_glob(text: str) -> str:
    """A glob of plain words: models, tables."""
    if not text or not text.isprintable() or " " in text or len(text) > _LONGEST_NAME:
        raise ValueError(f"{quoted(text)} is not a name or a pattern of names (no blanks, at most {_LONGEST_NAME})")
    return whole_glob(text)


def argument_globs(globs: tuple[str, ...]) -> tuple[str, ...]:
    """Globs of a program's arguments. They may hold anything but NUL, as arguments do."""
    for glob in globs:
        if "\0" in glob or len(glob) > _LONGEST_PATH:
            raise ValueError(f"{quoted(glob)} holds a NUL character, or more than {_LONGEST_PATH} others")
        whole_glob(glob)
    if "**" in globs[:-1]:
        raise ValueError("`**` stands for all further arguments, and can only be the last (`*` stands for one)")
    return globs


_STATEMENT = re.compile(r"[a-z]{1,40}")


def statement(text: str) -> str:
    """The kind of a query, in lower case."""
    if not _STATEMENT.fullmatch(text.lower()):
        raise ValueError(f"{quoted(text)} is not the kind of a query (write for example `select`)")
    return text.lower()


def verdict(word: object) -> Verdict:
    """``allow``, ``ask`` or ``deny``."""
    known = [each.name.lower() for each in (Verdict.ALLOW, Verdict.ASK, Verdict.DENY)]
    if not isinstance(word, str):
        raise ValueError(f"must be a word (known: {', '.join(known)})")
    if word not in known:
        raise ValueError(f"{quoted(word)} is not an answer ({nearest(word, known)})")
    return Verdict[word.upper()]


def format_version(value: object) -> object:
    """The version of the format."""
    if type(value) is not int or value != 1:  # True and 1.0 equal 1, and are not it
        raise ValueError("must be 1 (the only version that this Corral reads)")
    return value


def degradation(name: object) -> Degradation:
    """A wall that may be missing."""
    known = [wall.value for wall in Degradation]
    if not isinstance(name, str):
        raise ValueError(f"must be a name (known: {', '.join(known)})")
    if name not in known:
        raise ValueError(f"{quoted(name)} is not a wall that can be done without ({nearest(name, known)})")
    return Degradation(name)


def snapshot_time(name: object) -> SnapshotWhen:
    """When snapshots are taken."""
    known = [each.value for each in SnapshotWhen]
    if name not in known:
        raise ValueError(f"must be one of: {', '.join(known)}")
    return SnapshotWhen(name)


def action_class(name: object) -> Kind:
    """A class of actions."""
    known = [each.value for each in Kind]
    if isinstance(name, Kind):
        return name
    if not isinstance(name, str):
        raise ValueError(f"must be a name (known: {', '.join(known)})")
    if name not in known:
        raise ValueError(f"{quoted(name)} is not a class of actions ({nearest(name, known)})")
    return Kind(name)


def content_class(name: object) -> Content:
    """A class of content."""
    known = [each.value for each in Content]
    if isinstance(name, Content):
        return name
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{quoted(str(name))} is nothing that can be kept ({nearest(str(name), known)})")
    return Content(name)


_WITNESS = re.compile(r"([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]{44})")
_COSIGNATURE = 4
"""The type of a key that makes cosignatures (C2SP signed-note, "signature types")."""


def witness(key: str) -> str:
    """The public key of a witness, in the form in which `corral log key --witness` prints it."""
    found = _WITNESS.fullmatch(key)
    if not found:
        raise ValueError(f"{quoted(key)} is no public key (written as `witness.example+1a2b3c4d+BA...`)")
    name, identifier, encoded = found.groups()
    material = base64.b64decode(encoded)
    if sha256(name.encode() + b"\n" + material).hexdigest()[:8] != identifier:
        raise ValueError(f"{quoted(key)} is not whole (copy it once more)")
    if material[0] != _COSIGNATURE:
        raise ValueError(f"{quoted(key)} is no key of a witness (`corral log key FILE NAME --witness` makes one)")
    return key


# --- System calls ---------------------------------------------------------------------------------------------------

_CALL = re.compile(r"[a-z_][a-z0-9_]{0,63}")
INDISPENSABLE = frozenset(
    # Every program: its start, its memory, its end, the return from a signal handler.
    """execve execveat brk mmap munmap mprotect arch_prctl set_tid_address set_robust_list rseq futex exit exit_group
    read pread64 write close open openat fstat newfstatat rt_sigaction rt_sigprocmask rt_sigreturn restart_syscall
    """
    # The sandbox's first process and the leaders of execs, which live behind the same filter (init.c, command.c).
    """clone fork vfork wait4 waitid poll ppoll recvmsg recvfrom sendmsg sendto signalfd4 rt_sigtimedwait getdents64
    lseek kill tkill tgkill getpid gettid getsid setsid setpgid geteuid getegid setresuid setresgid capset prctl
    prlimit64 setrlimit dup2 dup3 fcntl ioctl chdir close_range pidfd_open nanosleep clock_nanosleep""".split()
)
"""System calls that can be neither denied nor asked for: without them no program runs, or the sandbox itself dies."""


def system_call(name: str) -> str:
    """A system call's name. Whether this machine has it is checked by whoever has the table, when a sandbox starts."""
    if not _CALL.fullmatch(name):
        raise ValueError(f"{quoted(name)} is not the name of a system call (as in syscalls(2): `ptrace`)")
    if name in INDISPENSABLE:
        raise ValueError(f"`{name}` can be neither denied nor asked for: nothing would run without it (remove it)")
    return name


# --- Variables ------------------------------------------------------------------------------------------------------


def variable(name: str) -> str:
    """The name of a variable."""
    if not _VARIABLE.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise ValueError(f"{quoted(name)} is not a variable name (letters, digits and `_`, not a digit first)")
    return name


def passed_variable(name: str) -> str:
    """The name of a variable, or the beginning of several with ``*``."""
    if name == "*":
        raise ValueError("`*` would pass the whole environment in (name the variables)")
    if "=" in name:
        raise ValueError(f"{quoted(name)} holds a value (values belong in environment.set)")
    variable(name.removesuffix("*"))
    return name


def variable_value(value: str) -> str:
    """A variable's value. It may be a secret: no message echoes it."""
    if "\0" in value:
        raise ValueError("holds a NUL character, which no variable can")
    if len(value.encode()) > _LONGEST_VALUE:
        raise ValueError(f"is longer than {_LONGEST_VALUE} bytes, more than the kernel passes on")
    return value


# --- As annotations -------------------------------------------------------------------------------------------------

_VERDICTS = WithJsonSchema({"enum": ["allow", "ask", "deny"]})
_SIZES = WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": SIZE}], "examples": ["512MiB"]})
_DURATIONS = WithJsonSchema(
    {"anyOf": [{"type": "number"}, {"type": "string", "pattern": DURATION}], "examples": ["90s", "2h"]}
)
_PROFILES = WithJsonSchema({"anyOf": [{"enum": list(PROFILES)}, {"type": "string", "pattern": "/"}]})
_KINDS = WithJsonSchema({"enum": [each.value for each in Kind]})
_CONTENT = WithJsonSchema({"enum": [each.value for each in Content]})
_SNAPSHOTS = WithJsonSchema({"enum": [each.value for each in SnapshotWhen]})
_WALLS = WithJsonSchema({"enum": [wall.value for wall in Degradation]})


_PATH = Annotated[str, AfterValidator(host_path), WithJsonSchema({"type": "string", "minLength": 1})]
_PATH_GLOB = Annotated[str, AfterValidator(path_glob), WithJsonSchema({"type": "string", "minLength": 1})]
_CALLS = WithJsonSchema({"type": "string", "pattern": f"^{_CALL.pattern}$", "not": {"enum": sorted(INDISPENSABLE)}})
_PASSED = WithJsonSchema({"type": "string", "pattern": f"^{_VARIABLE.pattern}[*]?$"})

Filled = (BeforeValidator(filled), Field(json_schema_extra={"minItems": 1}))
Paths = Annotated[tuple[_PATH, ...], Field(max_length=MAX_ENTRIES)]
# Each is an overlay of its own, and takes as long to mount.
Trees = Annotated[tuple[_PATH, ...], Field(max_length=64)]
PathGlobs = Annotated[tuple[_PATH_GLOB, ...], Field(max_length=MAX_ENTRIES)]
AppliedGlobs = Annotated[
    tuple[Annotated[str, AfterValidator(applied_glob), WithJsonSchema({"type": "string", "minLength": 1})], ...],
    Field(max_length=MAX_ENTRIES),
]
Witnesses = Annotated[tuple[Annotated[str, AfterValidator(witness)], ...], Field(max_length=MAX_WITNESSES)]
SystemCalls = Annotated[tuple[Annotated[str, AfterValidator(system_call), _CALLS], ...], Field(max_length=MAX_ENTRIES)]
Label = Annotated[str, AfterValidator(label)]
Line = Annotated[str, AfterValidator(line)]
FormatVersion = Annotated[Literal[1], BeforeValidator(format_version)]
SnapshotTime = Annotated[SnapshotWhen, BeforeValidator(snapshot_time), _SNAPSHOTS]
Answer = Annotated[Verdict, BeforeValidator(verdict), _VERDICTS]
Profile = Annotated[str, AfterValidator(profile), _PROFILES]
Walls = Annotated[
    tuple[Annotated[Degradation, BeforeValidator(degradation), _WALLS], ...], Field(max_length=MAX_ENTRIES)
]
Kinds = Annotated[tuple[Annotated[Kind, BeforeValidator(action_class), _KINDS], ...], Field(max_length=MAX_ENTRIES)]
Duration = Annotated[float, BeforeValidator(read_duration), _DURATIONS]
KeptContent = Annotated[
    dict[Annotated[Content, BeforeValidator(content_class), _CONTENT], Duration], Field(max_length=len(Content))
]
KeptSize = Annotated[int, BeforeValidator(Size(KIB, 64 * MIB)), _SIZES]
PassedVariables = Annotated[
    tuple[Annotated[str, AfterValidator(passed_variable), _PASSED], ...], Field(max_length=MAX_ENTRIES)
]
Variables = Annotated[
    dict[Annotated[str, AfterValidator(variable)], Annotated[str, AfterValidator(variable_value)]],
    Field(max_length=MAX_ENTRIES),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": f"^{_VARIABLE.pattern}$"},
            "additionalProperties": {"type": "string"},
            "maxProperties": MAX_ENTRIES,
        }
    ),
]
# Lower bounds catch a forgotten unit; for what tmpfs bounds, 0 would mean "no limit".
LargeSize = Annotated[int, BeforeValidator(Size(MIB, 1024 * TIB)), _SIZES]
SmallSize = Annotated[int, BeforeValidator(Size(KIB, GIB)), _SIZES]
