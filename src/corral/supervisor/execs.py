"""execve(2) and execveat(2): who runs what.

They cannot be carried out for somebody else, so the kernel makes them itself, from the caller's memory and by the
caller's path. Where the policy has no rules about programs, what is recorded is what was seen in the moment of the
call. Where it has, :mod:`corral.supervisor.tracing` compares what has become of it with what was decided, before the
program's first instruction, and another program or other arguments end the process there.
"""

from __future__ import annotations

import errno as errors
import os
import stat
from collections.abc import Callable
from dataclasses import replace

from corral.actions import Action, KernelCall, Kind, Origin, Program
from corral.supervisor import invocation
from corral.supervisor.call import Call, close_all
from corral.supervisor.invocation import Invocation, as_name, read_script
from corral.supervisor.tracing import Trace
from corral.supervisor.tree import directory_path

MAX_SCRIPTS = 6
"""Scripts whose interpreter is a script; the kernel gives up before (ELOOP)."""
_AT_FDCWD, _AT_EMPTY_PATH, _AT_SYMLINK_NOFOLLOW = -100, 0x1000, 0x100
_UNREADABLE = "the memory of its caller cannot be read, so nobody can tell what is to run"
_UNSEEN = "the file cannot be read, so the policy's rules about programs cannot be enforced"
_UNTRACED = "its process cannot be traced, so the policy's rules about programs cannot be enforced"
_REPLACED = "while it was held, something else was put in the place of what was approved"
_CHANGED = "what was about to run was not what had been decided: it was changed meanwhile; the process was ended"


def _execve(call: Call) -> None:
    _begin(call, _AT_FDCWD, 0, 1, 0)


def _execveat(call: Call) -> None:
    _begin(call, call.signed(0), 1, 2, call.low(4))


def _begin(call: Call, directory: int, path: int, arguments: int, flags: int) -> None:
    try:
        name = call.read_text(call.arguments[path])
    except PermissionError:
        _refuse(call, errors.EPERM, _UNREADABLE)
        return
    # Before the arguments are read, as the kernel does it: what is tried along PATH is mostly not there (execvp(3)).
    file = _open(call, directory, name, flags)
    try:
        said = invocation.copy(call, directory, name, call.arguments[arguments], flags)
    except BaseException as error:
        if file >= 0:
            os.close(file)
        if not isinstance(error, PermissionError):
            raise
        _refuse(call, errors.EPERM, _UNREADABLE)
        return
    _Attempt(call, said, file, flags).start()


def _refuse(call: Call, errno: int, reason: str) -> None:
    """Whatever anybody thinks of it, the call fails; and there is a record that says why."""
    call.decide(Kind.KERNEL, KernelCall(call.name, errno, reason), _nothing, refused=errno)
    call.fail(errno)


def _nothing() -> None:
    """A refused call has no effect, whatever the verdict."""


