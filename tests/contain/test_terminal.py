"""Interactive programs, driven through a real terminal as a person at a shell would drive them."""

from __future__ import annotations

import fcntl
import os
import re
import select
import shlex
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.contain.command_line import CommandLine, adopting_orphans
from tests.contain.conftest import wait_until

LIMIT = 30.0
PROMPT = "PROMPT> "


class Screen:
    """A terminal with a program on it as the foreground job of a minimal shell, our child, which sees it stop."""

    def __init__(self, words: list[str], *, env: dict[str, str], cwd: Path, rows: int = 24, columns: int = 80) -> None:
        self.master, slave = os.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(slave)
        self.tty = os.ttyname(slave)
        self.seen = b""
        self._at = 0
        self._status_reader, status_writer = os.pipe()
        self.shell = os.fork()
        if self.shell == 0:
            try:
                self._become_shell(slave, status_writer, words, env, cwd)
            finally:
                os._exit(99)
        os.close(status_writer)
        self._slave = slave
        (self.job,) = struct.unpack("i", os.read(self._status_reader, 4))

    def _become_shell(self, slave: int, status: int, words: list[str], env: dict[str, str], cwd: Path) -> None:
        """A shell as small as can be: one job in the foreground; whatever becomes of it is written to ``status``."""
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in range(3):
            os.dup2(slave, fd)
        job = os.fork()
        if job == 0:
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpid())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
            os.chdir(cwd)
            os.closerange(3, 256)
            os.execvpe(words[0], words, env)  # noqa: S606
        with suppress(OSError):
            os.setpgid(job, job)

        def fg(*_: object) -> None:
            os.tcsetpgrp(0, job)  # first the terminal, then the signal
            os.kill(-job, signal.SIGCONT)

        signal.signal(signal.SIGUSR1, fg)
        os.write(status, struct.pack("i", job))
        while True:
            _, code = os.waitpid(job, os.WUNTRACED | os.WCONTINUED)
            if os.WIFSTOPPED(code):
                os.tcsetpgrp(0, os.getpid())
            os.write(status, struct.pack("i", code))
            if os.WIFEXITED(code) or os.WIFSIGNALED(code):
                os._exit(0)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, limit: float = LIMIT) -> re.Match[bytes]:
        """The first place after the last one found; fails with what is on the screen."""
        wanted = re.compile(pattern.encode())
        deadline = time.monotonic() + limit
        while not (found := wanted.search(self.seen, self._at)):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} did not appear in {self.seen[self._at :]!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.seen += os.read(self.master, 1 << 16)
                except OSError:
                    pytest.fail(f"{pattern!r} did not appear in {self.seen[self._at :]!r} before the end")
        self._at = found.end()
        return found

    def next_status(self) -> int:
        """What waitpid(2) tells the shell next; output is taken meanwhile, or nobody could finish."""
        deadline = time.monotonic() + LIMIT
        while True:
            ready = select.select([self.master, self._status_reader], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"nothing became of it: {self.seen[-2000:]!r}"
            if self._status_reader in ready:
                return int(struct.unpack("i", os.read(self._status_reader, 4))[0])
            with suppress(OSError):
                self.seen += os.read(self.master, 1 << 16)

    def exit_code(self) -> int:
        status = self.next_status()
        while os.WIFCONTINUED(status):
            status = self.next_status()
        assert not os.WIFSTOPPED(status), f"it was stopped: {self.seen[-500:]!r}"
        return os.waitstatus_to_exitcode(status)

    def modes(self) -> list[object]:
        return termios.tcgetattr(self._slave)

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self._slave)[3] & termios.ICANON

    def close(self) -> None:
        for pid in (self.job, self.shell):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.waitpid(self.shell, 0)
        for fd in (self.master, self._slave, self._status_reader):
            os.close(fd)


Open = Callable[..., Screen]


@pytest.fixture
def cli(tmp_path: Path, workspace: Path) -> Iterator[CommandLine]:
    with adopting_orphans():
        yield CommandLine(tmp_path, workspace)


@pytest.fixture
def screen(cli: CommandLine) -> Iterator[Open]:
    """Opens `corral run WORDS` on a terminal of its own."""
    opened: list[Screen] = []

    def make(*words: str, **size: int) -> Screen:
        env = cli.env | {"PS1": PROMPT, "TERM": "xterm"}
        options = ["--env", "PS1"] if "--" in words else []
        made = Screen([*cli.command, "run", *options, *words], env=env, cwd=cli.workspace, **size)
        opened.append(made)
        return made

    yield make
    for each in opened:
        each.close()


BASH = ("--", "bash", "--norc", "-i")


# ---- a shell ----


def test_a_shell_with_a_prompt_and_an_exit_code(screen: Open, cli: CommandLine) -> None:
    bash = screen(*BASH)
    bash.wait_for(PROMPT)
    bash.type("echo $((6*7)); pwd; touch made-inside\r")
    bash.wait_for("[\r\n]42\r\n")
    bash.wait_for(re.escape(str(cli.workspace)))
    bash.wait_for(PROMPT)
    bash.type("exit 17\r")
    assert bash.exit_code() == 17
    assert bash.modes() == bash.before
    assert re.search(b"[12] changes? kept", bash.seen) and not (cli.workspace / "made-inside").exists()


def test_job_control_inside(screen: Open) -> None:
    bash = screen(*BASH)
    bash.wait_for(PROMPT)
    bash.type("sleep 1000\r")
    time.sleep(0.3)
    bash.type("\x1a")  # stops the child; bash goes on
    bash.wait_for(r"Stopped +sleep 1000")
    bash.wait_for(PROMPT)
    bash.type("jobs; bg\r")
    bash.wait_for(r"\[1\]\+ sleep 1000 &")
    bash.wait_for(PROMPT)
    bash.type("jobs\r")
    bash.wait_for(r"Running +sleep 1000")
    bash.type("fg\r")
    bash.wait_for(r"[\r\n]sleep 1000\r")
    time.sleep(0.3)
    bash.type("\x03")
    bash.wait_for(PROMPT)
    bash.type("echo code $?\r")
    bash.wait_for("[\r\n]code 130\r\n")
    bash.type("exit 0\r")
    assert bash.exit_code() == 0


def test_ctrl_c_ends_the_job_but_not_the_shell(screen: Open) -> None:
    bash = screen(*BASH)
    for _ in range(6):  # more often than `corral` itself would put up with
        bash.wait_for(PROMPT)
        bash.type("sleep 1000\r")
        time.sleep(0.2)
        bash.type("\x03")
    bash.wait_for(PROMPT)
    bash.type("exit 3\r")
    assert bash.exit_code() == 3


# ---- the job seen from outside ----


def test_ctrl_c_gives_130_and_the_terminal_back(screen: Open) -> None:
    job = screen("--", "sh", "-c", "echo ready; exec sleep 1000")
    job.wait_for("ready\r\n")
    assert job.is_raw()
    job.type("\x03")
    assert job.exit_code() == 130
    assert job.modes() == job.before


def test_ctrl_z_stops_corral_as_a_job_and_fg_goes_on(screen: Open) -> None:
    # Not sh: dash vforks, and a child that is stopped before it executes keeps its parent from stopping at all.
    job = screen("--", "bash", "-c", "echo ready; while :; do sleep 0.1; echo tick; done")
    job.wait_for("ready\r\n")
    for _ in range(3):
        job.wait_for("tick")
        job.type("\x1a")
        status = job.next_status()
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGTSTP
        assert job.modes() == job.before, "a stopped job must leave the terminal as the shell wants it"
        job.seen, job._at = b"", 0
        time.sleep(0.5)
        with suppress(BlockingIOError):
            os.set_blocking(job.master, False)
            job.seen += os.read(job.master, 1 << 16)
        os.set_blocking(job.master, True)
        assert job.seen.count(b"tick") <= 1, "the command ran on"
        job.seen, job._at = b"", 0
        os.kill(job.shell, signal.SIGUSR1)
        assert os.WIFCONTINUED(job.next_status())
        job.wait_for("tick")
        assert wait_until(job.is_raw)
    job.type("\x03")
    assert job.exit_code() == 130 and job.modes() == job.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_given_back_after_a_signal(screen: Open, number: signal.Signals) -> None:
    job = screen("--", "sh", "-c", "echo ready; exec sleep 1000")
    job.wait_for("ready")
    assert wait_until(job.is_raw)
    os.kill(job.job, number)
    assert job.exit_code() == 128 + number
    assert job.modes() == job.before


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.08, 0.12, 0.2])
def test_the_terminal_is_given_back_after_ctrl_c_during_the_start(screen: Open, delay: float) -> None:
    for _ in range(10):
        job = screen("--", "sleep", "1000")
        time.sleep(delay)
        while True:
            job.type("\x03")
            if select.select([job._status_reader], [], [], 0.3)[0]:
                break
        code = job.exit_code()
        assert job.modes() == job.before
        if code != 1:
            break
        # The C interpreter met it before it was ready, and says so: that run tells nothing of ours.
        job.wait_for("Fatal Python error: init_")
    assert code in (130, -signal.SIGINT)


