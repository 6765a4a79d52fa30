"""Real work inside: compilers, version control, databases, processes, sockets, files; and the host stays as it was.

Each test runs real programs in a sandbox, looks at what they made through the sandbox's own verbs, and compares the
host before and after. Calls on files are in test_workloads_files.py; packages, PATH's tools and other roots in
test_workloads_install.py; odd workspaces in test_workloads_places.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from corral.sandbox.box import Sandbox
from corral.sandbox.changes import ChangeKind

PYTHON = "/usr/bin/python3"
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
SECONDS = 120.0
"""Bound of one script: far above what it takes, below pytest's own patience."""

_SYSTEM = ("/usr/bin", "/usr/local/bin", "/usr/lib/python3/dist-packages", "/etc", "/var/lib/dpkg/info")
_INSTALLED = ("corral-tool", "corral-probe", "corral_probe", "corral-daemon", "99:1.0")
"""What only these tests install or name. Other programs may install other things meanwhile."""


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All that a tree holds: by relative path its mode, owner, number of links, time, and content or target."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        what = (status.st_mode, status.st_uid, status.st_gid, status.st_nlink, status.st_mtime_ns, content)
        found[str(path.relative_to(root))] = what
    return found


def traces() -> list[str]:
    """Where the host's system knows of anything that these tests install inside."""
    names = [f"{place}/{name}" for place in filter(os.path.isdir, _SYSTEM) for name in os.listdir(place)]
    for path in filter(os.path.exists, ("/var/lib/dpkg/status", "/etc/passwd")):
        names += Path(path).read_text(errors="replace").splitlines()
    return [name for name in names if any(installed in name for installed in _INSTALLED)]


class Inside:
    """A sandbox, the directory that is its workspace, and ways to run scripts that must succeed."""

    def __init__(self, box: Sandbox, workspace: Path) -> None:
        self.box = box
        self.workspace = workspace

    async def sh(self, script: str, **how: Any) -> str:
        """Runs a bash script in the workspace, stopping at the first failure; its output, without the last newline."""
        return await self.run(["/bin/bash", "-euo", "pipefail", "-c", script], **how)

    async def python(self, script: str, *arguments: str, **how: Any) -> str:
        """Runs a Python program in the workspace."""
        return await self.run([PYTHON, "-c", script, *arguments], **how)

    async def run(self, argv: list[str], **how: Any) -> str:
        """Runs a command in the workspace that must end with 0."""
        result = await self.box.exec(argv, timeout=how.pop("timeout", SECONDS), **how)
        assert not result.timed_out, f"still running after {SECONDS} s: {argv[-1]}"
        assert result.exit_code == 0, f"{result.exit_code}\n{result.text[-4000:]}\n{result.stderr.decode()[-4000:]}"
        return result.text.rstrip("\n")


@asynccontextmanager
async def contained(workspace: Path, *, search: str = PATH, **options: Any) -> AsyncIterator[Inside]:
    """A sandbox on ``workspace`` whose caller has ``search`` as PATH; afterwards the host must be what it was."""
    before = tree(workspace)
    async with Sandbox(workspace, environment={"PATH": search, "LANG": "C.UTF-8"}, **options) as box:
        yield Inside(box, workspace)
        assert tree(workspace) == before
    assert tree(workspace) == before
    assert traces() == []


@pytest.fixture
async def inside(workspace: Path) -> AsyncIterator[Inside]:
    """A sandbox with the default policy on the usual workspace."""
    async with contained(workspace) as started:
        yield started


def need(program: str) -> None:
    """Skips where a program is missing on the host."""
    if shutil.which(program, path=PATH) is None:
        pytest.skip(f"no {program} on this machine; `make test` as root installs it")


# ---- git

_GIT = """
export GIT_AUTHOR_NAME=A GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=C GIT_COMMITTER_EMAIL=c@example.org
"""


@pytest.fixture
def repository(workspace: Path) -> Path:
    """A host repository in the workspace, with a commit, a directory and an uncommitted change."""
    need("git")
    script = _GIT + (
        "git init -q -b main . && mkdir -p src/deep && echo one >src/deep/one && echo two >src/two && "
        "git add -A && git commit -q -m first && git gc -q && echo more >>file.txt"
    )
    subprocess.run(["/bin/bash", "-euc", script], cwd=workspace, check=True, timeout=60)
    return workspace


