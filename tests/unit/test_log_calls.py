"""What models were asked and answered stands on the time line, with what was done for it, as a tree."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Action, Content, Decision, Kind, ModelCall, Origin, Program, ToolCall, Used, Verdict
from corral.errors import RequestError
from corral.log.calls import WithCalls
from corral.log.conversations import MAX_DEPTH, Tree, _Done, _Reading, tree_lines, tree_of
from corral.log.events import Event, PayloadKept
from corral.log.html import write_html
from corral.log.items import Item, ItemKind
from corral.log.payloads import Payloads
from corral.log.player import Player
from corral.log.records import Record
from corral.log.replay import item_text
from corral.log.terminal import WithTerminal
from corral.log.timeline import Timeline
from corral.modelapi.answer import Api
from corral.modelapi.recognise import recognise
from tests.unit.model_answers import ALL, THOUGHT, WORDS, Given
from tests.unit.recorded import ORIGIN, Shelf, decision, numbered, session, used, written
from tests.unit.test_log_html import HOSTILE, Page, data_of
from tests.unit.test_log_records import HOSTILE as HOSTILE_TEXTS

SHELL = ToolCall("call_1", "shell", '{"command":["ls"]}')
READ = ToolCall("call_2", "read", '{"path":"a"}')


def read_tree(records: Iterable[tuple[int, Record]]) -> Tree:
    """The same as :func:`tree_of`, from records that were read whole."""
    reading, known = _Reading(), list(records)
    for number, record in known:
        if isinstance(record.event, Used):
            reading.used(number, record.event)
    for number, record in known:
        event = record.event
        if isinstance(event, Decision):
            origin = event.action.origin
            done = _Done(origin.step, origin.tool, event.action.kind.value, event.count, not event.allowed)
            reading.did(number, done, is_unexplained=origin.unexplained)
    return reading.tree()


def did(step: int, tool: str = "", verdict: Verdict = Verdict.ALLOW, **fields: Any) -> Decision:
    origin = replace(ORIGIN, step=step, tool=tool, **fields)
    return decision(Action(Kind.PROCESS_EXEC, Program("/bin/ls", ("ls",)), origin), verdict)


def asked(step: int) -> Decision:
    return decision(Action(Kind.MODEL_CALL, ModelCall("model-1"), replace(ORIGIN, step=step)))


@dataclass
class Told:
    """A session with its contents."""

    items: WithTerminal
    tree: Tree

    def of(self, kind: ItemKind) -> list[Item]:
        return [item for item in self.items if item.kind is kind]


Tell = Callable[..., Told]


@pytest.fixture
def tell(tmp_path: Path) -> Tell:
    def told(*events: Event) -> Told:
        shelf = Shelf(written(session(*events)))
        tree = read_tree(numbered(shelf.all))
        assert tree_of(shelf, "session-1") == tree
        store = Payloads(tmp_path / "store")
        return Told(WithTerminal(WithCalls(Timeline(shelf, "session-1"), store, tree), store), tree)

    return told


def kept(place: Path, content: Content, data: bytes, call: int, *, is_whole: bool = True) -> PayloadKept:
    made = Payloads(place / "store").keep(content, data, expires=1)
    return PayloadKept(ORIGIN, content, made.digest, len(data), is_whole, "model-1", 1, False, call)


def details(item: Item) -> dict[str, str]:
    return {detail.name: detail.text for detail in item.details}


# ---- answers ----


@pytest.mark.parametrize("given_", ALL.values(), ids=ALL.keys())
def test_an_api_is_recognised(given_: Given) -> None:
    assert recognise(given_.body) is given_.api
    assert recognise(b"\xef\xbb\xbf \r\n" + given_.body) is given_.api


@pytest.mark.parametrize(("body", "api"), [(b"", None), (b"<html>", None), (b": x\n\ndata: {}\n\n", Api.CHAT)])
def test_what_is_of_no_api_is_not_recognised(body: bytes, api: Api | None) -> None:
    assert recognise(body) is api


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_no_bytes_make_recognising_fail(body: bytes) -> None:
    assert recognise(body) in (None, *Api)


@pytest.mark.parametrize("given_", ALL.values(), ids=ALL.keys())
def test_a_call_says_what_was_answered(given_: Given, tell: Tell, tmp_path: Path) -> None:
    other = kept(tmp_path, Content.RESPONSE, b"data: {}\n\n", 8)
    told = tell(other, kept(tmp_path, Content.RESPONSE, given_.body, 7), used(call=7, tools=given_.answer.tools))
    (item,) = told.of(ItemKind.REASONING)
    found = details(item)
    assert (found["answer"], found["thinking"]) == (WORDS, THOUGHT)
    assert found["calls shell"].startswith('call_1: {"command":')
    assert "not all of it" not in found
    assert item.line == (
        "model.call model-1 of upstream-1: 100 tokens in (7 cached), 20 out, 0.0015 EUR, 1.5 s, asks for shell, read"
    )
    assert found["opens step"] == "4"


def test_an_answer_of_which_only_the_beginning_was_kept_says_so(tell: Tell, tmp_path: Path) -> None:
    body = ALL["messages stream"].body[:1500]
    told = tell(kept(tmp_path, Content.RESPONSE, body, 1, is_whole=False), used(call=1))
    found = details(told.of(ItemKind.REASONING)[0])
    assert found["thinking"] == THOUGHT
    assert found["not all of it"] == "only its beginning was kept"


def test_what_is_not_here_any_more_or_was_never_kept_is_told(tell: Tell, tmp_path: Path) -> None:
    event = kept(tmp_path, Content.RESPONSE, b"x", 1)
    Payloads(tmp_path / "store").erase(event.digest, lambda: None)
    query = kept(tmp_path, Content.QUERY, b"select \x1b name", 3)
    rows = used("select", "hr", kind=Kind.DATA_QUERY, call=3, rows=2)
    told = tell(event, used(call=1), used(call=2), query, rows)
    first, second = told.of(ItemKind.REASONING)
    assert "it is not there" in details(first)["answer"]
    assert "answer" not in details(second)
    (item,) = [item for item in told.of(ItemKind.TOOL_CALL) if item.line.startswith("data.query")]
    assert details(item)["asked"] == "select \\x1b name"
    assert item.line == "data.query select of hr: 2 rows, 2000 bytes, 0.0015 EUR, 1.5 s, asks for shell"


# ---- the tree ----

SUB = replace(used("model-2", conversation="cafe", parent="c0ffee", opened=6, tools=(READ,)), cost=0)


def conversations() -> list[Event]:
    """One that asks for two tools at once, one of which begins another conversation."""
    return [
        asked(0),
        used(opened=5, tools=(SHELL, READ)),
        did(5, "call_1"),
        did(5, "call_2", Verdict.DENY),
        asked(5),
        SUB,
        did(6, "call_2"),
        did(6),
        did(5, "call_1"),
        did(0, unexplained=True),
        used(opened=0, tools=()),
        did(5, unexplained=True),
    ]


def test_conversations_are_a_tree_with_what_was_done_for_each_tool_call(tell: Tell) -> None:
    told = tell(*conversations())
    first, second = told.tree.conversations
    assert (first.id, first.depth, second.id, second.parent, second.depth) == ("c0ffee", 0, "cafe", "c0ffee", 1)
    assert [(use.id, use.name, use.actions, use.refused) for use in first.calls[0].tools] == [
        ("call_1", "shell", 2, 0),
        ("call_2", "read", 1, 1),
    ]
    assert [(use.id, use.actions) for use in second.calls[0].tools] == [("call_2", 1), ("", 1)]
    assert (first.spend.calls, first.spend.input_tokens, first.spend.costs) == (2, 200, (("EUR", 3_000_000),))
    assert list(tree_lines(told.tree)) == [
        "conversation c0ffee: 2 calls, 200 tokens in, 40 out, 0.003 EUR",
        "  #3 model-1: 100 tokens in, 20 out, 0.0015 EUR, 1.5 s, opens step 5",
        "    shell call_1: 2 actions, from #4",
        "    read call_2: 1 actions, 1 refused, from #5",
        "  #12 model-1: 100 tokens in, 20 out, 0.0015 EUR, 1.5 s",
        "  conversation cafe, begun by c0ffee: 1 calls, 100 tokens in, 20 out",
        "    #7 model-2: 100 tokens in, 20 out, 1.5 s, opens step 6",
        "      read call_2: 1 actions, from #8",
        "      without a tool call that is known: 1 actions, from #9",
        "unexplained: 2 actions (#11 #13)",
    ]


def test_items_are_marked_with_their_step_tool_call_and_conversation(tell: Tell) -> None:
    told = tell(*conversations())
    by_number = {item.number: item for item in told.items}
    assert [(by_number[n].conversation, by_number[n].depth) for n in (3, 4, 7, 8)] == [
        ("c0ffee", 0),
        ("c0ffee", 1),
        ("cafe", 1),
        ("cafe", 2),
    ]
    assert details(by_number[5])["tool call"] == "call_2 (read)"
    assert details(by_number[8])["tool call"] == "call_2 (read)"
    assert str(item_text(by_number[8])).endswith("    process.exec /bin/ls [step 6, call_2]")
    assert str(item_text(by_number[3])).rstrip().endswith("asks for shell, read")
    assert [item.number for item in told.items if item.unexplained] == [11, 13]
    assert by_number[11].line == "unexplained: process.exec /bin/ls"
    assert details(by_number[11])["unexplained"] == "no answer of a model asked for it"


def test_actions_before_the_account_of_their_call_are_its_own(tell: Tell) -> None:
    """An agent acts on a tool call while the answer still comes."""
    told = tell(did(5, "call_1"), did(7), used(opened=5, tools=(SHELL,)), did(5, "call_1"))
    assert [(use.actions, use.first) for use in told.tree.conversations[0].calls[0].tools] == [(2, 2)]
    assert [(item.number, item.depth) for item in told.items if item.depth] == [(2, 1), (5, 1)]


def test_what_is_unexplained_and_what_a_tool_call_did_is_jumped_to(tell: Tell) -> None:
    player = Player(tell(*conversations()).items)
    places = []
    for place in ("unexplained", "unexplained", "tool call_2"):
        player.seek(place)
        item = player.take()
        assert item is not None
        places.append(item.number)
    assert places == [11, 13, 5]
    player.seek("#13")
    player.take()
    with pytest.raises(RequestError):
        player.seek("unexplained")
    player.search("unexplained")
    assert player.position == 11
    with pytest.raises(RequestError):
        player.seek("tool nothing")


def test_a_parent_that_is_not_there_or_comes_later_makes_no_circle() -> None:
    events = [
        used(conversation="a", parent="b"),
        used(conversation="b", parent="a"),
        used(conversation="a", parent="a"),
        used(conversation="c", parent="c"),
        *(used(conversation=f"d{at}", parent=f"d{at - 1}") for at in range(3 * MAX_DEPTH)),
    ]
    tree = read_tree(numbered(written(session(*events))))
    assert [(each.id, each.depth) for each in tree.conversations[:3]] == [("a", 0), ("b", 1), ("c", 0)]
    assert max(each.depth for each in tree.conversations) == MAX_DEPTH
    assert len(tree.conversations) == 3 + 3 * MAX_DEPTH


def test_the_tree_is_bounded_and_says_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from corral.log import conversations as module

    monkeypatch.setattr(module, "MAX_CONVERSATIONS", 3)
    monkeypatch.setattr(module, "MAX_CALLS", 5)
    monkeypatch.setattr(module, "MAX_UNEXPLAINED", 2)
    events: list[Event] = [used(conversation=str(at)) for at in range(5)]
    events += [used(conversation="0", tools=(SHELL,) * 1000) for _ in range(5)]
    events += [did(0, unexplained=True) for _ in range(5)]
    tree = read_tree(numbered(written(session(*events))))
    assert (len(tree.conversations), tree.left_out, tree.unexplained, len(tree.places)) == (3, 5, 5, 2)
    assert list(tree_lines(tree))[-1] == "5 more calls are not shown: there were too many"


def _moved(tree: Tree, by: int) -> Tree:
    """The same, of records whose numbers are higher."""
    conversations = tuple(
        replace(
            each,
            calls=tuple(
                replace(
                    call,
                    number=call.number + by,
                    tools=tuple(replace(use, first=use.first + by * bool(use.actions)) for use in call.tools),
                )
                for call in each.calls
            ),
        )
        for each in tree.conversations
    )
    return replace(tree, conversations=conversations, places=tuple(place + by for place in tree.places))


USES = st.builds(
    lambda conversation, parent, opened, tool, name: used(
        name, conversation=conversation, parent=parent, opened=opened, tools=(ToolCall(tool, name, tool),)
    ),
    HOSTILE_TEXTS,
    HOSTILE_TEXTS,
    st.integers(0, 3),
    HOSTILE_TEXTS,
    HOSTILE_TEXTS,
)
ACTS = st.builds(
    lambda step, tool, off: did(step, tool, unexplained=off), st.integers(0, 3), HOSTILE_TEXTS, st.booleans()
)


@settings(max_examples=60)
@given(st.lists(USES | ACTS, max_size=8))
def test_whatever_records_say_the_tree_is_printable_and_each_call_is_in_it(events: list[Event]) -> None:
    entries = written(session(*events))
    tree = read_tree(numbered(entries))
    assert tree_of(Shelf([*written([did(4)], "session-2"), b"{}", *entries]), "session-1") == _moved(tree, 2)
    assert all(line.isprintable() for line in tree_lines(tree))
    calls = [call for each in tree.conversations for call in each.calls]
    assert len(calls) == sum(isinstance(event, Used) for event in events)
    file = io.StringIO()
    write_html(file, [], "t", tree=tree)
    assert file.getvalue().replace("\n", "").isprintable()


@pytest.mark.parametrize("said", HOSTILE)
def test_hostile_texts_of_the_tree_become_no_markup(said: str) -> None:
    def rendered(text: str) -> Page:
        events: list[Event] = [
            used(text, conversation=text, tools=(ToolCall(text, text, text),), currency=text),
            used(text, conversation=f"{text}2", parent=text),
            did(4, text),
        ]
        file = io.StringIO()
        write_html(file, [], "t", tree=read_tree(numbered(written(session(*events)))))
        return Page(file.getvalue())

    assert rendered(said).structure() == rendered("plain").structure()


def test_the_page_has_the_tree_and_the_marks(tell: Tell) -> None:
    told = tell(*conversations())
    file = io.StringIO()
    write_html(file, told.items, "t", tree=told.tree)
    found = Page(file.getvalue())
    numbers = [attributes["data-number"] for tag, attributes in found.elements if "data-number" in attributes]
    assert numbers == ["3", "4", "5", "12", "7", "8", "9", "11", "13"]
    rows = {row[0]: row[8:] for row in data_of(found)["items"]}
    assert rows[8] == ["call_2", 0, "cafe", 2]
    assert rows[11] == ["", 1, "", 0]


def test_a_session_without_models_is_as_before(tell: Tell) -> None:
    told = tell(did(1))
    assert told.tree.conversations == ()
    file, plain = io.StringIO(), io.StringIO()
    write_html(file, told.items, "t", tree=told.tree)
    write_html(plain, told.items, "t")
    assert file.getvalue() == plain.getvalue()
    assert json.dumps([item.depth for item in told.items]) == json.dumps([0] * len(told.items))


def test_origins_of_every_record_say_the_tool_call() -> None:
    origin = Origin("b", "s", 1, 1, None, "call_9", True)
    events: Iterator[Event] = iter([replace(used(), origin=origin)])
    (record,) = [record for _, record in numbered(written(list(events)))]
    assert isinstance(record.event, Used)
    assert record.event.origin == origin
