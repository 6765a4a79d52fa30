"""Opens and renames of watched files against those who change path, link or descriptor while it is decided (I5)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corral.policy.model import Approvals, Filesystem, Policy
from tests.contain.conftest import Compile, MakeBox

ROUNDS = int(os.environ.get("CORRAL_ROUNDS", "10000"))
"""Of each race. As root, and by itself; the pass as an ordinary user makes fewer (tests/as_user.sh)."""
RACE = r"""
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
enum { DIRECTORY = 50 };
static char path[] = "dirA/file";
static const char *who, *what;
static volatile int *end;
static int directories[2];
static void flip(int n) {
    if (strcmp(who, "link") == 0) syscall(SYS_renameat2, AT_FDCWD, "link1", AT_FDCWD, "link2", 2);
    else if (strcmp(who, "dup2") == 0) dup2(directories[n & 1], DIRECTORY);
    else ((volatile char *)path)[3] = n & 1 ? 'D' : 'A';
}
static void *race(void *unused) {
    for (int n = 0; !*end; n++) flip(n);
    return NULL;
}
static int race_peer(void *unused) { race(NULL); return 0; }
static struct { unsigned long long flags, mode, resolve; } how;
static int kept; /* renames whose new name was refused */
static int attempt(int from, const char *name) {
    if (strcmp(what, "rename") == 0) {
        /* The old name is raced, then the new one; by the one call and by the other. */
        static int two;
        two = !two;
        if ((two ? syscall(SYS_renameat2, from, name, AT_FDCWD, "moved", 1)
                 : syscall(SYS_renameat, from, name, AT_FDCWD, "moved")) < 0)
            return -1;
        if ((two ? syscall(SYS_renameat2, AT_FDCWD, "moved", from, name, 0)
                 : syscall(SYS_renameat, AT_FDCWD, "moved", from, name)) == 0)
            return 0;
        if (errno != EACCES) return -1;
        kept++;
        return syscall(SYS_renameat, AT_FDCWD, "moved", AT_FDCWD, "dirA/file");
    }
    int fd;
    if (strcmp(what, "openat2") == 0) {
        how.flags = O_WRONLY | O_TRUNC;
        fd = syscall(SYS_openat2, from, name, &how, sizeof how);
    } else
        fd = syscall(SYS_openat, from, name, O_WRONLY | O_TRUNC);
    if (fd < 0) return -1;
    write(fd, "changed", 7);
    close(fd);
    return 0;
}
int main(int argc, char **argv) {
    who = argv[1], what = argv[2];
    int rounds = atoi(argv[3]), done = 0, refused = 0;
    end = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    directories[0] = open("dirA", O_RDONLY), directories[1] = open("dirD", O_RDONLY);
    symlink("dirA", "link1");
    symlink("dirD", "link2");
    dup2(directories[0], DIRECTORY);
    int from = strcmp(who, "dup2") == 0 ? DIRECTORY : AT_FDCWD;
    const char *name = from == DIRECTORY ? "file" : strcmp(who, "link") == 0 ? "link1/file" : path;
    pthread_t thread;
    pid_t peer = 0;
    if (strcmp(who, "peer") == 0)
        peer = clone(race_peer, (char *)malloc(1 << 16) + (1 << 16), CLONE_VM | SIGCHLD, NULL);
    else
        pthread_create(&thread, NULL, race, NULL);
    int odd = 0;
    for (int i = 0; i < rounds; i++) {
        if (attempt(from, name) == 0) done++;
        else if (errno == EACCES) refused++;
        else odd = errno;
    }
    *end = 1;
    if (peer) waitpid(peer, NULL, 0);
    printf("%d %d %d %d\n", done, refused, odd, kept);
    return 0;
}
"""


@pytest.mark.parametrize("what", ["openat", "openat2", "rename"])
@pytest.mark.parametrize("who", ["thread", "peer", "link", "dup2"])
async def test_no_racer_gets_at_a_file_that_was_refused(
    who: str, what: str, make_box: MakeBox, compile_c: Compile, workspace: Path
) -> None:
    """Nobody answers, so each question soon means no. The outcome is checked from the host."""
    for name in ("dirA", "dirD"):
        (workspace / name).mkdir()
        (workspace / name / "file").write_text(name)
    program = compile_c(RACE, "race")
    glob = f"{workspace}/dirD/file"
    policy = Policy(filesystem=Filesystem(ask=(glob,)), approvals=Approvals(timeout=0.001))
    box = await make_box(policy=policy)
    root = f"/proc/self/fd/{box.core.root_fd}"
    before = os.stat(root + glob)
    result = await box.exec([program, who, what, str(ROUNDS)], directory=str(workspace), timeout=230)
    done, refused, odd, kept = map(int, result.stdout.split())
    assert Path(root + glob).read_text() == "dirD"
    after = os.stat(root + glob)
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_ino) == (
        before.st_mtime_ns,
        before.st_ctime_ns,
        before.st_ino,
    )
    assert not os.path.lexists(f"{root}{workspace}/moved")
    assert (odd, done + refused) == (0, ROUNDS)
    assert done > kept
    assert refused > 0
    assert (kept > 0) == (what == "rename")
