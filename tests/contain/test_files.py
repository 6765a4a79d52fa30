"""Files of a live sandbox that fights back, touched from the host: as root and as an ordinary user.

Each scenario runs in a process of its own, with a sandbox of its own: this module is also the program that they run,
without pytest, because the ordinary user's interpreter need not have it. What a scenario asserts about the host it
looks up on the host.
"""

from __future__ import annotations

import functools
import inspect
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from corral.errors import RequestError, SandboxClosed, WallError
from corral.reactor import Loop
from corral.sandbox.acting import Actor
from corral.sandbox.core import Core, Exit, State
from corral.sandbox.files import Files, FileType, Skipped
from corral.sandbox.options import Options
from corral.sandbox.prepare import prepare
from corral.sandbox.transfer import stays_inside

if TYPE_CHECKING:
    import pytest

USER = "corral-test"
ROUNDS = 2000
CANARY = b"canary: the host's own\n"


class Box:
    """A sandbox on a loop that only runs while something is waited for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.workspace = place / "workspace"
        self.workspace.mkdir()
        (self.workspace / "kept").write_text("from the host\n")
        self.canary = place / "canary"
        self.canary.mkdir()
        self.secret = self.canary / "secret"
        self.secret.write_bytes(CANARY)
        self.secret.chmod(0o600)
        os.utime(self.secret, (1, 1))
        self.loop = Loop()
        self.core = Core(prepare(Options(str(self.workspace))), self.loop)
        failures: list[BaseException | None] = []

        def ready(error: BaseException | None) -> None:
            failures.append(error)
            self.loop.stop()

        self.core.when_ready(ready)
        self.loop.run()
        assert failures == [None], failures
        identity = self.core.prepared.identity
        self.uid = identity.outside(1000)
        self.gid = identity.gid_lines[0].outside + 1000 if identity.privileged else os.getegid()
        self.files = Files(self.core.root_fd, self.uid, self.gid, inside=identity.inside)

    def start(self, script: str, on_exit: Callable[[Exit], None] = lambda how: None) -> None:
        """Begins a Python program inside."""
        null = os.open("/dev/null", os.O_RDWR)
        try:
            self.core.exec(["/usr/bin/python3", "-c", script], (null, null, 2), on_exit)
        finally:
            os.close(null)

    def run(self, script: str) -> None:
        """Runs a Python program inside to its successful end."""
        ends: list[Exit] = []

        def ended(how: Exit) -> None:
            ends.append(how)
            self.loop.stop()

        self.start(script, ended)
        self.loop.run()
        assert ends[0].code == 0, ends

    def running(self, script: str) -> Path:
        """Begins a program inside and returns when it has made ``/tmp/ready``."""
        self.start(script)
        for _ in range(1000):
            try:
                self.files.info("/tmp/ready")
                return self.workspace
            except RequestError:
                time.sleep(0.01)
        raise AssertionError("the program inside did not begin")

    def close(self) -> None:
        self.files.close()
        self.end()
        self.core.close_layer()

    def end(self) -> None:
        if self.core.state is not State.ENDED:
            self.core.when_ended(self.loop.stop)
            self.core.kill("closed")
            self.loop.run()

    def check_canary(self) -> None:
        """The host's files are as they were: same contents, never read (atime), nothing beside them."""
        status = self.secret.stat()
        assert (status.st_atime, status.st_mtime) == (1, 1)
        assert os.listdir(self.canary) == ["secret"]
        assert os.listdir(self.workspace) == ["kept"]
        assert self.secret.read_bytes() == CANARY
        os.utime(self.secret, (1, 1))


def refused(call: Callable[[], object], *words: str) -> str:
    """The message with which a call is refused, quickly."""
    begin = time.monotonic()
    try:
        result = call()
    except RequestError as error:
        assert time.monotonic() - begin < 5, "refused too late"
        assert not words or any(word in str(error) for word in words), str(error)
        return str(error)
    raise AssertionError(f"not refused: {result!r}")


# ---- scenarios ----