# ---- what the command sees ----


def test_the_command_has_a_terminal_of_the_sandboxs_own(screen: Open) -> None:
    script = "import os; f=open('/dev/tty','w'); print('isatty', *map(os.isatty, range(3)), f.isatty())"
    job = screen("--", "sh", "-c", f"tty; python3 -c {shlex.quote(script)}; echo to-tty >/dev/tty; ps -o tty= -p $$")
    name = job.wait_for(r"(/dev/pts/\d+)\r\n")[1].decode()
    job.wait_for("isatty True True True True\r\n")
    job.wait_for("to-tty\r\n")
    job.wait_for(name.removeprefix("/dev/") + r" *\r\n")
    assert job.exit_code() == 0
    assert name == "/dev/pts/0", "the number is the sandbox's, not the host's"


def test_the_window_size_and_its_changes_pass_in(screen: Open) -> None:
    script = "trap 'stty size' WINCH; stty size; while :; do sleep 0.05; done"
    job = screen("--", "sh", "-c", script, rows=31, columns=97)
    job.wait_for("31 97\r\n")
    for rows, columns in ((40, 120), (5, 10)):
        job.resize(rows, columns)
        job.wait_for(f"{rows} {columns}\r\n")
    job.type("\x03")
    assert job.exit_code() == 130


