"""The system image: the part of the host's /etc and /var that every sandbox may see, copied once.

Sandboxes do not look at the live /etc and /var: these hold keys, accounts, mail and other people's data, and a file
that becomes readable there tomorrow must not become visible inside. The image holds copies of what everybody could
read when it was made, without what names this host or its people, and with the sandbox's own account files. It is
kept in the cache directory, named by a hash of what it was made from, and made anew when that changes.

For an ordinary user it also has a *skeleton* of /usr: empty directories owned by that user, to lie over the real /usr
in the overlay. A merged directory has its topmost owner, so files can be made and deleted there, as `apt-get` inside
needs; SKELETON_DEPTH is as deep as packages share directories, and bounds what the first start costs.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import stat
from collections.abc import Iterator

from corral.errors import WallError

FORMAT = 7
MAX_FILE = 16 << 20
MAX_TOTAL = 512 << 20
MAX_ENTRIES = 50_000
SKELETON_DEPTH = 6

# Names the host, its people or its secrets, or is written anew below; the rest of /etc is what programs read.
_ETC_LEFT_OUT = frozenset(
    """
    passwd passwd- group group- shadow shadow- gshadow gshadow- subuid subuid- subgid subgid- hostname hosts
    resolv.conf machine-id mtab fstab crypttab exports sudoers sudoers.d cron.allow cron.deny at.allow at.deny
    krb5.keytab netrc motd issue issue.net adjtime .pwd.lock .updated docker kubernetes rancher containerd wireguard
    openvpn ipsec.d ipsec.secrets NetworkManager wpa_supplicant netplan network systemd/network ssl/private
    pki/tls/private ssh apt/auth.conf apt/auth.conf.d letsencrypt postgresql mysql ppp chatscripts firewalld
    nftables.conf iptables
    """.split()
)
_VAR_DIRECTORIES = (
    ("backups", 0o755),
    ("cache/apt/archives/partial", 0o755),
    ("cache/debconf", 0o755),
    ("cache/man", 0o755),
    ("lib/apt/lists/partial", 0o755),
    ("lib/misc", 0o755),
    ("local", 0o755),
    ("log/apt", 0o755),
    ("mail", 0o755),
    ("opt", 0o755),
    ("spool", 0o755),
    ("tmp", 0o1777),
)
_VAR_COPIED = ("lib/dpkg", "lib/apt/extended_states", "lib/ucf", "lib/pam", "lib/python")
_VAR_EMPTY_FILES = ("lib/dpkg/lock", "lib/dpkg/lock-frontend", "lib/dpkg/triggers/Lock", "cache/apt/archives/lock")

_HOSTS = "127.0.0.1 localhost corral\n::1 localhost ip6-localhost ip6-loopback\n"
_RESOLV = """# There is no name server in this sandbox unless its policy opens one.
nameserver 127.0.0.1
options timeout:1 attempts:1
"""
# apt drops to user _apt for downloads and gives its terminal log to group adm; both need capabilities that nobody has
# here. The sandbox is the wall, and the log would say what the command's output says.
_APT = 'APT::Sandbox::User "root";\nDir::Log::Terminal "";\n'


def _accounts(kind: str) -> str:
    """System accounts of the host (their ids own files in /usr), root and the agent; no people."""
    lines = []
    try:
        with open(f"/etc/{kind}", encoding="utf-8", errors="replace") as source:
            for line in source:
                fields = line.rstrip("\n").split(":")
                if len(fields) < 3 or not fields[2].isdecimal():
                    continue
                number = int(fields[2])
                if number != 0 and (number < 1000 or number in (65533, 65534)):
                    if kind == "group":
                        fields[3:] = [""]
                    elif len(fields) > 4:
                        fields[4] = ""
                    lines.append(":".join(fields))
    except OSError:
        pass
    if kind == "passwd":
        own = ["root:x:0:0:root:/root:/bin/bash", "agent:x:1000:1000:agent:/home/agent:/bin/bash"]
    else:
        own = ["root:x:0:", "agent:x:1000:"]
    return "\n".join([own[0], *lines, own[1], ""])


def _walk(root: str, left_out: frozenset[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below ``root`` as relative path and lstat, without what is left out or cannot be listed."""
    pending = [""]
    seen = 0
    while pending:
        directory = pending.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, directory)), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            relative = f"{directory}/{entry.name}" if directory else entry.name
            if relative in left_out:
                continue
            seen += 1
            if seen > MAX_ENTRIES:
                raise WallError("system image", f"{root} holds more than {MAX_ENTRIES} entries")
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            yield relative, status
            if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_IXOTH:
                pending.append(relative)


def _key(skeleton: bool) -> str:
    """A hash of everything that the image is made from, by name, size, mode and change time."""
    digest = hashlib.blake2b(f"{FORMAT} {skeleton} {os.geteuid()}".encode(), digest_size=12)
    for relative, status in _walk("/etc", frozenset()):
        digest.update(relative.encode("utf-8", "surrogateescape"))
        digest.update(b"%d %d %d;" % (status.st_size, status.st_mode, status.st_ctime_ns))
    for path in ("/var/lib/dpkg/status", "/var/lib/dpkg/info", "/usr", "/usr/lib", "/usr/bin", "/usr/local"):
        try:
            digest.update(b"%d;" % os.stat(path).st_ctime_ns)
        except OSError:
            digest.update(b"-")
    return digest.hexdigest()


