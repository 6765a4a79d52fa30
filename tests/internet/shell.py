"""A real sshd for the user ``git``, behind a relay that records what reaches it.

The user exists in this mount namespace only: copies of /etc/passwd and its kind are bound over the host's.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.internet import places
from tests.internet.services import sink
from tests.internet.streams import Handler, Stream, splice

PORT = 2222
"""On the loopback of the namespace."""
_CONFIG = """\
ListenAddress 127.0.0.1:{port}
HostKey {keys}/host_key
AuthorizedKeysFile {keys}/authorized_keys
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
AllowUsers {user}
MaxStartups 200
AllowTcpForwarding yes
GatewayPorts yes
AcceptEnv GIT_PROTOCOL
Subsystem sftp internal-sftp
"""
_NEWER = "PerSourcePenalties no\n"
"""From OpenSSH 9.8 on; all clients are one source here."""


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, timeout=10, stdin=subprocess.DEVNULL)


def add_user(directory: Path) -> None:
    """The user ``git`` with its home, for this mount namespace."""
    home = directory / "home"
    home.mkdir(mode=0o755)
    lines = {
        "passwd": f"{places.GIT_USER}:x:{places.GIT_ID}:{places.GIT_ID}::{home}:/bin/sh\n",
        "group": f"{places.GIT_USER}:x:{places.GIT_ID}:\n",
        "shadow": f"{places.GIT_USER}:*:19000:0:99999:7:::\n",
    }
    for name, line in lines.items():
        host = Path("/etc") / name
        copy = directory / "etc" / name
        copy.parent.mkdir(mode=0o700, exist_ok=True)
        copy.touch(0o600 if name == "shadow" else 0o644)
        text = host.read_text(errors="surrogateescape") if host.exists() else ""
        text = "".join(f"{old}\n" for old in text.splitlines() if not old.startswith(places.GIT_USER + ":"))
        copy.write_text(text + line, errors="surrogateescape")
        if host.exists():
            _mount("--bind", str(copy), str(host))
    # Also hides the sockets of the host's own user databases.
    _mount("-t", "tmpfs", "-o", "mode=0755,size=16m", "tmpfs", "/run")
    Path("/run/sshd").mkdir(mode=0o755)
    shutil.chown(home, places.GIT_ID, places.GIT_ID)


def _key(path: Path) -> str:
    """A new key in this file; returns the public half, as a line of authorized_keys."""
    key = Ed25519PrivateKey.generate()
    path.touch(0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


def start(directory: Path) -> Handler:
    """Starts sshd; the handler relays to it. Without an sshd on this machine, a sink."""
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if program is None:
        return sink
    keys = directory / "ssh"
    keys.mkdir(mode=0o755)
    (keys / "host_key.pub").write_text(_key(keys / "host_key"))
    (keys / "authorized_keys").write_text(_key(keys / "client_key") + "\n")
    config = keys / "sshd_config"
    text = _CONFIG.format(port=PORT, keys=keys, user=places.GIT_USER)
    config.write_text(text + _NEWER)
    if subprocess.run([program, "-t", "-f", str(config)], timeout=10, capture_output=True).returncode:
        config.write_text(text)
    with (directory / "sshd.log").open("wb") as log:
        subprocess.Popen([program, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    async def relay(stream: Stream) -> None:
        for _ in range(100):
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
                return await splice(stream, reader, writer)
            except ConnectionRefusedError:
                await asyncio.sleep(0.05)
        stream.note("sshd does not answer")

    return relay


def described(directory: Path) -> dict[str, str]:
    """For internet.json; both empty where there is no sshd."""
    keys = directory / "ssh"
    if not keys.exists():
        return {"ssh_key": "", "known_hosts": ""}
    public = (keys / "host_key.pub").read_text()
    lines = []
    for place in places.PLACES.values():
        for port, service in place.ports:
            for host in (place.ipv4, place.ipv6, *place.names) if service == "ssh" else ():
                lines.append(f"{host if port == 22 else f'[{host}]:{port}'} {public}\n")
    return {"ssh_key": (keys / "client_key").read_text(), "known_hosts": "".join(lines)}