def ordinary_use(box: Box) -> None:
    files = box.files
    files.write("/tmp/a/b/c", b"x" * 3_000_000, parents=True)
    assert files.read("/tmp/a/b/c") == b"x" * 3_000_000
    files.write("/tmp/a/b/c", b"new", mode=0o755)
    info = files.info("/tmp/a/b/c")
    assert (info.name, info.type, info.size, info.mode, info.uid) == ("c", FileType.FILE, 3, 0o755, 1000)
    assert files.list("/tmp/a/b") == [info]  # and no temporary file
    files.make_directory("/tmp/a/d")
    refused(lambda: files.make_directory("/tmp/a/d"), "File exists")
    files.make_directory("/tmp/a/d/e", parents=True)
    files.make_directory("/tmp/a/d/e", parents=True)
    assert files.info("/tmp/a/d").mode == 0o755
    refused(lambda: files.remove("/tmp/a"), "not empty")
    files.remove("/tmp/a", recursive=True)
    refused(lambda: files.info("/tmp/a"), "No such file")
    path = f"{box.workspace}/kept"
    assert files.read(path) == b"from the host\n"
    files.write(path, b"changed inside")
    assert files.read(path) == b"changed inside"
    assert (box.workspace / "kept").read_text() == "from the host\n"
    assert {"proc", "tmp", "usr"} <= {entry.name for entry in files.list("/")}
    box.run(f"assert open({path!r}).read() == 'changed inside'; open({path!r}, 'a').write('!')")
    assert files.read(path) == b"changed inside!"
    for bad in ("relative", "", "/tmp/x\0y"):
        refused(functools.partial(files.read, bad))
    for bad in ("/", "/tmp/..", "/tmp/.", "/tmp/x/"):
        refused(functools.partial(files.write, bad, b""), "does not end in a name")
    refused(lambda: files.write("/tmp/x", b"", mode=0o4755), "permissions only")
    refused(lambda: files.read("/tmp/\n\x1b[2J\u202e"), r"'/tmp/\n\x1b[2J\u202e'")


def names_of_all_kinds(box: Box) -> None:
    names = ["new\nline", "tab\t\x1b[31m", "bad-\udcff\udcfe", "-rf *", " ", "ü", "x" * 255]
    for name in names:
        box.files.write(f"/tmp/{name}", name.encode(errors="surrogateescape"))
        assert box.files.read(f"/tmp/{name}") == name.encode(errors="surrogateescape")
    assert {entry.name for entry in box.files.list("/tmp")} >= set(names)
    box.run("import os; assert b'bad-\\xff\\xfe' in os.listdir(b'/tmp')")
    box.files.make_directory("/tmp/t")
    box.run(
        "import os; [os.rename(b'/tmp/'+n, b'/tmp/t/'+n) for n in os.listdir(b'/tmp') if os.path.isfile(b'/tmp/'+n)]"
    )
    box.files.download("/tmp/t", box.place / "out")
    assert {os.fsencode(name) for name in names} == set(os.listdir(bytes(box.place / "out")))
    box.files.upload(box.place / "out", "/tmp/back")
    assert {entry.name for entry in box.files.list("/tmp/back")} == set(names)
    refused(lambda: box.files.write("/tmp/" + "x" * 256, b""), "too long")
    refused(lambda: box.files.read("/tmp/\ud800"))


def links_stay_inside(box: Box) -> None:
    secret, up = str(box.secret), "../" * 20
    box.run(
        "import os; os.chdir('/tmp')\n"
        f"for i, to in enumerate([{secret!r}, {up + secret!r}, {str(box.canary)!r}, {up + str(box.canary)!r}]):\n"
        "    os.symlink(to, f'link{i}')\n"
        "os.symlink('/etc/shadow', 'shadow'); os.symlink('../' * 30 + 'etc/shadow', 'shadow2')\n"
        "os.symlink('loop', 'loop'); os.symlink('/', 'root'); os.symlink('/etc/hostname', 'good')"
    )
    files = box.files
    for link in ("link0", "link1", "link2/secret", "link3/secret", "root/" + secret, up + secret):
        refused(functools.partial(files.read, f"/tmp/{link}"), "No such file")
    for link in ("shadow", "shadow2"):
        refused(functools.partial(files.read, f"/tmp/{link}"), "No such file", "Permission denied")
    refused(lambda: files.read("/tmp/loop"), "link")
    refused(lambda: files.write("/tmp/link2/new", b"x"), "No such file")
    refused(lambda: files.make_directory("/tmp/link2/new", parents=True))
    refused(lambda: files.upload(box.workspace, "/tmp/link2"))
    refused(lambda: files.list("/tmp/link2"), "No such file")
    # Written, removed and looked at is the link.
    assert files.info("/tmp/link0").type is FileType.SYMLINK
    files.write("/tmp/link0", b"mine")
    assert files.info("/tmp/link0").type is FileType.FILE
    files.remove("/tmp/link1")
    files.remove("/tmp/link2", recursive=True)
    files.remove("/tmp/root", recursive=True)
    assert files.list("/usr")
    assert files.read("/tmp/good") == files.read("/etc/hostname")


