"""What the agent is told of a refused action: which one, by which rule, why, and what to do instead.

Written to be read by a model: short, without blame, and without a way around. Whatever the agent had a hand in (paths,
arguments, names) is escaped and bounded here, once, so that every reader may print it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corral.actions import Access, Action, Decision, Endpoint, File, KernelCall, Kind, Socket, Verdict
from corral.supervisor.allowed import allowed_names

PLACE = "/run/corral/denials.jsonl"
"""Where the agent reads them, one JSON object a line."""
_ACTION, _RULE, _SENTENCE = 300, 200, 500  # characters of one field
_LISTED = 4
"""Denials that :func:`summary` names before it counts the rest."""


@dataclass(frozen=True, slots=True)
class Denial:
    """Equal refusals of one exec. All texts are printable; ``rule``, ``reason`` and ``instead`` are empty where the
    rule is private."""

    action: str
    """As rules name it: ``net.connect 192.0.2.1:443``."""
    refused: str
    """What was refused, in a sentence."""
    rule: str
    reason: str
    instead: str
    """What to do instead."""
    exec: int
    """Number of the exec whose command the process descends from; 0 where that is none."""
    pid: int
    """Inside, of the first; 0 where no process tried it."""
    at: float
    """Of the first; seconds since the epoch."""
    count: int = 1


def printable(text: str) -> str:
    """Text from inside with everything escaped that could move an operator's cursor or hide what is there."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def is_told(decision: Decision) -> bool:
    """Whether the agent hears of it: refusals, except of what programs try as a matter of course."""
    subject = decision.action.subject
    if isinstance(subject, KernelCall):
        return decision.verdict >= Verdict.DENY and not subject.quiet
    return decision.verdict >= Verdict.DENY


def describe(decision: Decision) -> Denial:
    """What the agent is told of a refusal."""
    action = decision.action
    process = action.origin.process
    if decision.private:
        refused, rule, reason, instead = "This is not allowed in this sandbox.", "", "", ""
    else:
        end = ", and the sandbox ends" if decision.verdict is Verdict.KILL else ""
        refused = f"{_bounded(_attempt(action), _ACTION)} was refused{end}."
        rule = _bounded(decision.rule, _RULE)
        reason, instead = (_bounded(text, _SENTENCE) for text in _explain(decision))
    return Denial(
        action=_bounded(str(action), _ACTION),
        refused=refused,
        rule=rule,
        reason=reason,
        instead=instead,
        exec=action.origin.exec,
        pid=process.inner_pid if process else 0,
        at=decision.at,
        count=decision.count,
    )


def summary(denials: Sequence[Denial], dropped: int = 0, *, place: str = PLACE) -> str:
    """All of them in one line of bounded length. ``dropped`` more are counted; ``place`` is where the details are."""
    total = sum(denial.count for denial in denials) + dropped
    items = [_item(denial) for denial in denials[:_LISTED]]
    left = total - sum(denial.count for denial in denials[:_LISTED])
    if left:
        items.append(f"and {left} more")
    details = f". Details: {place}" if place else ""
    return f"{total} action{'s were' if total != 1 else ' was'} refused: {'; '.join(items)}{details}"


def stderr_line(
    denials: Sequence[Denial], dropped: int, before: bytes, *, restored: str = "", newline: bytes = b"\n"
) -> bytes:
    """What is written at the end of an exec's stderr: nothing where there is nothing to tell, else a line of its own
    of what was refused, and one where its files were set back to the layer ``restored``.

    ``before`` is what the command wrote last.
    """
    lines = [summary(denials, dropped)] if denials or dropped else []
    if restored:
        lines.append(set_back(restored))
    if not lines:
        return b""
    start = b"" if not before or before.endswith(b"\n") else newline
    return start + b"".join(f"corral: {line}".encode() + newline for line in lines)


def set_back(layer: str) -> str:
    """What is told of a command during which the files were set back."""
    return f"the files were set back to the layer {layer} while this ran"


