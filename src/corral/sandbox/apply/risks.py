"""What a person must look at before it is applied: files that make others execute things, and names that mislead.

A file is not dangerous because it can be executed, but because something executes it that nobody asked to: an editor
that opens the directory, a shell that enters it, git, a test runner, the next build elsewhere. What is executed because
somebody asked for it (a Makefile, a program) is for the diff to show, unless the policy names it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from functools import cache

from corral.policy.matching import AppliedPaths

_EXECUTED = {
    "a shell reads it": """
        .bashrc .bash_profile .bash_login .bash_logout .profile .bash_aliases .inputrc .zshrc .zshenv
        .zprofile .zlogin .zlogout .kshrc .mkshrc .cshrc .tcshrc .login .envrc .direnv/** .config/fish/**
        .tool-versions mise.toml .mise.toml .config/mise/** .python-version .tmux.conf .screenrc
    """,
    "an editor obeys it": """
        .vscode/** .idea/** .fleet/** .zed/** .gdbinit .lldbinit *.code-workspace .exrc .vimrc .nvimrc
        .nvim.lua .dir-locals.el .emacs *.sublime-project .devcontainer/** .devcontainer.json
        .helix/** .nova/** .theia/**
    """,
    "an agent obeys it": """
        .claude/** .mcp.json .windsurf/** .clinerules .cursor/** .cursorrules .windsurfrules .codex/**
        .gemini/** CLAUDE.md AGENTS.md GEMINI.md .github/copilot-instructions.md .aider* .continue/**
        .roo/** .kiro/** .amazonq/** .opencode/** opencode.json
    """,
    "it runs elsewhere, with other rights": """
        .github/workflows/** .github/actions/** .gitlab-ci.yml .gitlab/** .gitea/** .forgejo/** .circleci/**
        .travis.yml Jenkinsfile* azure-pipelines*.yml .drone.yml .buildkite/** .woodpecker* .ci/**
        bitbucket-pipelines.yml appveyor.yml .appveyor.yml cloudbuild.yaml .tekton/** .cirrus.yml .cirrus.star
        .semaphore/** .teamcity/** buildspec.yml
    """,
    "git runs or obeys it": """
        .gitmodules .gitattributes .gitconfig .config/git/** .husky/** .githooks/** lefthook.y*ml hooks/pre-*
        hooks/post-* hooks/*-msg .hg/hgrc* .hg/sharedpath .jj/repo/config.toml
        hooks/update hooks/push-to-checkout hooks/proc-receive hooks/fsmonitor-watchman
        hooks/reference-transaction
    """,
    "a commit runs it": """
        .pre-commit-config.yaml .pre-commit-hooks.yaml .lintstagedrc*
    """,
    "Python runs it unasked": """
        conftest.py *.pth *.pyc __pycache__/** sitecustomize.py usercustomize.py .pdbrc .pythonrc
        .pythonrc.py pip.conf .pypirc
    """,
    "an interpreter reads it when it starts": """
        .Rprofile .Renviron .ghci .psqlrc .sqliterc .my.cnf .curlrc .wgetrc
    """,
    "a package manager runs or obeys it": """
        package.json .npmrc .pnp.cjs .pnp.loader.mjs .prettierrc.* eslint.config.* .eslintrc.* .yarnrc
        .yarnrc.yml .yarn/** .pnpmfile.cjs binding.gyp bunfig.toml build.rs .cargo/** rust-toolchain
        rust-toolchain.toml .gemrc .irbrc .pryrc .bazelrc tools/bazel .mvn/** extconf.rb
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
    r"|refs/(heads|tags|remotes|notes)/.+|refs/stash|logs/HEAD|logs/refs/.+|packed-refs|index|HEAD|ORIG_HEAD|FETCH_HEAD|MERGE_HEAD"
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
        return "" if is_directory or _GIT_DATA.fullmatch(within) else "git runs or obeys it"
    if is_directory:
        return ""
    name = "/".join(folded)
    if not _known(" ".join(_EXECUTED.values()))(name):
        return ""
    return next(why for why, patterns in _EXECUTED.items() if _known(patterns)(name))


@cache
def _known(patterns: str) -> Callable[[str], object]:
    """Says whether one of some patterns names a path, by its truth. One expression for all: there may be a hundred
    thousand files."""
    return re.compile(f"(?:.*/)?(?:{'|'.join(map(_expression, patterns.casefold().split()))})", re.DOTALL).fullmatch


