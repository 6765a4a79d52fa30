"""The system calls that a sandbox may make, as far as no row of :mod:`corral.supervisor.syscalls` says otherwise.

None of them reaches out of the sandbox by itself: what they can do ends at its namespaces, mounts, limits and Landlock
rules. What is neither here nor there is refused.
"""

from __future__ import annotations

from typing import NamedTuple


class Group(NamedTuple):
    """Allowed system calls that share one reason."""

    reason: str
    names: str


ALLOWED: tuple[Group, ...] = (
    Group(
        "reads, writes and moves data through descriptors that the process already has",
        """read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile splice tee vmsplice
          copy_file_range readahead fadvise64 close close_range dup dup2 dup3 fcntl ioctl pipe pipe2 flock
          fsync fdatasync sync syncfs sync_file_range truncate ftruncate fallocate cachestat""",
    ),
    Group(
        "names files; mounts and Landlock decide which",
        """open openat openat2 creat access faccessat faccessat2 stat fstat lstat newfstatat statx statfs fstatfs
          statmount listmount getdents getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat
          rename renameat renameat2 link linkat symlink symlinkat readlink readlinkat mknod mknodat umask
          utime utimes futimesat utimensat chmod fchmod fchmodat fchmodat2 chown fchown fchownat lchown
          file_getattr file_setattr setxattr lsetxattr fsetxattr setxattrat getxattr lgetxattr fgetxattr
          getxattrat listxattr llistxattr flistxattr listxattrat removexattr lremovexattr fremovexattr
          removexattrat inotify_init inotify_init1 inotify_add_watch inotify_rm_watch""",
    ),
    Group(
        "waits for events",
        """poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd
          eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime pause nanosleep
          clock_nanosleep""",
    ),
    Group(
        "asynchronous file I/O of the old kind, on descriptors the process has (databases)",
        "io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents",
    ),
    Group(
        "its own memory",
        """mmap mprotect munmap mremap msync mincore madvise brk mlock mlock2 munlock mlockall munlockall memfd_create
          remap_file_pages pkey_mprotect pkey_alloc pkey_free mseal map_shadow_stack membarrier""",
    ),
    Group(
        "where memory lies on NUMA machines (numpy, torch, Java); the kernel checks access to other processes",
        "mbind set_mempolicy get_mempolicy set_mempolicy_home_node migrate_pages move_pages",
    ),
    Group(
        "processes and threads; all inside the sandbox's PID namespace",
        """clone fork vfork execve execveat exit exit_group wait4 waitid kill tkill tgkill pidfd_open pidfd_send_signal
          process_mrelease getpid getppid gettid getpgid getpgrp setpgid getsid setsid set_tid_address
          set_robust_list get_robust_list futex futex_waitv futex_wake futex_wait futex_requeue rseq
          arch_prctl prctl personality unshare seccomp landlock_create_ruleset landlock_add_rule
          landlock_restrict_self lsm_get_self_attr lsm_list_modules""",
    ),
    Group(
        "signals and timers of its own",
        """rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_tgsigqueueinfo
          rt_sigsuspend sigaltstack restart_syscall alarm getitimer setitimer timer_create timer_settime
          timer_gettime timer_getoverrun timer_delete""",
    ),
    Group(
        "ids and capabilities: without capabilities and with no_new_privs these can only give up",
        """getuid geteuid getgid getegid getresuid getresgid getgroups setuid setgid setreuid setregid setresuid
          setresgid setgroups setfsuid setfsgid capget capset""",
    ),
    Group(
        "scheduling and limits, which the kernel lets a process only lower",
        """sched_yield sched_setparam sched_getparam sched_setscheduler sched_getscheduler sched_get_priority_max
          sched_get_priority_min sched_rr_get_interval sched_setaffinity sched_getaffinity sched_setattr
          sched_getattr getpriority setpriority ioprio_set ioprio_get getrlimit setrlimit prlimit64
          getrusage times getcpu""",
    ),
    Group(
        "asks for the time, the machine and randomness",
        "gettimeofday time clock_gettime clock_getres uname sysinfo getrandom",
    ),
    Group(
        "sockets; the network namespace has nothing but the gateway in it",
        """socket socketpair connect accept accept4 bind listen shutdown sendto recvfrom sendmsg sendmmsg recvmsg
          recvmmsg getsockname getpeername setsockopt getsockopt""",
    ),
    Group(
        "IPC objects, of the sandbox's own IPC namespace",
        """shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open mq_unlink
          mq_timedsend mq_timedreceive mq_notify mq_getsetattr""",
    ),
    Group("used by the kernel's own return probes: refusing it breaks programs that the host traces", "uretprobe"),
)

# Known to libseccomp, and left unnamed on purpose: ENOSYS in the kernel itself, or without a caller for a decade.
OBSOLETE = frozenset(
    """uselib ustat sysfs _sysctl create_module get_kernel_syms query_module getpmsg putpmsg afs_syscall tuxcall
    security set_thread_area get_thread_area epoll_ctl_old epoll_wait_old vserver""".split()
)


def allowed_names() -> frozenset[str]:
    """Every name in :data:`ALLOWED`."""
    return frozenset(name for group in ALLOWED for name in group.names.split())
