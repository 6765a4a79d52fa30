"""git.test: repositories over smart HTTP (git-http-backend), the same that ssh gives as ``git@git.test:hello.git``.

``hello.git`` is for everybody, to read and to push; ``private.git`` only for the holder of the token.
"""

from __future__ import annotations

import asyncio
import base64
import subprocess
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path

from tests.internet import places
from tests.internet.web import Asked, Response, Site

NAMES = ("hello", "private")
_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "far end"), ("EMAIL", "git@git.test"), ("DATE", "2026-01-01T00:00:00Z"))
}


def _environment(home: Path) -> dict[str, str]:
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "LC_ALL": "C",
    }


def _make(home: Path) -> None:
    script = """
set -eu
git init -q -b main work
cd work
echo 'hello from git.test' >README
git add README
git commit -q -m 'One file'
cd ..
for name in hello private; do
  git clone -q --bare work $name.git
  git -C $name.git config http.receivepack true
done
rm -rf work
"""
    environment = {**_environment(home), **_IDENTITY}
    subprocess.run(
        ["/bin/sh", "-c", script],
        check=True,
        timeout=20,
        cwd=home,
        env=environment,
        user=places.GIT_ID,
        group=places.GIT_ID,
        extra_groups=[],
        stdin=subprocess.DEVNULL,
    )


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Status and headers of a CGI answer (RFC 3875 §6)."""
    status, headers = 200, []
    while line := (await reader.readline()).decode("latin-1").strip():
        key, _, value = line.partition(":")
        if key.lower() == "status":
            status = int(value.split()[0])
        else:
            headers.append((key, value.strip()))
    return status, tuple(headers)


def start(directory: Path) -> Site:
    """The repositories, and the site that gives them."""
    home = directory / "home"
    _make(home)
    basic = base64.b64encode(f"x-access-token:{places.TOKEN}".encode()).decode()

    async def site(asked: Asked) -> Response:
        request = asked.request
        known = request.header("authorization") in (f"Basic {basic}", f"Bearer {places.TOKEN}")
        if asked.path.startswith("/private") and not known:
            return Response(401, b"who are you?\n", (("www-authenticate", 'Basic realm="git.test"'),))
        body = await asked.whole()
        environment = {
            **_environment(home),
            "GIT_PROJECT_ROOT": str(home),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": request.method,
            "PATH_INFO": asked.path,
            "QUERY_STRING": urllib.parse.urlsplit(request.target).query,
            "CONTENT_TYPE": request.header("content-type") or "",
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": request.header("content-encoding") or "",
            "GIT_PROTOCOL": request.header("git-protocol") or "",
            "REMOTE_USER": "x-access-token" if known else "",
            "REMOTE_ADDR": places.HOST4,
        }
        if "\0" in "".join(environment.values()):
            return Response(400, b"NUL\n")
        process = await asyncio.create_subprocess_exec(
            "git",
            "http-backend",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
            user=places.GIT_ID,
            group=places.GIT_ID,
            extra_groups=[],
            limit=1 << 20,
        )
        assert process.stdin is not None and process.stdout is not None
        output = process.stdout

        async def feed() -> None:
            assert process.stdin is not None
            try:
                process.stdin.write(body)
                await process.stdin.drain()
            except OSError:
                pass
            process.stdin.close()

        feeding = asyncio.create_task(feed())

        async def rest() -> AsyncIterator[bytes]:
            try:
                while data := await output.read(65536):
                    yield data
            finally:
                feeding.cancel()
                if process.returncode is None:
                    try:
                        async with asyncio.timeout(5):
                            await process.wait()
                    except TimeoutError:
                        process.kill()

        status, headers = await _read_head(output)
        return Response(status, rest(), headers)

    return site