class _Attempt:
    """One exec, from the call to what came of it."""

    __slots__ = ("_call", "_expected", "_fds", "_flags", "_programs", "_said", "_statuses")

    def __init__(self, call: Call, said: Invocation, file: int, flags: int) -> None:
        """Takes ``file`` over; -1 where it is not for us to open."""
        self._call, self._said, self._flags = call, said, flags
        self._programs: list[Program] = []
        """What is to be decided: the program and, where its interpreter is a script, that, and so on."""
        self._expected: tuple[bytes, ...] = ()
        """The arguments that the kernel will make of it."""
        self._fds = [file] if file >= 0 else []
        """What is looked at: scripts, each followed by what runs it; the last is the file that the kernel will map."""
        self._statuses: list[os.stat_result] = []
        """What these were when they were looked at."""

    def start(self) -> None:
        call, said = self._call, self._said
        if not self._fds:
            start = b"/" if said.directory != _AT_FDCWD else os.fsencode(directory_path(call, _AT_FDCWD))
            self._programs.append(Program(os.fsdecode(os.path.join(start, said.path)), said.texts, said.truncated))
            self._decide(0)
            return
        try:
            self._look()
        except BaseException:
            self._close()
            raise

    # ---- what it is ----

    def _look(self) -> None:
        call, said = self._call, self._said
        call.when_gone = self._close
        file = self._fds[0]
        status = os.fstat(file)
        self._statuses.append(status)
        argv, name = said.argv, as_name(said.path, said.directory, _AT_FDCWD)
        self._programs.append(Program(_path(file), said.texts, said.truncated))
        if digest := call.sandbox.digests.known(status):
            self._expected = argv
            self._digested(digest)
            return
        content = _open_content(file) if stat.S_ISREG(status.st_mode) else -1
        if content < 0 and stat.S_ISREG(status.st_mode) and call.sandbox.exec_rules:
            self._close()
            _refuse(call, errors.EACCES, _UNSEEN)
            return
        try:
            start = os.pread(content, invocation.MAX_LINE, 0) if content >= 0 else b""
            while (script := read_script(start)) and len(self._programs) <= MAX_SCRIPTS:
                argv = (script.interpreter, *(() if script.argument is None else (script.argument,)), name, *argv[1:])
                name = script.interpreter
                start = self._interpreter(name, argv)
            self._expected = argv
            if content < 0:
                self._digested("")
            elif not call.sandbox.digests.find(content, status, self._then(self._digested)):
                self._close()
                call.fail(errors.EAGAIN)  # execve(2) has it for too much at once
        finally:
            if content >= 0:
                os.close(content)

    def _then(self, step: Callable[[str], None]) -> Callable[[str], None]:
        """A step that comes when a digest is there, and answers the call where it fails."""

        def run(digest: str) -> None:
            if self._call.answered:
                return
            try:
                step(digest)
            except OSError as error:
                self._close()
                self._call.fail(error.errno or errors.EPERM)
            except Exception as error:
                self._close()
                self._call.sandbox.fault(self._call, error)

        return run

    def _hash(self, file: int, done: Callable[[str], None]) -> None:
        """Has ``done`` called with the digest of ``file``, or with "". Raises OSError (EAGAIN: too many wait)."""
        if known := self._call.sandbox.digests.known(os.fstat(file)):
            done(known)
            return
        content = _open_content(file)
        if content < 0:
            done("")
            return
        try:
            if not self._call.sandbox.digests.find(content, os.fstat(content), self._then(done)):
                raise OSError(errors.EAGAIN, os.strerror(errors.EAGAIN))
        finally:
            os.close(content)

    def _interpreter(self, name: bytes, argv: tuple[bytes, ...]) -> bytes:
        """Adds what runs the last script; returns how that begins itself."""
        last, call = self._programs[-1], self._call
        try:
            file = call.sandbox.tree.find(call, _AT_FDCWD, name, follow=True)
        except OSError:
            if call.sandbox.exec_rules:
                raise
            self._programs[-1] = replace(last, interpreter=os.fsdecode(name))  # the kernel will say what is wrong
            return b""
        self._fds.append(file)
        self._statuses.append(os.fstat(file))
        self._programs[-1] = replace(last, interpreter=_path(file))
        content = _open_content(file)
        if content < 0:
            return b""
        try:
            start = os.pread(content, invocation.MAX_LINE, 0)
        finally:
            os.close(content)
        if start.startswith(b"#!"):
            texts = tuple(text.decode("utf-8", "replace") for text in argv)
            self._programs.append(Program(_path(file), texts, self._said.truncated))
        return start

    def _digested(self, digest: str) -> None:
        self._programs[0] = replace(self._programs[0], digest=digest)
        if not self._call.sandbox.exec_rules:
            del self._programs[1:]
        elif len(self._fds) == 2:  # a script, and what runs it
            self._hash(self._fds[1], self._interpreter_digested)
            return
        self._decide(0)

    def _interpreter_digested(self, digest: str) -> None:
        self._programs[0] = replace(self._programs[0], interpreter_digest=digest)
        self._decide(0)

    # ---- what comes of it ----

    def _decide(self, index: int) -> None:
        last = index + 1 == len(self._programs)
        self._call.decide(
            Kind.PROCESS_EXEC, self._programs[index], self._run if last else lambda: self._decide(index + 1)
        )

    def _run(self) -> None:
        try:
            if self._call.was_asked and self._call.sandbox.exec_rules:
                self._look_again()
            else:
                self._execute()
        except BaseException:
            self._close()
            raise

    def _look_again(self) -> None:
        """Whoever was asked had time to think, and others had it to write: what was shown must still be there. The same
        where the answer was for the session: it is for this content, which was hashed before."""
        call, said = self._call, self._said
        call.when_gone = self._close
        found = _open(call, said.directory, said.path, said.flags)
        try:
            same = os.path.samestat(os.fstat(found), os.fstat(self._fds[0]))
        finally:
            os.close(found)
        first = self._programs[0]
        if same:
            shown = [(self._fds[0], first.digest)]
            if first.interpreter_digest:
                shown.append((self._fds[1], first.interpreter_digest))
            self._compare(shown)
        else:
            self._replaced()

    def _compare(self, shown: list[tuple[int, str]]) -> None:
        """Executes where each file has its digest still."""
        if not shown:
            self._execute()
            return
        (file, wanted), *rest = shown

        def compared(digest: str) -> None:
            if digest and digest == wanted:
                self._compare(rest)
            else:
                self._replaced()

        self._hash(file, compared)

    def _replaced(self) -> None:
        self._close()
        _refuse(self._call, errors.EACCES, _REPLACED)

    def _execute(self) -> None:
        call = self._call
        call.sandbox.processes.executes(call.tid, call.actor.process.pid)
        if not call.sandbox.exec_rules:
            self._close()
            call.proceed()
            return
        actor = call.actor
        try:
            Trace(call, self._is_right, lambda: self._changed(actor.origin), lambda: self._ended(actor.process.pid))
        except OSError:
            self._close()
            _refuse(call, errors.EACCES, _UNTRACED)

    def _ended(self, pid: int) -> None:
        self._call.sandbox.processes.forget(pid)
        self._close()

    def _is_right(self, pid: int) -> bool:
        """Whether the process is about to run what was decided, before it does."""
        decided, found = os.fstat(self._fds[-1]), os.stat(f"/proc/{pid}/exe")
        if (decided.st_dev, decided.st_ino) != (found.st_dev, found.st_ino):
            return False
        if not self._are_unchanged():
            return False
        text = b"".join(argument + b"\0" for argument in self._expected)
        limit = len(text) + 1
        with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
            there = b""
            while len(there) < limit and (part := file.read(limit - len(there))):
                there += part
        return there.startswith(text) if self._said.truncated else there == text

    def _are_unchanged(self) -> bool:
        """Whether the files are as they were when they were decided on. A script is opened by its interpreter, by its
        name: so that has to lead to the same file still. Without a name it gets a descriptor, which nobody can change.
        """
        if len(self._fds) > 1 and self._said.path:
            follow = not self._flags & _AT_SYMLINK_NOFOLLOW
            again = self._call.sandbox.tree.find(self._call, self._said.directory, self._said.path, follow=follow)
            try:
                if not os.path.samestat(os.fstat(again), self._statuses[0]):
                    return False
            finally:
                os.close(again)
        return all(_version(os.fstat(fd)) == _version(was) for fd, was in zip(self._fds, self._statuses, strict=True))

    def _changed(self, origin: Origin) -> None:
        subject = KernelCall(self._call.name, errors.EACCES, _CHANGED)
        self._call.sandbox.monitor.submit(Action(Kind.KERNEL, subject, origin), lambda decision: None)

    def _close(self) -> None:
        close_all(self._fds)