def _item(denial: Denial) -> str:
    times = f" [x{denial.count}]" if denial.count > 1 else ""
    if not denial.reason:
        return f"{denial.action}{times} ({denial.refused.rstrip('.')})"
    rule = f"{denial.rule}: " if denial.rule else ""
    return f"{denial.action}{times} ({rule}{denial.reason.rstrip('.')}. {denial.instead.rstrip('.')})"


def _bounded(text: str, limit: int) -> str:
    """``text``, escaped, of at most ``limit`` characters."""
    escaped = printable(text[: limit + 1])
    return escaped if len(escaped) <= limit else f"{escaped[: limit - 1]}…"


def _attempt(action: Action) -> str:
    """What was tried, as the beginning of a sentence."""
    subject = action.subject
    if isinstance(subject, KernelCall):
        return f"The system call {subject.name}"
    if isinstance(subject, Endpoint) and action.kind is Kind.NET_RESOLVE:
        return f"Looking up {subject.name or subject.address}"
    if isinstance(subject, Endpoint):
        return f"{_ATTEMPTS[action.kind]} {subject} ({subject.transport.value})"
    if isinstance(subject, File) and action.kind is Kind.FILE_OPEN:
        return f"Opening {subject.path} for {'reading' if subject.access is Access.READ else 'writing'}"
    if isinstance(subject, File) and subject.other:
        return f"{_ATTEMPTS[action.kind]} {subject.path} to {subject.other}"
    return f"{_ATTEMPTS[action.kind]} {subject}"


_ATTEMPTS = {
    Kind.PROCESS_EXEC: "Running",
    Kind.FILE_OPEN: "Opening",
    Kind.FILE_RENAME: "Renaming",
    Kind.FILE_UNLINK: "Removing",
    Kind.FILE_LINK: "Linking",
    Kind.FILE_CHMOD: "Changing the mode or owner of",
    Kind.NET_SOCKET: "Making a socket of",
    Kind.NET_CONNECT: "Connecting to",
    Kind.NET_BIND: "Binding a socket to",
    Kind.NET_LISTEN: "Listening on",
    Kind.NET_SEND: "Sending to",
    Kind.NET_RESOLVE: "Looking up",
    Kind.HTTP_REQUEST: "The HTTP request",
    Kind.MODEL_CALL: "A call of the model",
    Kind.DATA_QUERY: "The query",
    Kind.API_CALL: "The operation",
    Kind.KERNEL: "The system call",
    Kind.SANDBOX_SNAPSHOT: "A snapshot of this sandbox",
    Kind.SANDBOX_RESTORE: "Restoring this sandbox",
    Kind.SANDBOX_FORK: "A copy of this sandbox",
    Kind.SANDBOX_APPLY: "Applying the changes of this sandbox",
    Kind.SANDBOX_UNDO: "Taking back the changes of this sandbox",
    Kind.SANDBOX_DISCARD: "Dropping the changes of this sandbox",
}

_ASK = "or ask the person you work for to allow it"
_INSTEAD = {
    "process": f"Trying again does not help. Do the task without this program, {_ASK}.",
    "file": f"Trying again does not help. Do the task without this file, {_ASK}.",
    "net": f"Trying again does not help. Do the task without this connection, {_ASK}.",
}
_OTHER_INSTEAD = f"Trying again does not help. Do the task without it, {_ASK}."


def _explain(decision: Decision) -> tuple[str, str]:
    """Why, and what to do instead: in the policy's words, else in ours."""
    subject = decision.action.subject
    if isinstance(subject, KernelCall):
        own = _KERNEL.get(subject.name, _OTHER_KERNEL)
        if subject.reason and subject.reason in decision.reason and subject.name not in _MADE_BY_PROGRAMS:
            # The table's reasons are for whoever reviews the walls: they say what an attacker would gain.
            return own
    elif isinstance(subject, Socket):
        own = _KERNEL["socket"]
        if decision.rule == "syscalls":  # the table's refusal, in a subject's words
            return own
    else:
        instead = _INSTEAD.get(decision.action.kind.value.partition(".")[0], _OTHER_INSTEAD)
        own = ("The policy of this sandbox does not allow it.", instead)
    return decision.reason or own[0], decision.advice or own[1]


