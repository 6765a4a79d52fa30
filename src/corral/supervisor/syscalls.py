"""Which system calls a sandbox may make: policy as data, one reason a row.

A call is of one of three classes. It is *refused* if a row of :data:`REFUSALS` matches it, else *decided* if a row of
:data:`DECIDED` does, else *free* if :data:`ALLOWED <corral.supervisor.allowed.ALLOWED>` names it. The supervisor is
told of the refused and the decided ones; it answers the former with their errno and has the monitor decide on the
latter. Of the free ones nobody is told.

Rules of this table:

1. What is not named is refused. A call that is neither in :data:`ALLOWED` nor in :data:`REFUSALS` gets ENOSYS, the
   answer of a kernel that never had it, for which every libc has a fallback. A newer kernel therefore opens no door.
2. A refusal without conditions refuses the call always, and its name must not be in :data:`ALLOWED`. A refusal with
   conditions refuses the call when all of them hold, and its name must be in :data:`ALLOWED`; so must that of a
   decided call. The rows of one call are tried in the order written here, refusals first, and the first match decides.
3. Only registers are looked at, never memory (invariant I5), and of each register only the half that the kernel looks
   at: it takes ``int`` and ``unsigned int`` arguments from the low 32 bits and ignores the rest, so a comparison of all
   64 bits can be passed by setting bit 63 (CVE-2019-10063). Of a pointer or a ``size_t`` it takes both halves, so
   these have a row for each: a null pointer is one whose halves are both 0.
4. The errno is the one that callers already handle: EPERM for "you may not", the natural one where programs fall back
   on it.
5. A refusal is *quiet* where programs try the call as a matter of course and go on without it: it is recorded, but the
   agent is not told, as it would look for a fault where there is none. What an agent may have wanted is never quiet.

The mounts, the missing capabilities and the sealed user namespaces refuse most of these calls again. The filter is
there for the kernel bug that makes one of those fail, and for the calls that need no privilege at all (io_uring,
keyctl, userfaultfd, AF_VSOCK, ...).
"""

from __future__ import annotations

from errno import (
    EACCES,
    EAFNOSUPPORT,
    EINVAL,
    ENOENT,
    ENOSYS,
    EOPNOTSUPP,
    EPERM,
    EPROTONOSUPPORT,
    ESOCKTNOSUPPORT,
)
from typing import NamedTuple


class Condition(NamedTuple):
    """Holds if ``(half of argument & mask)`` is one of ``values``, or with ``negated`` if it is none of them."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    negated: bool = False
    high: bool = False
    """Look at bits 32-63 of the argument instead of bits 0-31; for arguments that the kernel takes as 64 bits."""


class Refusal(NamedTuple):
    """One refused system call: ``when`` empty means always."""

    name: str
    errno: int
    reason: str
    when: tuple[Condition, ...] = ()
    quiet: bool = False
    """Programs try this as a matter of course and go on without it: recorded, but not told to the agent."""


class Decided(NamedTuple):
    """One system call that is decided before it has an effect: ``when`` empty means always."""

    name: str
    reason: str
    when: tuple[Condition, ...] = ()
    errno: int = EACCES
    """What a caller gets that may not: the kernel's own word for a file, a program or an address that is forbidden."""


def _words(text: str) -> list[str]:
    return text.split()


def is_(argument: int, *values: int, mask: int = 0xFFFFFFFF) -> Condition:
    return Condition(argument, values, mask)


def is_not(argument: int, *values: int, mask: int = 0xFFFFFFFF) -> Condition:
    return Condition(argument, values, mask, negated=True)


def always(names: str, reason: str, errno: int = EPERM, *, quiet: bool = False) -> tuple[Refusal, ...]:
    return tuple(Refusal(name, errno, reason, quiet=quiet) for name in _words(names))


def decided(names: str, reason: str) -> tuple[Decided, ...]:
    return tuple(Decided(name, reason) for name in _words(names))


def any_bit(argument: int) -> tuple[tuple[Condition, ...], ...]:
    """The conditions of two rows that together say: this 64-bit argument is not 0."""
    return ((is_not(argument, 0),), (Condition(argument, (0,), negated=True, high=True),))