def _open(call: Call, directory: int, path: bytes, flags: int) -> int:
    """What is to run, as the sandbox sees it, or -1 where it cannot be opened and no rule needs it. Raises OSError, as
    the kernel would say; it must not look again, because then there could be something."""
    if not path and not flags & _AT_EMPTY_PATH:
        raise FileNotFoundError(errors.ENOENT, os.strerror(errors.ENOENT))
    try:
        if not path:
            return call.take_number(directory)
        return call.sandbox.tree.find(call, directory, path, follow=not flags & _AT_SYMLINK_NOFOLLOW)
    except PermissionError:
        if call.sandbox.exec_rules:
            raise
        return -1


def _version(status: os.stat_result) -> tuple[int, int, int]:
    """What changes with a file's content, but for writes through a shared mapping of the layer; nobody inside can set
    the last. What a person was shown is hashed again (``_look_again``)."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _path(file: int) -> str:
    return os.readlink(f"/proc/self/fd/{file}")


def _open_content(file: int) -> int:
    """The same file for reading, or -1: execute permission does not include that, and only regular files are executed.

    To open another has effects: it wakes whoever waits at a fifo, and a terminal of the agent's could become ours.
    """
    if not stat.S_ISREG(os.fstat(file).st_mode):
        return -1
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return -1


HANDLERS: dict[str, Callable[[Call], None]] = {"execve": _execve, "execveat": _execveat}
