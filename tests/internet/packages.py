"""pypi.test, npm.test and apt.test: one tiny package each, ``corral-hello`` 1.0.0, made in memory."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Mapping

from tests.internet.web import Asked, Response, Site

NAME, VERSION = "corral-hello", "1.0.0"
WHEEL = f"corral_hello-{VERSION}-py3-none-any.whl"
GREETING = "hello from a package"


def _static(files: Mapping[str, tuple[str, bytes]]) -> Site:
    async def site(asked: Asked) -> Response:
        found = files.get(asked.path)
        if found is None:
            return Response(404, b"no such file\n")
        kind, body = found
        return Response(
            body=body, headers=(("content-type", kind), ("etag", f'"{hashlib.sha256(body).hexdigest()[:16]}"'))
        )

    return site


def _tar(files: Mapping[str, bytes], prefix: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(buffer.getvalue(), mtime=0)


def wheel() -> bytes:
    """A wheel with one module."""
    info = f"corral_hello-{VERSION}.dist-info"
    files = {
        "corral_hello.py": f"print({GREETING!r})\n".encode(),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: corral\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


def pypi() -> Site:
    """https://pypi.test/simple/ (PEP 503)."""
    data = wheel()
    link = f'<a href="/files/{WHEEL}#sha256={hashlib.sha256(data).hexdigest()}">{WHEEL}</a>'
    return _static(
        {
            "/simple/": ("text/html", f'<!DOCTYPE html><a href="/simple/{NAME}/">{NAME}</a>'.encode()),
            f"/simple/{NAME}/": ("text/html", f"<!DOCTYPE html>{link}".encode()),
            f"/files/{WHEEL}": ("application/octet-stream", data),
        }
    )


def npm() -> Site:
    """https://npm.test/"""
    package = {"name": NAME, "version": VERSION, "main": "index.js"}
    data = _tar(
        {"package.json": json.dumps(package).encode(), "index.js": f"console.log({GREETING!r})\n".encode()}, "package/"
    )
    place = f"/{NAME}/-/{NAME}-{VERSION}.tgz"
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    told = {
        "name": NAME,
        "dist-tags": {"latest": VERSION},
        "versions": {VERSION: {**package, "dist": {"tarball": f"https://npm.test{place}", "integrity": integrity}}},
    }
    return _static(
        {
            f"/{NAME}": ("application/json", json.dumps(told).encode()),
            place: ("application/octet-stream", data),
        }
    )


def debian_package() -> bytes:
    """A .deb (deb(5)) of one file, for any architecture."""
    control = (
        f"Package: {NAME}\nVersion: {VERSION}\nArchitecture: all\nMaintainer: far end <git@git.test>\n"
        f"Description: {GREETING}\n"
    )
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.gz": _tar({"control": control.encode()}, "./"),
        "data.tar.gz": _tar({"usr/share/corral-hello/hello": f"{GREETING}\n".encode()}, "./"),
    }
    archive = b"!<arch>\n"
    for name, data in members.items():
        archive += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) & 1)
        )
    return archive


def apt() -> Site:
    """http://apt.test/debian stable main, unsigned: ``deb [trusted=yes] ...``."""
    data = debian_package()
    pool = f"pool/main/{NAME}_{VERSION}_all.deb"
    listed = (
        f"Package: {NAME}\nVersion: {VERSION}\nArchitecture: all\nMaintainer: far end <git@git.test>\n"
        f"Filename: {pool}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
        f"Description: {GREETING}\n\n"
    ).encode()
    files: dict[str, bytes] = {}
    for architecture in ("amd64", "arm64"):
        files[f"main/binary-{architecture}/Packages"] = listed
        files[f"main/binary-{architecture}/Packages.gz"] = gzip.compress(listed, mtime=0)
    sums = "".join(f" {hashlib.sha256(body).hexdigest()} {len(body)} {name}\n" for name, body in files.items())
    release = (
        "Origin: far end\nSuite: stable\nCodename: stable\nArchitectures: amd64 arm64\nComponents: main\n"
        f"Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n{sums}"
    ).encode()
    stable = "/debian/dists/stable/"
    return _static(
        {
            stable + "Release": ("text/plain", release),
            **{stable + name: ("application/octet-stream", body) for name, body in files.items()},
            f"/debian/{pool}": ("application/vnd.debian.binary-package", data),
        }
    )
