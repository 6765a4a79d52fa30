"""Makes every call on files in many ways, and prints what comes of it. Run inside by test_watched_files."""
# A script of system calls, one after the other, whose descriptors nobody closes.
# mypy: ignore-errors
# ruff: noqa: E402, E741, SIM105, SIM115, UP031

import errno
import fcntl
import os
import resource
import socket
import stat


def name(error):
    return errno.errorcode.get(error.errno, error.errno) if isinstance(error, OSError) else type(error).__name__


def tell(what, function, *arguments, **options):
    try:
        result = function(*arguments, **options)
    except (OSError, ValueError) as error:
        print(what, name(error))
        return None
    if isinstance(result, int) and what.startswith("open"):
        flags = fcntl.fcntl(result, fcntl.F_GETFL) & ~0o100000
        if not flags & os.O_PATH:
            flags &= ~os.O_NOFOLLOW
        mode = os.fstat(result).st_mode
        print(
            what,
            oct(flags),
            fcntl.fcntl(result, fcntl.F_GETFD),
            oct(mode),
            os.lseek(result, 0, 1) if stat.S_ISREG(mode) and not flags & os.O_PATH else "",
        )
    else:
        print(what, result if not isinstance(result, int) or result < 10 else "number")
    return result


O = os
os.umask(0o027)
open("file", "w").write("content")
os.mkdir("directory")
os.symlink("file", "link")
os.symlink("made-by-link", "dangling")
os.symlink("loop", "loop")
os.symlink("/proc/self", "to-self")
os.symlink("/dev/null", "to-null")
os.mkfifo("fifo")
os.symlink("directory", "to-directory")
for what, flags in (
    ("read", 0),
    ("write", 1),
    ("append", O.O_RDWR | O.O_APPEND),
    ("nonblock", O.O_NONBLOCK),
    ("sync", O.O_SYNC | 1),
    ("directory", O.O_DIRECTORY),
    ("nofollow", O.O_NOFOLLOW),
    ("path", O.O_PATH),
    ("path nofollow", O.O_PATH | O.O_NOFOLLOW),
    ("create", O.O_CREAT | 1),
    ("exclusive", O.O_CREAT | O.O_EXCL | 1),
    ("truncate", O.O_TRUNC | 1),
    ("noatime", O.O_NOATIME),
    ("create directory", O.O_CREAT | O.O_DIRECTORY),
    ("temporary", O.O_TMPFILE | 2),
    ("temporary read", O.O_TMPFILE),
    ("odd", 3),
):
    for path in (
        "file",
        "directory",
        "link",
        "absent",
        "absent/below",
        "file/below",
        "loop",
        "directory/",
        "file/",
        "absent/",
        ".",
        "",
        "/",
        "to-directory/",
        "to-directory",
        "link/",
        "x" * 300,
        "/" + "x/" * 2100,
        "to-null",
        "directory/../file",
        "to-self/comm",
    ):
        existed = os.path.lexists(path)
        fd = tell(f"open {what} {path[:20]}", os.open, path, flags, 0o666)
        if fd is not None:
            os.close(fd)
        if not existed and path.startswith("absent"):
            try:
                os.unlink(path)
            except OSError:
                pass
        open("file", "a").write("more")
fd = tell("open dangling", os.open, "dangling", os.O_CREAT | os.O_WRONLY, 0o666)
print(oct(os.stat("made-by-link").st_mode), os.lstat("dangling").st_size)
print("truncated", os.path.getsize("file") < 30)
directory = os.open("directory", os.O_RDONLY)
at = tell("open at", os.open, "inside", os.O_CREAT | os.O_RDWR, 0o777, dir_fd=directory)
print(oct(os.stat("directory/inside").st_mode))
tell("open at absolute", os.open, os.path.abspath("file"), 0, dir_fd=directory)
tell("open at file", os.open, "x", 0, dir_fd=at)
tell("open at closed", os.open, "x", 0, dir_fd=999)
for path in (
    "/dev/fd/%d" % at,
    "/proc/self/fd/%d" % at,
    "/proc/thread-self/fd/%d" % at,
    "/proc/self/fd/%d/inside" % directory,
    "/proc/self/cwd/file",
    "/proc/self/root/etc/passwd",
    "/proc/self/exe",
    "/proc/self/status",
    "/proc/%d/maps" % os.getpid(),
    "/proc/self/fd",
    "/proc/self/task",
    "/proc/mounts",
    "/proc/net/tcp",
    "/proc/meminfo",
    "/proc/self/nothing",
    "/proc/self/fd/999",
    "to-self/status",
    "to-self/cwd/file",
    "/proc",
    "/proc/self/environ",
    "/proc/%d/cwd/file" % os.getpid(),
):
    fd = tell("open own " + path.replace(str(os.getpid()), "PID")[:14], os.open, path, 0)
    if fd is not None and os.path.isdir(path) is False:
        print(len(os.read(fd, 10)) > 0)
print(open("/proc/self/status").readline().split()[1], str(os.getpid()) in open("/proc/self/status").read())
with open("/proc/self/comm", "w") as comm:
    comm.write("renamed")
print(open("/proc/self/comm").read().strip())
reader, writer = os.pipe()
again = os.open("/dev/fd/%d" % writer, os.O_WRONLY)
os.write(again, b"through")
print(os.read(reader, 10))
unnamed = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666)
os.write(unnamed, b"named")
tell("link unnamed", os.link, "/proc/self/fd/%d" % unnamed, "named", src_dir_fd=directory, follow_symlinks=True)
print(open("named").read(), oct(os.stat("named").st_mode))
deleted = os.open("named", os.O_RDWR)
os.unlink("named")
print(os.read(os.open("/proc/self/fd/%d" % deleted, 0), 10))
if os.fork() == 0:
    os.write(os.open("fifo", os.O_WRONLY), b"from a child")
    os._exit(0)
