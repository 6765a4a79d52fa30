"""`corral log content`, `erase` and `encrypt`: what is kept beside a log."""

from __future__ import annotations

import json
import os
import pwd
import sys
import time
from collections.abc import Sequence

from corral.cli.foreground import printable
from corral.cli.log import directory_of
from corral.errors import RequestError
from corral.log import payload_keys
from corral.log.events import PayloadErased
from corral.log.places import erase_payloads, expired_payloads, open_payloads, payload_key_path, payloads_path

MAX_WHY = 1000


def show(digest: str | None, log: str | None, *, as_json: bool) -> None:
    """Writes one content to stdout as it is; without a digest, lists what there is."""
    payloads = open_payloads(directory_of(log))
    if digest is not None:
        data = payloads.read(digest)
        if sys.stdout.isatty():
            # An agent wrote it: it is not to draw on this terminal.
            sys.stdout.write(printable(data.decode("utf-8", "replace")) + "\n")
        else:
            sys.stdout.buffer.write(data)
        return
    found = list(payloads.all())
    if as_json:
        rows = [{"digest": each.digest, "content": each.content.value, "expires": each.expires} for each in found]
        print(json.dumps(rows))
        return
    for each in found:
        until = time.strftime("%Y-%m-%d", time.gmtime(each.expires))
        print(printable(f"{each.digest}  {each.content.value:12}  until {until}"))


def erase(digests: Sequence[str], log: str | None, *, expired: bool, why: str, by: str | None, as_json: bool) -> None:
    """Erases contents, and records who did it and why."""
    if not why.strip() or len(why) > MAX_WHY:
        raise RequestError(f"--why: say why, in at most {MAX_WHY} characters; it is recorded")
    if bool(digests) == expired:
        raise RequestError("name the contents to erase, or pass --expired")
    directory = directory_of(log)
    if expired:
        open_payloads(directory).sweep()
        wanted = expired_payloads(directory, time.time())
    else:
        wanted = list(dict.fromkeys(digests))
    erase_payloads(directory, [PayloadErased(digest, by or _user(), why) for digest in wanted])
    if as_json:
        print(json.dumps(wanted))
    else:
        for digest in wanted:
            print(printable(f"erased {digest}"))


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def encrypt(log: str | None) -> None:
    """Makes the key with which all is encrypted that is kept from now on."""
    directory = directory_of(log)
    path = payload_key_path(directory)
    payload_keys.encrypt(payloads_path(directory), path)
    print(printable(f"made {path}; without it nothing that is kept from now on can be read"))