class _Copier:
    """Copies what everybody may read; counts, so that an odd host cannot fill the cache."""

    def __init__(self, destination: str) -> None:
        self.destination = destination
        self.total = 0

    def directory(self, relative: str, mode: int) -> None:
        path = os.path.join(self.destination, relative)
        os.makedirs(path, exist_ok=True)
        os.chmod(path, mode)

    def file(self, source: str, relative: str, mode: int) -> None:
        # Opened first, judged on the descriptor: the path may be another file by now.
        try:
            fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return
        with open(fd, "rb") as opened:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or not status.st_mode & stat.S_IROTH or status.st_size > MAX_FILE:
                return
            self.total += status.st_size
            if self.total > MAX_TOTAL:
                raise WallError("system image", f"the readable part of /etc and /var is larger than {MAX_TOTAL} bytes")
            self.write(relative, opened.read(MAX_FILE), mode)

    def write(self, relative: str, content: bytes, mode: int = 0o644) -> None:
        path = os.path.join(self.destination, relative)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as target:
            target.write(content)
            os.fchmod(fd, mode)

    def tree(self, source: str, into: str, left_out: frozenset[str]) -> None:
        for relative, status in _walk(source, left_out):
            target = f"{into}/{relative}"
            if stat.S_ISDIR(status.st_mode):
                if status.st_mode & stat.S_IXOTH and status.st_mode & stat.S_IROTH:
                    self.directory(target, 0o755)
            elif stat.S_ISLNK(status.st_mode):
                path = os.path.join(self.destination, target)
                if os.path.isdir(os.path.dirname(path)):
                    os.symlink(os.readlink(os.path.join(source, relative)), path)
            elif stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IROTH:
                self.file(os.path.join(source, relative), target, 0o755 if status.st_mode & 0o111 else 0o644)


def _build(destination: str, skeleton: bool) -> None:
    copier = _Copier(destination)
    copier.directory("etc", 0o755)
    copier.tree("/etc", "etc", _ETC_LEFT_OUT)
    for name, content in (
        ("passwd", _accounts("passwd")),
        ("group", _accounts("group")),
        ("hosts", _HOSTS),
        ("resolv.conf", _RESOLV),
        ("hostname", "corral\n"),
        ("machine-id", ""),
        ("apt/apt.conf.d/99corral", _APT),
    ):
        copier.write(f"etc/{name}", content.encode())
    copier.directory("var", 0o755)
    for relative, mode in _VAR_DIRECTORIES:
        copier.directory(f"var/{relative}", mode)
    for relative in _VAR_COPIED:
        source = f"/var/{relative}"
        if os.path.isdir(source):
            copier.directory(f"var/{relative}", 0o755)
            copier.tree(source, f"var/{relative}", frozenset())
        else:
            copier.file(source, f"var/{relative}", 0o644)
    for relative in _VAR_EMPTY_FILES:
        if os.path.isdir(os.path.join(destination, "var", os.path.dirname(relative))):
            copier.write(f"var/{relative}", b"", 0o640)
    os.symlink("/run", f"{destination}/var/run")
    os.symlink("/run/lock", f"{destination}/var/lock")
    if skeleton:
        copier.directory("usr", 0o755)
        _copy_skeleton("/usr", f"{destination}/usr", SKELETON_DEPTH)


def _copy_skeleton(source: str, destination: str, depth: int) -> None:
    if depth == 0:
        return
    try:
        entries = list(os.scandir(source))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            os.mkdir(f"{destination}/{entry.name}", 0o755)
            _copy_skeleton(entry.path, f"{destination}/{entry.name}", depth - 1)


def _remove(path: str) -> None:
    import shutil  # its compressors take long to load, and most starts remove nothing

    shutil.rmtree(path, ignore_errors=True)


def _reap(cache: str, keep: str) -> None:
    """Removes images that nobody uses, and half-made ones of dead processes. A user holds a shared lock."""
    for name in os.listdir(cache):
        path = os.path.join(cache, name)
        if name.startswith("system-") and name.endswith(".lock") and name != f"{keep}.lock":
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path.removesuffix(".lock"))
                os.unlink(path)
            except OSError:
                pass
            finally:
                os.close(fd)
        elif name.startswith("partial-"):
            owner = name.split("-")[1]
            if owner.isdecimal() and not os.path.exists(f"/proc/{owner}"):
                _remove(path)


@functools.cache
def system_image(cache: str, skeleton: bool) -> str:
    """The image's directory, made now where there is none yet. Holds it for the life of this process.

    Raises WallError where it cannot be made.
    """
    try:
        os.makedirs(cache, mode=0o700, exist_ok=True)
        name = f"system-{_key(skeleton)}"
        path = os.path.join(cache, name)
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not os.path.isdir(path):
            partial = os.path.join(cache, f"partial-{os.getpid()}-{os.urandom(4).hex()}")
            old_mask = os.umask(0o022)
            try:
                os.mkdir(partial, 0o755)
                _build(partial, skeleton)
                os.rename(partial, path)
            except OSError as error:
                _remove(partial)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            finally:
                os.umask(old_mask)
            _reap(cache, name)
        elif any(entry.startswith("partial-") for entry in os.listdir(cache)):
            _reap(cache, name)
    except OSError as error:
        raise WallError("system image", f"{cache}: {error.strerror}", error.errno or 0) from None
    return path