def test_terminal_modes_of_the_caller_pass_in(screen: Open) -> None:
    job = screen("--", "sh", "-c", "stty -a; read line; echo got $line")
    job.wait_for("intr = \\^C;")
    job.type("no\x15yes\r")  # ^U kills the line, inside
    job.wait_for("got yes\r\n")
    assert job.exit_code() == 0


def test_pipes_when_asked_for(screen: Open, cli: CommandLine) -> None:
    job = screen("-T", "--", "sh", "-c", "test -t 0 || echo no terminal; (: </dev/tty) || echo none at all")
    job.wait_for("no terminal\r\n")
    job.wait_for("none at all\r\n")
    assert job.exit_code() == 0 and job.modes() == job.before


def test_a_terminal_where_there_is_none(cli: CommandLine) -> None:
    done = cli.run("-t", "--", "sh", "-c", "tty; test -t 0 && test -t 1 && test -t 2 && echo all", stdin=b"")
    assert done.stdout == b"/dev/pts/0\r\nall\r\n" and done.returncode == 0
    started = time.monotonic()
    process = cli.start("run", "-t", "--", "yes")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()  # hangs the terminal up
    assert process.wait(LIMIT) == 128 + signal.SIGHUP and time.monotonic() - started < LIMIT
    process.communicate()


def test_exec_gives_a_terminal_too(cli: CommandLine, screen: Open) -> None:
    with cli.live("--", "sleep", "1000") as (name, _):
        shell = Screen([*cli.command, "exec", name, "bash", "--norc", "-i"], env=cli.env, cwd=cli.workspace)
        try:
            shell.wait_for(r"\$ ")
            shell.type("tty; stty size\r")
            shell.wait_for(r"/dev/pts/\d+\r\n24 80\r\n")
            shell.type("sleep 1000\r")
            time.sleep(0.3)
            shell.type("\x1a")
            shell.wait_for("Stopped")
            shell.type("exit\rexit 5\r")
            assert shell.exit_code() == 5
            assert shell.modes() == shell.before
        finally:
            shell.close()


