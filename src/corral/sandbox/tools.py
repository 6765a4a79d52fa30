"""Which interpreters and tools outside the system trees a command needs, found from PATH.

Inside a sandbox the host's home is absent, and with it a virtual environment, pyenv, nvm or conda that PATH names.
:func:`find_tools` names the smallest trees to show read-only:

1. A tree is an *installation* (a prefix known by what lies in it), a part of a version manager, one bin directory, or
   one executable file; never a hidden root, nothing that holds one, nothing in or around a directory of keys.
2. Paths are followed as the kernel follows them, link by link. Every *name* on the way is shown as well as the real
   tree: with ``~/.pyenv -> /data/pyenv`` both are in ``trees``, since scripts and links in it spell either. The bind
   mount's source follows the link, its target is a plain directory or file at that name. A link can change between
   this look and the mount: the mounter must check what it opened against what it denies.
3. What an entry below ``visible`` leads to is trusted less: a repository may hold a link or a ``pyvenv.cfg`` made by
   somebody else, so it can lead to an installation, never to a lone file or a plain directory.
4. Nothing here raises for what it finds: an odd entry is left out, of ``trees`` and of ``path``.

Not found: what a program opens without PATH, a link or ``#!`` saying so (an unusual RUSTUP_HOME, ``~/.tool-versions``).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import basename, dirname, isdir, islink, join, lexists, normpath

STANDARD_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")

_MAX_PATH_ENTRIES = 128
_MAX_LINKS = 40  # the kernel's own bound
_MAX_DEPTH = 8  # venv on venv, script on script
_MAX_ENTRIES, _MAX_LOOKED_AT = 256, 512  # of one directory, and of all: bounds the time of one start
_MAX_NAME, _MAX_SHEBANG, _MAX_CFG = 4095, 256, 4096  # bytes; the kernel's, the kernel's, ours

_KERNEL_ROOTS = frozenset({"proc", "sys", "dev"})  # names below them change meaning inside, so no tree goes there
_KEYS = frozenset(
    {".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".oci", ".gcloud", ".password-store", ".pki", ".mozilla"}
    | {".thunderbird", "keyrings", ".netrc", ".git-credentials", ".pypirc"}
)
"""Names that no shown path may pass through."""
_TELLTALES = _KEYS | {".bash_history", ".bashrc", ".profile", ".zshrc", "credentials", "credentials.toml"}
"""Names that a shown directory may not hold: it is somebody's home, or keeps a token, whatever else it looks like."""
_NEVER_WHOLE = frozenset({".local", ".config", ".cache", ".cargo", ".rustup"})
"""Prefixes that users' data shares with tools; only their parts are shown."""

_MARKERS = (
    *(("conda-meta",), ("lib/node_modules",), ("include/node",), ("lib/rustlib",)),
    *(("bin/ruby", "lib/ruby"), ("bin/java", "lib/modules"), ("bin/go", "src/runtime")),
)
"""A prefix that has all names of one of these is an installation."""
_MANAGERS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("shims", "versions"), ("bin", "libexec", "shims", "versions", "plugins", "version", "completions", "pyenv.d")),
    (("shims", "installs"), ("bin", "lib", "libexec", "shims", "installs", "plugins", "asdf.sh")),
    (("bin", "tools/image"), ("bin", "tools")),
)
"""Version managers (pyenv and kin, asdf and mise, Volta): what one is known by, and the parts it needs."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What to show of the host's tools, and the PATH that fits it."""

    trees: tuple[str, ...]
    """Absolute host paths, sorted, to show read-only at their own place. None lies inside another."""
    path: str
    """The caller's entries that exist inside, in order, then the standard ones that were missing."""