# From 424 (Linux 5.1) on, a call has the same number on every architecture, so newer calls than libseccomp's table
# knows can be named here.
FIRST_COMMON_NUMBER = 424
COMMON_NUMBERS = {
    name: FIRST_COMMON_NUMBER + offset
    for offset, name in enumerate(
        _words("""pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig
        fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 process_madvise epoll_pwait2
        mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret
        process_mrelease futex_waitv set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait
        futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat
        getxattrat listxattrat removexattrat open_tree_attr file_getattr file_setattr""")
    )
}
# Below 424 and unknown to libseccomp 2.5: by architecture.
OWN_NUMBERS = {"x86_64": {"uretprobe": 335}}

CLONE_NEW_FLAGS = 0x7E020000  # NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; NEWTIME is in clone3 only
UNSHARE_HARMLESS = 0x00050F00  # VM, FS, FILES, SIGHAND, THREAD, SYSVSEM: what a process may stop sharing
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
NETLINK_PROBED = (4, 7, 9, 15, 16)  # SOCK_DIAG, SELINUX, AUDIT, KOBJECT_UEVENT, GENERIC
SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_TYPE_MASK = 1, 2, 3, 0xF
IPPROTO_IP, IPPROTO_ICMP, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_ICMPV6, NETLINK_ROUTE = 0, 1, 6, 17, 58, 0
TIOCSTI, TIOCLINUX, TIOCSETD = 0x5412, 0x541C, 0x5423
IPPROTO_MPTCP = 262
SOL_IP, IP_OPTIONS, SOL_TCP, TCP_ULP = 0, 4, 6, 31
SOL_IPV6, IPV6_2292PKTOPTIONS, IPV6_FLOWLABEL_MGR, IPV6_RTHDR = 41, 6, 32, 57
S_IFMT, S_IFCHR, S_IFBLK = 0xF000, 0x2000, 0x6000
PER_LINUX, PER_LINUX32, PERSONALITY_QUERY = 0, 8, 0xFFFFFFFF

_INTERNET = is_(0, AF_INET, AF_INET6)
_SOURCE_ROUTE = "a source route sends packets to another address than the one that was decided"
_DEVICE = "a device node is a door to a driver; made inside, it would also lie in the files that are applied outside"

