"""What a sandbox leaves behind: the list of changes, the kept layer, the patch; and attacks through them.

The comparison is held against a model that knows nothing of overlays: the same script runs inside on the workspace and
outside on a copy of it, and two plain directory trees are compared.
"""

from __future__ import annotations

import os
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral import diskspace
from corral.errors import CorralError, RequestError
from corral.reactor import Loop
from corral.sandbox import layer
from corral.sandbox.changes import Change, ChangeKind, FileType
from corral.sandbox.core import Core, Exit
from corral.sandbox.extent import measure
from corral.sandbox.keeping import keep
from corral.sandbox.layer import KeptLayer, discard, is_changed, list_layers, live_changes, open_layer
from corral.sandbox.options import Options
from corral.sandbox.prepare import prepare
from corral.sandbox.trees import remove_tree

PYTHON = "/usr/bin/python3"


class Run:
    """A sandbox that ran one command and ended; its layer is still there."""

    def __init__(self, workspace: Path, *argv: str, user: int = 1000, command_user: int | None = None) -> None:
        loop = Loop()
        self.prepared = prepare(Options(str(workspace), user=user))
        self.core = Core(self.prepared, loop)
        exits: list[Exit] = []

        def done(ended: Exit) -> None:
            exits.append(ended)
            self.core.kill("closed")

        def ready(error: CorralError | None) -> None:
            assert error is None, error
            with open(os.devnull) as null:
                self.core.exec(argv, (null.fileno(), 1, 2), done, user=command_user)

        self.core.when_ready(ready)
        self.core.when_ended(loop.stop)
        loop.run()
        assert exits[0].error is None, exits[0].error
        self.code = exits[0].code

    def changes(self) -> list[Change]:
        return live_changes(self.prepared, self.core.layer_fd)

    def workspace(self) -> dict[str, Change]:
        """The changes below the workspace, by relative path."""
        prefix = len(self.prepared.directory) + 1
        return {change.path[prefix:]: change for change in self.changes() if change.part == "workspace"}

    def keep(self) -> KeptLayer | None:
        return keep(self.prepared, self.core.layer_fd, command="test")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Layers of a test are kept in its own place."""
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    yield place / "corral" / "layers"
    # Deeper than pytest's own removal of old directories can go, and with modes that stop it.
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    remove_tree(parent, place.name)
    os.close(parent)


def python(workspace: Path, code: str, **options: int) -> Run:
    """Runs Python code inside, in the workspace; it must succeed."""
    run = Run(workspace, PYTHON, "-B", "-c", "import os, stat\n" + code, **options)
    assert run.code == 0
    return run


def kept(run: Run) -> KeptLayer:
    result = run.keep()
    run.core.close_layer()
    assert result is not None
    assert open_layer(result.id) == result
    return result


def relative(changes: list[Change], workspace: Path) -> dict[str, ChangeKind]:
    prefix = f"{workspace}/"
    return {change.path.removeprefix(prefix): change.kind for change in changes if change.path.startswith(prefix)}


# ---- the model ----

# It also runs outside, so it opens nothing through a link, and its links lead nowhere.
_OPERATIONS = """
import os, random, shutil, stat, sys
os.chdir(sys.argv[1])
choice = random.Random(int(sys.argv[2]))
os.umask(0o022)
NAMES = ["a", "b", "c", "d", "e", "new\\nline", "n" * 255, b"\\xff\\xfe".decode("utf-8", "surrogateescape")]

def place():
    return "/".join(choice.choice(NAMES) for _ in range(choice.randint(1, 3)))

def kind(path):
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except OSError:
        return 0

def opener(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)

def write(path):
    text = choice.choice(["", "one\\n", "two\\n", "x" * 5000])
    if kind(path) in (0, stat.S_IFREG):
        with open(path, "w", opener=opener) as file:
            file.write(text)

def append(path):
    if kind(path) == stat.S_IFREG:
        with open(path, "a", opener=opener) as file:
            file.write("more")

def rewrite(path):
    if kind(path) == stat.S_IFREG:
        with open(path, "r+", opener=opener) as file:
            text = file.read()
            file.seek(0)
            file.write(text)

def rename(path):
    other = place()
    if kind(path) != stat.S_IFDIR or not (kind(other) or f"{os.path.realpath(other)}/".startswith(
        f"{os.path.realpath(path)}/"
    )):
        os.rename(path, other)

def remove(path):
    if kind(path) == stat.S_IFDIR:
        shutil.rmtree(path)

