"""What is installed inside, what PATH brings in, and another root."""

from __future__ import annotations

import asyncio
import base64
import errno
import functools
import hashlib
import http.server
import io
import os
import shutil
import subprocess
import tarfile
import threading
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corral.sandbox.changes import ChangeKind
from corral.sandbox.inward import Forward
from corral.sandbox.options import Listener
from tests.contain.test_workloads import PATH, PYTHON, contained, need, tree

# ---- pip

_BACKEND = """
import base64, hashlib, zipfile
def build_wheel(directory, config_settings=None, metadata_directory=None):
    name = 'corral_probe-%s-py3-none-any.whl'
    with zipfile.ZipFile(directory + '/' + name, 'w') as wheel:
        for path, text in %r.items(): wheel.writestr(path, text)
    return name
"""


def wheel_files(version: str) -> dict[str, str]:
    """A package with a module and a command."""
    info = f"corral_probe-{version}.dist-info"
    files = {
        "corral_probe.py": f"def main():\n    print('probe', {version!r})\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: corral-probe\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ncorral-probe = corral_probe:main\n",
    }
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text)}\n")
    return files | {f"{info}/RECORD": "".join(rows) + f"{info}/RECORD,,\n"}


def write_wheel(directory: Path, version: str) -> None:
    """Version 1 of the package as a wheel."""
    with zipfile.ZipFile(directory / f"corral_probe-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in wheel_files(version).items():
            wheel.writestr(path, text)


def project_files(version: str) -> dict[str, str]:
    """The package as a source tree that brings its own build backend, so that building it needs nothing else."""
    return {
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
        f"[project]\nname = 'corral-probe'\nversion = '{version}'\n",
        "backend.py": _BACKEND % (version, wheel_files(version)),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: corral-probe\nVersion: {version}\n",
    }


def write_sdist(directory: Path, version: str) -> None:
    """The package as a source archive."""
    with tarfile.open(directory / f"corral_probe-{version}.tar.gz", "w:gz") as archive:
        for path, text in project_files(version).items():
            member = tarfile.TarInfo(f"corral_probe-{version}/{path}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Tests print nothing."""


@contextmanager
def served(directory: Path) -> Iterator[int]:
    """A web server for ``directory`` on the host's loopback; its port."""
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


async def test_venv_and_pip_from_a_local_index(workspace: Path, tmp_path: Path) -> None:
    """The index is a server on the host's loopback, reached through a listener inside, and through nothing else."""
    index = tmp_path / "index" / "simple" / "corral-probe"
    index.mkdir(parents=True)
    write_wheel(index, "1.0")
    write_sdist(index, "2.0")
    with served(tmp_path / "index") as port:
        async with contained(workspace, listeners=[Listener(8099)]) as inside:
            forward = Forward(asyncio.get_running_loop(), inside.box.listeners[0], "127.0.0.1", port)
            try:
                pip = "env/bin/pip --disable-pip-version-check -q install --index-url http://127.0.0.1:8099/simple/ "
                await inside.sh("python3 -m venv env; " + pip + "corral-probe==1.0")
                assert await inside.sh("env/bin/corral-probe; env/bin/python -c 'import sys; print(sys.prefix)'") == (
                    f"probe 1.0\n{workspace}/env"
                )
                await inside.sh(pip + "--upgrade corral-probe")  # a source archive: built inside
                assert await inside.sh("env/bin/corral-probe") == "probe 2.0"
                missing = await inside.box.exec(["bash", "-c", pip + "no-such-thing"], timeout=60)
                assert missing.exit_code == 1
                assert b"No matching distribution" in missing.stderr
                await inside.sh("env/bin/pip uninstall -qy corral-probe; ! test -e env/bin/corral-probe")
            finally:
                forward.close()
    assert os.listdir(workspace) == ["file.txt"]


async def test_pip_into_the_user_site_and_into_the_system(workspace: Path) -> None:
    if subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True, check=False, timeout=60).returncode:
        pytest.skip("no pip for the system's Python on this machine (Debian: python3-pip)")
    (workspace / "project").mkdir()
    for path, text in project_files("3.0").items():
        (workspace / "project" / path).write_text(text)
    write_wheel(workspace, "1.0")
    pip = "python3 -m pip --disable-pip-version-check -q install --no-index --break-system-packages "
    async with contained(workspace) as inside:
        await inside.sh(pip + "--user ./project")
        assert await inside.sh("~/.local/bin/corral-probe; python3 -m site --user-site") == (
            f"probe 3.0\n/home/agent/.local/lib/python{await inside.python(_VERSION)}/site-packages"
        )
    async with contained(workspace, user="root") as inside:
        await inside.sh(pip + f"--root-user-action=ignore --find-links {workspace} corral-probe")
        assert await inside.sh("corral-probe; command -v corral-probe", directory="/tmp") == (
            "probe 1.0\n/usr/local/bin/corral-probe"
        )
        await inside.sh("python3 -m pip uninstall -qy --break-system-packages corral-probe; ! command -v corral-probe")
    assert not Path("/usr/local/bin/corral-probe").exists()


_VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"

# ---- apt and dpkg

_BUILD_PACKAGE = r"""
cd /tmp; name=$1; version=$2; shift 2; tree=$name-$version; mkdir -p $tree/DEBIAN $tree/usr/bin $tree/etc
printf 'Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: T <t@example.org>\nDescription: a tool\n' \
  $name $version >$tree/DEBIAN/control
echo /etc/$name.conf >$tree/DEBIAN/conffiles; echo "version $version" >$tree/etc/$name.conf
printf '#!/bin/sh\nset -e\necho "postinst $*" >>/var/log/%s.log\n' $name >$tree/DEBIAN/postinst
printf '#!/bin/sh\nset -e\necho "prerm $*" >>/var/log/%s.log\n' $name >$tree/DEBIAN/prerm
printf '#!/bin/sh\ncat /etc/%s.conf\n' $name >$tree/usr/bin/$name
chmod 755 $tree/DEBIAN/p* $tree/usr/bin/$name
for file; do mkdir -p $tree/$(dirname $file); echo "from $version" >$tree/$file; done
dpkg-deb --root-owner-group -b $tree /tmp/$name-$version.deb >/dev/null
"""
_APT = "export DEBIAN_FRONTEND=noninteractive; exec </dev/null; cd /tmp; apt-get -qq "


def _needs_debian() -> None:
    if not os.path.exists("/var/lib/dpkg/status") or shutil.which("apt-get", path=PATH) is None:
        pytest.skip("this machine is not Debian or kin: nothing to install with apt-get")


async def test_apt_installs_upgrades_and_removes(workspace: Path) -> None:
    _needs_debian()
    state = "dpkg-query -W -f '${db:Status-Abbrev}${Version}' corral-tool"
    async with contained(workspace, user="root") as inside:
        for version in ("1.0", "2.0"):
            build = ["bash", "-euc", _BUILD_PACKAGE, "build", "corral-tool", version]
            await inside.run([*build, "usr/share/doc/corral-tool/copyright", "usr/share/man/man1/corral-tool.1"])
        first = await inside.box.exec(["bash", "-euc", _APT + "install -y ./corral-tool-1.0.deb"], timeout=60)
        assert (first.exit_code, b"W: " in first.stderr) == (0, False), first.stderr
        assert await inside.sh(f"corral-tool; {state}; dpkg -S /usr/bin/corral-tool") == (
            "version 1.0\nii 1.0corral-tool: /usr/bin/corral-tool"
        )
        assert "ii  corral-tool" in await inside.sh("dpkg -l corral-tool; dpkg --verify corral-tool; dpkg --audit")

        await inside.sh("rm /usr/bin/corral-tool; " + _APT + "install -y --reinstall ./corral-tool-1.0.deb")
        assert await inside.sh("corral-tool") == "version 1.0"

        # A conffile that was edited is kept in an upgrade.
        keep = "-o Dpkg::Options::=--force-confold install -y ./corral-tool-2.0.deb"
        await inside.sh("echo mine >/etc/corral-tool.conf; " + _APT + keep)
        assert await inside.sh(f"corral-tool; cat /etc/corral-tool.conf.dpkg-*; {state}") == "mine\nversion 2.0\nii 2.0"

        await inside.sh(_APT + "remove -y corral-tool")
        assert await inside.sh(f"{state}; cat /etc/corral-tool.conf; ! ls /usr/bin/corral-tool 2>&1") == (
            "rc 2.0mine\nls: cannot access '/usr/bin/corral-tool': No such file or directory"
        )
        await inside.sh(_APT + "purge -y corral-tool; ! test -e /etc/corral-tool.conf; apt-get check -qq")
        assert (await inside.sh("cat /var/log/corral-tool.log")).splitlines() == [
            "postinst configure ",
            *("prerm upgrade 1.0", "postinst configure 1.0"),
            *("prerm upgrade 2.0", "postinst configure 1.0"),
            "prerm remove",
        ]
        changed = {change.path for change in await inside.box.changes()}
        assert not [path for path in changed if path.startswith("/usr/bin/")]


async def test_apt_replaces_a_package_that_the_host_has(workspace: Path) -> None:
    """As an ordinary user, only after removing it: a host file of another owner cannot be renamed or linked inside.

    The kernel would have to give the copy an owner that the sandbox's user namespace does not map (EOVERFLOW), so
    dpkg cannot make its backup of the old file. Deleting needs no copy.
    """
    _needs_debian()
    need("git")
    files = ("usr/bin/git", "usr/share/icons/hicolor/48x48/apps/git.png")
    async with contained(workspace, user="root") as inside:
        await inside.run(["bash", "-euc", _BUILD_PACKAGE, "build", "git", "99:1.0", files[1]])
        result = await inside.box.exec(["dpkg", "-i", "/tmp/git-99:1.0.deb"], timeout=120)
        if os.geteuid() != 0:
            assert result.exit_code == 1
            assert b"unable to make backup link of './usr/bin/git'" in result.stderr
            await inside.sh("git --version; dpkg --remove --force-depends git 2>&1; dpkg -i /tmp/git-99:1.0.deb")
        else:
            assert result.exit_code == 0, result.stderr
        assert await inside.sh(f"git; cat /{files[1]}") == "version 99:1.0\nfrom 99:1.0"
        assert "ii  git " in await inside.sh("dpkg -l git")


async def test_what_no_package_can_do(workspace: Path) -> None:
    """Give files to others, and change /opt: root inside has no capability, and /opt is read-only."""
    async with contained(workspace, user="root") as inside:
        await inside.sh("useradd -r corral-daemon; getent passwd corral-daemon; touch /var/opt/file")
        result = await inside.box.exec(["chown", "corral-daemon", "/var/opt/file"], timeout=60)
        # In a map of one id the new user does not even have a number outside.
        assert (b"Operation not permitted" if os.geteuid() == 0 else b"Invalid argument") in result.stderr
        if os.path.isdir("/opt"):
            result = await inside.box.exec(["mkdir", "/opt/vendor"], timeout=60)
            assert b"Read-only file system" in result.stderr


# ---- what PATH brings in


async def test_the_tools_of_the_caller(workspace: Path) -> None:
    """Whatever PATH this test runs with, its programs are found inside, at the same place and in the same version."""
    search = os.environ["PATH"]
    async with contained(workspace, search=search) as inside:
        for name in ("python3", "pip", "git", "node", "npm", "ruby", "go", "cargo", "java", "gcc", "make", "perl"):
            place = shutil.which(name)
            if place is None:
                continue
            command = [name, "version" if name == "go" else "--version"]
            expected = subprocess.run(command, cwd=workspace, check=False, capture_output=True, timeout=60)
            if expected.returncode == 0:
                assert await inside.sh(f"command -v {name}") == place
                assert await inside.run(command) == expected.stdout.decode().rstrip("\n"), place


async def test_a_virtual_environment_from_path(workspace: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_ed25519").write_text("key")
    (home / "notes").write_text("private")
    builder = venv.EnvBuilder(symlinks=True)
    builder.create(home / "envs" / "tool")
    site = next((home / "envs" / "tool" / "lib").glob("python3*/site-packages"))
    (site / "carried.py").write_text("VALUE = 42\n")
    before = tree(home)
    async with contained(workspace, search=f"{home}/envs/tool/bin:{PATH}") as inside:
        script = "import sys, carried; print(sys.prefix, carried.VALUE, carried.__file__)"
        assert await inside.run(["python", "-c", script]) == f"{home}/envs/tool 42 {site}/carried.py"
        script = "import sys\ntry: open(sys.argv[1], 'w')\nexcept OSError as e: print(e.errno)"
        for target in (f"{site}/new.py", f"{site}/carried.py", f"{home}/envs/tool/pyvenv.cfg"):
            assert int(await inside.python(script, target)) == errno.EROFS, target
        assert await inside.sh(f"ls -A {home} {home}/envs") == f"{home}:\nenvs\n\n{home}/envs:\ntool"
    assert tree(home) == before


_PROGRAM = "#!/bin/sh\necho {name} from $(dirname $0)\n"
_LAYOUTS = {
    # name: (directory of PATH, the command, further files, what must be absent)
    "nvm": (
        ".nvm/versions/node/v20.1.0/bin",
        "node",
        (".nvm/versions/node/v20.1.0/lib/node_modules/npm/bin/npm", ".nvm/versions/node/v20.1.0/include/node/n.h"),
        (".nvm/.cache", ".bash_history"),
    ),
    "pyenv": (
        ".pyenv/shims",
        "python9",
        (".pyenv/versions/9.9/bin/python9", ".pyenv/libexec/pyenv", ".pyenv/version"),
        (".pyenv/sources", ".netrc"),
    ),
    "rustup": (
        ".cargo/bin",
        "cargo",
        (".rustup/toolchains/stable/bin/cargo", ".rustup/settings.toml"),
        (".cargo/registry", ".cargo/credentials.toml"),
    ),
    "conda": (
        "miniconda/envs/work/bin",
        "tool",
        ("miniconda/envs/work/conda-meta/history", "miniconda/envs/work/lib/libtool.so"),
        ("data", ".condarc"),
    ),
}


@pytest.mark.parametrize("layout", _LAYOUTS)
async def test_a_version_manager_from_path(workspace: Path, tmp_path: Path, layout: str) -> None:
    entry, command, beside, absent = _LAYOUTS[layout]
    home = tmp_path / "home"
    for path in (f"{entry}/{command}", *beside, *(f"{path}/file" for path in absent)):
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(_PROGRAM.format(name=command))
        (home / path).chmod(0o755)
    async with contained(workspace, search=f"{home}/{entry}:{PATH}") as inside:
        assert await inside.run([command]) == f"{command} from {home}/{entry}"
        for path in beside:
            assert await inside.run(["cat", f"{home}/{path}"]) == _PROGRAM.format(name=command).rstrip("\n")
        for path in absent:
            assert await inside.sh(f"! test -e {home}/{path}; ! test -L {home}/{path}") == ""
        if layout == "rustup":
            assert await inside.sh("echo $RUSTUP_HOME") == f"{home}/.rustup"
        refused = await inside.box.exec(["touch", f"{home}/{entry}/new"], timeout=60)
        assert b"Read-only file system" in refused.stderr


# ---- another root


def _copy_program(program: str, root: Path) -> None:
    """Copies a program and the libraries that ldd names."""
    listed = subprocess.run(["ldd", program], check=True, capture_output=True, text=True, timeout=60).stdout
    libraries = [word for word in listed.split() if word.startswith("/")]
    for path in (program, *libraries):
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(os.path.realpath(path), target)


async def test_another_root_file_system(workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for program in ("/bin/sh", "/bin/ls", "/bin/cat", "/bin/mkdir", PYTHON):
        _copy_program(program, root)
    library = subprocess.run(
        [PYTHON, "-c", "import os; print(os.path.dirname(os.__file__))"], check=True, capture_output=True, text=True
    ).stdout.strip()
    left_out = shutil.ignore_patterns("__pycache__", "test", "*-packages", "config-*", "idlelib", "ensurepip")
    shutil.copytree(library, root / library.lstrip("/"), ignore=left_out)
    (root / "etc").mkdir()
    (root / "etc" / "os-release").write_text("NAME=made-up\n")
    before = tree(root)
    async with contained(workspace, root=root) as inside:
        how = {"directory": "/"}
        assert await inside.run(["/bin/sh", "-c", "cat /etc/os-release"], **how) == "NAME=made-up"
        names = set((await inside.run(["/bin/ls", "-A", "/"], **how)).split())
        assert {"bin", "dev", "etc", "home", "proc", "root", "run", "tmp", "usr"} <= names
        assert not names & {"opt", "srv", "mnt", "boot", "sbin"}
        assert await inside.run(["/bin/cat", f"{workspace}/file.txt"], **how) == "original"
        assert (await inside.box.exec(["/bin/ls", "/usr/share/dpkg"], timeout=60)).exit_code != 0
        script = "import os, json, subprocess; open('w', 'w').write('x'); print(os.getuid(), os.stat('.').st_uid)"
        assert await inside.python(script) == "1000 1000"
    async with contained(workspace, root=root, user="root") as inside:
        await inside.run(["/bin/sh", "-c", "mkdir /opt && echo new >/opt/x && echo changed >/etc/os-release"])
        kinds = {change.path: change.kind for change in await inside.box.changes()}
        assert kinds["/etc/os-release"] is ChangeKind.CHANGED
        assert kinds["/opt"] is ChangeKind.ADDED
    assert tree(root) == before
