"""Keys on a device (SoftHSM): the log is signed by them, they stay where they are, and what fails signs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from pkcs11.util.ec import encode_named_curve_parameters

import corral
from corral.errors import CorralError, RequestError
from corral.log import pkcs11_key
from corral.log.note import KeyFile, KeyType, NoteError, cosign, parse_note
from corral.log.pkcs11_key import Pkcs11Key, parse_uri, read_signer
from corral.log.places import files_of, key_path, open_log, rotate_key
from corral.log.signing import read_keys
from corral.log.verify import verify_log
from corral.log.writer import Log, LogUnwritable

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
ED25519, ED448 = "1.3.101.112", "1.3.101.113"
PIN = "a secret PIN 93"

pytestmark = pytest.mark.skipif(
    not os.path.exists(MODULE) and not os.environ.get("CI"), reason="SoftHSM (Debian: softhsm2) is not installed"
)


class Device:
    """A token with keys; its library reads its configuration once in a process."""

    def __init__(self, directory: Path) -> None:
        self.pin = directory / "pin"
        self.pin.write_text(f"{PIN}\n")
        self.pin.chmod(0o600)
        (directory / "tokens").mkdir()
        configuration = directory / "softhsm2.conf"
        configuration.write_text(f"directories.tokendir = {directory}/tokens\nobjectstore.backend = file\n")
        os.environ["SOFTHSM2_CONF"] = str(configuration)
        argv = ["softhsm2-util", "--init-token", "--free", "--label", "a token", "--pin", PIN, "--so-pin", "12345678"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        self._token = pkcs11.lib(MODULE).get_token(token_label="a token")
        with self._token.open(user_pin=PIN, rw=True) as session:
            for label, curve, more in (
                ("first", ED25519, {}),
                ("second", ED25519, {}),
                ("leaves", ED25519, {pkcs11.Attribute.EXTRACTABLE: True}),
                ("another curve", ED448, {}),
            ):
                self._make(session, label, curve, more)

    @staticmethod
    def _make(session: Any, label: str, curve: str, more: dict[Any, Any]) -> None:
        parameters = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}
        domain = session.create_domain_parameters(pkcs11.KeyType.EC_EDWARDS, parameters, local=True)
        mechanism = pkcs11.Mechanism.EC_EDWARDS_KEY_PAIR_GEN
        domain.generate_keypair(mechanism=mechanism, store=True, label=label, id=label.encode(), private_template=more)

    def uri(self, label: str = "first", *, pin: Path | None = None) -> str:
        where = f"module-path={MODULE}&pin-source=file:{pin or self.pin}"
        return f"pkcs11:token=a%20token;object={label.replace(' ', '%20')};type=private?{where}"

    def replace(self, label: str) -> None:
        """Another key in the place of that one."""
        with pkcs11_key._lock:
            session = self._token.open(rw=True)
            for each in list(session.get_objects({pkcs11.Attribute.LABEL: label})):
                each.destroy()
            self._make(session, label, ED25519, {})
            session.close()


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    before = os.environ.get("SOFTHSM2_CONF")
    yield Device(tmp_path_factory.mktemp("device"))
    os.environ.pop("SOFTHSM2_CONF")
    if before is not None:
        os.environ["SOFTHSM2_CONF"] = before


def faults(directory: Path) -> list[Any]:
    return list(verify_log(directory, read_keys(directory)).faults)


def test_a_log_is_signed_by_a_key_on_a_device(device: Device, tmp_path: Path) -> None:
    place = tmp_path / "log"
    made = Pkcs11Key.make(key_path(place), "example.org/log", device.uri())
    for number in range(3):
        with open_log(place) as log:
            log.append(b"entry %d" % number)
    assert read_keys(place) == (made.verifier,) and faults(place) == []
    assert verify_log(place, [made.verifier]).size == 3
    line = key_path(place).read_text()
    assert line == f"PKCS11+KEY+{made.verifier} {device.uri()}\n" and PIN not in line
    assert not key_path(place).stat().st_mode & 0o077
    assert {str(device.pin), str(key_path(place))} <= set(files_of(place)), "an agent that has the PIN can sign"


def test_keys_change_from_a_file_to_a_device_and_on_and_not_back_by_themselves(device: Device, tmp_path: Path) -> None:
    place = tmp_path / "log"
    with open_log(place) as log:
        log.append(b"first")
    rotate_key(place, device.uri("first"))
    with open_log(place) as log:
        log.append(b"second")
    with pytest.raises(NoteError, match="on a device; name the new one"):
        rotate_key(place)
    rotate_key(place, device.uri("second"))
    with open_log(place) as log:
        log.append(b"third")
    assert len(read_keys(place)) == 3 and faults(place) == []


def test_a_witness_may_cosign_by_a_device(device: Device, tmp_path: Path) -> None:
    made = Pkcs11Key.make(tmp_path / "key", "example.org/witness", device.uri(), KeyType.COSIGNATURE)
    signer = read_signer(tmp_path / "key")
    text = "example.org/log\n1\nAAAA\n"
    note = parse_note(f"{text}\n{cosign(text, signer, at=7).line()}".encode())
    assert made.verifier.cosigned_at(note) == 7


def test_a_key_that_may_leave_its_device_is_refused(device: Device) -> None:
    with pytest.raises(NoteError, match="may leave its device"):
        Pkcs11Key("example.org/log", KeyType.ED25519, parse_uri(device.uri("leaves")))


@pytest.mark.parametrize("label", ["another curve", "nothing"])
def test_what_is_no_ed25519_key_is_refused(device: Device, label: str) -> None:
    with pytest.raises(NoteError):
        Pkcs11Key("example.org/log", KeyType.ED25519, parse_uri(device.uri(label)))


def test_another_key_under_the_same_name_is_noticed(device: Device, tmp_path: Path) -> None:
    Pkcs11Key.make(tmp_path / "key", "example.org/log", device.uri("second"))
    device.replace("second")
    with pytest.raises(NoteError, match="another key there"):
        read_signer(tmp_path / "key")


def test_a_device_that_fails_ends_the_log_and_signs_nothing(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "log"
    Pkcs11Key.make(key_path(place), "example.org/log", device.uri())
    log = open_log(place)
    log.append(b"before")
    before = log.seal().size
    failed = threading.Event()
    log.when_failed(lambda error: failed.set())

    class Gone:
        def sign(self, *_: Any, **__: Any) -> bytes:
            raise pkcs11.DeviceRemoved

    signer = log._checkpoints._signer
    assert isinstance(signer, Pkcs11Key)
    monkeypatch.setattr(signer, "_private", Gone())
    with pytest.raises(CorralError, match="DeviceRemoved"):
        log.append(b"durable, but under no checkpoint")
        log.seal()
    assert failed.wait(20), "it goes on without being signed for"
    with pytest.raises(LogUnwritable, match="DeviceRemoved"):
        log.append(b"after")
    with pytest.raises(LogUnwritable):
        log.close()
    assert faults(place) == []
    assert verify_log(place, read_keys(place)).size == before
    with open_log(place) as again:
        assert again.seal().size > before
    assert faults(place) == []


def test_a_wrong_signature_of_a_device_is_never_published(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = Pkcs11Key.make(tmp_path / "key", "example.org/log", device.uri())
    log = Log(tmp_path / "log", signer, checkpoint_every=3600)
    log.append(b"entry")

    class Broken:
        def sign(self, *_: Any, **__: Any) -> bytes:
            return bytes(64)

    monkeypatch.setattr(signer, "_private", Broken())
    with pytest.raises(CorralError, match="not valid"):
        log.seal()
    with pytest.raises(LogUnwritable):
        log.close()
    assert faults(tmp_path / "log") == []


OPEN = """
import sys
from corral.errors import CorralError
from corral.log.note import KeyType
from corral.log.pkcs11_key import Pkcs11Key, parse_uri
try:
    Pkcs11Key("example.org/log", KeyType.ED25519, parse_uri(sys.argv[1]))