def magic_links(box: Box) -> None:
    box.running(
        "import os, time; f = open('/etc/hostname'); pid = os.getpid()\n"
        "for i, to in enumerate(['/proc/1/root', '/proc/self/root', f'/proc/{pid}/root', f'/proc/{pid}/cwd',"
        " f'/proc/{pid}/exe', f'/proc/{pid}/fd/{f.fileno()}', '/proc/self/fd/3', '/dev/fd/0', '/dev/stdin',"
        " f'/proc/{pid}/environ', '/proc/1/environ', '/proc/1/mem', '/proc/uptime', '/dev/pts/ptmx',"
        " '/proc/thread-self/root', '/sys/devices/system/cpu/online']):\n"
        "    os.symlink(to, f'/tmp/m{i}')\n"
        "open('/tmp/ready', 'w'); time.sleep(60)"
    )
    count = sum(entry.name.startswith("m") for entry in box.files.list("/tmp"))
    assert count == 16
    for i in range(count):
        link = f"/tmp/m{i}"
        for path in (link, f"{link}/etc/shadow", f"{link}/etc/hostname"):
            refused(functools.partial(box.files.read, path))
            refused(functools.partial(box.files.info, path, follow=True))
        refused(functools.partial(box.files.list, link))
        refused(functools.partial(box.files.write, f"{link}/new", b""))
        refused(functools.partial(box.files.download, link, box.place / "out"))
    for pid in range(1, 40):
        refused(functools.partial(box.files.read, f"/proc/{pid}/root{box.secret}"))
        refused(functools.partial(box.files.read, f"/proc/{pid}/environ"))
    assert not (box.place / "out").exists()


def special_files(box: Box) -> None:
    box.running(
        "import os, socket, time; os.mkdir('/tmp/d'); os.mkfifo('/tmp/d/fifo')\n"
        "s = socket.socket(socket.AF_UNIX); s.bind('/tmp/d/socket'); s.listen()\n"
        "for kind in (0o020000, 0o060000):\n"
        "    try: os.mknod('/tmp/d/device', 0o666 | kind, os.makedev(1, 3)); os._exit(1)\n"
        "    except PermissionError: pass\n"
        "open('/tmp/d/file', 'w').write('x'); os.symlink('fifo', '/tmp/d/link')\n"
        "import fcntl; f = open('/tmp/leased', 'w+'); fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)\n"
        "import signal; signal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "open('/tmp/ready', 'w'); time.sleep(60)"
    )
    for name, kind in (("fifo", "fifo"), ("link", "fifo"), ("socket", "socket")):
        refused(functools.partial(box.files.read, f"/tmp/d/{name}"), f"it is a {kind}")
        refused(functools.partial(box.files.list, f"/tmp/d/{name}"), f"it is a {kind}")
        refused(functools.partial(box.files.download, f"/tmp/d/{name}", box.place / "one"), f"it is a {kind}")
    for device in ("null", "tty", "zero"):
        refused(functools.partial(box.files.read, f"/dev/{device}"), "it is a character device")
    refused(lambda: box.files.read("/tmp/leased"), "somebody inside holds it")
    refused(lambda: box.files.info("/tmp/d/device"), "No such file")
    begin = time.monotonic()
    got = box.files.download("/tmp/d", box.place / "out")
    assert time.monotonic() - begin < 5
    assert sorted(os.listdir(box.place / "out")) == ["file", "link"]
    assert set(got.skipped) == {Skipped("fifo", "it is a fifo"), Skipped("socket", "it is a socket")}
    # The link leads to nothing outside, for the fifo was left out.
    assert not (box.place / "out" / "link").exists()
    # A fifo is replaced and removed like any file, without anybody at its other end.
    box.files.write("/tmp/d/fifo", b"now a file")
    assert box.files.read("/tmp/d/link") == b"now a file"
    box.files.remove("/tmp/d", recursive=True)


