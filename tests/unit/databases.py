"""Real database servers for tests: private ones, on loopback, in a directory of their own, gone with the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pymysql

PASSWORD = "canary-6b1f0d5e-password"
"""Of the user that the broker logs in as: must be nowhere but there."""


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs."""

    port: int
    directory: Path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _user(name: str) -> dict[str, Any]:
    """As whom a server runs: neither likes to be root."""
    if os.getuid() != 0:
        return {}
    entry = pwd.getpwnam(name)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _directory(name: str, user: str) -> Path:
    path = Path(tempfile.mkdtemp(prefix=f"corral-{name}-", dir="/tmp"))
    if os.getuid() == 0:
        shutil.chown(path, user)
    return path


def _run(*argv: str, user: str) -> None:
    done = subprocess.run(argv, capture_output=True, cwd="/", **_user(user), check=False)
    assert done.returncode == 0, f"{argv[0]}: {done.stderr.decode()[-2000:]}"


def _stop(process: subprocess.Popen[bytes], directory: Path) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def postgresql() -> Iterator[Server]:
    """PostgreSQL; `admin` may everything without a password, from this machine."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    assert binaries, "PostgreSQL is not installed: apt-get install postgresql (the Makefile's TEST_PACKAGES)"
    directory, port = _directory("pg", "postgres"), free_port()
    data = directory / "data"
    _run(
        *(str(binaries[-1] / "initdb"), "-D", str(data), "-U", "admin", "-A", "trust", "--no-sync"),
        *("-E", "UTF8", "--locale", "C.UTF-8"),
        user="postgres",
    )
    (data / "pg_hba.conf").write_text(
        "host all admin 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n", encoding="utf-8"
    )
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [
                *(str(binaries[-1] / "postgres"), "-D", str(data), "-p", str(port), "-h", "127.0.0.1"),
                *("-k", str(directory), "-c", "fsync=off", "-c", "max_connections=200", "-c", "shared_buffers=32MB"),
            ],
            stdout=log,
            stderr=log,
            cwd="/",
            **_user("postgres"),
        )
    try:
        _await(process, directory, lambda: psycopg.connect(admin(port)).close())
        yield Server(port, directory)
    finally:
        _stop(process, directory)


def admin(port: int, database: str = "postgres") -> str:
    return f"host=127.0.0.1 port={port} user=admin dbname={database}"


@contextmanager
def mariadb() -> Iterator[Server]:
    """MariaDB; `root` may everything without a password, from this machine."""
    server = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin")
    install = shutil.which("mariadb-install-db")
    assert server and install, "MariaDB is not installed: apt-get install mariadb-server (the Makefile's TEST_PACKAGES)"
    directory, port = _directory("maria", "mysql"), free_port()
    _run(
        *(install, "--no-defaults", f"--datadir={directory}/data", "--auth-root-authentication-method=normal"),
        *("--skip-test-db", "--skip-name-resolve"),
        user="mysql",
    )
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [
                *(server, "--no-defaults", f"--datadir={directory}/data", f"--port={port}"),
                *(f"--socket={directory}/socket", "--bind-address=127.0.0.1", "--skip-name-resolve"),
                *(f"--pid-file={directory}/pid", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"),
            ],
            stdout=log,
            stderr=log,
            cwd="/",
            **_user("mysql"),
        )
    try:
        _await(process, directory, lambda: maria_root(port).close())
        yield Server(port, directory)
    finally:
        _stop(process, directory)


def maria_root(port: int, database: str | None = None) -> Any:
    return pymysql.connect(host="127.0.0.1", port=port, user="root", database=database, autocommit=True)


def _await(process: subprocess.Popen[bytes], directory: Path, connect: Any) -> None:
    for _ in range(300):
        assert process.poll() is None, (directory / "log").read_text(errors="replace")[-2000:]
        try:
            connect()
        except (psycopg.OperationalError, pymysql.err.OperationalError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not start")