except CorralError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("mode", "content", "why"),
    [(0o640, PIN, "others can read"), (0o600, "another PIN", "PinIncorrect"), (0o600, "\n", "is no PIN")],
)
def test_a_pin_that_others_can_read_or_that_is_wrong_opens_nothing(
    device: Device, tmp_path: Path, mode: int, content: str, why: str
) -> None:
    """In a process of its own: this one is logged in."""
    pin = tmp_path / "pin"
    pin.write_text(content)
    pin.chmod(mode)
    package = str(Path(corral.__file__).parents[1])
    argv = [sys.executable, "-c", OPEN, device.uri(pin=pin)]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": package})
    assert done.returncode == 1 and why in done.stderr
    assert "another PIN" not in done.stderr and PIN not in done.stderr


def test_a_fork_does_not_sign(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = Pkcs11Key("example.org/log", KeyType.ED25519, parse_uri(device.uri()))
    monkeypatch.setattr(signer, "_process", -1)
    with pytest.raises(NoteError, match="fork"):
        signer.sign(b"x")


def test_without_the_library_it_is_said_what_to_install(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    with pytest.raises(RequestError, match=r"pip install 'corral\[pkcs11\]'"):
        Pkcs11Key("example.org/log", KeyType.ED25519, parse_uri(device.uri()))


WHERE = "module-path=/m.so&pin-source=file:/pin"


def test_a_uri_says_where_a_key_is() -> None:
    place = parse_uri(f"pkcs11:serial=%01%ff;object=a%20b;id=%00?{WHERE}")
    assert (place.module, place.pin_file, place.serial, place.label, place.id) == (
        "/m.so",
        "/pin",
        b"\x01\xff",
        "a b",
        b"\0",
    )


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "file:/key",
        f"pkcs11:token=t?{WHERE}",
        f"pkcs11:object=o?{WHERE}",
        "pkcs11:token=t;object=o",
        "pkcs11:token=t;object=o?module-path=/m.so",
        "pkcs11:token=t;object=o?pin-source=/pin",
        "pkcs11:token=t;object=o?module-path=m.so&pin-source=/pin",
        "pkcs11:token=t;object=o?module-path=/m.so&pin-source=|/bin/sh",
        "pkcs11:token=t;object=o?module-path=/m.so&pin-value=1234",
        f"pkcs11:token=t;object=o;object=p?{WHERE}",
        f"pkcs11:token=t;object=o;slot-id=1?{WHERE}",
        f"pkcs11:token=t;object=o;type=public?{WHERE}",
        f"pkcs11:token=%ff;object=o?{WHERE}",
        f"pkcs11:token=t;object=%00?{WHERE}",
        f"pkcs11:token=t;object=o?{WHERE}\n",
        f"pkcs11:token=t;object=o?{WHERE} ",
        f"pkcs11:token=t;object=\u202e?{WHERE}",
    ],
)
def test_a_uri_that_might_mean_something_else_is_refused(uri: str) -> None:
    with pytest.raises(RequestError) as told:
        parse_uri(uri)
    assert "1234" not in str(told.value)


def test_a_file_that_names_no_device_is_read_as_a_key(tmp_path: Path) -> None:
    made = KeyFile.make(tmp_path / "key", "example.org/log")
    assert read_signer(tmp_path / "key").verifier == made.verifier
    named = tmp_path / "named"
    named.write_text(f"PKCS11+KEY+{made.verifier}\n")
    named.chmod(0o600)
    with pytest.raises(NoteError, match="names no key on a device"):
        read_signer(named)
    named.chmod(0o640)
    with pytest.raises(NoteError, match="others can read"):
        read_signer(named)