def find_tools(path: str, *, visible: Sequence[str], hidden_roots: Sequence[str], command: str | None = None) -> Tools:
    """Return the trees that PATH and ``command`` need beside ``visible``, and the PATH to use inside.

    ``visible`` are trees that are shown anyway. ``hidden_roots`` are never shown whole, nor inside a tree; one that
    ends in ``/*`` stands for every direct child. ``command`` is a program's name or path, or a line that begins so.
    """
    finder = _Finder(visible, hidden_roots)
    entries: dict[str, None] = {}
    for entry in map(_normal, path.split(":")[: 4 * _MAX_PATH_ENTRIES]):
        # A directory that everybody may write decides which program runs: it is not searched, wherever it lies.
        mode = _look(entry or "")[0]
        if entry and stat.S_ISDIR(mode) and not mode & stat.S_IWOTH and len(entries) < _MAX_PATH_ENTRIES:
            entries[entry] = None
    for entry in entries:
        finder.show_entry(entry)
    kept = [entry for entry in entries if finder.is_reachable(entry)]
    finder.show_command(command or "", kept)
    return Tools(finder.trees(), ":".join(dict.fromkeys((*kept, *STANDARD_PATH))))


_PLACES = ("VIRTUAL_ENV", "CONDA_PREFIX", "NVM_BIN", "JAVA_HOME", "GOROOT")
_MANAGERS_ROOTS = ("PYENV_ROOT", "NVM_DIR", "RUSTUP_HOME", "CARGO_HOME")


def environment_hints(env: Mapping[str, str], trees: Sequence[str]) -> dict[str, str]:
    """Return the variables of ``env`` that name a tool shown inside, and so should be set there.

    ``trees`` is all that is shown: :attr:`Tools.trees` and the visible ones. A manager's root counts when parts of it
    are shown, a name (PYENV_VERSION, CONDA_DEFAULT_ENV) when what it names is.
    """
    around = {parent for tree in trees for parent in _up(tree)} - {"/"}
    hints: dict[str, str] = {}
    for name in (*_PLACES, *_MANAGERS_ROOTS):
        place = _normal(env.get(name, ""))
        if place and (_within(place, set(trees)) or (name in _MANAGERS_ROOTS and place in around)):
            hints[name] = env[name]
    versions = [tree for tree in trees if basename(dirname(tree)) == "versions"]
    versions += [place for tree in trees if basename(tree) == "versions" for place in _entries(tree)]
    if {"system", *map(basename, versions)}.issuperset(env.get("PYENV_VERSION", "").split(":")):
        hints["PYENV_VERSION"] = env["PYENV_VERSION"]
    prefix = hints.get("CONDA_PREFIX", "")
    if prefix and env.get("CONDA_DEFAULT_ENV") in ("base", basename(prefix), prefix):
        hints["CONDA_DEFAULT_ENV"] = env["CONDA_DEFAULT_ENV"]
    return hints


def default_hints(trees: Sequence[str]) -> dict[str, str]:
    """Return variables for shown tools that look below HOME unless told: HOME is another one inside."""
    roots = (dirname(tree) for tree in trees if basename(tree) == "toolchains")
    rustup = next((root for root in roots if basename(root) in (".rustup", "rustup")), None)
    return {} if rustup is None else {"RUSTUP_HOME": rustup}


