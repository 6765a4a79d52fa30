"""What miners say to a pool: Stratum and the other dialects of JSON-RPC, a message on each line.

Known by the method (``mining.subscribe``, ``eth_submitLogin``, ...) or, where that is a common word (``login``,
``submit``), by what stands beside it. Stratum V2 is encrypted from its first byte on and looks like nothing.
"""

from __future__ import annotations

import json
import re

_METHODS = (
    rb"mining\.[a-z_.]{1,40}|eth_submit[A-Za-z]{1,20}|eth_get[Ww]ork|eth_login|client\.get_version|getblocktemplate|"
    rb"getjob|getwork|submitblock|keepalived"
)
_METHOD = re.compile(_METHODS, re.IGNORECASE)
_COMMON = {
    "login": {"login", "rigid", "worker", "agent", "algo"},
    "submit": {"job_id", "nonce"},
    "job": {"job_id", "blob"},
}
"""Methods that others have too, with names of parameters that make them a miner's."""

_HIDDEN = rb"\\u00(?:[46][1-9A-Fa-f]|[57][0-9Aa])"
"""A letter of ASCII written as ``\\u006d``: no program writes so, only who hides a word does."""
_KEY = b"".join(rb"(?:%c|\\u00(?i:%02x))" % (letter, letter) for letter in b"method") + rb'"\s{0,8}:\s{0,8}"'
SAID = (
    rb'"(?:' + _KEY + rb"(?:(?:" + _METHODS + rb')"|[^"\n]{0,40}' + _HIDDEN + rb"|"
    rb'login"[^\n]{0,100}"(?:login|rigid|agent)"\s{0,8}:)|'
    rb'(?:login|rigid|agent)"\s{0,8}:[^\n]{0,100}"method"\s{0,8}:\s{0,8}"login"|'
    rb'blob"\s{0,8}:\s{0,8}"[0-9A-Fa-f]{60,300}"\s{0,8},\s{0,8}"(?:job_id|target|algo)"|'
    rb'job_id"\s{0,8}:\s{0,8}"[^"\n]{1,80}"\s{0,8},\s{0,8}"blob")'
)
"""A pattern (regular expression of bytes, at most 512 long) for the same where no JSON can be parsed. A literal byte
comes first: then a search is quick."""

_SAID = re.compile(SAID)


_DECODER = json.JSONDecoder(strict=False)


def value_length(line: bytes) -> int:
    """Bytes of the object or list that a line begins with; 0 where it does not end there."""
    try:
        return _DECODER.raw_decode(line.decode("latin-1"))[1]
    except (ValueError, RecursionError):
        return 0


def miner(line: bytes) -> str:
    """What in a line of JSON makes its sender a miner; ``""`` where nothing does."""
    found = "mining" if _SAID.search(line) else ""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return found
    for message in said[:100] if isinstance(said, list) else [said]:
        if isinstance(message, dict) and (method := _method(message)):
            return method
    return found


def _method(message: dict[str, object]) -> str:
    """The message's method where it is a miner's."""
    method = message.get("method")
    if not isinstance(method, str):
        return ""
    if _METHOD.fullmatch(method.encode("utf-8", "replace")):
        return method
    beside = set(message)
    parameters = message.get("params")
    for item in parameters if isinstance(parameters, list) else [parameters]:
        if isinstance(item, dict):
            beside |= set(item)
    return method if not _COMMON.get(method.lower(), set()).isdisjoint(beside) else ""