def racing_links(box: Box) -> None:
    """A program inside swaps a file and a directory for links to the host, as fast as it can."""
    box.running(
        f"import os, itertools; secret, canary = {str(box.secret)!r}, {str(box.canary)!r}; up = '../' * 20\n"
        "os.chdir('/tmp'); os.mkdir('real'); open('real/secret', 'w').write('inside'); open('f', 'w').write('inside')\n"
        "open('ready', 'w')\n"
        "for i in itertools.count():\n"
        "    to = ('', up)[i % 2]\n"
        "    os.symlink(to + secret, 'l1'); os.rename('l1', 'f')\n"
        "    os.symlink(to + canary, 'l2')\n"
        "    try: os.rename('real', 'real2'); os.rename('l2', 'real')\n"
        "    except OSError: pass\n"
        "    with open('n', 'w') as n: n.write('inside')\n"
        "    os.rename('n', 'f')\n"
        "    try: os.unlink('real'); os.rename('real2', 'real')\n"
        "    except OSError: pass\n"
        "    os.path.lexists('l2') and os.unlink('l2')\n"
    )
    seen, failed = 0, 0
    deadline = time.monotonic() + 60
    for i in range(ROUNDS):
        calls: tuple[Callable[[], bytes | None], ...] = (
            lambda: box.files.read("/tmp/f"),
            lambda: box.files.read("/tmp/real/secret"),
            lambda: box.files.read("/tmp/real/../real/../f"),
            lambda: box.files.write("/tmp/real/secret", b"inside"),
            lambda: box.files.write("/tmp/f", b"inside"),
        )
        try:
            got = calls[i % len(calls)]()
            assert got in (None, b"inside", b""), got
            seen += 1
        except RequestError:
            failed += 1
        if time.monotonic() > deadline:
            raise AssertionError("too slow")
    assert seen > 50 and failed > 50, (seen, failed)  # else nothing raced


def racing_transfers(box: Box) -> None:
    """Directories of an upload, a download and a removal turn into links while they are walked."""
    source = box.place / "source"
    for i in range(5):
        (source / f"d{i}" / "deep").mkdir(parents=True)
        for j in range(5):
            (source / f"d{i}" / "deep" / f"f{j}").write_text("uploaded")
    box.running(
        f"import os, itertools; canary = {str(box.canary)!r}; os.chdir('/tmp'); open('ready', 'w')\n"
        "for i in itertools.count():\n"
        "    for top in ('up/d%d' % (i % 5), 'up/d%d/deep' % (i % 5)):\n"
        "        try:\n"
        "            os.rename(top, 'aside%d' % i)\n"
        "            os.symlink(('', '../' * 20)[i % 2] + canary, top)\n"
        "            os.unlink(top)\n"
        "            os.rename('aside%d' % i, top)\n"
        "        except OSError: pass\n"
    )
    done = failed = 0
    for i in range(40):
        for call in (
            functools.partial(box.files.upload, source, "/tmp/up"),
            functools.partial(box.files.download, "/tmp/up", box.place / f"out{i}"),
            functools.partial(box.files.remove, "/tmp/up", recursive=True),
        ):
            try:
                call()
                done += 1
            except RequestError:
                failed += 1
        for path in (box.place / f"out{i}").rglob("*"):
            assert not path.is_file() or path.read_bytes() in (b"uploaded", b""), path
            assert box.canary not in path.resolve().parents
        shutil.rmtree(box.place / f"out{i}", ignore_errors=True)
    assert done > 10, (done, failed)
    assert sorted(path.read_text() for path in source.rglob("f*")) == ["uploaded"] * 25


