"""The two readers of `corral run`'s options: the fast one may know less than typer, but never something else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import typer.main
from hypothesis import example, given, settings
from hypothesis import strategies as st

import corral.cli
from corral.cli import app as app_module
from corral.cli import run as run_module
from corral.cli.options import RUN_OPTIONS, Arguments, read_fast

FLAGS = [option for option in RUN_OPTIONS if not option.metavar]
VALUED = [option for option in RUN_OPTIONS if option.metavar]


def read_slowly(words: Sequence[str]) -> Arguments | None:
    """What typer makes of the words, or None where it refuses them."""
    seen: list[Arguments] = []

    def record(arguments: Arguments) -> int:
        seen.append(arguments)
        return 0

    original = run_module.run
    run_module.run = record
    try:
        typer.main.get_command(app_module.app).main(["run", *words], "corral", standalone_mode=False)
    except SystemExit:
        pass  # how the command passes its exit code on
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise  # no usage error: a defect
    finally:
        run_module.run = original
    return seen[0] if seen else None


def _spellings() -> list[str]:
    words = [f"--{option.name}" for option in RUN_OPTIONS]
    words += [f"-{option.short}" for option in RUN_OPTIONS if option.short]
    words += ["--", "-", "--no-such", "-Z", "-qT", "--work", "--workspace=", "--env=A=b", "--quiet=1", "--json="]
    return words


values = st.sampled_from(["", "x", "a b", "-x", "--", "-", "NAME=VALUE", "=", "--workspace", "\n", "é", "1"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6
)
single_words = (
    st.sampled_from(_spellings())
    | values
    | st.builds("--{}={}".format, st.sampled_from([option.name for option in RUN_OPTIONS]), values)
    | st.builds("-{}{}".format, st.sampled_from([option.short for option in RUN_OPTIONS if option.short]), values)
)
plausible = st.lists(
    st.sampled_from(FLAGS).map(lambda option: [f"--{option.name}"])
    | st.builds(lambda option, value: [f"--{option.name}", value], st.sampled_from(VALUED), values)
    | st.builds(lambda option, value: [f"--{option.name}={value}"], st.sampled_from(VALUED), values)
    | single_words.map(lambda word: [word]),
    max_size=4,
).map(lambda groups: [word for group in groups for word in group])
tails = st.lists(st.sampled_from(["true", "ls", "-la", "--json", "--", "", "x"]), max_size=4)
dashes: st.SearchStrategy[list[str]] = st.sampled_from([[], ["--"]])
lines = st.builds(lambda options, end, command: [*options, *end, *command], plausible, dashes, tails)


@settings(max_examples=600, deadline=None)
@given(lines)
@example(["--label", "--", "true"])
@example(["--label=", "true"])
@example(["--env", "A=1", "-e", "B", "--", "env", "--json"])
@example(["", "x"])
@example(["--", ""])
@example(["--", "--", "x"])
@example(["-", "x"])
@example(["--user", "a", "--user", "b", "id"])
def test_the_fast_reader_agrees_with_typer_wherever_it_answers(words: list[str]) -> None:
    fast = read_fast(words)
    if fast is not None:
        assert fast == read_slowly(words)


@pytest.mark.parametrize("option", RUN_OPTIONS, ids=lambda option: option.name)
def test_every_option_is_known_to_both_in_every_form(option: object) -> None:
    assert isinstance(option, type(RUN_OPTIONS[0]))
    forms = [[f"--{option.name}"]] + ([[f"-{option.short}"]] if option.short else [])
    if option.metavar:
        forms = [[*form, "value"] for form in forms] + [[f"--{option.name}=value"]]
    for form in forms:
        words = [*form, "--", "ls", f"--{option.name}"]
        expected = Arguments(
            {option.name: "value"} if option.metavar and not option.many else {},
            {option.name: ("value",)} if option.many else {},
            frozenset() if option.metavar else frozenset({option.name}),
            ("ls", f"--{option.name}"),
        )
        assert read_fast(words) == expected
        assert read_slowly(words) == expected


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--"],
        ["--quiet"],
        ["--label"],
        ["--label", "x"],
        ["--no-such", "true"],
        ["--quiet=1", "true"],
        ["-Z", "true"],
        ["--work", ".", "true"],
    ],
    ids=" ".join,
)
def test_what_typer_refuses_the_fast_reader_leaves_to_it(words: list[str]) -> None:
    assert read_slowly(words) is None
    assert read_fast(words) is None


def test_typer_also_reads_what_the_fast_reader_does_not_know() -> None:
    assert read_fast(["-qT", "true"]) is None
    assert read_slowly(["-qT", "true"]) == Arguments({}, {}, frozenset({"quiet", "no-terminal"}), ("true",))
    assert read_fast(["-w.", "true"]) is None
    assert read_slowly(["-w.", "true"]) == Arguments({"workspace": "."}, {}, frozenset(), ("true",))


def test_ctrl_c_while_a_class_is_made_is_still_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 raises a RuntimeError from what comes within __set_name__, as dataclasses have it."""

    class Interrupted:
        def __set_name__(self, *_: object) -> None:
            raise self.error

        def __init__(self, error: BaseException) -> None:
            self.error = error

    def within(error: BaseException) -> None:
        type("Made", (), {"field": Interrupted(error)})

    monkeypatch.setattr("corral.cli._main", lambda: within(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as left:
        corral.cli.main()
    assert left.value.code == 130
    monkeypatch.setattr("corral.cli._main", lambda: within(ValueError("a fault of ours")))
    with pytest.raises((RuntimeError, ValueError)):
        corral.cli.main()