class _Finder:
    """Collects trees. One per call, because all that it remembers of the file system is true for a moment only."""

    def __init__(self, visible: Sequence[str], hidden_roots: Sequence[str]) -> None:
        self._visible = {tree for tree in map(_normal, visible) if tree is not None}
        self._hidden = hidden_roots
        self._closed: set[str] = set()  # hidden roots and all above them; filled when the first tree is considered
        self._starred: set[str] = set()  # directories whose children are hidden roots
        self._identities: set[tuple[int, int]] = set()  # hidden roots' device and inode: a bind mount shows no link
        self._trees: set[str] = set()
        self._names_of: dict[str, tuple[str, ...]] = {}
        self._plain: set[str] = set()  # known not to be links
        self._installed: dict[str, bool] = {}  # bin directory -> whether its installation is shown
        self._chased: set[tuple[str, bool]] = set()
        self._left = _MAX_LOOKED_AT

    def trees(self) -> tuple[str, ...]:
        return tuple(sorted(tree for tree in self._trees if not _within(dirname(tree), self._trees)))

    def is_reachable(self, path: str) -> bool:
        """Whether ``path`` exists inside: each name through which the kernel goes is shown."""
        return self._names(path) != () and all(map(self._is_shown, self._names(path)))

    def show_entry(self, entry: str) -> None:
        """Show what one PATH directory needs."""
        if not self._install(entry, 0) and not _within(entry, self._visible) and self._add(entry):
            self._scan(entry, 0)

    def show_command(self, command: str, entries: Sequence[str]) -> None:
        """Show what the command's own file needs, as PATH (``entries``, all reachable) finds it."""
        word = command if "/" in command and lexists(command) else (command.split(None, 1) or [""])[0]
        places = (word,) if "/" in word else (join(entry, word) for entry in entries)
        try:
            file = _normal(join(os.getcwd(), next(filter(_is_program, places), ""))) or ""
        except OSError:
            return  # the working directory is gone
        self._chase(file, 0, trusted=not _within(file, self._visible))

    def _is_shown(self, path: str) -> bool:
        return _within(path, self._visible) or _within(path, self._trees)

    def _names(self, path: str) -> tuple[str, ...]:
        """Return each spelling that the kernel goes through to reach ``path``; the last is real. Empty: no such file.

        A relative link starts at the real place of the directory that holds it, as in the kernel. A spelling in which
        ``..`` comes after a name is left out: read without the file system it could name something else.
        """
        names, links, real, rest = [path], 0, "/", path.split("/")[:0:-1]
        if path in self._names_of:
            return self._names_of[path]
        while rest:
            here = _step(real, rest.pop())
            known = here in self._plain or len(here) <= len(real)
            try:
                target = os.readlink(here) if not known and stat.S_ISLNK(os.lstat(here).st_mode) else None
            except (OSError, ValueError):
                return ()
            if target is None:
                self._plain.add(real := here)
                continue
            links += 1
            if links > _MAX_LINKS or not target.isprintable():
                return ()
            rest.extend(target.split("/")[::-1])
            real = "/" if target.startswith("/") else real
            while rest and rest[-1] in ("", ".", ".."):
                real = _step(real, rest.pop())
            if ".." not in rest:
                names.append(_lexical(join(real, *rest[::-1])))
        return self._names_of.setdefault(path, tuple(dict.fromkeys((*names, real))))

    def _close(self) -> None:
        self._closed.add("/")
        for root in self._hidden:
            place = _lexical(root.removesuffix("*") if root.endswith("/*") else root)
            names = {place, *self._names(place)}
            if root.endswith("/*"):
                self._starred |= names
                names.update(name for link in filter(islink, _entries(place)) for name in self._names(link))
            self._closed.update(parent for name in names for parent in _up(name))
            self._identities.update(_look(name)[1:] for name in names)

    def _is_forbidden(self, path: str) -> bool:
        if not self._closed:
            self._close()
        if path in self._closed or dirname(path) in self._starred:
            return True
        return path.split("/", 2)[1] in _KERNEL_ROOTS or not _KEYS.isdisjoint(path.split("/"))

    def _add(self, path: str, *, data: bool = False) -> bool:
        """Add a directory, an executable, or with ``data`` any regular file, under all its names; false if refused."""
        names = self._names(path)
        if not names or any(map(self._is_forbidden, names)):
            return False
        mode, *identity = _look(real := names[-1])
        if stat.S_ISDIR(mode):
            home = tuple(identity) in self._identities or any(lexists(join(real, name)) for name in _TELLTALES)
            if home or not os.access(real, os.X_OK) or any(basename(name) in _NEVER_WHOLE for name in names):
                return False
        elif not stat.S_ISREG(mode) or not (data or mode & 0o111):
            return False
        self._trees.update(name for name in names if not _within(name, self._visible))
        return True

    def _install(self, place: str, depth: int) -> bool:
        """Show the installation whose bin directory is ``place``, by whichever of its names that is one."""
        names = self._names(place)
        for name in names:
            if name not in self._installed and depth <= _MAX_DEPTH:
                self._installed[name] = False  # ends loops
                self._installed[name] = self._manager(name, depth) or self._prefix(name, depth)
        found = any(self._installed.get(name) for name in names)
        # One more name for what is shown already adds nothing to see. A bin that leads out of its prefix would.
        return found and (self.is_reachable(place) or (self._is_shown(names[-1]) and self._add(place)))

    def _prefix(self, place: str, depth: int) -> bool:
        prefix, name = os.path.split(place)
        if name not in ("bin", "condabin") or prefix == "/":
            return False
        venv = lexists(join(prefix, "pyvenv.cfg")) and lexists(join(place, "python"))
        if self.is_reachable(prefix):
            if not venv:
                return True
        elif not (venv or self._is_installation(prefix)) or not (self._add(prefix) or self._add_parts(prefix, depth)):
            return False
        self._install((_venv_home(join(prefix, "pyvenv.cfg")) if venv else None) or "/", depth + 1)
        for interpreter in ("python", "python3", "node", "java", "go"):
            self._chase(join(place, interpreter), depth + 1, trusted=False)
        return True

    def _is_installation(self, prefix: str) -> bool:
        # An interpreter that is a link to somewhere else says nothing about this prefix.
        own = (self._names(join(prefix, "bin", name))[-1:] for name in ("python3", "node"))
        if any(_within(name, set(self._names(prefix)[-1:])) for names in own for name in names):
            return True
        known = any(all(lexists(join(prefix, name)) for name in marker) for marker in _MARKERS)
        return known or bool(_python_libraries(prefix))

    def _add_parts(self, prefix: str, depth: int) -> bool:
        """Of a prefix that must not be shown whole (``~``, ``~/.local``), show what pip and npm put there."""
        if not self._add(join(prefix, "bin")):
            return False
        for part in (*_python_libraries(prefix), join(prefix, "lib/node_modules"), join(prefix, "pyvenv.cfg")):
            self._add(part, data=True)
        self._scan(join(prefix, "bin"), depth)
        return True

    def _manager(self, place: str, depth: int) -> bool:
        root, name = os.path.split(place)
        if name not in ("bin", "shims") or self.is_reachable(place):
            return False
        if name == "bin" and basename(root) in (".cargo", "cargo") and lexists(join(place, "cargo")):
            # Only bin: credentials.toml lies beside it.
            rustup = join(dirname(root), basename(root).replace("cargo", "rustup"))
            self._add_all(rustup, ("toolchains", "settings.toml", "update-hashes"), depth)
            return self._add(place)
        if name == "shims" and "/plugins/" in place:
            root = place[: place.index("/plugins/")]
        for markers, parts in _MANAGERS:
            if all(isdir(join(root, marker)) for marker in markers):
                self._add_all(root, parts, depth)
                self._scan(place, depth, links_only=True)
                return self.is_reachable(place)
        return False

    def _add_all(self, root: str, parts: Sequence[str], depth: int) -> None:
        """Show parts of a manager's root. A version in it may be a link to an installation elsewhere."""
        for part in parts:
            if self._add(join(root, part), data=True) and part in ("versions", "toolchains"):
                for entry in filter(islink, self._look_through(join(root, part))):
                    self._install(join(entry, "bin"), depth + 1)

    def _scan(self, directory: str, depth: int, *, links_only: bool = False) -> None:
        """Show what links and scripts in a bin directory need: pipx and ``pip --user`` leave nothing else there."""
        for entry in self._look_through(directory):
            file = entry if islink(entry) else "" if links_only else _interpreter(entry)
            self._chase(file or "", depth + 1, trusted=True)

    def _look_through(self, directory: str) -> list[str]:
        found = _entries(directory)[: self._left]
        self._left -= len(found)
        return found

    def _chase(self, file: str, depth: int, *, trusted: bool) -> None:
        """Show what running ``file`` needs: its links' targets and its interpreter."""
        if depth > _MAX_DEPTH or (file, trusted) in self._chased or not _is_program(file):
            return
        self._chased.add((file, trusted))
        for name in self._names(file):
            if not self._install(dirname(name), depth + 1) and not self._is_shown(name) and trusted:
                # An npm program finds its modules beside itself.
                parent, found, _ = name.partition("/node_modules/")
                if not found or not self._add(join(parent, "node_modules")):
                    self._add(name)
        if self.is_reachable(file):
            self._chase(_interpreter(file) or "", depth + 1, trusted=trusted)


