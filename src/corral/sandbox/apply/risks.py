"""What a person must look at before it is applied: files that make others execute things, and names that mislead.

A file is not dangerous because it can be executed, but because something executes it that nobody asked to: an editor
that opens the directory, a shell that enters it, git, a test runner, the next build elsewhere. What is executed because
somebody asked for it (a Makefile, a program) is for the diff to show.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

_EXECUTED = {
    "a shell reads it": """
        .bashrc .bash_profile .bash_login .bash_logout .profile .bash_aliases .inputrc .zshrc .zshenv
        .zprofile .zlogin .zlogout .kshrc .cshrc .tcshrc .login .envrc .config/fish/** .tool-versions
        mise.toml .mise.toml .python-version
    """,
    "an editor obeys it": """
        .vscode/** .idea/** .fleet/** .zed/** *.code-workspace .exrc .vimrc .nvimrc .nvim.lua .dir-locals.el
        .emacs .sublime-project .devcontainer/** .devcontainer.json
    """,
    "an agent obeys it": """
        .claude/** .mcp.json .cursor/** .cursorrules .windsurfrules .codex/** .gemini/** CLAUDE.md AGENTS.md
        GEMINI.md .github/copilot-instructions.md
    """,
    "it runs elsewhere, with other rights": """
        .github/workflows/** .github/actions/** .gitlab-ci.yml .gitlab/** .circleci/** .travis.yml
        Jenkinsfile* azure-pipelines*.yml .drone.yml .buildkite/** .woodpecker* .ci/**
        bitbucket-pipelines.yml appveyor.yml .appveyor.yml cloudbuild.yaml .tekton/**
    """,
    "git runs or obeys it": """
        .gitmodules .gitattributes .husky/** .githooks/** lefthook.y*ml hooks/pre-* hooks/post-* hooks/*-msg
        hooks/update hooks/fsmonitor-watchman hooks/reference-transaction
    """,
    "a commit runs it": """
        .pre-commit-config.yaml .pre-commit-hooks.yaml .lintstagedrc*
    """,
    "Python runs it unasked": """
        conftest.py *.pth sitecustomize.py usercustomize.py .pdbrc .pythonrc pip.conf .pypirc
    """,
    "a package manager runs or obeys it": """
        package.json .npmrc .yarnrc .yarnrc.yml .yarn/** .pnpmfile.cjs binding.gyp bunfig.toml build.rs
        .cargo/** .gemrc extconf.rb
    """,
    "a desktop runs it": """
        *.desktop .config/autostart/** .config/systemd/** .local/share/applications/**
    """,
    "it lets others in, or leads elsewhere": """
        .ssh/** .netrc .gnupg/** .aws/** .kube/** .docker/**
    """,
}
"""By why. A pattern without a slash holds for a name anywhere; with one, from any directory on."""

_GIT_DATA = re.compile(
    r"(objects/([0-9a-f]{2}/[0-9a-f]+|pack/pack-[0-9a-f]+\.(pack|idx|rev|bitmap|mtimes)|info/(packs|commit-graph))"
    r"|refs/(heads|tags|remotes|notes)/.+|refs/stash|logs/.+|packed-refs|index|HEAD|ORIG_HEAD|FETCH_HEAD|MERGE_HEAD"
    r"|MERGE_MSG|MERGE_MODE|AUTO_MERGE|CHERRY_PICK_HEAD|REVERT_HEAD|COMMIT_EDITMSG|SQUASH_MSG|shallow|gc\.pid)"
)
"""What lies in a repository and is never executed. All else there may be."""


def executed(path: str, *, is_directory: bool = False) -> str:
    """Why a file makes others execute things, or nothing. ``path`` is relative to the workspace."""
    parts = path.split("/")
    folded = [part.casefold() for part in parts]
    if ".git" in folded:
        within = "/".join(parts[folded.index(".git") + 1 :])
        if not within:
            return "" if is_directory else "git obeys it: it says where a repository is"
        # A repository within another's (.git/modules, .git/worktrees) is looked at as one.
        inner = re.sub(r"^(modules/.+?|worktrees/[^/]+)/(?=objects|refs|logs|index|HEAD)", "", within)
        return "" if is_directory or _GIT_DATA.fullmatch(inner) else "git runs or obeys it"
    if is_directory:
        return ""
    for why, patterns in _EXECUTED.items():
        if any(_matches(folded, pattern.casefold()) for pattern in patterns.split()):
            return why
    return ""


def _matches(parts: list[str], pattern: str) -> bool:
    wanted = pattern.split("/")
    if len(wanted) == 1:
        return fnmatchcase(parts[-1], pattern)
    deep = wanted[-1] == "**"
    wanted = wanted[:-1] if deep else wanted
    for start in range(len(parts) - len(wanted) + (0 if deep else 1)):
        if not deep and start + len(wanted) != len(parts):
            continue
        if all(fnmatchcase(part, each) for part, each in zip(parts[start:], wanted, strict=False)):
            return True
    return False


def misleading(name: str) -> str:
    """Why a name is not what it looks like, or nothing."""
    if any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for each in name):
        return "its name has characters that are not seen, or is no text"
    if name != name.strip():
        return "its name begins or ends with a space"
    return ""


def twin(name: str, others: Iterable[str]) -> str:
    """Another name that is the same on some systems, or looks the same."""
    folded = _folded(name)
    return next((other for other in others if other != name and _folded(other) == folded), "")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def leads_out(path: str, target: str) -> bool:
    """Whether a link leads out of the workspace, or may."""
    if target.startswith("/"):
        return True
    depth = path.count("/")
    for part in target.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            return True
    return False


def reasons(path: str, *, is_directory: bool, link: str | None, others: Iterable[str], is_new: bool) -> Iterator[str]:
    """Why a person must look at an entry: ``link`` is where it leads, ``others`` are the names beside it."""
    name = path.rpartition("/")[2]
    names = list(others)
    why = executed(path, is_directory=is_directory)
    if not why and name == "config" and "HEAD" in names:
        why = "git runs or obeys it: beside it, there is a repository"
    if why:
        yield why
    if is_new and (odd := misleading(name)):
        yield odd
    if is_new and (other := twin(name, names)):
        yield f"it differs from {other} only in case or form"
    if link is not None and leads_out(path, link):
        yield "it is a link that may lead out of the workspace"
