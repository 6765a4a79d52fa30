"""Policy files: YAML in, a checked :class:`~corral.policy.model.Policy` out, or every fault with its line.

:mod:`corral.policy.document` makes plain values of the text, each with its place. The strict models of
:mod:`corral.policy.schema` check them, :mod:`corral.policy.wording` tells what they find, and
:mod:`corral.policy.merge` lays the file over the profile that it starts from.

What a message echoes is escaped and bounded; values of ``environment.set`` may be secrets and are never echoed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import replace

from pydantic import ValidationError

from corral.errors import PolicyError
from corral.policy.document import (
    MAX_BYTES,
    TOO_LARGE,
    Fault,
    Tree,
    check_text,
    escaped,
    field_name,
    number_or_text,
    policy_error,
)
from corral.policy.merge import merged
from corral.policy.model import Policy
from corral.policy.profiles import PROFILES
from corral.policy.schema import PolicyFile
from corral.policy.wording import faults_of, said

MAX_ANCESTORS = 8
"""Policy files that one policy may start from, each from the next."""


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read and check the policy file at ``path``, or take the built-in profile of that name.

    The bare name of a profile is never a file: a file that an agent left behind must not become the policy of the next
    one by its name (``./locked`` is a file). Relative paths inside the file are relative to the directory that
    ``path`` names; ``~/`` is the caller's home. An empty file is the default policy. Sizes come back in bytes,
    durations in seconds.

    Raises:
        PolicyError: the file cannot be read, is not a regular file, or has faults; all of them are listed, by line.
    """
    source = os.fspath(path)
    return PROFILES[source] if source in PROFILES else _load(source, ())


def parse_policy(text: str, *, source: str) -> Policy:
    """Check the policy in ``text``; ``source`` is the file name for messages.

    Relative paths are relative to the directory part of ``source`` (the current directory where it has none). Sizes
    come back in bytes, durations in seconds.

    Raises:
        PolicyError: every fault found, in the order of lines, each as ``source:line: field: what is wrong``.
    """
    return _parse(text, source, ())


def override_resources(policy: Policy, values: Mapping[str, str], *, source: str) -> Policy:
    """Return ``policy`` with some of its ``resources`` replaced, as written on a command line.

    ``values`` maps field names to text. Numbers are read as in a policy file; other text is text, as if in quotes.

    Raises:
        PolicyError: every fault found, each as ``source: resources.field: what is wrong``. There are no lines to name.
    """
    given: dict[str, object] = {}
    wrong: dict[str, str] = {}
    for name, text in values.items():
        try:
            given[name] = number_or_text(text)
        except ValueError as error:
            wrong[name] = str(error)
    checked = None
    try:
        checked = PolicyFile.model_validate({"resources": given})
    except ValidationError as error:
        wrong |= {str(item["loc"][-1]): said(item, item["loc"]) for item in error.errors(include_url=False)}
    if checked is None or wrong:
        where = escaped(source)
        raise PolicyError([f"{where}: {field_name(('resources', n))}: {wrong[n]}" for n in values if n in wrong])
    return replace(policy, resources=replace(policy.resources, **checked.resources.model_dump(exclude_unset=True)))


def _load(source: str, above: tuple[str, ...]) -> Policy:
    """``above`` are the real paths of the files that start from this one, outermost first."""
    try:
        data = _read(source)
    except (OSError, ValueError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if isinstance(error, FileNotFoundError) and "/" not in source:
            cause += f" (the built-in profiles are {', '.join(PROFILES)})"
        raise PolicyError([f"{escaped(source)}: cannot read the policy file: {escaped(cause)}"]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PolicyError([f"{escaped(source)}:{line}: not UTF-8 text (save the file as UTF-8)"]) from None
    return _parse(text, source, above)


def _read(path: str) -> bytes:
    """At most ``MAX_BYTES + 1`` bytes of a regular file: the parser refuses the one too many, with its reason."""
    # A pipe without a writer would read as empty, and so as the default policy: open without waiting, then look.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(TOO_LARGE)
    return data


def _parse(text: str, source: str, above: tuple[str, ...]) -> Policy:
    faults: list[Fault] = []
    check_text(text, faults)
    if faults:
        raise policy_error(source, faults)
    tree = Tree(faults)
    data = tree.read(text)
    file = None
    try:
        file = PolicyFile.model_validate(data, context={"directory": os.path.dirname(source)})
    except ValidationError as error:
        faults.extend(faults_of(error, tree))
    if file is None or faults:
        raise policy_error(source, faults)
    base = PROFILES.get(file.profile)
    if base is None:
        try:
            base = _base(file.profile, (*above, os.path.realpath(source)))
        except RecursionError as error:
            raise policy_error(source, [Fault(tree.place(("profile",)), "profile", str(error))]) from None
    return merged(base, file)


def _base(path: str, above: tuple[str, ...]) -> Policy:
    if os.path.realpath(path) in above:
        raise RecursionError("leads back to this file (a policy cannot start from itself)")
    if len(above) > MAX_ANCESTORS:
        raise RecursionError(f"more than {MAX_ANCESTORS} files in a row start from one another")
    return _load(path, above)