REFUSALS: tuple[Refusal, ...] = (
    # The file tree is the launcher's work, and the file walls rest on it.
    *always(
        "mount umount2 pivot_root open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr",
        "the mounts are the file walls; no program inside may change them",
    ),
    *always("chroot", "another root hides the walls from a process and is half of the classic escape from them"),
    *always(
        "open_by_handle_at",
        "opens a file by inode, past every directory, mount and Landlock rule (the 'shocker' escape)",
    ),
    # Quiet: programs that only ask whether a path is a mount point try it first (systemd's tools, util-linux).
    *always("name_to_handle_at", "gives the handle that such an open needs", quiet=True),
    *always("fanotify_init fanotify_mark", "watches or gates the opens of whole mounts and hands out descriptors"),
    *always("swapon swapoff quotactl quotactl_fd acct", "administers the host's storage or accounting"),
    # New namespaces bring back capabilities, and with them the kernel code that only root could reach before.
    *always("setns", "enters a namespace that is not the sandbox's own"),
    Refusal(
        "unshare",
        EPERM,
        "only sharing with other threads may end; anything else makes a namespace, now or in a newer kernel",
        (is_not(0, 0, mask=0xFFFFFFFF ^ UNSHARE_HARMLESS),),
    ),
    Refusal(
        "unshare",
        EPERM,
        "flags above bit 31, of a newer kernel, are not known to be harmless",
        (Condition(0, (0,), negated=True, high=True),),
    ),
    Refusal(
        "clone",
        EPERM,
        "a new namespace, above all a user namespace, gives back capabilities",
        (is_not(0, 0, mask=CLONE_NEW_FLAGS),),
    ),
    *always(
        "clone3",
        "its flags lie in memory, where a filter cannot see them; ENOSYS makes every libc use clone, "
        "whose flags are in a register",
        ENOSYS,
        quiet=True,  # every libc tries it for every thread
    ),
    # Other processes: the sandbox's own PID 1 has the agent's uid.
    *always(
        "ptrace process_vm_readv process_vm_writev pidfd_getfd process_madvise",
        "reads, alters or steals from another process; the supervisor must be the only one who can",
    ),
    # Quiet: graphics libraries and service managers ask whether two descriptors are one file, and take no for unknown.
    *always("kcmp", "tells which kernel objects other processes hold", quiet=True),
    Refusal(
        "seccomp",
        EPERM,
        "a second listener would sit between a call and the supervisor; filters of one's own "
        "without a listener only take rights away, and browsers need them",
        (is_(0, SECCOMP_SET_MODE_FILTER), is_not(1, 0, mask=SECCOMP_FILTER_FLAG_NEW_LISTENER)),
    ),
    *always("lsm_set_self_attr", "the host's own confinement of the sandbox may rest on this label"),
    Refusal(
        "personality",
        EPERM,
        "only the plain and the 32-bit uname personality, and asking which: the others "
        "switch off address randomisation or non-executable memory (gdb warns, and works as far as it does)",
        (is_not(0, PER_LINUX, PER_LINUX32, PERSONALITY_QUERY),),
        quiet=True,  # debuggers, and setarch around configure scripts, do without
    ),
    # Kernel interfaces with a long record of holes, usable without any capability.
    *always(
        "io_uring_setup io_uring_enter io_uring_register",
        "does file and network calls in the kernel, where no filter sees them",
        quiet=True,  # node, databases and runtimes ask for it at their start, and use epoll and threads then
    ),
    *always("bpf perf_event_open userfaultfd", "programs, measures or stalls the kernel; the usual tools of exploits"),
    *always(
        "keyctl add_key request_key",
        "kernel keyrings are not cut by namespaces, and request_key runs a program on the host",
    ),
    *always("memfd_secret", "memory that the supervisor cannot read; what cannot be read cannot be decided"),
    *always("lookup_dcookie nfsservctl", "dead interfaces of profilers and of the NFS server"),
    # Privileged by nature: nothing inside has a use for these, even where the kernel would say no by itself.
    *always("init_module finit_module delete_module kexec_load kexec_file_load reboot", "replaces the host's kernel"),
    *always(
        "settimeofday clock_settime clock_adjtime adjtimex",
        "the clock belongs to the host, and records rest on "
        "it; whether a call only reads lies in memory, where a filter cannot see it",
    ),
    *always("sethostname setdomainname", "the name is part of the plan that the launcher applied"),
    *always("syslog", "the kernel's log holds addresses and the doings of others"),
    *always("vhangup", "hangs up the caller's terminal"),
    *always("iopl ioperm modify_ldt", "direct ports and segment tables: hardware access, and kernel holes in the past"),
    # Sockets: UNIX, and TCP and UDP over IP, which all end at the gateway; a route dump, which libc's resolver needs.
    Refusal(
        "socket",
        EAFNOSUPPORT,
        "only UNIX, IPv4, IPv6 and route-netlink sockets: AF_VSOCK passes the network "
        "namespace, AF_ALG, AF_PACKET, AF_RXRPC, AF_XDP, ... are kernel holes of the past",
        (is_not(0, AF_UNIX, AF_INET, AF_INET6, AF_NETLINK),),
    ),
    Refusal(
        "socket",
        EPROTONOSUPPORT,
        "tells about sockets, devices and audit of the whole machine; of netlink only NETLINK_ROUTE is given",
        (is_(0, AF_NETLINK), is_(2, *NETLINK_PROBED)),
        quiet=True,  # ss, libselinux, PAM, libudev and ethtool try these, and go on
    ),
    Refusal(
        "socket",
        EPROTONOSUPPORT,
        "of netlink only NETLINK_ROUTE, for interface lists: the rest configures or watches the kernel",
        (is_(0, AF_NETLINK), is_not(2, NETLINK_ROUTE)),
    ),
    Refusal(
        "socket",
        EPERM,
        "raw packets would go past the gateway's view of a connection",
        (_INTERNET, is_(1, SOCK_RAW, mask=SOCK_TYPE_MASK)),
    ),
    Refusal(
        "socket",
        ESOCKTNOSUPPORT,
        "only streams and datagrams: SCTP's and DCCP's types and SOCK_PACKET are not routed to the gateway",
        (_INTERNET, is_not(1, SOCK_STREAM, SOCK_DGRAM, mask=SOCK_TYPE_MASK)),
    ),
    Refusal(
        "socket",
        EACCES,
        "ping sockets carry data in ICMP, which the gateway does not speak; this is the "
        "kernel's own answer to users outside ping_group_range",
        (_INTERNET, is_(2, IPPROTO_ICMP, IPPROTO_ICMPV6)),
    ),
    Refusal(
        "socket",
        EPROTONOSUPPORT,
        "Multipath TCP is not what the gateway speaks",
        (_INTERNET, is_(2, IPPROTO_MPTCP)),
        quiet=True,  # Go tries it first, for every listener, and falls back to TCP on this errno
    ),
    Refusal(
        "socket",
        EPROTONOSUPPORT,
        "only TCP and UDP end at the gateway: not SCTP, UDP-Lite, SMC, L2TP",
        (_INTERNET, is_not(2, IPPROTO_IP, IPPROTO_TCP, IPPROTO_UDP)),
    ),
    Refusal("socketpair", EAFNOSUPPORT, "only UNIX: TIPC and others make pairs too", (is_not(0, AF_UNIX),)),
    Refusal(
        "setsockopt",
        ENOENT,
        "an upper-layer protocol makes another socket out of a TCP one (SMC, kernel TLS, "
        "ESP-in-TCP); ENOENT is the answer of a kernel that lacks it",
        (is_(1, SOL_TCP), is_(2, TCP_ULP)),
        quiet=True,  # OpenSSL asks for kernel TLS on every connection where it is switched on
    ),
    # What was decided is where the packets go.
    Refusal("setsockopt", EPERM, _SOURCE_ROUTE, (is_(1, SOL_IP), is_(2, IP_OPTIONS))),
    Refusal(
        "setsockopt",
        EPERM,
        _SOURCE_ROUTE,
        (is_(1, SOL_IPV6), is_(2, IPV6_2292PKTOPTIONS, IPV6_FLOWLABEL_MGR, IPV6_RTHDR)),
    ),
    # Terminals: the agent's may be the one from which `corral run` was called.
    Refusal(
        "ioctl",
        EPERM,
        "types into, or pastes to, the terminal, as if the person had (CVE-2017-5226, CVE-2023-28100)",
        (is_(1, TIOCSTI, TIOCLINUX),),
    ),
    Refusal(
        "ioctl",
        EPERM,
        "loads a line discipline: drivers for modems and bluetooth with a record of holes",
        (is_(1, TIOCSETD),),
    ),
    Refusal("mknod", EPERM, _DEVICE, (is_(1, S_IFCHR, S_IFBLK, mask=S_IFMT),)),
    Refusal("mknodat", EPERM, _DEVICE, (is_(2, S_IFCHR, S_IFBLK, mask=S_IFMT),)),
)