async def test_git_in_a_repository_of_the_host(repository: Path) -> None:
    async with contained(repository) as inside:
        assert await inside.sh("git status --porcelain") == " M file.txt"  # neither "dubious ownership" nor all changed
        text = await inside.sh(
            _GIT
            + """
            git stash -q; grep -qx original file.txt; test "$(cat file.txt)" = original
            git checkout -q -b topic; echo topic >topic; git add topic; git commit -q -m topic
            git checkout -q main; test ! -e topic; echo three >src/three; git add -A; git commit -q -m three
            git merge -q --no-edit topic; test -e topic -a -e src/three
            git checkout -q -b rebased HEAD~1; echo r >r; git add r; git commit -q -m r; git rebase -q main
            test "$(git merge-base rebased main)" = "$(git rev-parse main)"
            git stash pop -q; grep -qx more file.txt; git commit -qam popped
            git mv src/two src/renamed; git commit -qm renamed; test ! -e src/two
            git worktree add -q /tmp/worktree main; git -C /tmp/worktree log --oneline | wc -l
            git worktree remove /tmp/worktree
            git clone -q . /tmp/clone; git -C /tmp/clone log -1 --format=%s
            git clone -q --local --no-hardlinks .git /tmp/bare --bare; git push -q /tmp/bare rebased:pushed
            git gc -q --prune=now; git fsck --strict 2>&1 | grep -v ^dangling || true; git status --porcelain
            """,
        )
        assert text == "4\nrenamed"


async def test_git_in_a_new_repository(inside: Inside) -> None:
    need("git")
    script = "git init -q new; cd new; echo x >x; git add x; git commit -q -m x; git log --format='%an %s %D'"
    text = await inside.sh(_GIT + "git config --global init.defaultBranch trunk; " + script)
    assert text == "A x HEAD -> trunk"
    assert (await inside.box.read_file(f"{inside.workspace}/new/.git/HEAD")) == b"ref: refs/heads/trunk\n"


async def test_a_directory_of_the_host_is_renamed(repository: Path) -> None:
    """By rename(2), ``git mv``, ``mv`` and :func:`shutil.move`, though the overlay refuses it (EXDEV)."""
    async with contained(repository) as inside:
        await inside.python("import os; os.rename('src', 'elsewhere'); os.rename('elsewhere', 'src')")
        text = await inside.sh("git mv src s; find s -type f | sort; git status --porcelain | grep ^R")
        assert text.splitlines()[:2] == ["s/deep/one", "s/two"]
        assert len(text.splitlines()) == 4
        await inside.python("import shutil; shutil.move('s', 'again')")
        await inside.sh("mkdir -p made/here; echo x >made/here/x; mv -T made renamed; cat renamed/here/x file.txt")
        await inside.python("import os; os.rename('renamed', 'twice'); os.rename('file.txt', 'moved.txt')")
        assert await inside.sh("ls") == "again\nmoved.txt\ntwice"


# ---- builds and runtimes


async def test_c_build_with_generated_sources(workspace: Path) -> None:
    need("make")
    need("gcc")
    lines = [
        "all: program",
        "OBJECTS := $(foreach n,$(shell seq 1 24),unit$(n).o) main.o",
        "program: $(OBJECTS)\n\tgcc -o $@ $^",
        "unit%.c: Makefile\n\tprintf 'int unit$*(void) { return $*; }\\n' >$@",
        "main.c: generate.py\n\tpython3 generate.py >$@",
        "%.o: %.c\n\tgcc -O1 -Wall -Werror -c -o $@ $<",
    ]
    (workspace / "Makefile").write_text("\n".join(lines) + "\n")
    (workspace / "generate.py").write_text(
        "print('#include <stdio.h>')\n"
        "for n in range(1, 25): print(f'int unit{n}(void);')\n"
        "print('int main(void) { printf(\"%d\\\\n\", ' + ' + '.join(f'unit{n}()' for n in range(1, 25)) + '); }')\n"
    )
    async with contained(workspace) as inside:
        assert (await inside.sh("make -s -j2; ./program; touch main.c; make -s -j2; ./program")) == "300\n300"
        added = {change.path for change in await inside.box.changes() if change.kind is ChangeKind.ADDED}
        assert {f"{workspace}/program", f"{workspace}/unit24.o"} <= added


