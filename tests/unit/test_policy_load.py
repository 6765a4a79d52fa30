"""Policy files: what they mean, what is refused, and on which line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from corral.errors import PolicyError
from corral.policy import document
from corral.policy.load import load_policy, override_resources, parse_policy
from corral.policy.model import GIB, KIB, MIB, Degradation, Environment, Filesystem, Policy, Resources

DOC = Path(__file__).parents[2] / "docs" / "policy.md"


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")


def parse(text: str) -> Policy:
    return parse_policy(text, source="/cfg/p.yaml")


def problems(text: str, source: str = "p.yaml") -> list[str]:
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, source=source)
    return list(caught.value.problems)


# --- What is accepted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "---\n...\n", "{}", "version: 1\n"])
def test_nothing_said_is_the_default_policy(text: str) -> None:
    assert parse(text) == Policy()


def test_sections_without_fields_keep_the_defaults() -> None:
    assert parse("filesystem: {}\nresources: {}\nenvironment: {}\nallow_degraded: []\n") == Policy()


def test_the_errors_of_the_reference_are_what_is_said() -> None:
    (expected,) = re.findall(r"```text\n(.*?)```", DOC.read_text(), re.DOTALL)
    text = "version: 1\nresources:\n  memory: 4\n  cpus: 2\n"
    assert problems(text, "policy.yaml") == expected.splitlines()


_WITNESS = "witness.example/one+55da798a+BMhTrQ8M0rYZrqks7sT9VqJNZJnVhM55JX5Fz9gTm2Cn"
_LOG = "log.example+f8b01728+AchTrQ8M0rYZrqks7sT9VqJNZJnVhM55JX5Fz9gTm2Cn"


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("2097152", 2 * MIB),
        ("512MiB", 512 * MIB),
        ("2GiB", 2 * GIB),
        ("10 MB", 10_000_000),
        ("1.5GiB", 3 * GIB // 2),
        ("2048KiB", 2 * MIB),
        ("2000kB", 2_000_000),
        ("3GB", 3_000_000_000),
        ("1024KiB", MIB),
        ("1125899906842624", 1024 * 1024 * GIB),
    ],
)
def test_sizes(written: str, size: int) -> None:
    assert parse(f"resources: {{memory: {written}}}").resources.memory == size


@pytest.mark.parametrize(
    ("written", "seconds"), [("90", 90.0), ("1.5", 1.5), ("90s", 90.0), ("15m", 900.0), ("2h", 7200.0), ("0.5 h", 1800)]
)
def test_durations(written: str, seconds: float) -> None:
    assert parse(f"resources: {{wall_time: {written}}}").resources.wall_time == seconds


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("/opt//x/./y/../z/", "/opt/x/z"),
        ("//opt", "/opt"),
        ("~/x", "/home/me/x"),
        ("'~'", "/home/me"),
        ("data", "/cfg/data"),
        (".", "/cfg"),
        ("../data", "/data"),
        ("./~odd", "/cfg/~odd"),
        ("/a b/[id].tsx", "/a b/[id].tsx"),
        ("/päth/雪", "/päth/雪"),
    ],
)
def test_paths(written: str, path: str) -> None:
    assert parse(f"filesystem: {{deny: ['{written}']}}".replace("''", "'")).filesystem.deny == (path,)


def test_a_path_listed_twice_is_one() -> None:
    assert parse("filesystem: {read: [~/x, /home/me/x, /y]}").filesystem.read == ("/home/me/x", "/y")


@pytest.mark.parametrize(
    ("written", "glob"),
    [
        ("Makefile", "/**/Makefile"),
        ("*.mk", "/**/*.mk"),
        ("deploy/", "/**/deploy"),
        ("deploy/**", "/deploy/**"),
        ("/setup.cfg", "/setup.cfg"),
        ("**/ci/run", "/**/ci/run"),
        ("**", "/**"),
        ("/**/Makefile", "/**/Makefile"),
        (r"\!x", r"/**/\!x"),
    ],
)
def test_paths_that_are_applied(written: str, glob: str) -> None:
    assert parse(f"apply: {{ask: ['{written}']}}").apply.ask == (glob,)


@pytest.mark.parametrize("home", ["", "relative"])
def test_home_falls_back_to_the_account(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: type("Entry", (), {"pw_dir": "/account"}))
    assert parse("filesystem: {read: [~/x]}").filesystem.read == ("/account/x",)


def test_words_that_yaml_1_1_would_turn_into_something_else_stay_text() -> None:
    text = "environment: {set: {A: no, B: 010, C: 1:30, D: 2026-01-01, E: 0x1f, F: 1_000, on: yes}}"
    expected = {"A": "no", "B": "010", "C": "1:30", "D": "2026-01-01", "E": "0x1f", "F": "1_000", "on": "yes"}
    assert dict(parse(text).environment.set) == expected


def test_core_tags_and_crlf_are_fine() -> None:
    policy = parse('environment: !!map\r\n  set:\r\n    A: !!str 1\r\n    B: "x\\ny"\r\n')
    assert policy.environment.set == (("A", "1"), ("B", "x\ny"))


def test_dangerous_variables_are_the_callers_choice() -> None:
    assert parse("environment: {allow: [LD_*, LD_PRELOAD]}").environment.allow == ("LD_*", "LD_PRELOAD")


# --- What is refused, field by field --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("version", "2", "must be 1"),
        ("version", "true", "must be 1"),
        ("version", "1.0", "must be 1"),
        ("resources", "[]", "must be a mapping"),
        ("resources", "", "has no value"),
        ("resources.cpu", "0", "at least 0.01"),
        ("resources.cpu", "true", "must be a number"),
        ("resources.cpu", "'2'", "must be a number"),
        ("resources.cpu", ".nan", "finite"),
        ("resources.cpu", "1e999", "finite"),
        ("resources.cpu", "9000", "at most 8192"),
        ("resources.memory", "4", "is a unit missing"),
        ("resources.memory", "-1", "at least 1 MiB"),
        ("resources.memory", "true", "must be a size"),
        ("resources.memory", "1.5", "must be a size"),
        ("resources.memory", "512mb", "'512mb' is not understood"),
        ("resources.memory", "512", "at least 1 MiB"),
        ("resources.memory", "1.0000001MiB", "not a whole number of bytes"),
        ("resources.memory", "٣GiB", "is not understood"),
        ("resources.memory", "null", "has no value"),
        ("resources.disk", "0", "at least 1 MiB"),
        ("resources.disk", "9999999GiB", "at most 1024 TiB"),
        ("resources.output", "2GiB", "at most 1 GiB"),
        ("resources.processes", "0", "at least 1"),
        ("resources.processes", "1.0", "whole number"),
        ("resources.processes", "true", "whole number"),
        ("resources.processes", "4194305", "at most 4194304"),
        ("resources.open_files", "1e3", "whole number"),
        ("resources.inodes", "9" * 41, "more than 40 characters"),
        ("resources.inodes", "9" * 5000, "more than 40 characters"),
        ("resources.wall_time", "0", "between"),
        ("resources.wall_time", ".nan", "between"),
        ("resources.wall_time", ".inf", "between"),
        ("resources.wall_time", "9" * 40, "between"),
        ("resources.wall_time", "1h30m", "is not understood"),
        ("resources.wall_time", "1:30", "is not understood"),
        ("resources.wall_time", "[1]", "must be a duration"),
        ("filesystem.read", "/x", "must be a list"),
        ("filesystem.read[0]", "/", "whole file system"),
        ("filesystem.read[0]", "/x/..", "whole file system"),
        ("filesystem.read[0]", "''", "is empty"),
        ("filesystem.read[0]", "' /x'", "blanks"),
        ("filesystem.read[0]", "/x/*", "patterns"),
        ("filesystem.read[0]", "$HOME/x", "not expanded"),
        ("filesystem.read[0]", "~root/x", "only `~/`"),
        ("filesystem.read[0]", "~", "has no value"),
        ("filesystem.read[0]", "1", "must be text"),
        ("apply.ask[0]", "'!x'", "no exceptions"),
        ("apply.ask[0]", "~/x", "below the workspace"),
        ("apply.ask[0]", "../x", "in it"),
        ("apply.ask[0]", "a//b", "empty part"),
        ("apply.ask[0]", "''", "empty part"),
        ("apply.ask[0]", "/", "empty part"),
        ("apply.ask[0]", "a**", "whole parts"),
        ("apply.witnesses[0]", "witness.example", "no public key"),
        ("apply.witnesses[0]", _WITNESS.replace("55d", "55e"), "not whole"),
        ("apply.witnesses[0]", _LOG, "no key of a witness"),
        ("apply.cosignatures", "65", "at most 64"),
        ("filesystem.read[0]", '"/x\\0y"', "control character"),
        ("filesystem.read[0]", '"/x\\ny"', "control character"),
        ("filesystem.read[0]", '"/x\\u009by"', "control character"),
        ("filesystem.read[0]", '"/\\ud800"', "half of a surrogate"),
        ("filesystem.deny[0]", "/" + "x" * 256, "longer than a path"),
        ("filesystem.deny[0]", "/x" * 2048, "longer than a path"),
        ("environment.allow[0]", "'*'", "whole environment"),
        ("environment.allow[0]", "A*B", "not a variable name"),
        ("environment.allow[0]", "9A", "not a variable name"),
        ("environment.allow[0]", '"A\\n"', "not a variable name"),
        ("environment.set", "[A]", "must be a mapping"),
        ("environment.set.A", "1", "must be text"),
        ("environment.set.A", "true", "must be text"),
        ("environment.set.A", "", "has no value"),
        ("environment.set.A", '"x\\0y"', "NUL"),
        ("environment.set.A", "x" * 132_000, "longer than"),
        ("allow_degraded", "landlock", "must be a list"),
        ("allow_degraded[0]", "landlok", "did you mean `landlock`"),
        ("allow_degraded[0]", "seccomp", "known: landlock"),
        ("allow_degraded[0]", "1", "must be a name"),
    ],
)
def test_refused_value(field: str, value: str, reason: str) -> None:
    name, item, _ = field.partition("[0]")
    lines = [f"{'  ' * depth}{part}:" for depth, part in enumerate(name.split("."))]
    if item:
        lines.append(f"        - {value}")
    else:
        lines[-1] += f" {value}"
    (problem,) = problems("# comment\n" + "\n".join(lines) + "\n")
    assert problem.startswith(f"p.yaml:{len(lines) + 1}: {field}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("resource: {}", "resource: unknown field (did you mean `resources`?)"),
        ("memory: 1GiB", "memory: unknown field (did you mean `resources.memory`?)"),
        ("resources: {procesess: 1}", "resources.procesess: unknown field (did you mean `processes`?)"),
        ("environment: {zzz: 1}", "environment.zzz: unknown field (known: allow, set)"),
    ],
)
def test_unknown_field_suggests_the_nearest(text: str, problem: str) -> None:
    assert problems(text) == [f"p.yaml:1: {problem}"]


@pytest.mark.parametrize("text", ["word", "null", "[]", "- a", "1", "'version: 1'"])
def test_a_file_that_is_not_a_mapping_is_refused(text: str) -> None:
    assert len(problems(text)) == 1


def test_an_anchor_does_not_make_an_empty_file() -> None:
    assert "anchors" in problems("&a")[0]


def test_all_problems_at_once_in_the_order_of_lines() -> None:
    text = """\