# Added where processors are given by affinity, as no cpu cgroup can.
FIXED_PROCESSORS: tuple[Refusal, ...] = always(
    "sched_setaffinity",
    "any process may widen its own set of processors",
    quiet=True,  # thread pools of numerical libraries pin their threads where they may
)

# Added where no memory cgroup counts what a sandbox holds: memory that hangs on a descriptor in flight or on a detached
# segment is in no process's figures, so nobody could tell whose it is (see corral.sandbox.limits).
UNCOUNTED_MEMORY: tuple[Refusal, ...] = (
    # Quiet: callers of both have a way that works, and take it.
    *always(
        "memfd_create",
        "ENOSYS makes programs use files in /dev/shm instead, which the layer bounds",
        ENOSYS,
        quiet=True,
    ),
    Refusal(
        "shmget",
        EINVAL,
        "16 KiB (times 4,096 segments) is more than databases use as a lock; EINVAL is the answer beyond SHMMAX",
        (is_not(1, 0, mask=0xFFFFC000),),
        quiet=True,
    ),
    Refusal(
        "shmget",
        EINVAL,
        "the same for sizes above bit 31",
        (Condition(1, (0,), negated=True, high=True),),
        quiet=True,
    ),
)

_DUMPS = "a limit of core dumps that is not 1 has the host's core_pattern run a program of the host"