async def test_pytest_suite(workspace: Path) -> None:
    """pytest comes from the environment that runs this test: found from PATH, shown read-only."""
    tests = "import pytest\n\n@pytest.mark.parametrize('n', range(20))\ndef test_n(n, tmp_path):\n"
    (workspace / "test_it.py").write_text(tests + "    (tmp_path / 'f').write_text(str(n))\n    assert n != 13\n")
    search = f"{os.path.dirname(sys.executable)}:{PATH}"
    async with contained(workspace, search=search) as inside:
        result = await inside.box.exec(["python", "-m", "pytest", "-q", "test_it.py"], timeout=SECONDS)
        assert result.exit_code == 1, result.stderr
        assert "1 failed, 19 passed" in result.text
        assert await inside.run(["python", "-c", "import sys; print(sys.prefix)"]) == sys.prefix
        await inside.sh("ls -d .pytest_cache __pycache__/test_it*.pyc")


async def test_node(workspace: Path) -> None:
    need("node")
    (workspace / "script.js").write_text(
        """
        const fs = require('fs'), http = require('http'), { execFileSync } = require('child_process');
        const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
        if (!isMainThread) { parentPort.postMessage(workerData * 2); } else {
          fs.mkdirSync('out/deep', { recursive: true });
          fs.writeFileSync('out/deep/file', fs.readFileSync('file.txt'));
          console.log(execFileSync('cat', ['out/deep/file']).toString().trim());
          new Worker(__filename, { workerData: 21 }).on('message', (answer) => {
            console.log(answer);
            const server = http.createServer((request, response) => response.end('at ' + request.url));
            server.listen(0, '127.0.0.1', () => http.get(
                { host: '127.0.0.1', port: server.address().port, path: '/x' }, (response) =>
              response.on('data', (data) => { console.log(String(data)); server.close(); })));
          });
        }
        """
    )
    async with contained(workspace) as inside:
        assert await inside.sh("node script.js") == "original\n42\nat /x"


async def test_sqlite_with_several_writers(workspace: Path) -> None:
    import sqlite3

    with sqlite3.connect(workspace / "data.db") as connection:
        connection.execute("pragma journal_mode=wal")
        connection.execute("create table t (who, n)")
    connection.close()
    script = """
import multiprocessing, sqlite3
def write(who):
    with sqlite3.connect('data.db', timeout=60) as c:
        for n in range(100):
            c.execute('insert into t values (?, ?)', (who, n)); c.commit()
if __name__ == '__main__':
    with multiprocessing.Pool(4) as pool: pool.map(write, range(4))
    c = sqlite3.connect('data.db')
    print(*c.execute('select count(*), sum(n) from t').fetchone(), *c.execute('pragma journal_mode').fetchone())
    print(*c.execute('pragma integrity_check').fetchone())
"""
    async with contained(workspace) as inside:
        await inside.box.write_file(f"{workspace}/write.py", script.encode())
        assert await inside.sh("python3 write.py") == "400 19800 wal\nok"
        if shutil.which("sqlite3", path=PATH):
            assert await inside.sh("sqlite3 data.db 'select count(*) from t'; sqlite3 data.db vacuum") == "400"


# ---- processes