allow_degraded: [nothing]
environment:
  set:
    1A: x
    B: 2
resources:
  cpu: -1
  memory: &big 1GiB
  disk: *big
  cpu: 2
filesystem:
  read:
    - /ok
    - /
nonsense: 1
"""
    found = [re.match(r"p\.yaml:(\d+): (.*?): ", problem) for problem in problems(text)]
    assert [(int(match[1]), match[2]) for match in found if match] == [
        (1, "allow_degraded[0]"),
        (4, "environment.set.'1A'"),
        (5, "environment.set.B"),
        (7, "resources.cpu"),
        (8, "resources.memory"),
        (9, "resources.disk"),
        (10, "resources.cpu"),
        (14, "filesystem.read[1]"),
        (15, "nonsense"),
    ]


def test_problems_beyond_the_hundredth_are_counted() -> None:
    found = problems("".join(f"k{number}: 1\n" for number in range(130)))
    assert len(found) == document.MAX_PROBLEMS + 1
    assert found[-1] == "p.yaml:101: and 30 more problems"


# --- Attacks --------------------------------------------------------------------------------------------------------


def test_alias_bomb() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert any("a1[0]: aliases" in problem for problem in problems("\n".join(lines)))


def test_alias_to_itself_anchor_without_alias_and_alias_as_name() -> None:
    assert any("aliases" in problem for problem in problems("resources: &r\n  memory: *r\n"))
    assert problems("resources: {memory: &m 1GiB}") == [
        "p.yaml:1: resources.memory: anchors (`&name`) are not allowed (remove it)"
    ]
    assert "as names" in problems("*x : 1\n")[0]


def test_merge_key() -> None:
    (problem,) = problems("resources:\n  <<: {memory: 1GiB}\n")
    assert problem.startswith("p.yaml:2: resources: merge keys")


@pytest.mark.parametrize("second", ["memory: 64GiB", '"memory": 64GiB', '"m\\x65mory": 64GiB', "!!str memory: 64GiB"])
def test_duplicate_names_however_written(second: str) -> None:
    assert problems(f"resources:\n  memory: 1GiB\n  {second}\n") == [
        "p.yaml:3: resources.memory: is given twice (first on line 2; keep one)"
    ]


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.system ['true']", "!!set {a}", "!!binary aGk=", "!own {}", "!!map []", "!!str {}"],
)
def test_tags_outside_the_core_are_refused(value: str) -> None:
    (problem,) = problems(f"\nresources: {value}\n")
    assert problem.startswith("p.yaml:2: resources: the tag ")


def test_tag_hidden_behind_a_directive() -> None:
    (problem,) = problems("%TAG !p! tag:yaml.org,2002:python/\n---\nresources: !p!none x\n")
    assert "python/none' is not allowed" in problem


@pytest.mark.parametrize("text", ['"\\ud800": 1', 'environment: {set: {"\\ud800": x}}', "1: x", "? [a]\n: x"])
def test_names_that_are_not_text(text: str) -> None:
    (problem,) = problems(text)
    assert "a name must be text" in problem


@pytest.mark.parametrize("value", ["!!int abc", "!!bool 1", "!!float x", "!!null x", "!!int 1_000"])
def test_value_that_does_not_fit_its_tag(value: str) -> None:
    assert "does not fit its tag" in problems(f"resources: {{cpu: {value}}}")[0]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{a: " * 100_000,
        "- " * 100_000,
        "? " * 100_000,
        "a:\n" + "\n".join(" " * n + "a:" for n in range(1, 400)),
    ],
)
def test_deep_nesting(text: str) -> None:
    (problem,) = problems(text)
    assert f"nested deeper than {document.MAX_DEPTH}" in problem


@pytest.mark.parametrize("text", ["- a\n" * 200_000, "[" + "a," * 500_000, "?\n" * 300_000])
def test_many_values(text: str) -> None:
    (problem,) = problems(text)
    assert f"more than {document.MAX_NODES} values" in problem


@pytest.mark.parametrize("text", ["#" * (MIB + 1), "é" * (MIB // 2 + 1)])
def test_huge_text(text: str) -> None:
    assert problems(text) == ["p.yaml:1: cannot read the policy: it is larger than 1024 KiB"]


def test_more_than_one_document() -> None:
    (problem,) = problems("version: 1\n---\nversion: 1\n")
    assert problem.startswith("p.yaml:2: a second document starts here")


@pytest.mark.parametrize(
    ("character", "name"),
    [("\0", "0000"), ("\x1b", "001B"), ("\x7f", "007F"), ("\x85", "0085"), ("\x9b", "009B"), ("\r", "000D"),
     ("\u2028", "2028"), ("\u202e", "202E"), ("\u2066", "2066"), ("\ufeff", "FEFF"), ("\ud800", "D800")],
)  # fmt: skip
def test_characters_that_deceive(character: str, name: str) -> None:
    (problem,) = problems(f"# one\r\n# two {character} three\nversion: 1\n")
    assert problem.startswith(f"p.yaml:2: character U+{name} is not allowed")


@pytest.mark.parametrize(
    "text",
    [
        '"\\e]0;owned\\a": 1',
        'filesystem: {read: ["/\\e[2J\\u202e"]}',
        'environment: {allow: ["\\e[31m"], set: {"\\e": x}}',
        'resources: {memory: "\\e[31m\\n\\u2066"}',
        'allow_degraded: ["\\e\\r\\n"]',
        "resources: !<\\e[31m> 1",
        'a: "\\q"',
        "a: *\u200b",
    ],
)
def test_messages_are_printable_and_bounded(text: str) -> None:
    for problem in problems(text, source="e\x1b[31m\nvil\udc80.yaml"):
        assert problem.isprintable()
        assert len(problem) < 500


@pytest.mark.parametrize("where", ["{}: 1", "allow_degraded: [{}]", "filesystem: {{read: [$a{}]}}", "a: !{} x"])
def test_long_values_are_not_echoed_whole(where: str) -> None:
    assert all(len(problem) < 500 for problem in problems(where.format("x" * 900)))


@pytest.mark.parametrize(
    "text",
    [
        "environment: {set: {A: 7312345}}",
        "environment: {set: {A: [s7312345]}}",
        "environment: {set: [A=s7312345]}",
        "environment: {set: A=s7312345}",
        "environment: {set: {A=s7312345: x}}",
        "environment: {allow: [A=s7312345]}",
        "environment: {allow: {A: s7312345}}",
        "environment: {A=s7312345: x}",
        'environment: {set: {A: "s7312345\\0"}}',
        "environment: {set: {A: 's7312345}}",
    ],
)
def test_secrets_are_not_echoed(text: str) -> None:
    assert "7312345" not in "\n".join(problems(text))


@pytest.mark.parametrize(
    "text", ['a: 1\nb: "\\U00110000"', 'a: 1\nb: "\\UFFFFFFFF"', "# x\n%YAML 1." + "9" * 5000 + "\n---\n"]
)
def test_what_pyyaml_crashes_on_has_a_line(text: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith("p.yaml:2: not valid YAML")


def test_unclosed_quote_says_where_it_began() -> None:
    assert problems("a: 1\nb: 'x\nc: 2\n") == [
        "p.yaml:4: not valid YAML that began on line 2: while scanning a quoted scalar, found unexpected end of stream"
    ]


# --- Files ----------------------------------------------------------------------------------------------------------


def test_load_reads_a_file_and_starts_from_its_directory(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_bytes(b"\xef\xbb\xbffilesystem:\n  read: [data]\n")
    assert load_policy(file).filesystem.read == (str(tmp_path / "data"),)
    assert load_policy(str(file)) == load_policy(file)


def test_a_relative_file_name_starts_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text("filesystem: {read: [data]}")
    assert load_policy("policy.yaml").filesystem.read == (str(tmp_path / "data"),)


def _directory(path: Path) -> None:
    path.mkdir()


def _too_large(path: Path) -> None:
    path.write_bytes(b"#" * (MIB + 1))


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (_directory, "Is a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (_too_large, "larger than 1024 KiB"),
        (_sparse, "larger than 1024 KiB"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "policy.yaml"
    make(path)
    with pytest.raises(PolicyError, match=reason) as caught:
        load_policy(path)
    assert str(caught.value).startswith(f"{path}: cannot read the policy file: ")


def test_nul_in_the_file_name() -> None:
    with pytest.raises(PolicyError, match="null byte"):
        load_policy("a\0b")


def test_a_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"version: 1\n# \xff\n")
    with pytest.raises(PolicyError, match=":2: not UTF-8"):
        load_policy(path)


# --- The command line ------------------------------------------------------------------------------------------------


def override(**values: str) -> Policy:
    return override_resources(Policy(), values, source="command line")


def override_problems(**values: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        override(**values)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("field", "written", "value"),
    [
        ("cpu", "2", 2.0),
        ("cpu", "0.5", 0.5),
        ("cpu", "5e-1", 0.5),
        ("memory", "1048576", MIB),
        ("memory", "512MiB", 512 * MIB),
        ("memory", "1.5 GiB", 3 * GIB // 2),
        ("processes", "+7", 7),
        ("open_files", "64", 64),
        ("disk", "10MB", 10_000_000),
        ("inodes", "1000", 1000),
        ("wall_time", "90", 90.0),
        ("wall_time", "15m", 900.0),
        ("output", "64KiB", 64 * KIB),
    ],
)
def test_the_command_line_is_read_like_a_file(field: str, written: str, value: float) -> None:
    policy = override(**{field: written})
    found = getattr(policy.resources, field)
    assert (found, type(found)) == (value, type(value))
    assert policy == parse(f"resources: {{{field}: {written}}}")


def test_only_the_named_fields_change() -> None:
    text = "resources: {memory: 1GiB, cpu: 2, wall_time: 1h}\nfilesystem: {deny: [/x]}\nenvironment: {set: {A: b}}\n"
    before = parse(text)
    after = override_resources(before, {"cpu": "3", "disk": "1GiB"}, source="command line")
    assert after == dataclasses.replace(before, resources=dataclasses.replace(before.resources, cpu=3.0, disk=GIB))
    assert before == parse(text)
    assert override_resources(before, {}, source="command line") == before


def test_a_default_on_the_command_line_replaces_what_a_file_says() -> None:
    before = parse("resources: {memory: 1GiB}")
    default = Resources().memory
    assert override_resources(before, {"memory": str(default)}, source="command line").resources.memory == default


@pytest.mark.parametrize(
    ("field", "written", "reason"),
    [
        ("cpu", "0", "must be at least 0.01"),
        ("cpu", "two", "must be a number"),
        ("cpu", ".nan", "must be a finite number"),
        ("cpu", "nan", "must be a number"),
        ("cpu", "true", "must be a number"),
        ("cpu", "", "must be a number"),
        ("memory", "4", 'must be at least 1 MiB (is a unit missing, as in "4GiB"?)'),
        ("memory", "-1", "must be at least 1 MiB"),
        ("memory", "1.5", 'must be a size (write for example "512MiB", or a whole number of bytes)'),
        ("memory", "512mb", "'512mb' is not understood"),
        ("memory", "\U0001f600", "'\U0001f600' is not understood"),
        ("memory", "\x1b[2J", "'\\x1b[2J' is not understood"),
        ("memory", "\udcff", "half of a surrogate pair is not text"),
        ("memory", "1GiB\n", "'1GiB\\n' is not understood"),
        ("memory", "1GiB}\ncpu: 1", "'1GiB}\\ncpu: 1' is not understood"),
        ("memory", "*a", "'*a' is not understood"),
        ("memory", "x" * 5000, f"'{'x' * 60}'... is not understood"),
        ("processes", "1.0", "must be a whole number"),
        ("processes", "1_000", "must be a whole number"),
        ("processes", "010", "must be a whole number"),
        ("open_files", "0", "must be at least 1"),
        ("disk", "9999999GiB", "must be at most 1024 TiB"),
        ("inodes", "9" * 5000, "the number has more than 40 characters"),
        ("wall_time", ".inf", "must be between 0.001 seconds and 366 days"),
        ("wall_time", "1h30m", "'1h30m' is not understood"),
        ("output", "2GiB", "must be at most 1 GiB"),
    ],
)
def test_a_refused_value_on_the_command_line_has_a_field_and_no_line(field: str, written: str, reason: str) -> None:
    (problem,) = override_problems(**{field: written})
    assert problem.startswith(f"command line: resources.{field}: {reason}")
    assert problem.isprintable()


def test_an_unknown_resource_on_the_command_line() -> None:
    assert override_problems(memroy="1GiB") == [
        "command line: resources.memroy: unknown field (did you mean `memory`?)"
    ]
    assert override_problems(allow="1") == [
        "command line: resources.allow: unknown field (did you mean "
        "`network.allow`, `process.allow`, `environment.allow`, `model.allow`, `data.allow` or `api.allow`?)"
    ]


def test_all_problems_of_the_command_line_at_once_in_its_order() -> None:
    found = override_problems(wall_time="x", inodes="9" * 50, disk="1GiB", cpu="0", nonsense="1")
    fields = [problem.split(": ")[1] for problem in found]
    assert fields == ["resources.wall_time", "resources.inodes", "resources.cpu", "resources.nonsense"]


@given(st.sampled_from([field.name for field in dataclasses.fields(Resources)]), st.text(st.characters()))
def test_any_text_on_the_command_line_is_a_policy_or_one_problem(field: str, text: str) -> None:
    try:
        override(**{field: text})
    except PolicyError as error:
        (problem,) = error.problems
        assert problem.startswith(f"command line: resources.{field}: ")
        assert problem.isprintable()
        assert len(problem) < 500


# --- Properties -----------------------------------------------------------------------------------------------------

FRAGMENTS = st.sampled_from(
    ["version", "resources", "memory", "environment", "set", "allow", "filesystem", "read", ": ", "\n", "  ", "- ", "[",
     "]", "{", "}", ",", "&a ", "*a", "!!int ", "! ", "!<", ">", "|", "%YAML ", "%TAG ", "---", "...", "'", '"', "\\U",
     "\\x", "1", "0x", ".inf", "~", "/", "?", "<<", "#", "\t", "\r\n", "=", "\x85", "\ufeff", "\ud800", "\0", "9" * 50]
)  # fmt: skip


@given(st.text() | st.text(alphabet=st.characters()) | st.lists(FRAGMENTS).map("".join))
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    found: tuple[str, ...] = ()
    try:
        assert isinstance(parse_policy(text, source="p.yaml"), Policy)
        return
    except PolicyError as error:
        found = error.problems
    lines = []
    for problem in found:
        match = re.match(r"p\.yaml:(\d+): .", problem)
        assert match
        assert problem.isprintable()
        lines.append(int(match[1]))
    assert lines == sorted(lines)
    assert 1 <= lines[0] <= lines[-1] <= text.count("\n") + 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_policy_or_a_policy_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    with contextlib.suppress(PolicyError):
        load_policy(path)


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True)
PARTS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Zs"), exclude_characters="/*?"), min_size=1)
PATHS = (
    st.lists(PARTS.filter(lambda part: part not in (".", "..") and len(part.encode()) < 256), min_size=1, max_size=5)
    .map(lambda parts: "/" + "/".join(parts))
    .filter(lambda path: path == path.strip())
)
POLICIES = st.builds(
    Policy,
    filesystem=st.builds(
        Filesystem,
        read=st.lists(PATHS, unique=True, max_size=4).map(tuple),
        deny=st.lists(PATHS, unique=True, max_size=4).map(tuple),
    ),
    resources=st.builds(
        Resources,
        cpu=st.none() | st.floats(0.01, 8192),
        memory=st.integers(MIB, 1 << 50),
        processes=st.integers(1, 4_194_304),
        open_files=st.integers(1, 1_048_576),
        disk=st.integers(MIB, 1 << 50),
        inodes=st.integers(1, 10**9),
        wall_time=st.none() | st.floats(0.001, 366 * 86400),
        output=st.integers(KIB, GIB),
    ),
    environment=st.builds(
        Environment,
        allow=st.lists(NAMES | NAMES.map(lambda name: name + "*"), max_size=4, unique=True).map(tuple),
        set=st.dictionaries(NAMES, st.text(st.characters(codec="utf-8", exclude_characters="\0")), max_size=4).map(
            lambda values: tuple(values.items())
        ),
    ),
    allow_degraded=st.frozensets(st.sampled_from(Degradation)),
)


@given(POLICIES)
def test_a_policy_that_is_written_out_reads_back_the_same(policy: Policy) -> None:
    data = {
        "version": 1,
        "filesystem": {"read": list(policy.filesystem.read), "deny": list(policy.filesystem.deny)},
        "resources": {name: value for name, value in dataclasses.asdict(policy.resources).items() if value is not None},
        "environment": {"allow": list(policy.environment.allow), "set": dict(policy.environment.set)},
        "allow_degraded": [wall.value for wall in policy.allow_degraded],
    }
    # Double quotes keep every text as text; numbers are written as YAML writes them.
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=False, width=1 << 20, allow_unicode=False)
    text = yaml.serialize(_quoted(yaml.compose(text, yaml.SafeLoader)), Dumper=_Dumper, width=1 << 20)
    assert parse_policy(text, source="/cfg/p.yaml") == policy


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _quoted(node: yaml.Node | None) -> yaml.Node:
    assert node is not None
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str":
        node.style = '"'
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _quoted(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _quoted(key)
            _quoted(value)
    return node


@given(st.integers(0, 50), st.integers(0, 50), st.sampled_from(["\n", "\r\n", "# note ü\n", "   \n"]))
def test_the_line_is_right_wherever_the_fault_is(before: int, between: int, filler: str) -> None:
    text = filler * before + "resources:\n" + filler * between + "  cpu: none\n" + filler + "other: 1\n"
    assert [problem.split(": ")[0] for problem in problems(text)] == [
        f"p.yaml:{before + between + 2}",
        f"p.yaml:{before + between + 4}",
    ]