DECIDED: tuple[Decided, ...] = (
    *decided("connect", "the address lies in memory, and says where data goes"),
    *decided("bind", "takes an address, or makes a socket file, under which others find this process"),
    *decided("listen", "from here on others can connect; without bind(2) the kernel chooses a port"),
    # Without an address the data goes where connect(2), which was decided, pointed the socket. That holds for
    # MSG_FASTOPEN too: a connection that it opens without an address is one whose connect(2) put off its first packet
    # (TCP_FASTOPEN_CONNECT); any other is EINVAL.
    *(Decided("sendto", "with an address, which says where this datagram goes", when) for when in any_bit(4)),
    *decided(
        "sendmsg sendmmsg",
        "whether there is an address, and which descriptors and marks go with it, lies in memory",
    ),
    *decided("execve execveat", "the program and its arguments lie in memory"),
    # RLIMIT_CORE; reading it is free.
    Decided("setrlimit", _DUMPS, (Condition(0, (4,)),)),
    *(Decided("prlimit64", _DUMPS, (Condition(1, (4,)), *when)) for when in any_bit(2)),
    Decided("setsid", "leaves the session by which the supervisor knows whose process this is", errno=EPERM),
)

# Added where a policy neither asks for files nor watches them: an overlay refuses to rename a directory that it has
# from below, and then it is moved (corral.supervisor.moving). Nothing is decided, so a policy may ask for these calls
# by name; then the kernel makes them.
MOVED_DIRECTORIES: tuple[Decided, ...] = (
    *decided("rename renameat renameat2", "whether it is a directory, which the overlay may refuse, lies in memory"),
    *decided("landlock_restrict_self", "whose rules would not hold for what is moved for the caller"),
)

# Added where a policy asks for files or watches them: whatever can open, change or replace one by its name, and what
# would change it without.
#
# Not here: mkdir, as a directory has no content and nothing in it escapes its own name; chown, as without
# capabilities it gives a file only to those who have it; time stamps; and what works on a descriptor that was
# opened to be written, as that was decided when it was opened.
WATCHED_FILES: tuple[Decided, ...] = (
    *decided("open openat openat2 creat", "opens a file by its name"),
    *decided("rename renameat renameat2", "takes a name away, puts another file there, or moves the directory above"),
    *decided("unlink unlinkat rmdir", "takes a name away"),
    *decided("link linkat", "gives a file a second name, by which no rule knows it"),
    *decided("symlink symlinkat", "puts a name there that leads to content from elsewhere"),
    *decided("mknod mknodat", "puts a file, or a pipe that somebody else fills, in its place"),
    *decided("truncate", "changes the content by name"),
    *decided("chmod fchmodat fchmodat2", "changes by name who may read, write or run a file"),
    *decided("fchmod", "changes the same of a file that was opened, and decided, only to be read"),
)
# Added with them.
WATCHED_FILES_REFUSALS: tuple[Refusal, ...] = (
    *always(
        "setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat",
        "an access list is a chmod by another name; EOPNOTSUPP is the answer of a file system without such attributes",
        EOPNOTSUPP,
        quiet=True,  # cp, tar, install and editors copy attributes as far as they can
    ),
    *always(
        "landlock_create_ruleset landlock_add_rule landlock_restrict_self",
        "opens are made for the caller, by somebody whom its own rules would not hold; EOPNOTSUPP is the answer of a "
        "kernel that was started without Landlock",
        EOPNOTSUPP,
        quiet=True,  # what locks itself up does so as far as the kernel lets it
    ),
)