def limits(box: Box) -> None:
    box.run(
        "import os; os.mkdir('/tmp/t'); f = open('/tmp/t/huge', 'w'); f.truncate(2_000_000_000)\n"
        "open('/tmp/exact', 'w').write('x' * 1000); os.mkdir('/tmp/many')\n"
        "for i in range(300): open(f'/tmp/many/{i}', 'w').write('x' * 100)\n"
        "os.chdir('/tmp'); os.mkdir('deep'); os.chdir('deep')\n"
        "for i in range(500): os.mkdir('d'); os.chdir('d')"
    )
    files = box.files
    refused(lambda: files.read("/tmp/t/huge"), "larger than")
    refused(lambda: files.read("/tmp/t/huge", limit=0), "larger than")
    assert len(files.read("/tmp/exact", limit=1000)) == 1000
    refused(lambda: files.read("/tmp/exact", limit=999), "larger than 999")
    out = box.place / "out"
    for call in (
        functools.partial(files.download, "/tmp/t", out),
        functools.partial(files.download, "/tmp/t/huge", out, limit=1 << 20),
        functools.partial(files.download, "/tmp/many", out, max_entries=299),
        functools.partial(files.download, "/tmp/many", out, limit=29_999),
    ):
        refused(call, "more than")
        assert not out.exists(), "something half copied is left"
    got = files.download("/tmp/many", out, max_entries=300, limit=30_000)
    assert (got.files, got.directories, got.size, got.skipped) == (300, 1, 30_000, ())
    deep = files.download("/tmp/deep", box.place / "deep")
    assert [skipped.reason for skipped in deep.skipped] == ["it is nested deeper than 200 directories"]
    refused(lambda: files.remove("/tmp/deep", recursive=True), "nested deeper")
    # A file that grows while it is read ends at the limit too.
    box.start("f = open('/tmp/grows', 'w')\nwhile True: f.write('x' * 65536); f.tell() > 1 << 24 and f.truncate(0)")
    for _ in range(50):
        with suppress(RequestError):
            assert len(files.read("/tmp/grows", limit=1 << 20)) <= 1 << 20


def download_of_a_hostile_tree(box: Box) -> None:
    box.run(
        f"import os; secret = {str(box.secret)!r}; os.makedirs('/tmp/t/a/b/c'); os.chdir('/tmp/t')\n"
        "links = {'abs': secret, 'up': '../outside', 'a/ups': '../../outside', 'a/ok': '../file', 'dot': './file',\n"
        "  'a/b/c/top': '../../../a', 'sneak': 'a/b/c/top/../../x', 'etc': '/etc/shadow', 'self': '.',\n"
        "  'a/b/c/root': '../../..', 'a/b/c/over': '../../../..'}\n"
        "for name, to in links.items(): os.symlink(to, name)\n"
        "open('file', 'w').write('x'); os.link('file', 'hard'); os.chmod('file', 0o6755)\n"
        "open('secret', 'w'); os.chmod('secret', 0); os.mkdir('closed'); os.chmod('closed', 0)\n"
        "os.mkdir('empty'); os.chmod('empty', 0o1777); open('wide', 'w'); os.chmod('wide', 0o777)"
    )
    out = box.place / "out"
    old = os.umask(0o022)
    got = box.files.download("/tmp/t", out)
    os.umask(old)
    assert {skipped.path for skipped in got.skipped} == {
        "abs", "up", "a/ups", "sneak", "etc", "a/b/c/over", "secret", "closed"
    }  # fmt: skip
    assert {s.reason for s in got.skipped if s.path in ("secret", "closed")} == {"Permission denied"}
    assert (got.files, got.links) == (3, 5)
    for path in [out, *out.rglob("*")]:
        status = path.lstat()
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid()), path
        assert not path.is_symlink() or path.resolve().is_relative_to(out), path
        if not path.is_symlink():
            assert stat.S_IMODE(status.st_mode) in (0o755, 0o700), path
        assert os.listxattr(path, follow_symlinks=False) == []
    assert (out / "file").stat().st_nlink == 1
    refused(lambda: box.files.download("/tmp/t", out), "exists already")
    dangling = box.place / "dangling"
    dangling.symlink_to(box.canary / "new")
    refused(lambda: box.files.download("/tmp/t/file", dangling), "exists already")
    refused(lambda: box.files.download("/tmp/t/file", box.place / "no" / "where"), "No such file")
    refused(lambda: box.files.download("/tmp/t/secret", box.place / "s"), "Permission denied")
    assert not (box.place / "s").exists()


