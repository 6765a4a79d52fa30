"""System calls on files, in a workspace that the host has filled: what programs expect there holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corral.sandbox.changes import ChangeKind
from tests.contain.test_workloads import contained

_FILE_CALLS = {
    "inotify": """
libc = ctypes.CDLL(None, use_errno=True); fd = libc.inotify_init1(0)
assert libc.inotify_add_watch(fd, b'.', 0x100) >= 0 and libc.inotify_add_watch(fd, b'lower', 0x2) >= 0
open('seen', 'w').close(); assert struct.unpack('iIII', os.read(fd, 4096)[:16])[:2] == (1, 0x100)
""",
    "copies in the kernel": """
data = os.urandom(300_000); open('data', 'wb').write(data); source = os.open('data', os.O_RDONLY)
target = os.open('sent', os.O_RDWR | os.O_CREAT)
while os.sendfile(target, source, os.lseek(target, 0, os.SEEK_CUR), 1 << 20): pass
assert open('sent', 'rb').read() == data
target = os.open('ranged', os.O_RDWR | os.O_CREAT)
while os.copy_file_range(source, target, 1 << 20, offset_src=os.lseek(target, 0, os.SEEK_CUR)): pass
assert open('ranged', 'rb').read() == data
reader, writer = os.pipe(); target = os.open('spliced', os.O_RDWR | os.O_CREAT)
assert os.splice(source, writer, 4096, offset_src=0) == 4096 and os.splice(reader, target, 4096) == 4096
assert open('spliced', 'rb').read() == data[:4096]
""",
    "files without a name": """
fd = os.open('.', os.O_TMPFILE | os.O_RDWR); os.write(fd, b'nameless')
os.link(f'/proc/self/fd/{fd}', 'named', src_dir_fd=fd, follow_symlinks=True)
assert open('named').read() == 'nameless'
with tempfile.TemporaryFile(dir='.') as file: file.write(b'x')
""",
    "links": """
# The two names of a file that the host had share all but their inode number: the overlay keeps no index.
os.link('lower', 'hard'); assert os.stat('lower').st_nlink == os.stat('hard').st_nlink == 2
with open('hard', 'a') as file: file.write('!')
assert open('lower').read() == 'from the host!'
os.symlink('lower', 'soft'); assert os.readlink('soft') == 'lower' and os.path.samefile('soft', 'lower')
os.link('hard', 'harder'); assert os.path.samefile('harder', 'hard')
os.rename('lower', 'renamed'); os.replace('renamed', 'file.txt'); assert not os.path.exists('lower')
assert open('file.txt').read() == 'from the host!'
""",
    "shared mappings": """
file = open('mapped', 'w+b'); file.truncate(8192); memory = mmap.mmap(file.fileno(), 8192)
if os.fork() == 0: memory[4096:4100] = b'kid!'; os._exit(0)
assert os.wait()[1] == 0 and memory[4096:4100] == b'kid!'
memory.flush(); assert open('mapped', 'rb').read()[4096:4100] == b'kid!'
file = open('lower', 'r+b'); lower = mmap.mmap(file.fileno(), 0); lower[:4] = b'FROM'; lower.flush()
assert open('lower').read() == 'FROM the host'
""",
    "locks": """
def attempt(code):
    code = f'import fcntl; f = open("lower", "r+"); fcntl.{code}(f, fcntl.LOCK_EX | fcntl.LOCK_NB)'
    return subprocess.run([sys.executable, '-c', code], stderr=subprocess.DEVNULL).returncode
held = open('lower', 'r+')
for name in ('flock', 'lockf'):
    getattr(fcntl, name)(held, fcntl.LOCK_EX); assert attempt(name) == 1
    getattr(fcntl, name)(held, fcntl.LOCK_UN); assert attempt(name) == 0
""",
    "times, modes, space": """
