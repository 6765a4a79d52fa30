"""What a person must look at before it is applied: by name, by what lies beside it, by where it leads."""

from __future__ import annotations

import pytest

from corral.sandbox.apply.risks import Asked, Names, executed, misleading, reasons

DIRECTORY = "/"
"""In the place of where a link leads."""


def marked(*paths: str, deleted: bool = False) -> dict[str, list[str]]:
    """Why entries of a tree are marked: directories end with a slash, a link is written ``path -> target``."""
    tree: dict[str, str | None] = {}
    for each in paths:
        path, arrow, target = each.partition(" -> ")
        tree[path.rstrip("/")] = target if arrow else DIRECTORY if path.endswith("/") else None
        while path := path.rstrip("/").rpartition("/")[0]:
            tree.setdefault(path, DIRECTORY)
    found = {}
    for path, what in tree.items():
        parent = path.rpartition("/")[0]
        beside = Names([each.rpartition("/")[2] for each in tree if each.rpartition("/")[0] == parent])
        why = list(
            reasons(
                path,
                is_directory=what == DIRECTORY,
                is_deleted=deleted,
                link=None if what == DIRECTORY else what,
                names=beside,
                is_new=not deleted,
                is_link=lambda each: tree.get(each) not in (None, DIRECTORY),
            )
        )
        if why:
            found[path] = why
    return found


@pytest.mark.parametrize(
    "path",
    # Those that issue 6 names, and some of each kind.
    """.git/hooks/pre-commit .git/config .git/modules/a/hooks/post-checkout .git/info/attributes .githooks/pre-push
    .husky/pre-commit lefthook.yml .gitattributes .gitmodules .hg/hgrc .bashrc .zshenv .profile .inputrc .envrc
    .github/workflows/ci.yml .gitlab-ci.yml .circleci/config.yml Jenkinsfile Jenkinsfile.release .travis.yml .cirrus.yml
    azure-pipelines.yml .vscode/tasks.json .vscode/settings.json .idea/workspace.xml .devcontainer/devcontainer.json
    conftest.py evil.pth sitecustomize.py __pycache__/x.cpython-311.pyc x.pyc package.json .npmrc .yarnrc.yml
    .pnpmfile.cjs binding.gyp build.rs .cargo/config.toml .pre-commit-config.yaml CLAUDE.md .mcp.json .cursor/rules
    .aider.conf.yml opencode.json a.desktop .ssh/authorized_keys .netrc .Rprofile .psqlrc mise.toml""".split(),
)
def test_what_makes_others_execute_things_is_marked_wherever_it_lies(path: str) -> None:
    for place in (path, f"deep/sub/{path}", path.upper()):
        assert executed(place), place
        assert place in marked(place)


@pytest.mark.parametrize(
    "path",
    """Makefile rules.mk justfile setup.py main.py README.md src/package/json package.json.txt gitconfig vscode/x
    .git/objects/ab/0123 .git/refs/heads/main .git/HEAD .git/index .git/logs/refs/heads/main .gitignore hooks/readme
    workflows/ci.yml config HEAD a.pth.txt .github/dependabot.yml""".split(),
)
def test_what_is_not_is_left_to_the_diff_and_the_policy(path: str) -> None:
    assert not executed(path)
    assert marked(path) == {}


def test_what_must_be_looked_at_is_not_hidden_by_links_or_pieces() -> None:
    found = marked(
        *(".vscode -> innocent", "innocent/tasks.json", ".claude", ".cargo -> x"),
        *("x/HEAD", "x/commondir", "x/config.worktree", "y/config", "y/objects/", "y/refs/"),
        *(".git/modules/a/logs/hooks/post-checkout", ".git/modules/a/logs/config", ".git/refs/heads/main", ".git/HEAD"),
        *("d1/d2/s -> ../..", "d1/real/", "t -> d1/d2/s/x", "d1/u -> real/../../../..", "d1/v -> real/x"),
        *("a.sublime-project", "rust-toolchain", "__pycache__/a.pyc"),
    )
    assert found.keys() == {
        ".vscode",
        ".claude",
        ".cargo",
        "x/HEAD",
        "x/commondir",
        "x/config.worktree",
        "y/config",
        ".git/modules/a/logs/hooks/post-checkout",
        ".git/modules/a/logs/config",
        "t",
        "d1/u",
        "a.sublime-project",
        "rust-toolchain",
        "__pycache__/a.pyc",
    }


def test_what_goes_away_is_marked_as_what_lay_in_it() -> None:
    assert marked(".git/", "sub/", deleted=True).keys() == {".git"}
    assert marked(".vscode/", "sub/conftest.py", deleted=True).keys() == {".vscode", "sub/conftest.py"}


@pytest.mark.parametrize("name", ["a\u202eb", "a\u200bb", "a\x1b[2J", "a\nb", "\udcff", " a", "a "])
def test_names_that_mislead_are_marked(name: str) -> None:
    assert misleading(name)
    assert marked(name)


@pytest.mark.parametrize(("name", "other"), [("FILE.txt", "file.txt"), ("\ufb01le", "file"), ("e\u0301", "\u00e9")])
def test_twins_are_marked(name: str, other: str) -> None:
    assert all("only in case or form" in why for (why,) in marked(name, other).values())
    assert marked(name, other).keys() == {name, other}


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "sub/../../x", "s/x", "../../workspace/x"])
def test_links_that_may_lead_out_are_marked(target: str) -> None:
    assert "may lead out" in str(marked(f"link -> {target}", "s -> sub", "sub/")["link"])


def test_what_a_policy_names_is_marked_with_all_below() -> None:
    asked = Asked(("/**/Makefile", "/**/*.mk", "/deploy", "/src/*/generated/**", "/**/we\\*ird"))
    for path in (
        *("Makefile", "sub/Makefile", "MAKEFILE", "Makefile/below", "sub/rules.mk", "deploy", "Deploy/x/y"),
        *("src/a/generated", "src/a/generated/x/y", "a/we*ird"),
    ):
        assert asked(path).startswith("the policy asks for it ("), path
    for path in ("Makefile.am", "sub/deploy", "deployed", "src/generated/x", "src/a/b/generated", "weird", "x.mkd"):
        assert not asked(path), path
    assert asked("sub/rules.mk") == "the policy asks for it (*.mk)"
    assert asked("deploy/x") == "the policy asks for it (deploy)"
    assert not Asked(())("Makefile")