def upload_of_a_tree(box: Box) -> None:
    source = box.place / "source"
    (source / "d").mkdir(parents=True)
    (source / "d" / "tool").write_text("#!/bin/sh\n")
    (source / "d" / "tool").chmod(0o6755)
    (source / "link").symlink_to(box.secret)
    (source / "d" / "empty").write_bytes(b"")
    box.files.upload(source, "/tmp/new")
    box.files.upload(source, "/tmp/new/")  # merged
    assert box.files.info("/tmp/new/d/tool").mode == 0o755
    assert box.files.info("/tmp/new/d/tool").uid == 1000
    assert [entry.name for entry in box.files.list("/tmp/new")] == ["d", "link"]
    box.run(
        f"import os; os.chdir('/tmp/new'); assert os.readlink('link') == {str(box.secret)!r}\n"
        "assert not os.path.exists('link'); assert os.stat('d/tool').st_uid == 1000; open('d/tool', 'a').write('x')\n"
        f"os.rename('d', 'd2'); os.symlink({str(box.canary)!r}, 'd'); os.rename('d2/tool', '/tmp/tool')"
    )
    refused(lambda: box.files.upload(source, "/tmp/new"), "Not a directory", "link")
    refused(lambda: box.files.upload(source / "d" / "tool", "/tmp/new"), "directory")
    box.files.upload(source / "link", "/tmp/l")
    assert box.files.info("/tmp/l").type is FileType.SYMLINK
    box.files.upload(source / "d" / "tool", "/tmp/l")
    assert box.files.read("/tmp/l") == b"#!/bin/sh\n"
    os.mkfifo(source / "z")
    refused(lambda: box.files.upload(source, "/tmp/other"), "z' on the host: it is a fifo")
    refused(lambda: box.files.upload(source / "z", "/tmp/other"), "it is a fifo")
    refused(lambda: box.files.upload("/dev/null", "/tmp/other"), "it is a character device")
    refused(lambda: box.files.info("/tmp/other"), "No such file")
    refused(lambda: box.files.upload(source / "none", "/tmp/other"), "No such file")


def closed_files_and_hard_links(box: Box) -> None:
    """The agent's own permissions bind the host too: no confused deputy."""
    box.run(
        "import os; os.chdir('/tmp'); open('closed', 'w').write('x'); os.chmod('closed', 0)\n"
        f"open('a', 'w').write('first'); os.link('a', 'b'); os.link({str(box.workspace)!r} + '/kept', "
        f"{str(box.workspace)!r} + '/hard')"
    )
    files = box.files
    refused(lambda: files.read("/tmp/closed"), "Permission denied")
    files.write("/tmp/closed", b"replaced")
    files.write("/tmp/b", b"second")
    assert (files.read("/tmp/a"), files.read("/tmp/b")) == (b"first", b"second")
    files.write(f"{box.workspace}/hard", b"changed")
    refused(lambda: files.write("/etc/../new", b""), "Permission denied", "Read-only")
    refused(lambda: files.write("/dev/new", b""), "Permission denied", "Read-only")
    refused(lambda: files.remove("/dev/null"), "mounted")
    refused(lambda: files.remove(str(box.workspace), recursive=True), "mounted", "Permission denied", "Read-only")
    assert files.read(f"{box.workspace}/kept") == b"from the host\n"
    if os.geteuid() == 0:
        for path in ("/etc/new", "/usr/new", "/root/new"):
            refused(functools.partial(files.write, path, b""), "Permission denied")
        refused(lambda: files.remove("/usr/bin/env"), "Permission denied")
        assert Path("/usr/bin/env").exists()


def after_the_end(box: Box) -> None:
    other = Files(box.core.root_fd, box.uid, box.gid)
    box.files.close()
    box.files.close()
    for call in (lambda: box.files.read("/etc/hostname"), lambda: box.files.list("/")):
        try:
            call()
        except SandboxClosed:
            continue
        raise AssertionError("closed files can be read")
    box.end()
    # The number of the root's descriptor now means the host's root: not to those who were given it before.
    number = os.open("/", os.O_PATH)
    refused(lambda: other.read(str(box.secret)), "No such file")
    refused(lambda: other.read("/etc/hostname"), "No such file")
    os.close(number)
    try:
        Files(-1, box.uid, box.gid)
    except SandboxClosed:
        return
    raise AssertionError("files without a root")