def mode(path):
    new = choice.choice([0o600, 0o644, 0o755])
    if kind(path) == stat.S_IFREG:
        os.chmod(path, new)
    elif kind(path) == stat.S_IFDIR:
        os.chmod(path, new | 0o700)

def truncate(path):
    size = choice.choice([0, 3, 10000])
    if kind(path) == stat.S_IFREG:
        os.truncate(path, size)

def link(path):
    os.link(path, place(), follow_symlinks=False)

def symlink(path):
    os.symlink(choice.choice(["a", "/nowhere-at-all", "b/c"]), path)

def touch(path):
    os.utime(path, follow_symlinks=False)

OPERATIONS = [write, write, append, rewrite, rename, os.mkdir, os.mkdir, os.unlink, os.rmdir, remove, mode, symlink]
OPERATIONS += [link, os.mkfifo, truncate, touch]
for _ in range(int(sys.argv[3])):
    try:
        choice.choice(OPERATIONS)(place())
    except OSError:
        pass
"""


def snapshot(top: Path) -> dict[str, tuple[object, ...]]:
    """A plain tree: path to what is comparable of it."""
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(top):
        for name in names + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content: object = None
            if kind == stat.S_IFREG:
                content = Path(path).read_bytes()
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            mode = None if kind == stat.S_IFLNK else stat.S_IMODE(status.st_mode)
            found[os.path.relpath(path, top)] = (kind, content, mode)
    return found


def expected(before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]]) -> dict[str, ChangeKind]:
    """The difference of two plain trees in the words of changes; what lies below a vanished directory is not listed."""
    result = {}
    for path in before.keys() | after.keys():
        old, new = before.get(path), after.get(path)
        if old is None:
            result[path] = ChangeKind.ADDED
        elif new is None:
            parent = after.get(os.path.dirname(path))
            if os.path.dirname(path) == "" or (parent is not None and parent[0] == stat.S_IFDIR):
                result[path] = ChangeKind.DELETED
        elif old[:2] != new[:2]:
            result[path] = ChangeKind.CHANGED
        elif old != new:
            result[path] = ChangeKind.MODE
    return result


@pytest.mark.parametrize("seed", range(12))
def test_i7_changes_are_what_the_same_script_does_to_a_plain_directory(tmp_path: Path, seed: int) -> None:
    workspace, copy = tmp_path / "workspace", tmp_path / "copy"
    workspace.mkdir()
    subprocess.run([PYTHON, "-c", _OPERATIONS, workspace, str(seed + 1000), "150"], check=True, timeout=20)
    subprocess.run(["cp", "-a", workspace, copy], check=True)
    before = snapshot(workspace)
    subprocess.run([PYTHON, "-c", _OPERATIONS, copy, str(seed), "200"], check=True, timeout=20)
    run = Run(workspace, PYTHON, "-B", "-c", _OPERATIONS, str(workspace), str(seed), "200")
    assert run.code == 0
    want = expected(before, snapshot(copy))

    assert {path: change.kind for path, change in run.workspace().items()} == want
    assert snapshot(workspace) == before
    if want:
        layer_kept = kept(run)
        assert relative(layer_kept.changes(), workspace) == want
        layer_kept.patch()


# ---- keeping ----


def test_nothing_changed_keeps_nothing(workspace: Path, state: Path) -> None:
    run = python(workspace, "open('file.txt').read(); os.listdir('/usr')")
    assert not is_changed(run.prepared, run.core.layer_fd)
    assert run.keep() is None
    assert not state.exists() or os.listdir(state) == []
    run.core.close_layer()


def test_a_new_time_stamp_alone_is_no_change(workspace: Path) -> None:
    run = python(workspace, "os.utime('file.txt', (5, 5)); os.chmod('file.txt', 0o600); os.chmod('file.txt', 0o644)")
    assert run.changes() == []
    assert run.keep() is None
    run.core.close_layer()


def test_a_kept_layer_has_contents_times_holes_and_hard_links(workspace: Path, state: Path) -> None:
    run = python(
        workspace,
        """
with open('sparse', 'wb') as file:
    file.seek(1 << 30); file.write(b'end')