_OTHER_KERNEL = ("No program in this sandbox may use this call.", f"Do the task without it, {_ASK}.")
_KERNEL = {
    name: (reason, instead)
    for names, reason, instead in (
        (
            "mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick "
            "mount_setattr",
            "The mounts of this sandbox are fixed.",
            "Use the files where they are; you may write to the workspace, your home directory and /tmp.",
        ),
        (
            "unshare setns clone",
            "No namespaces can be made or entered here.",
            "Start the program without its own container or sandbox mode: it is contained already.",
        ),
        ("clone3", "This call is not available here.", "Use clone or fork."),
        (
            "open_by_handle_at name_to_handle_at",
            "Files are opened by path here, not by handle.",
            "Open the file by its path.",
        ),
        (
            "fanotify_init fanotify_mark",
            "Whole file systems cannot be watched here.",
            "Watch directories with inotify.",
        ),
        (
            "ptrace process_vm_readv process_vm_writev pidfd_getfd process_madvise kcmp",
            "A process may not look into another one.",
            "Debug from within the program: logging, assertions, or a debugger that runs in the same process.",
        ),
        (
            "seccomp",
            "Filters with a listener of their own are not available here.",
            "Start the program without its own supervision of system calls: it is contained already.",
        ),
        (
            "personality",
            "Address space randomisation stays on.",
            "Go on without switching it off (gdb: `set disable-randomization off`).",
        ),
        (
            "io_uring_setup io_uring_enter io_uring_register",
            "io_uring is not available here.",
            "Switch it off in the program's settings; ordinary reads, writes and epoll work.",
        ),
        (
            "bpf perf_event_open userfaultfd",
            "The kernel cannot be programmed or measured from here.",
            "Measure in the program itself, with timers or its language's own profiler.",
        ),
        (
            "keyctl add_key request_key",
            "The kernel's keyrings are not available here.",
            "Use the program's setting that keeps its keys in a file.",
        ),
        (
            "memfd_secret memfd_create shmget",
            "This kind of shared memory is not available here.",
            "Use a file in /dev/shm.",
        ),
        (
            "settimeofday clock_settime clock_adjtime adjtimex",
            "The clock cannot be read or set by this call.",
            "Read it with clock_gettime; give a program that needs another time that time as data.",
        ),
        (
            "sethostname setdomainname",
            "The host name is fixed.",
            "Set the name in the program's own settings.",
        ),
        (
            "socket socketpair",
            "Only Unix, TCP and UDP sockets exist here.",
            "Use TCP or UDP; ping, raw packets and other protocols do not work here.",
        ),
        ("setsockopt", "This socket option is not available here.", "Use the socket without it."),
        (
            "ioctl",
            "This operation on the terminal is not available here.",
            "Read and write the terminal in the ordinary way.",
        ),
        (
            "mknod mknodat",
            "No device nodes can be made here.",
            "Use the devices that are in /dev, or an ordinary file.",
        ),
        (
            "sched_setaffinity",
            "The processors of this sandbox are fixed.",
            "Use the processors that `nproc` counts.",
        ),
        (
            "swapon swapoff quotactl quotactl_fd acct init_module finit_module delete_module kexec_load "
            "kexec_file_load reboot syslog vhangup iopl ioperm modify_ldt",
            "The machine cannot be administered from here.",
            "Do the task without it, or tell the person you work for what the machine would need.",
        ),
    )
    for name in names.split()
}
_MADE_BY_PROGRAMS = allowed_names() - _KERNEL.keys()
"""One of these was refused for what it was about, by a policy or by the supervisor itself: that reason is told."""