def ids_are_given_back(box: Box) -> None:
    def ids() -> list[str]:
        lines = Path("/proc/thread-self/status").read_text().splitlines()
        return [line for line in lines if line.startswith(("Uid", "Gid", "Groups", "Cap"))]

    before = ids()
    wrong: list[str] = []

    def watch() -> None:
        own = ids()
        while not stop.is_set():
            wrong.extend(line for line in ids() if line not in own)

    stop, threads = threading.Event(), []
    for target in (watch, watch):
        threads.append(threading.Thread(target=target, daemon=True))
        threads[-1].start()
    for i in range(300):
        box.files.write("/tmp/x", b"x")
        refused(lambda: box.files.read("/nowhere"))
        if i % 10 == 0:
            box.files.download("/tmp/x", box.place / f"x{i}")
            assert (box.place / f"x{i}").stat().st_uid == os.geteuid()
    stop.set()
    for thread in threads:
        thread.join()
    assert ids() == before and not wrong, wrong
    refused(lambda: Actor(0, 0), "never touched as root")
    if os.geteuid() != 0:
        refused(lambda: Actor(box.uid + 1, box.gid), "only root")
        return
    with Actor(box.uid, box.gid).acting():
        inside = ids()
        assert f"Uid:\t0\t0\t0\t{box.uid}" in inside and f"Gid:\t0\t0\t0\t{box.gid}" in inside
        assert any(line.split() == ["Groups:"] for line in inside), inside
        try:
            os.listdir(box.canary.parent / "closed")
        except PermissionError:
            pass
        else:
            raise AssertionError("the switched thread reads what only root may read")
        try:
            box.files.read("/tmp/x")
        except WallError:
            pass
        else:
            raise AssertionError("switched twice")
    assert ids() == before


SCENARIOS: Sequence[Callable[[Box], None]] = [
    ordinary_use,
    names_of_all_kinds,
    links_stay_inside,
    magic_links,
    special_files,
    racing_links,
    racing_transfers,
    limits,
    download_of_a_hostile_tree,
    upload_of_a_tree,
    closed_files_and_hard_links,
    after_the_end,
    ids_are_given_back,
]


def run_scenario(name: str) -> None:
    """Runs one scenario as whoever this process is."""
    place = Path(tempfile.mkdtemp(prefix="corral-files-"))
    (place / "closed").mkdir(mode=0o700)
    try:
        box = Box(place)
        try:
            {scenario.__name__: scenario for scenario in SCENARIOS}[name](box)
            box.check_canary()
        finally:
            box.close()
    finally:
        shutil.rmtree(place)


# ---- under pytest ----


@functools.cache
def _user_tree() -> tuple[pwd.struct_passwd, str]:
    """The ordinary user, and a copy of Corral and this module that it can read."""
    try:
        user = pwd.getpwnam(USER)
    except KeyError:
        # A system account gets no range in /etc/subuid.
        subprocess.run(["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", USER], check=False)
        user = pwd.getpwnam(USER)
    tree = tempfile.mkdtemp(prefix="corral-test-user-")
    os.chmod(tree, 0o755)
    source = Path(inspect.getfile(Core)).parents[1]
    shutil.copytree(source, f"{tree}/src/corral", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(__file__, f"{tree}/scenarios.py")
    os.mkdir(f"{tree}/home", 0o700)
    os.chown(f"{tree}/home", user.pw_uid, user.pw_gid)
    return user, tree


def teardown_module() -> None:
    """Removes the copy."""
    if _user_tree.cache_info().currsize:
        shutil.rmtree(_user_tree()[1])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each scenario as the user that runs the tests, and from root also as an ordinary one."""
    whose = ("root", "user") if os.geteuid() == 0 else ("user",)
    if "who" in metafunc.fixturenames:
        metafunc.parametrize("who", whose)
        metafunc.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])


def test_scenario(who: str, scenario: str) -> None:
    program, environment = [sys.executable, __file__, scenario], dict(os.environ)
    environment["PYTHONPATH"] = str(Path(inspect.getfile(Core)).parents[2])
    if who == "user" and os.geteuid() == 0:
        user, tree = _user_tree()
        environment = {"PYTHONPATH": f"{tree}/src", "HOME": f"{tree}/home", "PATH": "/usr/bin:/bin"}
        program = ["/usr/bin/python3", f"{tree}/scenarios.py", scenario]
        become = functools.partial(subprocess.run, user=user.pw_uid, group=user.pw_gid, extra_groups=[])
    else:
        become = functools.partial(subprocess.run)
    result = become(program, env=environment, cwd="/", capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_links_that_stay_inside() -> None:
    for target, depth, stays in (
        (b"a/b", 0, True),
        (b".", 0, True),
        (b"", 0, True),
        (b"..", 0, False),
        (b"..", 1, True),
        (b"./.././..", 2, True),
        (b"../../a", 1, False),
        (b"a/..", 3, False),  # `a` may be a link too
        (b"../a/..", 3, False),
        (b"/a", 3, False),
        (b"..a", 0, True),
    ):
        assert stays_inside(target, depth) is stays, (target, depth)


if __name__ == "__main__":
    run_scenario(sys.argv[1])