open('one', 'w').write('same'); os.link('one', 'two')
os.utime('one', ns=(1, 1234567890123456789)); os.symlink('/etc/shadow', 'link'); os.mkfifo('pipe')
os.mkdir('sub'); open('sub/file', 'w').write('x'); os.chmod('sub', 0o750); os.unlink('file.txt')
os.setxattr('sub/file', 'user.mine', b'value')
""",
    )
    result = kept(run)
    top = state / result.id / "parts" / "workspace"
    sparse = os.stat(top / "sparse")
    assert sparse.st_size == (1 << 30) + 3 and sparse.st_blocks * 512 < 1 << 20
    assert os.stat(top / "one").st_ino == os.stat(top / "two").st_ino
    assert os.stat(top / "one").st_mtime_ns == 1234567890123456789
    assert os.readlink(top / "link") == "/etc/shadow"
    assert stat.S_ISFIFO(os.lstat(top / "pipe").st_mode)
    assert stat.S_IMODE(os.stat(top / "sub").st_mode) == 0o750
    assert os.getxattr(top / "sub" / "file", "user.mine") == b"value"
    gone = os.lstat(top / "file.txt")
    assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0
    assert stat.S_IMODE(os.stat(state / result.id).st_mode) == 0o700
    kinds = relative(result.changes(), workspace)
    assert kinds == {
        **dict.fromkeys(("sparse", "one", "two", "link", "pipe", "sub", "sub/file"), ChangeKind.ADDED),
        "file.txt": ChangeKind.DELETED,
    }
    assert result.command == "test" and result.count == len(kinds)
    assert [layer.id for layer in list_layers()] == [result.id]
    result.discard()
    assert os.listdir(state) == []
    with pytest.raises(RequestError):
        result.changes()


def test_the_patch_is_applied_by_git_and_gives_the_same_files(workspace: Path, tmp_path: Path) -> None:
    (workspace / "sub dir").mkdir()
    (workspace / "sub dir" / "deep").write_text("".join(f"line {number}\n" for number in range(100)))
    (workspace / "gone").mkdir()
    (workspace / "gone" / "x").write_text("no end of line")
    (workspace / "script").write_text("#!/bin/sh\n")
    (workspace / "turns").write_text("into a link\n")
    (workspace / "latin").write_bytes(b"caf\xe9\n")
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", workspace, copy], check=True)
    run = python(
        workspace,
        r"""
import shutil
text = open('sub dir/deep').read().replace('line 50\n', 'line fifty\r\n\x1b[31m\n')
open('sub dir/deep', 'w', newline='').write(text); shutil.rmtree('gone'); os.chmod('script', 0o755)
os.unlink('turns'); os.symlink('script', 'turns'); open('latin', 'ab').write(b'\xff last')
open('new"quoted"\tname', 'w').write('new'); open('empty', 'w'); open('file.txt', 'w').write('')
open('caf\u00e9', 'w').write('x\n')
""",
    )
    result = kept(run)
    patch = result.patch()
    assert b"\x1b[31m" in patch
    applied = subprocess.run(["git", "apply", "-"], cwd=copy, input=patch, capture_output=True, check=False)
    assert applied.returncode == 0, applied.stderr
    assert (copy / "sub dir" / "deep").read_bytes() == "".join(
        f"line {number}\n" if number != 50 else "line fifty\r\n\x1b[31m\n" for number in range(100)
    ).encode()
    assert not (copy / "gone").exists() and os.access(copy / "script", os.X_OK)
    assert os.readlink(copy / "turns") == "script"
    assert (copy / "latin").read_bytes() == b"caf\xe9\n\xff last"
    assert (copy / 'new"quoted"\tname').read_text() == "new"
    assert (copy / "empty").read_bytes() == b"" == (copy / "file.txt").read_bytes()


def test_binary_files_are_announced_in_a_patch(workspace: Path) -> None:
    run = python(workspace, r"open('bin', 'wb').write(b'a\0b')")
    assert b"Binary files /dev/null and b/bin differ" in kept(run).patch()


# ---- attacks ----


def test_setuid_and_setgid_bits_are_never_stored(workspace: Path, state: Path) -> None:
    run = python(
        workspace,
        "open('su', 'w').write('#!'); os.chmod('su', 0o6755); os.mkdir('dir'); os.chmod('dir', 0o2777)\n"
        "os.chmod('file.txt', 0o4644)",
    )
    assert run.workspace()["su"].mode_after == 0o6755
    result = kept(run)
    for directory, names, files in os.walk(state):
        for name in names + files:
            assert os.lstat(os.path.join(directory, name)).st_mode & 0o6000 == 0
    found = {change.path: change for change in result.changes()}
    assert result.stripped.count == 3 and f"{workspace}/su" in result.stripped.paths
    assert found[f"{workspace}/su"].mode_after == 0o755


def test_sockets_are_dropped_and_told(workspace: Path, state: Path) -> None:
    run = python(workspace, "import socket\nsocket.socket(socket.AF_UNIX).bind('sock'); open('f', 'w')")
    assert run.workspace()["sock"].file_type is FileType.SOCKET
    result = kept(run)
    assert result.dropped.count == 1 and result.dropped.paths == [f"{workspace}/sock"]
    assert not os.path.lexists(state / result.id / "parts" / "workspace" / "sock")


def test_a_hard_link_to_a_host_file_is_a_copy(workspace: Path) -> None:
    run = python(workspace, "os.link('file.txt', 'second'); open('second', 'a').write('more')")
    found = run.workspace()
    assert found["second"].kind is ChangeKind.ADDED and found["file.txt"].kind is ChangeKind.CHANGED
    assert (workspace / "file.txt").read_text() == "original\n"
    assert os.stat(workspace / "file.txt").st_nlink == 1
    run.core.close_layer()


def test_overlay_marks_cannot_be_forged(workspace: Path, state: Path) -> None:
    (workspace / "dir").mkdir()
    (workspace / "dir" / "inner").write_text("x")
    run = python(
        workspace,
        """
