"""What `corral log ...` does: verifies, proves, signs. It only prints what :mod:`corral.log` says."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from corral.cli.foreground import complain, printable
from corral.errors import RequestError
from corral.log.gaps import Gaps
from corral.log.holdings import Holdings
from corral.log.merkle import ProofError
from corral.log.note import KeyFile, KeyType, NoteError, Verifier, parse_verifier
from corral.log.pkcs11_key import Pkcs11Key, read_signer
from corral.log.places import open_payloads, payloads_path, rotate_key
from corral.log.proof import MAX_PROOF_FILE, check_proof, make_proof, parse_proof
from corral.log.signing import CHECKPOINT, read_keys
from corral.log.verify import Report, verify_between, verify_log
from corral.sandbox.paths import state_directory

_MAX_FILE = 1 << 20


def default_log() -> Path:
    """The log of this user."""
    return Path(state_directory()) / "log"


def directory_of(name: str | None) -> Path:
    """The log that was named, or that of this user. Raises RequestError where there is none."""
    directory = Path(name) if name else default_log()
    if not (directory / "keys").is_file():
        raise RequestError(f"{directory}: there is no log; `corral run --log ... -- COMMAND` begins one")
    return directory


def trusted_keys(directory: Path, given: Sequence[str]) -> tuple[Verifier, ...]:
    """The keys that were given, or, with a word about what that is worth, those that the log names itself."""
    if given:
        return tuple(parse_verifier(each) for each in given)
    complain("trusting the keys that the log itself names; an outsider passes --key, with the key from elsewhere")
    return read_keys(directory)


def _content(path: str, limit: int = _MAX_FILE) -> bytes:
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    if len(content) > limit:
        raise RequestError(f"{path}: it is too long")
    return content


# ---- verify ----


def verify(
    log: str | None,
    *,
    keys: Sequence[str],
    witnesses: Sequence[str],
    quorum: int,
    earlier: Sequence[str],
    as_json: bool,
) -> int:
    """Verifies a whole log. Returns the exit code: 1 where something is not as it must be."""
    directory = directory_of(log)
    kept = [_content(path) for path in earlier]
    known = [parse_verifier(each) for each in witnesses]
    trusted = trusted_keys(directory, keys)
    look = Holdings(Gaps())
    if as_json or not sys.stderr.isatty():
        report = verify_log(directory, trusted, witnesses=known, quorum=quorum, earlier=kept, look=look)
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("verifying", total=None)
            report = verify_log(
                directory,
                trusted,
                witnesses=known,
                quorum=quorum,
                earlier=kept,
                look=look,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    if look.count and not payloads_path(directory).is_dir():
        report.unread = look.count
        complain(f"{look.count} contents were kept beside this log; they are not here, and not verified")
    else:
        for number, problem in look.faults(open_payloads(directory)):
            report.add("payloads", f"entry {number}", problem)
        report.unread = look.unread
        if look.unread:
            complain(f"{look.unread} contents are encrypted, and the key is not here: not verified but that they exist")
    return _print_report(report, as_json=as_json)


def verify_consistency(log: str | None, old: str, new: str, *, keys: Sequence[str], as_json: bool) -> int:
    """Verifies that one checkpoint continues another. Returns the exit code."""
    directory = directory_of(log)
    report = verify_between(_content(old), _content(new), directory, trusted_keys(directory, keys))
    return _print_report(report, as_json=as_json)


def _print_report(report: Report, *, as_json: bool) -> int:
    if as_json:
        faults = [{"check": each.check, "where": each.where, "what": each.what} for each in report.faults]
        print(
            json.dumps(
                {
                    "valid": report.valid,
                    "entries": report.size,
                    "verified": report.checked,
                    "contents_unread": report.unread,
                    "cosigners": list(report.cosigners),
                    "faults": faults,
                }
            )
        )
    else:
        for fault in report.faults:
            print(printable(f"FAULT {fault}"))
        by = f", cosigned by {', '.join(report.cosigners)}" if report.cosigners else ""
        words = "is whole" if report.valid else "is NOT what was signed"
        print(printable(f"the log of {report.size} entries {words}{by}"))
    return 0 if report.valid else 1


# ---- proofs ----


def prove(log: str | None, number: int, output: str | None) -> None:
    """Writes the proof of one record."""
    directory = directory_of(log)
    try:
        encoded = make_proof(directory, number).encode()
    except ProofError as error:
        raise RequestError(str(error)) from None
    if output is None:
        sys.stdout.write(encoded.decode())
        return
    try:
        Path(output).write_bytes(encoded)
    except OSError as error:
        raise RequestError(f"{output}: {error.strerror}") from None


def check(path: str, *, key: str, entry: str | None, witnesses: Sequence[str], quorum: int, as_json: bool) -> int:
    """Verifies a proof without the log. Returns the exit code: 1 where it proves nothing."""
    verifier = parse_verifier(key)
    known = tuple(parse_verifier(each) for each in witnesses)
    given = None if entry is None else _content(entry)
    problem, size, number = "", 0, -1
    try:
        proof = parse_proof(_content(path, MAX_PROOF_FILE))
        number = proof.index
        record = proof.extra if given is None else given
        if record is None:
            raise ProofError("the proof does not carry the record itself: pass --entry")
        size = check_proof(proof, record, verifier, witnesses=known, quorum=quorum).size
    except ProofError as error:
        problem = str(error)
    if as_json:
        print(json.dumps({"valid": not problem, "number": number, "entries": size, "problem": problem or None}))
    elif problem:
        print(printable(f"NOT proven: {problem}"))
    else:
        print(printable(f"entry {number} is in the log {verifier.name}, under its checkpoint for {size} entries"))
    return 1 if problem else 0


# ---- keys and checkpoints ----


def show_keys(log: str | None, *, as_json: bool) -> None:
    """Prints the public halves of a log's keys: what to give to those who verify it."""
    keys = [str(key) for key in read_keys(directory_of(log))]
    print(json.dumps(keys) if as_json else "\n".join(map(printable, keys)))