print(os.read(os.open("fifo", 0), 20))
os.wait()
tell("open fifo nobody", os.open, "fifo", os.O_WRONLY | os.O_NONBLOCK)
bound = socket.socket(socket.AF_UNIX)
bound.bind("socket")
tell("open socket", os.open, "socket", 0)
for what, function, *arguments in (
    ("rename", os.rename, "file", "file2"),
    ("rename over", os.rename, "link", "made-by-link"),
    ("rename absent", os.rename, "absent", "x"),
    ("rename directory over file", os.rename, "directory", "file2"),
    ("rename file over directory", os.rename, "file2", "directory"),
    ("rename into itself", os.rename, "directory", "directory/x"),
    ("rename dot", os.rename, ".", "x"),
    ("rename slash", os.rename, "file2/", "y"),
    ("rename directory slash", os.rename, "directory/", "directory2/"),
    ("rename same", os.rename, "file2", "file2"),
    ("rename empty", os.rename, "", "x"),
    ("rename abroad", os.rename, "file2", "/dev/shm/x"),
    ("link", os.link, "file2", "file3"),
    ("link again", os.link, "file2", "file3"),
    ("link directory", os.link, "directory2", "x"),
    ("link slash", os.link, "file2", "x/"),
    ("symlink", os.symlink, "file2", "symbolic"),
    ("symlink again", os.symlink, "file2", "symbolic"),
    ("symlink empty", os.symlink, "", "x"),
    ("symlink slash", os.symlink, "file2", "x/"),
    ("symlink slash directory", os.symlink, "file2", "directory2/"),
    ("unlink", os.unlink, "file3"),
    ("unlink absent", os.unlink, "file3"),
    ("unlink directory", os.unlink, "directory2"),
    ("unlink dot", os.unlink, "."),
    ("unlink slash", os.unlink, "file2/"),
    ("unlink directory slash", os.unlink, "directory2/"),
    ("unlink root", os.unlink, "/"),
    ("rmdir full", os.rmdir, "directory2"),
    ("rmdir file", os.rmdir, "file2"),
    ("rmdir dot", os.rmdir, "."),
    ("rmdir dots", os.rmdir, ".."),
    ("rmdir root", os.rmdir, "/"),
    ("chmod", os.chmod, "file2", 0o4711),
    ("chmod link", os.chmod, "symbolic", 0o600),
    ("chmod absent", os.chmod, "absent", 0o600),
    ("chmod other", os.chmod, "/etc/passwd", 0o777),
    ("fchmod", os.fchmod, at, 0o604),
    ("fchmod closed", os.fchmod, 999, 0o604),
    ("fchmod pipe", os.fchmod, reader, 0o600),
    ("truncate", os.truncate, "file2", 3),
    ("truncate directory", os.truncate, "directory2", 3),
    ("truncate absent", os.truncate, "absent", 3),
    ("truncate fifo", os.truncate, "fifo", 3),
    ("mknod", os.mknod, "node", 0o100666),
    ("mknod again", os.mknod, "node", 0o100666),
    ("mkfifo", os.mkfifo, "pipe"),
    ("mkfifo again", os.mkfifo, "pipe"),
):
    tell(what, function, *arguments)
print(oct(os.stat("file2").st_mode), os.path.getsize("file2"), oct(os.fstat(at).st_mode), sorted(os.listdir(".")))
path_only = os.open("file2", os.O_PATH)
tell("fchmod path", os.fchmod, path_only, 0o600)
tell("chmod through", os.chmod, "/proc/self/fd/%d" % path_only, 0o640)
print(oct(os.stat("file2").st_mode))
tell("open closed directory", os.open, "directory2", 1)
os.chmod("directory2", 0)
if os.geteuid():
    tell("open no search", os.open, "directory2/inside", 0)
os.chmod("directory2", 0o700)
os.chmod("file2", 0)
if os.geteuid():
    tell("open no permission", os.open, "file2", 0)
if os.geteuid():
    tell("open no write", os.open, "/etc/passwd", 1)
import ctypes

libc = ctypes.CDLL(None, use_errno=True)


def openat2(path, flags=0, mode=0, resolve=0, size=24, extra=b"", dir_fd=-100):
    how = flags.to_bytes(8, "little") + mode.to_bytes(8, "little") + resolve.to_bytes(8, "little") + extra
    fd = libc.syscall(437, dir_fd, path.encode(), how, ctypes.c_size_t(size + len(extra)))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "")
    return fd


os.chmod("file2", 0o600)
for what, options in (
    ("plain", {}),
    ("flags", {"flags": 1 << 40}),
    ("mode", {"mode": 1}),
    ("size", {"size": 8}),
    ("extra", {"extra": bytes(8)}),
    ("more", {"extra": b"x" * 8}),
    ("beneath", {"resolve": 8}),
    ("no links", {"resolve": 4}),
    ("no magic", {"resolve": 2}),
    ("unknown", {"resolve": 1 << 20}),
):
    tell("openat2 " + what, openat2, "file2", **options)
for path in ("symbolic", "../x", "/etc/passwd", "directory2/inside", "to-self/status"):
    for resolve in (2, 4, 8, 16):
        tell(f"openat2 {path} {resolve}", openat2, path, resolve=resolve, dir_fd=os.open(".", os.O_PATH))
tell("openat2 create beneath", openat2, "new", flags=os.O_CREAT | 1, mode=0o666, resolve=8)
resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
fds = []
try:
    while True:
        fds.append(os.open("file2", 0))
except OSError as error:
    print(name(error))