# ---- full-screen programs ----


def test_vim_edits_a_file_of_the_layer_only(screen: Open, cli: CommandLine) -> None:
    vim = screen("--", "vim", "-u", "NONE", "file.txt")
    vim.wait_for("original")
    vim.type("Gonew line\x1b")
    time.sleep(0.2)
    vim.type(":wq\r")
    assert vim.exit_code() == 0
    assert vim.modes() == vim.before
    assert (cli.workspace / "file.txt").read_text() == "original\n"
    assert b"+new line\n" in cli("diff", "--patch").stdout


def test_less_pages(screen: Open, cli: CommandLine) -> None:
    (cli.workspace / "long").write_text("".join(f"line {number}.\n" for number in range(1000)))
    (cli.workspace / "long").chmod(0o644)
    less = screen("--", "less", "long")
    less.wait_for(r"line 22\.")
    less.type(" ")
    less.wait_for(r"line 44\.")
    less.type("G")
    less.wait_for(r"line 999\.")
    less.type("q")
    assert less.exit_code() == 0 and less.modes() == less.before


def test_tmux(screen: Open, cli: CommandLine) -> None:
    tmux = screen("--env", "SHELL=/bin/sh", "--", "tmux", "-f", "/dev/null", "new-session", "-s", "work")
    tmux.wait_for(r"\[work\]")
    tmux.type("tmux split-window; echo in-$((40+2))\r")
    tmux.wait_for("in-42")
    tmux.type("tmux kill-server\r")
    assert tmux.exit_code() in (0, 1)  # 1: its server was killed
    assert tmux.modes() == tmux.before


def test_a_python_prompt(screen: Open) -> None:
    python = screen("--", os.path.realpath(sys.executable), "-q")
    python.wait_for(">>> ")
    python.type("6 * 7\r")
    python.wait_for("\r\n42\r\n")
    python.wait_for(">>> ")
    python.type("wrong\x01right = 5; x\x0b\r")  # readline: ^A to the beginning, ^K kills to the end
    python.wait_for(">>> ")
    python.type("import sys; sys.stdout.isatty() and sys.exit(6)\r")
    assert python.exit_code() == 6
    assert python.modes() == python.before


# ---- when there is no room for what it has changed ----

FULL = """
import os
from corral.sandbox import copying
copying.spare_bytes = lambda fd: -1 if os.path.exists("full") else 1 << 40
"""


@pytest.mark.parametrize("how", ["room is made", "ctrl-c"])
def test_what_cannot_be_kept_waits_for_the_person_at_the_terminal(cli: CommandLine, how: str) -> None:
    (cli.workspace / "full").touch()
    words = [sys.executable, "-c", f"{FULL}from corral.cli import main; main()", "run", "--", "sh", "-c", "echo 1 >new"]
    screen = Screen(words, env=cli.env, cwd=cli.workspace)
    try:
        screen.wait_for("still in memory, and this is tried again")
        layers = cli.state / "corral" / "layers"
        assert not list(layers.glob("*/"))
        if how == "room is made":
            (cli.workspace / "full").unlink()
            screen.wait_for("1 change kept")
            assert screen.exit_code() == 0
        else:
            screen.type("\x03")
            screen.wait_for("were not kept, and are lost")
            assert screen.exit_code() == 130
            assert not list(layers.glob("*/"))
    finally:
        screen.close()


def test_where_nobody_is_what_cannot_be_kept_is_told(cli: CommandLine) -> None:
    (cli.workspace / "full").touch()
    cli.command = [sys.executable, "-c", f"{FULL}from corral.cli import main; main()"]
    done = cli.run("--", "sh", "-c", "echo 1 >new")
    assert done.returncode == 125
    assert b"make room" in done.stderr and b"They are lost" in done.stderr
