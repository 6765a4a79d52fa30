"""What a caller may ask for, and what is refused before anything is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from corral.errors import ExecError, RequestError
from corral.sandbox.options import check_read, check_root, check_workspace, user_id


@pytest.mark.parametrize("path", ["/", "/usr", "/etc", "/proc/self", "/dev/shm", "/sys", "/run", "/home", "/tmp"])
def test_the_system_is_no_workspace(path: str) -> None:
    with pytest.raises(RequestError, match="part of the system"):
        check_workspace(path)


def test_a_home_is_no_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RequestError, match="your home"):
        check_workspace(str(tmp_path))


@pytest.mark.parametrize("path", ["", "/nonexistent", "/etc/passwd", "a\0b", "a\nb", "/tmp/\x1b[31m"])
def test_what_is_no_directory_is_no_workspace(path: str) -> None:
    with pytest.raises(RequestError) as refusal:
        check_workspace(path)
    assert "\x1b" not in str(refusal.value)


def test_a_link_to_the_system_is_the_system(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(RequestError, match="/etc is a part of the system"):
        check_workspace(str(tmp_path / "link"))


def test_a_workspace_is_known_by_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert check_workspace(str(tmp_path / "link")) == os.path.realpath(tmp_path / "real")


def test_what_is_shown_must_exist_and_not_be_everything(tmp_path: Path) -> None:
    (tmp_path / "all").symlink_to("/")
    for path in ("relative", str(tmp_path / "missing"), "/", str(tmp_path / "all"), f"{tmp_path}/\x07"):
        with pytest.raises(RequestError):
            check_read([path])
    (tmp_path / "x").mkdir()
    assert check_read([f"{tmp_path}/./x/.."]) == (str(tmp_path),)


def test_the_host_is_no_root_to_use() -> None:
    assert check_root(None) is None
    with pytest.raises(RequestError):
        check_root("/")


def test_users() -> None:
    assert (user_id("agent"), user_id("root"), user_id(4321)) == (1000, 0, 4321)
    for user in ("nobody-known", -1, 65534, True):
        with pytest.raises(RequestError):
            user_id(user)


def test_an_exec_error_has_no_empty_parts() -> None:
    assert str(ExecError("fork", "", 11)) == "cannot start the command: fork: Resource temporarily unavailable"