async def test_python_multiprocessing(inside: Inside) -> None:
    script = """
import concurrent.futures, multiprocessing, os, threading
from multiprocessing import shared_memory
def count(n, lock, value, queue, memory):
    shared = shared_memory.SharedMemory(memory)
    for _ in range(500):
        with lock: value.value += 1
    shared.buf[n] = n + 1; shared.close(); queue.put(n)
def square(n): return n * n
if __name__ == '__main__':
    multiprocessing.set_start_method(%r)
    lock, value, queue = multiprocessing.Semaphore(), multiprocessing.RawValue('i'), multiprocessing.Queue()
    shared = shared_memory.SharedMemory(create=True, size=4096)
    assert os.path.exists('/dev/shm/' + shared.name)
    children = [multiprocessing.Process(target=count, args=(n, lock, value, queue, shared.name)) for n in range(4)]
    for child in children: child.start()
    got = sorted(queue.get(timeout=60) for _ in children)
    for child in children: child.join(); assert child.exitcode == 0
    with concurrent.futures.ProcessPoolExecutor(2) as pool: squares = sum(pool.map(square, range(50)))
    threads = [threading.Thread(target=queue.put, args=(n,)) for n in range(50)]
    for thread in threads: thread.start()
    print(value.value, got, bytes(shared.buf[:4]), squares, sum(queue.get(timeout=60) for _ in threads))
    shared.close(); shared.unlink()
    barrier = multiprocessing.Manager().dict(a=1); print(dict(barrier))
"""
    expected = "2000 [0, 1, 2, 3] b'\\x01\\x02\\x03\\x04' 40425 1225\n{'a': 1}"
    for method in ("fork", "spawn"):
        await inside.box.write_file(f"{inside.workspace}/{method}.py", (script % method).encode())
        assert await inside.sh(f"python3 {method}.py") == expected, method
    assert await inside.sh("ls -A /dev/shm") == ""


async def test_asyncio_processes_and_sockets(inside: Inside) -> None:
    script = """
import asyncio, socket, tempfile, os
async def echo(reader, writer):
    writer.write((await reader.readline()).upper()); await writer.drain(); writer.close()
async def ask(reader, writer):
    writer.write(b'hello\\n'); answer = await reader.read(); writer.close(); return answer
async def main():
    for address in ('127.0.0.1', '127.9.8.7', '::1'):
        server = await asyncio.start_server(echo, address, 0)
        port = server.sockets[0].getsockname()[1]
        answers = await asyncio.gather(*(asyncio.open_connection(address, port) for _ in range(20)))
        assert await asyncio.gather(*(ask(*pair) for pair in answers)) == [b'HELLO\\n'] * 20, address
        server.close()
    for path in (tempfile.mkdtemp() + '/socket', 'here.sock', '\\0abstract'):
        server = await asyncio.start_unix_server(echo, path)
        assert await ask(*await asyncio.open_unix_connection(path)) == b'HELLO\\n', path
        server.close()
    runs = [await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1) for _ in range(10)]
    outputs = await asyncio.gather(*(run.communicate(b'x' * 200_000) for run in runs))
    assert all(out == b'x' * 200_000 for out, _ in outputs)
    assert await (await asyncio.create_subprocess_shell('exit 7')).wait() == 7
    one, two = socket.socketpair()
    socket.send_fds(one, [b'f'], [os.open('file.txt', os.O_RDONLY)])
    print(os.read(socket.recv_fds(two, 1, 1)[1][0], 100))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(('127.0.0.1', 0))
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'datagram', udp.getsockname()); print(udp.recv(100))
    print(socket.getaddrinfo('localhost', 80, socket.AF_INET)[0][4])
asyncio.run(main())
"""
    assert await inside.python(script) == "b'original\\n'\nb'datagram'\n('127.0.0.1', 80)"


async def test_a_daemon_outlives_the_command_that_started_it(inside: Inside) -> None:
    await inside.sh(
        "setsid python3 -m http.server --bind 127.0.0.1 8000 >server.log 2>&1 </dev/null & echo $! >pid; "
        "for i in $(seq 200); do (: </dev/tcp/127.0.0.1/8000) 2>/dev/null && exit 0; sleep 0.05; done; exit 1"
    )
    fetch = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8000/file.txt').read())"
    assert await inside.python(fetch) == "b'original\\n'"
    # It belongs to the sandbox's network: on the host nobody listens there.
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", 8000))
    await inside.sh("kill $(cat pid); for i in $(seq 200); do kill -0 $(cat pid) || exit 0; sleep 0.05; done; exit 1")