def attempt(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        pass
attempt(os.mknod, 'file2', stat.S_IFCHR, 0)
attempt(os.mknod, os.path.expanduser('~/file2'), stat.S_IFCHR, 0)
home = '/home/agent/dir'
os.mkdir(home)
open(home + '/inner', 'w')
open('dir/touched', 'w')
for name in ('opaque', 'redirect', 'metacopy', 'whiteout', 'origin'):
    attempt(os.setxattr, 'dir', 'user.overlay.' + name, b'y')
    attempt(os.setxattr, 'file.txt', 'user.overlay.' + name, b'/etc/shadow')
    attempt(os.setxattr, home, 'user.overlay.' + name, b'y')
""",
    )
    found = run.workspace()
    assert {path: change.kind for path, change in found.items()} == {"dir/touched": ChangeKind.ADDED}
    result = kept(run)
    for directory, names, files in os.walk(state / result.id):
        for name in names + files:
            path = os.path.join(directory, name)
            assert not stat.S_ISCHR(os.lstat(path).st_mode)
            assert not [x for x in os.listxattr(path, follow_symlinks=False) if x.startswith("user.overlay")]


def test_links_are_never_followed(workspace: Path, tmp_path: Path, state: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("the host's key")
    (workspace / "dir").mkdir()
    (workspace / "dir" / "key").write_text("mine")
    run = python(
        workspace,
        f"import shutil\nshutil.rmtree('dir'); os.symlink({str(secret)!r}, 'dir'); os.symlink('/', 'root')\n"
        f"os.unlink('file.txt'); os.symlink({str(secret / 'key')!r}, 'file.txt')",
    )
    found = run.workspace()
    assert found["dir"].kind is ChangeKind.CHANGED and found["dir"].file_type is FileType.SYMLINK
    assert found["dir"].type_before is FileType.DIRECTORY
    assert set(found) == {"dir", "root", "file.txt"}
    result = kept(run)
    assert b"the host's key" not in result.patch()
    discard(result.id)
    assert (secret / "key").read_text() == "the host's key"


def test_deep_trees_and_long_names(workspace: Path, state: Path) -> None:
    run = python(
        workspace,
        """
for number in range(3000):
    os.mkdir('d'); os.chdir('d')
open('bottom', 'w').write('x')
os.chdir(os.environ.get('HOME')); os.mkdir('n' * 255); open('n' * 255 + '/' + 'm' * 255, 'w')
""",
    )
    found = run.changes()
    assert len([change for change in found if change.part == "workspace"]) == 3001
    assert f"{workspace}{'/d' * 3000}/bottom" in {change.path for change in found}
    result = kept(run)
    assert result.entries == 3003
    assert len(result.changes()) == 3003
    assert b"/bottom" in result.patch()
    result.discard()
    assert os.listdir(state) == []


def test_directories_that_nobody_may_enter(workspace: Path, state: Path) -> None:
    run = python(
        workspace,
        "os.mkdir('shut'); open('shut/inner', 'w').write('text'); os.chmod('shut/inner', 0); os.chmod('shut', 0)",
    )
    assert set(run.workspace()) == {"shut", "shut/inner"}
    assert run.workspace()["shut/inner"].owner_after == (1000, 1000)
    result = kept(run)
    assert stat.S_IMODE(os.lstat(state / result.id / "parts" / "workspace" / "shut").st_mode) == 0
    assert set(relative(result.changes(), workspace)) == {"shut", "shut/inner"}
    assert b"+text" in result.patch()
    result.discard()
    assert os.listdir(state) == []


def test_files_of_another_id_than_the_callers(workspace: Path) -> None:
    """With a range from /etc/subuid, root inside is a stranger to the caller, whose layer it is all the same."""
    probe = prepare(Options(str(workspace)))
    probe.identity.release()
    if not probe.identity.has(0):
        pytest.skip("this user has a single id in a sandbox")
    run = python(
        workspace,
        "os.umask(0o077); os.mkdir('/var/secret'); open('/var/secret/file', 'w').write('x'); os.mkdir('/root/d')",
        command_user=0,
    )
    found = {change.path: change for change in run.changes()}
    assert set(found) == {"/var/secret", "/var/secret/file", "/root/d"}
    assert found["/var/secret/file"].owner_after == (0, 0) and found["/var/secret/file"].mode_after == 0o600
    assert {change.path for change in kept(run).changes()} == set(found)


def test_the_disk_is_never_filled(workspace: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = python(workspace, "open('f', 'w').write('x' * 100000)")
    monkeypatch.setattr(diskspace, "KEEP_BYTES", 1 << 60)
    with pytest.raises(CorralError, match="1 GiB or 5 % free"):
        run.keep()
    assert os.listdir(state) == []
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(state.parent.parent))
    assert kept(run).count == 1


def test_what_dead_processes_left_is_reaped(workspace: Path, state: Path) -> None:
    run = python(workspace, "open('f', 'w')")
    result = kept(run)
    dead = subprocess.Popen(["true"])
    dead.wait()
    os.makedirs(state / f"partial-{dead.pid}-abcdefgh" / "parts" / "x")
    os.makedirs(state / f"partial-{os.getpid()}-abcdefgh")
    assert layer.reap_partials() == 1
    assert sorted(os.listdir(state)) == sorted([result.id, f"partial-{os.getpid()}-abcdefgh"])


@pytest.mark.parametrize("name", ["", "..", "a", "../abcdef", "ABCDEFGH", "abcdefg1", "abcdefgh\n", "abcdefghi"])
def test_ids_are_checked(name: str) -> None:
    for call in (open_layer, discard):
        with pytest.raises(RequestError):
            call(name)


def test_a_layer_that_is_read_while_it_is_discarded(workspace: Path) -> None:
    run = python(workspace, "for n in range(500): open(f'f{n}', 'w').write('x')")
    result = kept(run)
    failures: list[BaseException] = []

    def read() -> None:
        while True:
            try:
                assert len(result.changes()) == 500
            except RequestError:
                return
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    time.sleep(0.1)
    result.discard()
    for reader in readers:
        reader.join(20)
    assert failures == [] and list_layers() == []


def test_a_live_sandbox_that_swaps_entries_while_it_is_looked_at(workspace: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("k" * 9)
    script = f"""
import os, time
os.makedirs('x/y/z'); open('x/y/z/deep', 'w')
end = time.monotonic() + 2.5
while time.monotonic() < end:
    try:
        os.rename('x', 'w'); os.symlink({str(secret)!r}, 'x'); os.unlink('file.txt')
        os.mkfifo('file.txt'); os.unlink('x'); os.rename('w/y', 'y'); os.rename('y', 'w/y')
        os.rename('w', 'x'); os.unlink('file.txt'); open('file.txt', 'w').write('k' * 9)
    except OSError as error:
        pass
"""
    loop = Loop()
    prepared = prepare(Options(str(workspace)))
    core = Core(prepared, loop)
    rounds = 0

    def look() -> None:
        nonlocal rounds
        for change in live_changes(prepared, core.layer_fd):
            assert "key" not in change.path
        measure(prepared.view.parts, core.layer_fd, prepared.view.scaffold)
        rounds += 1
        if core._execs:
            loop.call_later(0.01, look)

    def ready(error: CorralError | None) -> None:
        assert error is None, error
        with open(os.devnull) as null:
            core.exec((PYTHON, "-B", "-c", script), (null.fileno(), 1, 2), lambda _: core.kill("closed"))
        loop.call_later(0.05, look)

    core.when_ready(ready)
    core.when_ended(loop.stop)
    loop.run()
    core.close_layer()
    assert rounds > 10