assert os.stat('lower').st_mtime == 1
os.utime('lower', ns=(10**18 + 1, 2 * 10**18 + 3)); assert os.stat('lower').st_mtime_ns == 2 * 10**18 + 3
os.chmod('lower', 0o741); assert stat.S_IMODE(os.stat('lower').st_mode) == 0o741
assert os.stat('lower').st_uid == os.stat('.').st_uid == os.getuid() == 1000
fd = os.open('space', os.O_RDWR | os.O_CREAT); os.posix_fallocate(fd, 0, 1 << 20); os.fsync(fd); os.fdatasync(fd)
assert os.stat('space').st_blocks * 512 >= 1 << 20
os.truncate('space', 0); os.truncate('space', 1 << 30); assert os.stat('space').st_blocks == 0
assert os.lseek(fd, 0, os.SEEK_HOLE) == 0; os.sync(); assert os.statvfs('.').f_bavail > 0
""",
    "user attributes": """
for name in ('lower', 'new'):
    open(name, 'a').close(); os.setxattr(name, 'user.note', b'n'); assert os.listxattr(name) == ['user.note']
    assert os.getxattr(name, 'user.note') == b'n'; os.removexattr(name, 'user.note')
""",
    "many files and odd names": """
os.mkdir('many')
for n in range(5000): open(f'many/{n:05}', 'w').close()
names = ['наб', '名前', 'e\\u0301', '\\U0001f600', 'new\\nline', '-rf', 'a' * 255, 'spaces  two']
for name in names: open(f'many/{name}', 'w').write(name); assert open(f'many/{name}').read() == name
open(b'many/\\xff\\xfe', 'w').close()
assert len(os.listdir('many')) == 5009 and set(names) <= set(os.listdir('many'))
for n in range(5000): os.unlink(f'many/{n:05}')
assert len(os.listdir('many')) == 9
""",
}


@pytest.mark.parametrize("name", _FILE_CALLS)
async def test_file_calls(workspace: Path, name: str) -> None:
    if name == "user attributes" and tuple(map(int, os.uname().release.split(".")[:2])) < (6, 6):
        pytest.skip("the layer is a tmpfs, which has user attributes from Linux 6.6 on (tmpfs(5))")
    (workspace / "lower").write_text("from the host")
    os.utime(workspace / "lower", (1, 1))
    async with contained(workspace) as inside:
        modules = "import ctypes, fcntl, mmap, os, stat, struct, subprocess, sys, tempfile"
        await inside.python(modules + _FILE_CALLS[name])
        assert await inside.box.changes() != [] or name == "locks"


async def test_names_pass_unchanged(workspace: Path) -> None:
    names = ["наб", "名前", "e\u0301", "\U0001f600", "spaces  two", "-rf", "a" * 255, os.fsdecode(b"\xff")]
    for name in names:
        (workspace / name).write_text("host")
    async with contained(workspace) as inside:
        await inside.python("import os\nfor n in os.listdir('.'): os.rename(n, n + 'x' if len(n) < 9 else 'long')")
        found = {os.path.basename(change.path): change.kind for change in await inside.box.changes()}
        assert {name for name, kind in found.items() if kind is ChangeKind.DELETED} >= set(names)
        expected = {name + "x" for name in names if len(name) < 9} | {"long"}
        assert {name for name, kind in found.items() if kind is ChangeKind.ADDED} == expected | {"file.txtx"}


async def test_big_directories_of_the_host(workspace: Path) -> None:
    (workspace / "many").mkdir()
    for number in range(5000):
        (workspace / "many" / f"{number:05}").touch()
    async with contained(workspace) as inside:
        script = "touch many/new; rm many/0000*; mv many/00010 many/moved; ls many | wc -l; rm -r many; ls"
        assert await inside.sh(script) == "4991\nfile.txt"
        kinds = {change.path: change.kind for change in await inside.box.changes()}
        assert kinds == {f"{workspace}/many": ChangeKind.DELETED}