_TOOLS = (
    (r"diff <(printf 'a\nb\n') <(printf 'a\nc\n') || true", "2c2\n< b\n---\n> c"),
    ("sort -n -S 1M -T /tmp lines >/tmp/sorted; sort -n -c /tmp/sorted; wc -l </tmp/sorted", "60000"),
    (r"printf 'p\0q r\0' | xargs -0 -n1 -P2 printf '[%s]\n' | sort", "[p]\n[q r]"),
    ("cat /dev/stdin <<<in; cat /dev/fd/3 3<<<two; echo fd >/dev/fd/1; echo o >/dev/stdout", "in\ntwo\nfd\no"),
    ("echo lost >/dev/stderr; : </dev/tty || echo none", "none"),
    ("mkdir pack; cp lines pack/a; ln -s a pack/link; chmod 750 pack; tar -cf - pack | xz -1 >p.tar.xz", ""),
    ("xz -dc p.tar.xz | tar -xpf - -C /tmp; cmp lines /tmp/pack/a; readlink /tmp/pack/link", "a"),
    ("stat -c %a /tmp/pack; rm -r /tmp/pack; test ! -e /tmp/pack", "750"),
    ("tar -czf p.tgz pack; gzip -t p.tgz; mkdir un; tar -xf p.tgz -C un; cmp un/pack/a lines", ""),
    ("python3 -m zipfile -c p.zip pack; python3 -m zipfile -e p.zip unz; cmp unz/pack/a lines", ""),
    ("find . -name a -type f -print0 | xargs -0 ls", "./pack/a\n./un/pack/a\n./unz/pack/a"),
    ("perl -MFile::Temp=tempfile -e 'my ($h, $n) = tempfile(); print $h \"p\"; close $h; print -s $n'", "1"),
    ("sed -i s/original/edited/ file.txt; cat file.txt", "edited"),
    ("locale charmap; TZ=Asia/Tokyo date -d @0 +%H:%M; date -d @0 +%Z", "UTF-8\n09:00\nUTC"),
    ("id -un; id -u; whoami; getent passwd agent | cut -d: -f6; hostname", "agent\n1000\nagent\n/home/agent\ncorral"),
    (
        "nproc >/dev/null; df . >/dev/null; free >/dev/null; uptime >/dev/null; ps -e >ps; grep -c bash ps",
        "1",
    ),
    ("timeout 0.2 sleep 9 || echo $?; (ulimit -n 64; ulimit -n); umask", "124\n64\n0022"),
    ("trap 'echo t' TERM; kill -TERM $$; (exit 3) || echo $?; kill -9 $BASHPID & wait $! || echo $?", "t\n3\n137"),
    ("mkfifo f; echo through >f & cat f; wait", "through"),
    ("coproc cat; echo co >&${COPROC[1]}; read -r x <&${COPROC[0]}; echo $x", "co"),
)


async def test_shell_and_text_tools(workspace: Path) -> None:
    (workspace / "lines").write_text("".join(f"{n * 7919 % 100_003} {'x' * 40}\n" for n in range(60_000)))
    async with contained(workspace) as inside:
        for script, expected in _TOOLS:
            assert await inside.sh(script) == expected, script


async def test_keys_and_certificates(inside: Inside) -> None:
    need("ssh-keygen")
    assert "SHA256:" in await inside.sh("ssh-keygen -q -t ed25519 -N '' -f key; ssh-keygen -lf key.pub")
    assert await inside.sh("stat -c %a key ~/.; ls -A ~") == "600\n755"
    if os.path.isdir("/etc/ssl/certs"):
        script = "import ssl; c = ssl.create_default_context(); print(c.cert_store_stats()['x509_ca'])"
        assert int(await inside.python(script)) == int(
            subprocess.run([PYTHON, "-c", script], check=True, capture_output=True, timeout=60).stdout
        )
    if shutil.which("openssl", path=PATH):
        make = "openssl req -x509 -newkey rsa:2048 -nodes -keyout k.pem -out c.pem -days 1 -subj /CN=x 2>/dev/null; "
        assert await inside.sh(make + "openssl verify -CAfile c.pem c.pem") == "c.pem: OK"