def make_key(path: str, name: str, *, witness: bool, uri: str | None) -> None:
    """Makes a key, or a file that names one on a device, and prints its public half."""
    kind = KeyType.COSIGNATURE if witness else KeyType.ED25519
    made = KeyFile.make(path, name, kind) if uri is None else Pkcs11Key.make(path, name, uri, kind)
    print(printable(str(made.verifier)))


def rotate(log: str | None, uri: str | None) -> None:
    """Has a new key sign from now on, and prints its public half."""
    print(printable(str(rotate_key(directory_of(log), uri).verifier)))


def show_checkpoint(log: str | None) -> None:
    """Prints the newest checkpoint, for others to keep."""
    try:
        sys.stdout.write((directory_of(log) / CHECKPOINT).read_text("utf-8"))
    except OSError as error:
        raise NoteError(f"{CHECKPOINT}: {error.strerror}") from None


# ---- witnesses ----


def cosign(log: str | None, witnesses: Sequence[str], quorum: int, *, as_json: bool) -> int:
    """Asks witnesses. Returns the exit code: 1 where fewer than ``quorum`` have cosigned."""
    from corral.log.cosigning import cosign_log, parse_address
    from corral.log.places import open_log

    directory = directory_of(log)
    addresses = [parse_address(each) for each in witnesses]
    with open_log(directory) as opened:
        outcomes = cosign_log(opened, addresses)
    done = {each.witness for each in outcomes if each.signature is not None}
    if as_json:
        print(json.dumps([{"witness": each.witness, "problem": each.problem or None} for each in outcomes]))
    else:
        for each in outcomes:
            print(printable(f"{each.witness}: {each.problem or 'has cosigned'}"))
    return 0 if len(done) >= quorum else 1


def witness(state: str, key: str, logs: Sequence[str], listen: str) -> None:
    """Serves a witness until it is told to end."""
    import signal

    from corral.log.witness import Witness
    from corral.log.witness_server import WitnessServer

    known: dict[str, tuple[Verifier, ...]] = {}
    for each in logs:
        verifier = parse_verifier(each)
        known[verifier.name] = (*known.get(verifier.name, ()), verifier)
    address, _, port = listen.rpartition(":")
    if not address or not port.isdigit():
        raise RequestError(f"--listen {listen}: it is written as ADDRESS:PORT")
    made = Witness(Path(state), read_signer(key), known)
    try:
        server = WitnessServer(made, address.strip("[]"), int(port))
    except OSError as error:
        raise RequestError(f"--listen {listen}: {error.strerror}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host, actual = server.server_address[:2]
    print(printable(str(made.verifier)))
    shown = f"[{host!s}]" if ":" in str(host) else str(host)
    print(printable(f"listening on {shown}:{actual}"), flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