def _lexical(path: str) -> str:
    return "/" + normpath(path).lstrip("/")  # normpath keeps two leading slashes


def _step(real: str, part: str) -> str:
    return dirname(real) if part == ".." else real if part in ("", ".") else join(real, part)


def _normal(path: str) -> str | None:
    """Return an absolute path in one spelling, or None for one that is relative, too long or not printable text.

    ``..`` after a link means what the kernel says, so there the real path is taken.
    """
    if not path.startswith("/") or len(path) > _MAX_NAME or not path.isprintable():
        return None
    return next(reversed(_Finder((), ())._names(path)), None) if "/../" in path + "/" else _lexical(path)


def _up(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield "/"


def _within(path: str, roots: set[str]) -> bool:
    return not roots.isdisjoint(_up(path))


def _look(path: str) -> tuple[int, int, int]:
    """Return mode, device and inode of what ``path`` leads to; a mode of 0 for nothing."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return (0, -1, -1)
    return (found.st_mode, found.st_dev, found.st_ino)


def _is_program(path: str) -> bool:
    mode = _look(path)[0]
    return stat.S_ISREG(mode) and bool(mode & 0o111)


def _entries(directory: str) -> list[str]:
    """Return the paths in a directory, up to a bound."""
    try:
        with os.scandir(directory) as found:
            return [
                entry.path for entry, _ in zip(found, range(_MAX_ENTRIES), strict=False) if entry.name.isprintable()
            ]
    except (OSError, ValueError):
        return []


def _python_libraries(prefix: str) -> list[str]:
    return [path for path in _entries(join(prefix, "lib")) if basename(path).startswith(("python3.", "pypy3."))]


def _head(path: str, size: int) -> bytes:
    """Return up to ``size`` bytes of a regular file; empty for anything else. Never waits on a FIFO or a device."""
    if not stat.S_ISREG(_look(path)[0]):
        return b""
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(size) or b""
    except (OSError, ValueError):
        return b""


def _venv_home(cfg: str) -> str | None:
    """Return ``home`` of a pyvenv.cfg, or None unless it is said once, absolutely, in a file of ordinary size."""
    head = _head(cfg, _MAX_CFG + 1)
    pairs = [line.partition("=") for line in os.fsdecode(head).split("\n")] if len(head) <= _MAX_CFG else []
    homes = [value.strip() for key, _, value in pairs if key.strip().lower() == "home"]
    return _normal(homes[0]) if len(homes) == 1 else None


def _interpreter(script: str) -> str | None:
    """Return the interpreter in a script's first line; None without one, or if it is longer than the kernel reads."""
    first, end, rest = _head(script, _MAX_SHEBANG).partition(b"\n")
    words = first[2:].split() if end and first.startswith(b"#!") else []
    # Where the interpreter's path is too long or has spaces, pip names it in the second line.
    if words == [b"/bin/sh"] and rest.startswith(b"'''exec' "):
        rest = rest[len(b"'''exec' ") :]
        words = rest.split(b'"')[1:2] if rest.startswith(b'"') else rest.split(b" ")[:1]
    return _normal(os.fsdecode(words[0])) if words else None
