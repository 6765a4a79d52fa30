"""Committing a proposal to a new branch of the workspace's repository. No file of the workspace changes, nor its index.

    the layer's files ──▶ git fast-import ──▶ a commit on HEAD ──▶ git update-ref, if there is no such branch

fast-import takes content as it is: no filter, attribute or hook of the repository runs, and nothing that the layer
holds is read as configuration. It writes the commit under ``refs/corral/ID``, which is there for that moment only.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from corral.errors import CorralError, RequestError
from corral.log.events import Outcome
from corral.log.writer import Log
from corral.sandbox.apply.journal import components
from corral.sandbox.apply.proposal import Entry, Proposal
from corral.sandbox.apply.proposing import propose
from corral.sandbox.apply.recording import Consent
from corral.sandbox.changes import ChangeKind
from corral.sandbox.compare import FileType
from corral.sandbox.prepare import new_id
from corral.sandbox.trees import OPEN_FILE, open_components

TIMEOUT = 60.0
"""Seconds that git may take for one question."""
_CHUNK = 1 << 20
_SETTINGS = {
    "core.hooksPath": "/dev/null",  # update-ref and fast-import run `reference-transaction`
    "core.fsmonitor": "false",
    "core.protectHFS": "true",
    "core.protectNTFS": "true",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "protocol.allow": "never",
    "safe.bareRepository": "explicit",
}
_ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "LC_ALL": "C",
}
_NOTHING = "git keeps nothing of these changes: they are of modes, owners, empty directories, or in it already"
_KEPT = "GIT_COMMITTER_"


class Branch:
    """A branch that is to be made of a proposal."""

    def __init__(self, proposal: Proposal, name: str) -> None:
        """Looks whether it can be made. Raises RequestError where the workspace is no repository of its own, there is
        such a branch, or something is changed that git does not keep; CorralError where git fails."""
        for entry in proposal.entries:
            if any(map(_is_git, components(entry.path))):
                raise RequestError(
                    f"{entry.path}: it belongs to git itself, and no commit can hold it; name other paths"
                )
        self._proposal, self._git = proposal, _Git(proposal.workspace)
        self._ref = f"refs/heads/{name}"
        if name.startswith("-") or self._git.says("check-ref-format", self._ref) is None:
            raise RequestError(f"{name!r} is not the name of a branch (git-check-ref-format(1))")
        if self._git.says("rev-parse", "--verify", "--quiet", self._ref) is not None:
            raise RequestError(f"there is a branch {name} already")
        if self._git.says("symbolic-ref", "--quiet", "HEAD") == self._ref.encode():
            raise RequestError(f"{name} is checked out, though it has no commit yet: the workspace would seem changed")
        self._head = self._git.says("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
        if self._head is None and not self._is_unborn():
            raise CorralError(f"{proposal.workspace}: git finds no commit at HEAD; `git fsck` says more")
        self._identity = self._git.says("var", "GIT_COMMITTER_IDENT")
        if self._identity is None:
            raise RequestError("git does not know who commits: set user.name and user.email (git-config(1))")
        self._changes = tuple(self._changed())
        if not self._changes:
            raise RequestError(_NOTHING)

    def commit(self, consent: str | Consent, *, log: Log | Path | None = None) -> str:
        """Makes the branch, and returns its commit. As :meth:`Proposal.apply` says, it is decided and recorded.

        Raises as that; nothing is changed then.
        """
        with self._proposal.decided(consent, log, self._ref) as records:
            try:
                commit = self._commit()
            except BaseException as error:
                why = str(error) if isinstance(error, CorralError) else type(error).__name__
                with suppress(CorralError):  # what went wrong is told; that it was decided is recorded
                    records.ended("", Outcome.ROLLED_BACK, why)
                raise
            try:
                records.ended(commit, Outcome.COMMITTED)
            except CorralError as error:
                raise CorralError(f"{self._ref} is made ({commit}), and that cannot be recorded: {error}") from None
        return commit

    def _is_unborn(self) -> bool:
        """Whether the branch that is checked out has no commit yet."""
        ref = self._git.says("symbolic-ref", "--quiet", "HEAD")
        return ref is not None and self._git.says("show-ref", "--verify", "--quiet", ref.decode()) is None

    def _changed(self) -> Iterator[tuple[Entry, str]]:
        """What a commit can hold, as modes of git; empty where something goes away. Raises RequestError."""
        tracked = self._tracked()
        modules = {path for path, mode in tracked.items() if mode == b"160000"}
        for entry in self._proposal.entries:
            change, path = entry.change, os.fsencode(entry.path)
            for module in modules:
                if path == module or path.startswith(module + b"/"):
                    raise RequestError(f"{entry.path}: it lies in a submodule, which has a repository of its own")
            is_directory = change.file_type is FileType.DIRECTORY
            replaced = is_directory and change.type_before not in (None, FileType.DIRECTORY)
            if change.kind is ChangeKind.DELETED or replaced:
                yield entry, ""
            elif is_directory or change.kind is ChangeKind.OWNER:
                continue
            elif change.kind is ChangeKind.MODE and path not in tracked:
                continue  # of a file that git does not know only the mode is changed
            elif change.file_type is FileType.SYMLINK:
                yield entry, "120000"
            else:
                yield entry, "100755" if (change.mode_after or 0) & 0o100 else "100644"

    def _tracked(self) -> dict[bytes, bytes]:
        if self._head is None:
            return {}
        rows = self._git.ask("ls-tree", "-r", "-z", "--full-tree", self._head.decode()).split(b"\0")
        return {path: about.split(b" ", 1)[0] for about, _, path in (row.partition(b"\t") for row in rows if row)}

    def _commit(self) -> str:
        git, temporary = self._git, f"refs/corral/{new_id()}"
        try:
            git.write(self._stream(temporary))
            commit = git.ask("rev-parse", "--verify", f"{temporary}^{{commit}}").decode()
            if self._head is not None:
                trees = {git.ask("rev-parse", "--verify", f"{each}^{{tree}}") for each in (self._head.decode(), commit)}
                if len(trees) == 1:
                    raise RequestError(_NOTHING)
            proposal = self._proposal
            only = [os.path.join(proposal.workspace, path) for path in proposal.only or ("",)]
            if propose(proposal.layer, only, policy=proposal.policy).hash != proposal.hash:
                raise RequestError("something has changed meanwhile; look at what would be applied now")
            reason = f"corral apply {proposal.layer.id}"
            git.ask("update-ref", "-m", reason, self._ref, commit, "")  # which fails if there is such a branch now
        finally:
            with suppress(CorralError):
                git.ask("update-ref", "-d", temporary)
        return commit

    def _stream(self, ref: str) -> Iterator[bytes]:
        """What git-fast-import(1) reads."""
        proposal = self._proposal
        yield b"feature done\n"
        with proposal.layer.reading() as parts:
            for number, (entry, mode) in enumerate(self._changes, 1):
                if mode:
                    yield f"blob\nmark :{number}\n".encode()
                    yield from _content(parts, [proposal.tree.name, *components(entry.path)], mode)
        layer = proposal.layer.id
        message = f"Changes of {layer}\n\nCorral-Layer: {layer}\nCorral-Proposal: {proposal.hash}\n"
        yield f"commit {ref}\ncommitter ".encode() + (self._identity or b"")
        yield f"\ndata {len(message)}\n{message}\n".encode()
        if self._head is not None:
            yield b"from " + self._head + b"\n"
        # Whatever goes away goes first: something else may come in its place.
        for entry, mode in self._changes:
            if not mode or entry.change.kind is ChangeKind.CHANGED:
                yield b"D " + _quoted(entry.path) + b"\n"
        for number, (entry, mode) in enumerate(self._changes, 1):
            if mode:
                yield f"M {mode} :{number} ".encode() + _quoted(entry.path) + b"\n"
        yield b"done\n"


class _Git:
    """git in one workspace, as its owner."""

    def __init__(self, workspace: str) -> None:
        self._workspace = workspace
        status = os.stat(workspace)
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name.startswith(_KEPT)
        } | _ENVIRONMENT
        self._as: dict[str, object] = {}
        if os.geteuid() == 0 and status.st_uid != 0:  # what it writes is his, and what it reads is what he may
            self._as = {"user": status.st_uid, "group": status.st_gid, "extra_groups": ()}
            self._environment["HOME"] = _home(status.st_uid)
            self._environment.pop("XDG_CONFIG_HOME", None)
        found = self._run(("rev-parse", "--show-toplevel"))
        if found.returncode or os.path.realpath(found.stdout.rstrip(b"\n")) != os.fsencode(workspace):
            why = f" ({_told(found.stderr)})" if found.returncode else ""
            raise RequestError(f"{workspace}: it is not the top of a git repository with a working tree{why}")

    def says(self, *words: str) -> bytes | None:
        """What git answers, without its newline; None where it says no. Raises CorralError where it cannot be run."""
        done = self._run(words)
        return None if done.returncode else done.stdout.rstrip(b"\n")

    def ask(self, *words: str) -> bytes:
        """The same, where no is an error. Raises CorralError."""
        done = self._run(words)
        if done.returncode:
            raise CorralError(f"git {words[0]} failed: {_told(done.stderr)}")
        return done.stdout.rstrip(b"\n")

    def write(self, stream: Iterator[bytes]) -> None:
        """Has git-fast-import(1) write objects. Raises CorralError."""
        process = self._popen(("fast-import", "--quiet", "--date-format=raw"))
        try:
            with suppress(BrokenPipeError):  # it says itself why it has gone
                _pour(stream, process)
            _, complaint = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise CorralError(f"git fast-import has not ended within {TIMEOUT:.0f} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            raise CorralError(f"git fast-import failed: {_told(complaint)}")

    def _run(self, words: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        process = self._popen(words)
        try:
            output, complaint = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise CorralError(f"git {words[0]} has not answered within {TIMEOUT:.0f} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return subprocess.CompletedProcess(list(words), process.returncode, output, complaint)

    def _popen(self, words: Sequence[str]) -> subprocess.Popen[bytes]:
        settings = [word for name, value in _SETTINGS.items() for word in ("-c", f"{name}={value}")]
        try:
            process: subprocess.Popen[bytes] = subprocess.Popen(
                ["git", "--no-pager", "-C", self._workspace, *settings, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                env=self._environment,
                **self._as,  # type: ignore[call-overload]
            )
            return process
        except OSError as error:
            raise CorralError(f"git cannot be run: {error.strerror}; a branch needs it") from None


def _pour(stream: Iterator[bytes], process: subprocess.Popen[bytes]) -> None:
    pipe: IO[bytes] | None = process.stdin
    assert pipe is not None  # noqa: S101 - for the type checker
    for piece in stream:
        pipe.write(piece)
    pipe.flush()


def _content(parts: int, path: list[str], mode: str) -> Iterator[bytes]:
    """An entry of the layer as fast-import's ``data``. Raises CorralError."""
    *parents, name = path
    try:
        directory = open_components(parts, parents)
        try:
            if mode == "120000":
                target = os.fsencode(os.readlink(name, dir_fd=directory))
                yield f"data {len(target)}\n".encode() + target + b"\n"
                return
            fd = os.open(name, OPEN_FILE, dir_fd=directory)
        finally:
            os.close(directory)
        with open(fd, "rb") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CorralError(f"{'/'.join(path[1:])}: it is no file in the layer")
            yield f"data {status.st_size}\n".encode()
            left = status.st_size
            while left:
                piece = file.read(min(left, _CHUNK))
                if not piece:
                    raise CorralError(f"{'/'.join(path[1:])}: it is shorter than it was")
                left -= len(piece)
                yield piece
            yield b"\n"
    except OSError as error:
        raise CorralError(f"{'/'.join(path[1:])}: cannot read it in the layer: {error.strerror}") from None


def _quoted(path: str) -> bytes:
    """As git-fast-import(1) wants paths with any characters: in quotes, with octal numbers."""
    plain = (byte if 32 <= byte < 127 and byte not in b'"\\' else -byte for byte in os.fsencode(path))
    return b'"' + b"".join(bytes([each]) if each > 0 else b"\\%03o" % -each for each in plain) + b'"'


def _is_git(name: str) -> bool:
    """Whether some system takes a name for ``.git``: by case, by characters that do not count, or as NTFS does."""
    seen = "".join(each for each in name if unicodedata.category(each) != "Cf")
    return seen.casefold().rstrip(". ").partition(":")[0] in (".git", "git~1")


def _home(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_dir
    except KeyError:
        return "/nonexistent"


def _told(complaint: bytes) -> str:
    text = complaint.decode("utf-8", "backslashreplace").strip().splitlines()
    return text[-1][:500] if text else "it says nothing"
