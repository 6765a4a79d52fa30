"""Tools found from PATH: each kind of installation, and each way to have a private file shown."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.sandbox.tools import STANDARD_PATH, Tools, environment_hints, find_tools

STANDARD = ":".join(STANDARD_PATH)
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/opt")
HIDDEN = ("/", "/root", "/home", "/home/*", "/var", "/etc", "/run", "/tmp", "/srv", "/proc", "/sys", "/dev")


class Host:
    """A host in a directory: a home with keys, a data disk and a workspace that is visible."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home" / "u"
        self.data = root / "data"
        self.workspace = root / "ws"
        for place in (self.home / ".ssh", self.data, self.workspace):
            place.mkdir(parents=True)
        self.file(self.home / ".ssh" / "id_rsa", "key", mode=0o600)

    @property
    def hidden(self) -> tuple[str, ...]:
        return (*HIDDEN, str(self.root), f"{self.root}/home", f"{self.root}/home/*")

    def file(self, path: Path, text: str = "\x7fELF", *, mode: int = 0o755) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def link(self, path: Path, target: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(str(target))
        return path

    def python(self, prefix: Path) -> Path:
        self.file(prefix / "bin" / "python3.12")
        self.link(prefix / "bin" / "python3", "python3.12")
        self.link(prefix / "bin" / "python", "python3")
        (prefix / "lib" / "python3.12").mkdir(parents=True)
        return prefix

    def venv(self, prefix: Path, base: Path) -> Path:
        self.link(prefix / "bin" / "python", base / "bin" / "python3")
        self.file(prefix / "pyvenv.cfg", f"home = {base}/bin\nversion = 3.12.1\n", mode=0o644)
        return prefix

    def pyenv(self, root: Path) -> Path:
        for part in ("bin", "libexec", "shims", "versions", "plugins", ".git"):
            (root / part).mkdir(parents=True)
        self.file(root / "libexec" / "pyenv", "#!/usr/bin/env bash\n")
        self.link(root / "bin" / "pyenv", "../libexec/pyenv")
        self.file(root / "shims" / "python", "#!/usr/bin/env bash\n")
        self.file(root / "version", "3.12.1\n", mode=0o644)
        self.python(root / "versions" / "3.12.1")
        return root

    def find(self, *entries: object, command: str | None = None) -> Tools:
        found = find_tools(
            ":".join(map(str, entries)),
            visible=(*SYSTEM, str(self.workspace)),
            hidden_roots=self.hidden,
            command=command,
        )
        check(found, self.hidden)
        return found

    def trees(self, *entries: object, command: str | None = None) -> list[str]:
        return [tree.removeprefix(f"{self.root}/") for tree in self.find(*entries, command=command).trees]


def check(found: Tools, hidden: tuple[str, ...]) -> None:
    """What holds for every answer."""
    assert list(found.trees) == sorted(set(found.trees))
    for tree in found.trees:
        assert os.path.isabs(tree) and os.path.exists(tree)
        assert not any(other != tree and tree.startswith(other + "/") for other in found.trees)
        for spelling in (tree, os.path.realpath(tree)):
            assert ".ssh" not in spelling.split("/")
            for root in hidden:
                if root.endswith("/*"):
                    assert os.path.dirname(spelling) != root[:-2]
                else:
                    assert spelling != root and not root.startswith(spelling + "/")
    assert all(entry.startswith("/") and entry.isprintable() for entry in found.path.split(":"))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# What must be found


def test_system_path_needs_nothing(host: Host) -> None:
    assert host.find("/usr/bin", "/bin") == Tools((), "/usr/bin:/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin")


def test_venv_on_pyenv_on_link(host: Host) -> None:
    host.pyenv(host.data / "pyenv")
    pyenv = host.link(host.home / ".pyenv", host.data / "pyenv")
    venv = host.venv(host.home / "venv", pyenv / "versions" / "3.12.1")
    expected = ["data/pyenv/versions/3.12.1", "home/u/.pyenv/versions/3.12.1", "home/u/venv"]
    assert host.trees(venv / "bin") == expected
    assert host.find(venv / "bin").path == f"{venv}/bin:{STANDARD}"
    assert host.trees(command=f"{venv}/bin/python -c 1") == expected


def test_venv_in_workspace_shows_its_base_only(host: Host) -> None:
    base = host.python(host.home / "python")
    venv = host.venv(host.workspace / ".venv", base)
    assert host.trees(venv / "bin") == ["home/u/python"]
    assert host.find(venv / "bin").path.startswith(f"{venv}/bin:")


def test_venv_on_venv(host: Host) -> None:
    base = host.python(host.home / "python")
    middle = host.venv(host.home / "a", base)
    host.link(middle / "bin" / "python3", "python")
    outer = host.venv(host.home / "b", middle)
    assert host.trees(outer / "bin") == ["home/u/a", "home/u/b", "home/u/python"]


def test_pyenv_parts_without_its_repository(host: Host) -> None:
    pyenv = host.pyenv(host.home / ".pyenv")
    host.python(host.data / "built")
    host.link(pyenv / "versions" / "own", host.data / "built")
    parts = [f"home/u/.pyenv/{part}" for part in ("bin", "libexec", "plugins", "shims", "version", "versions")]
    assert host.trees(pyenv / "shims", pyenv / "bin") == ["data/built", *parts]
    assert host.trees(pyenv / "versions" / "3.12.1" / "bin") == ["home/u/.pyenv/versions/3.12.1"]


def test_nvm(host: Host) -> None:
    node = host.home / ".nvm" / "versions" / "node" / "v22.1.0"
    host.file(node / "bin" / "node")
    host.file(node / "lib" / "node_modules" / "npm" / "cli.js", "#!/usr/bin/env node\n")
    host.link(node / "bin" / "npm", "../lib/node_modules/npm/cli.js")
    assert host.trees(node / "bin") == ["home/u/.nvm/versions/node/v22.1.0"]


def test_fnm_link_shows_name_and_real_tree(host: Host) -> None:
    host.file(host.home / "fnm" / "v22" / "bin" / "node")
    shell = host.link(host.data / "multishells" / "1", host.home / "fnm" / "v22")
    assert host.trees(shell / "bin") == ["data/multishells/1", "home/u/fnm/v22"]


def test_conda_environment_without_base_and_base(host: Host) -> None:
    base = host.home / "miniconda3"
    for prefix in (base, base / "envs" / "ml"):
        host.file(prefix / "bin" / "python3.12")
        (prefix / "conda-meta").mkdir()
    (base / "condabin").mkdir()
    assert host.trees(base / "envs" / "ml" / "bin") == ["home/u/miniconda3/envs/ml"]
    assert host.trees(base / "envs" / "ml" / "bin", base / "condabin") == ["home/u/miniconda3"]


def test_cargo_without_credentials(host: Host) -> None:
    host.file(host.home / ".cargo" / "bin" / "cargo")
    host.file(host.home / ".cargo" / "bin" / "python3")  # would make .cargo a prefix
    host.file(host.home / ".cargo" / "credentials.toml", "token", mode=0o600)
    host.file(host.home / ".rustup" / "settings.toml", "", mode=0o644)
    (host.home / ".rustup" / "toolchains").mkdir()
    (host.home / ".rustup" / "tmp").mkdir()
    assert host.trees(host.home / ".cargo" / "bin") == [
        "home/u/.cargo/bin",
        "home/u/.rustup/settings.toml",
        "home/u/.rustup/toolchains",
    ]


def test_go_and_java(host: Host) -> None:
    host.file(host.home / "sdk" / "go" / "bin" / "go")
    (host.home / "sdk" / "go" / "src" / "runtime").mkdir(parents=True)
    host.file(host.home / "jdk" / "bin" / "java")
    host.file(host.home / "jdk" / "lib" / "modules")
    assert host.trees(host.home / "sdk/go/bin", host.home / "jdk/bin") == ["home/u/jdk", "home/u/sdk/go"]


def test_pipx_shows_the_venv_behind_the_link(host: Host) -> None:
    base = host.python(host.home / "python")
    venv = host.venv(host.home / ".local" / "pipx" / "venvs" / "x", base)
    tool = host.file(venv / "bin" / "x", f"#!{venv}/bin/python\n")
    host.link(host.home / ".local" / "bin" / "x", tool)
    host.file(host.home / ".local" / "pipx" / "venvs" / "y" / "pyvenv.cfg", "", mode=0o644)
    assert host.trees(host.home / ".local" / "bin") == [
        "home/u/.local/bin",
        "home/u/.local/pipx/venvs/x",
        "home/u/python",
    ]


def test_local_prefix_is_shown_in_parts(host: Host) -> None:
    local = host.python(host.home / ".local")
    host.file(local / "share" / "keyrings" / "login.keyring", mode=0o600)
    assert host.trees(local / "bin") == ["home/u/.local/bin", "home/u/.local/lib/python3.12"]


@pytest.mark.parametrize(
    "line", ["#!{}\n", "#! {} -u\n", "#!/bin/sh\n'''exec' {} \"$0\"\n", "#!/bin/sh\n'''exec' \"{}\"\n"]
)
def test_interpreter_of_a_script(host: Host, line: str) -> None:
    base = host.python(host.data / "p")
    host.file(host.home / "bin" / "tool", line.format(base / "bin" / "python3"))
    assert host.trees(host.home / "bin") == ["data/p", "home/u/bin"]


def test_npm_program_finds_its_modules(host: Host) -> None:
    host.file(host.home / "js" / "node_modules" / "a" / "node_modules" / "b" / "cli.js", "#!/usr/bin/env node\n")
    host.link(host.home / "bin" / "b", host.home / "js" / "node_modules" / "a" / "node_modules" / "b" / "cli.js")
    assert host.trees(host.home / "bin") == ["home/u/bin", "home/u/js/node_modules"]


def test_command_by_path_is_one_file(host: Host) -> None:
    tool = host.file(host.home / "project" / "my tool", "#!/bin/sh\n")
    host.file(host.home / "project" / "secret", mode=0o600)
    assert host.trees(command=str(tool)) == ["home/u/project/my tool"]
    assert host.trees(command=str(tool.parent)) == []


def test_command_on_path_is_followed_beyond_the_bound(host: Host) -> None:
    tools = host.home / "bin"
    for number in range(700):
        host.file(tools / f"t{number}")
    host.file(host.data / "app" / "run")
    host.link(tools / "zz", host.data / "app" / "run")
    assert host.trees(tools, command="zz --help") == ["data/app/run", "home/u/bin"]


# What must not be shown


def test_entries_that_are_dropped(host: Host) -> None:
    plain, open_to_all = host.home / "bin", host.home / "shared"
    plain.mkdir()
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for name in ("new\nline", "caf\udce9"):
        (host.home / name).mkdir()
    file = host.file(host.home / "file")
    odd: tuple[object, ...] = ("", ".", "bin", "./bin", f"{plain}\0", host.home / "none", open_to_all, file)
    odd += (host.home / "new\nline", host.home / "caf\udce9", "/\ud800")
    found = host.find(*odd, f"{plain}//", f"{host.home}/x/../bin", "/proc/self/cwd", plain, host.home / ".ssh")
    assert found == Tools((str(plain),), f"{plain}:{STANDARD}")


@pytest.mark.parametrize(
    "home", ["/", "/root", "/root/bin", "/etc", "{}", "{}/.ssh", "{}/.ssh/bin", "../..", "{}/x/../.."]
)
def test_pyvenv_cfg_cannot_name_a_home(host: Host, home: str) -> None:
    venv = host.venv(host.workspace / "venv", host.data / "none")
    host.file(host.home / ".ssh" / "bin" / "python3")
    (host.home / ".ssh" / "lib" / "python3.12").mkdir(parents=True)
    host.file(venv / "pyvenv.cfg", f"home = {home.format(host.home)}\n", mode=0o644)
    host.file(venv / "bin" / "tool")
    (venv / "bin" / "python").unlink()
    host.file(venv / "bin" / "python")
    assert host.trees(venv / "bin") == []


@pytest.mark.parametrize(
    "text", ["home = {0}\n" + "#" * 5000, "home = {0}\nhome = {0}\n", "\0home = {0}", "home {0}", ""]
)
def test_pyvenv_cfg_is_read_strictly(host: Host, text: str) -> None:
    base = host.python(host.data / "p")
    venv = host.venv(host.workspace / "venv", base)
    (venv / "bin" / "python").unlink()
    host.file(venv / "bin" / "python")
    assert host.trees(venv / "bin") == ["data/p"]
    host.file(venv / "pyvenv.cfg", text.format(base / "bin"), mode=0o644)
    assert host.trees(venv / "bin") == []


def test_links_to_private_things(host: Host) -> None:
    tools = host.home / ".local" / "bin"
    host.file(host.home / "notes.txt", mode=0o644)
    host.file(host.home / ".ssh" / "tool")
    host.link(host.home / "through", host.home / ".ssh")
    (host.home / "private").mkdir()
    targets = (".ssh/id_rsa", ".ssh/tool", "through/tool", "notes.txt", "private", "", "none", ".ssh", ".local/bin/0")
    for number, target in enumerate(targets):
        host.link(tools / f"{number}", host.home / target)
    host.link(tools / "loop", "loop")
    host.link(tools / "device", "/dev/zero")
    os.mkfifo(tools / "fifo")
    for command in (None, "0", "loop", "fifo", str(host.home / ".ssh" / "tool"), str(tools / "1"), str(host.home)):
        assert host.trees(tools, command=command) == ["home/u/.local/bin"]


def test_workspace_leads_to_installations_only(host: Host) -> None:
    host.file(host.home / "deploy" / "bin" / "prod", "#!/bin/sh\n")
    host.link(host.workspace / "run", host.home / "deploy" / "bin" / "prod")
    host.link(host.workspace / "tools", host.home / "deploy" / "bin")
    fake = host.workspace / "venv"
    host.file(fake / "pyvenv.cfg", f"home = {host.home}/deploy/bin\n", mode=0o644)
    host.file(host.home / "deploy" / "bin" / "python")
    host.link(fake / "bin", host.home / "deploy" / "bin")
    host.file(host.workspace / "bin" / "script", f"#!{host.home}/deploy/bin/prod\n")
    places = (host.workspace / "tools", fake / "bin", host.workspace / "bin")
    for command in (str(host.workspace / "run"), "script", "prod", None):
        found = host.find(*places, command=command)
        assert found == Tools((), f"{host.workspace}/bin:{STANDARD}")


def test_prefix_that_is_a_home(host: Host) -> None:
    host.python(host.home)
    host.file(host.home / "pyvenv.cfg", "home = /usr/bin\n", mode=0o644)
    assert host.trees(host.home / "bin") == ["home/u/bin", "home/u/lib/python3.12", "home/u/pyvenv.cfg"]
    assert host.trees(host.home) == []


def test_home_that_is_not_listed_is_known_by_its_files(host: Host) -> None:
    other = host.python(host.data / "somebody")
    host.file(other / ".bash_history", mode=0o600)
    assert host.trees(other / "bin") == ["data/somebody/bin", "data/somebody/lib/python3.12"]


def test_prefix_that_holds_a_hidden_root(host: Host) -> None:
    prefix = host.python(host.data / "p")
    found = find_tools(f"{prefix}/bin", visible=SYSTEM, hidden_roots=(f"{prefix}/var/home",))
    assert str(prefix) not in found.trees and f"{prefix}/bin" in found.trees


def test_links_are_no_way_around_hidden_roots(host: Host) -> None:
    host.link(host.data / "alias", host.home)
    host.link(host.data / "top", "/")
    host.link(host.root / "home" / "loop", "loop")
    (host.root / "home" / "empty").mkdir()
    moved = host.python(host.data / "moved")
    host.link(host.root / "home" / "v", moved)
    assert (
        host.trees(
            host.root / "home" / "empty", host.data / "alias", host.data / "top", host.data / "top" / "proc/self/cwd"
        )
        == []
    )
    assert host.trees(moved / "bin") == ["data/moved/bin", "data/moved/lib/python3.12"]


def test_parents_after_a_link_mean_what_the_kernel_means(host: Host) -> None:
    host.file(host.home / "a" / "private" / "tool")  # what the text alone would name
    real = host.file(host.data / "d" / "private" / "tool").parent
    (host.data / "d" / "e").mkdir()
    host.link(host.home / "a" / "l", host.data / "d" / "e")
    host.link(host.home / "bin" / "tool", "../a/l/../private/tool")
    assert host.find(f"{host.home}/a/l/../private").trees == (str(real),)
    assert host.trees(host.home / "bin") == ["data/d/private/tool", "home/u/bin"]


def test_ten_thousand_entries_and_long_chains_end_soon(host: Host) -> None:
    for number in range(1500):
        host.link(host.workspace / "c" / f"{number}", f"{number + 1}")
        host.file(host.workspace / "s" / f"{number}", f"#!{host.workspace}/s/{number + 1}\n")
    many = [host.home / f"none{number}" for number in range(10_000)]
    start = time.perf_counter()
    for command in (f"{host.workspace}/c/0", f"{host.workspace}/s/0"):
        assert host.trees(host.workspace / "c" / "0", *many, command=command) == []
    assert time.perf_counter() - start < 0.5


def test_many_nested_prefixes_do_not_recurse_without_end(host: Host) -> None:
    for number in range(400):
        local = host.data / f"{number}" / ".local"
        host.file(local / "lib" / "python3.12" / "x")
        host.link(local / "bin" / "next", host.data / f"{number + 1}" / ".local" / "bin" / "next")
    assert len(host.trees(host.data / "0" / ".local" / "bin")) <= 2 * 400


def test_a_missing_working_directory(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = host.root / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert host.trees("/usr/bin", command="./x") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_directories_are_left_out(host: Host) -> None:
    base = host.python(host.home / "closed")
    base.chmod(0)
    try:
        assert host.trees(base / "bin", base) == []
    finally:
        base.chmod(0o755)


NAMES = st.sampled_from(
    ["bin", "lib", "shims", "versions", ".local", ".cargo", ".ssh", "python3", "python", "conda-meta"]
)
WHERE = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
TARGET = st.one_of(
    WHERE, st.sampled_from(["", "..", "../..", "../../..", "/", "/root", "/proc/self/root", "/dev", "../u"])
)
KIND = st.sampled_from(["dir", "file", "link", "script", "cfg"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(KIND, WHERE, TARGET), max_size=14), st.lists(TARGET, max_size=4), st.text(max_size=12))
def test_nothing_hidden_is_ever_shown(made: list[tuple[str, str, str]], entries: list[str], noise: str) -> None:
    root = Path(tempfile.mkdtemp())
    try:
        host = Host(root)
        for number, (kind, where, target) in enumerate(made):
            base = (host.home, host.data, host.workspace)[number % 3]
            other = (host.home, host.data, host.workspace)[number % 2]
            path = base / where
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "dir":
                    path.mkdir()
                elif kind == "link":
                    path.symlink_to(target if target.startswith((".", "/")) else other / target)
                elif kind == "cfg":
                    (path / "bin").mkdir(parents=True)
                    (path / "bin" / "python").symlink_to(other / target)
                    (path / "pyvenv.cfg").write_text(f"home = {other / target}\n")
                else:
                    path.write_text(f"#!{other / target}\n" if kind == "script" else "x")
                    path.chmod(0o755)
            except OSError:
                continue
        places = [base / entry for entry in entries for base in (host.home, host.data, host.workspace)]
        for command in (None, noise, str(host.home / noise), "python3"):
            host.find(*places, noise, *[base / "bin" for base in (host.home, host.data)], command=command)
    finally:
        shutil.rmtree(root)


# Variables


def test_hints_name_shown_tools_only(host: Host) -> None:
    env = {
        "VIRTUAL_ENV": "/h/venv",
        "CONDA_PREFIX": "/h/conda/envs/ml",
        "CONDA_DEFAULT_ENV": "ml",
        "PYENV_ROOT": "/h/.pyenv",
        "PYENV_VERSION": "3.12.1:system",
        "RUSTUP_HOME": "/h/.rustup",
        "CARGO_HOME": "/h/other",
        "JAVA_HOME": "/opt/../root/jdk",
        "GOROOT": "/usr/lib/go",
        "NVM_DIR": "relative",
        "SECRET": "x",
    }
    trees = ["/h/venv", "/h/conda/envs/ml", "/h/.pyenv/versions/3.12.1", "/h/.rustup/toolchains", "/usr", "/opt"]
    dropped = {"CARGO_HOME", "JAVA_HOME", "NVM_DIR", "SECRET"}
    assert environment_hints(env, trees) == {name: env[name] for name in env if name not in dropped}
    assert environment_hints(env, ["/usr"]) == {"GOROOT": "/usr/lib/go"}
    assert environment_hints({"PYENV_VERSION": "../x", "CONDA_DEFAULT_ENV": "a"}, trees) == {}
    pyenv = host.pyenv(host.home / ".pyenv")
    assert environment_hints({"PYENV_VERSION": "3.12.1"}, [f"{pyenv}/versions"]) == {"PYENV_VERSION": "3.12.1"}