def _expression(pattern: str) -> str:
    name = pattern.removesuffix("/**")
    return re.escape(name).replace(r"\*", "[^/]*") + ("/.+" if name != pattern else "")


class Asked:
    """What a policy wants to be looked at (``apply.ask``)."""

    def __init__(self, globs: tuple[str, ...]) -> None:
        self._globs, self._paths = globs, AppliedPaths(globs)

    def __call__(self, path: str) -> str:
        """Why, or nothing. ``path`` is relative to the workspace."""
        found = self._paths.all(path)
        return f"the policy asks for it ({self._globs[found[0]].removeprefix('/**/').lstrip('/')})" if found else ""


def misleading(name: str) -> str:
    """Why a name is not what it looks like, or nothing."""
    if any(unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for each in name):
        return "its name has characters that are not seen, or is no text"
    if name != name.strip():
        return "its name begins or ends with a space"
    return ""


class Names:
    """The names in a directory."""

    def __init__(self, names: Collection[str]) -> None:
        self.folded = {name.casefold() for name in names}
        self._alike: dict[str, list[str]] = {}
        for name in names:
            self._alike.setdefault(_folded(name), []).append(name)

    def twin(self, name: str) -> str:
        """Another name that is the same on some systems, or looks the same."""
        return next((other for other in sorted(self._alike.get(_folded(name), ())) if other != name), "")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def leads_out(path: str, target: str, is_link: Callable[[str], bool]) -> bool:
    """Whether a link leads out of the workspace, or may: ``is_link`` says what it would pass through."""
    if target.startswith("/"):
        return True
    at = path.split("/")[:-1]
    has_followed = False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    for number, part in enumerate(parts, 1):
        if part == "..":
            # After a name, where ".." leads is for the other end of that name to say.
            if has_followed or not at:
                return True
            at.pop()
            continue
        at.append(part)
        has_followed = True
        if number < len(parts) and is_link("/".join(at)):
            return True
    return False


def reasons(
    path: str,
    *,
    is_directory: bool,
    is_deleted: bool,
    link: str | None,
    names: Names,
    is_new: bool,
    is_link: Callable[[str], bool],
) -> Iterator[str]:
    """Why a person must look at an entry: ``link`` is where it leads, ``names`` are those in its directory."""
    name = path.rpartition("/")[2]
    if why := _obeyed(path, name, is_directory=is_directory, is_deleted=is_deleted, names=names):
        yield why
    if is_new and (odd := misleading(name)):
        yield odd
    if is_new and (other := names.twin(name)):
        yield f"it differs from {other} only in case or form"
    if link is not None and leads_out(path, link, is_link):
        yield "it is a link that may lead out of the workspace"


def _obeyed(path: str, name: str, *, is_directory: bool, is_deleted: bool, names: Names) -> str:
    if is_directory:
        # A whole tree that goes away is what lay in it; one that is made is listed entry by entry.
        return executed(f"{path}/-") if is_deleted else ""
    # A link, or a file, in place of a directory that is obeyed leads to another one.
    within = ".git" in path.casefold().split("/")
    if why := executed(path) or ("" if within else executed(f"{path}/-")):
        return why
    if within:
        return ""
    repository = {"head", "config", "objects", "refs", "commondir"}
    if name.casefold() in ("commondir", "gitdir", "config.worktree") or (
        name.casefold() in ("head", "config") and len(names.folded & repository) > 1
    ):
        return "git runs or obeys it: with what lies beside it, it is a repository"
    return ""
