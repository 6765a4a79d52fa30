"""Held actions: every way out but a person's yes is a no, and an answer is for what was shown, or for nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from corral.actions import (
    Access,
    Action,
    Ancestor,
    Endpoint,
    File,
    KernelCall,
    Kind,
    Meaning,
    Operation,
    Opinion,
    Origin,
    Process,
    Program,
    Query,
    Request,
    Subject,
    Transport,
    Verb,
    Verdict,
)
from corral.approvals import queue as queues
from corral.approvals import waiting
from corral.approvals.queue import Ended, Ending, Queue, Scope
from corral.cli import pending as commands
from corral.errors import RequestError
from corral.monitor.parts import Answer
from corral.sandbox import peers, registry, resolver
from corral.sandbox.peers import Peer
from tests.unit.test_registry import Server

OPINION = Opinion(Verdict.ASK, "network.ask[0]", "somebody should know")
LONG = 3600.0


def connect(port: int = 80, session: str = "session", process: Process | None = None) -> Action:
    endpoint = Endpoint(Transport.TCP, "192.0.2.1", port)
    return Action(Kind.NET_CONNECT, endpoint, Origin("sandbox", session, process=process))


def run(subject: Subject) -> Action:
    return Action(Kind.PROCESS_EXEC, subject, Origin("sandbox", "session"))


class Told:
    """Takes answers, and notices a second one."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.event = threading.Event()

    def __call__(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.event.set()

    def wait(self) -> Answer:
        assert self.event.wait(20), "no answer came"
        assert len(self.answers) == 1
        return self.answers[0]


class Hooks:
    """What the owner of a queue is told."""

    def __init__(self) -> None:
        self.killed: list[str] = []
        self.queue: Queue | None = None
        self.held: list[int] = []

    def changed(self) -> None:
        assert self.queue is not None
        self.held.append(self.queue.held)


Make = Callable[..., Queue]


@pytest.fixture
def hooks() -> Hooks:
    return Hooks()


@pytest.fixture
def make(hooks: Hooks) -> Iterator[Make]:
    made: list[Queue] = []

    def it(timeout: float = LONG, **how: Any) -> Queue:
        how = {"kill": hooks.killed.append, "on_change": hooks.changed} | how
        hooks.queue = queue = Queue(timeout, **how)
        made.append(queue)
        return queue

    yield it
    for queue in made:
        queue.close()
    for thread in threading.enumerate():
        if thread.name == "corral-approvals":
            thread.join(10)
            assert not thread.is_alive(), "a queue that is closed has a thread"


def threads() -> int:
    return sum(thread.name == "corral-approvals" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("program", "known"),
    [
        (Program("/bin/a", ("a",), digest="d"), True),
        (Program("/bin/a", ("a",)), False),
        (Program("/s", ("s",), interpreter="/bin/a", digest="d", interpreter_digest="e"), True),
        (Program("/s", ("s",), interpreter="/bin/a", digest="d"), False),
        (Program("/s", ("s",), interpreter="/bin/a", interpreter_digest="e"), False),
    ],
)
def test_only_what_is_known_by_its_content_is_approved_for_the_session(
    make: Make, program: Program, known: bool
) -> None:
    queue, told = make(), Told()
    queue.ask(run(program), OPINION, told)
    if known:
        queue.answer(1, Verdict.ALLOW, "anna", scope=Scope.SESSION)
        queue.ask(run(replace(program, interpreter_digest="another")), OPINION, Told())
        assert queue.held == 1
        return
    with pytest.raises(RequestError, match="once only"):
        queue.answer(1, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    assert queue.held == 1 and not told.answers
    queue.answer(1, Verdict.ALLOW, "anna")
    assert told.wait().verdict is Verdict.ALLOW
    queue.ask(run(program), OPINION, Told())
    assert queue.held == 1


# ---- answers ----


@pytest.mark.parametrize("verdict", [Verdict.ALLOW, Verdict.DENY, Verdict.KILL])
def test_an_answer_is_told_once(make: Make, verdict: Verdict) -> None:
    queue, told = make(), Told()
    held = queue.ask(connect(), OPINION, told)
    (question,) = queue.waiting()
    assert (question.number, question.action, question.opinion) == (1, connect(), OPINION)
    assert not told.answers and queue.held == 1
    outcome = queue.answer(1, verdict, "anna", reason="because")
    assert told.wait() == Answer(verdict, "anna", "because")
    assert (outcome.question, outcome.answered) == (question, 1)
    assert queue.held == 0 and not queue.waiting()
    for again in (verdict, Verdict.ALLOW):
        with pytest.raises(RequestError, match=f"not held: it was answered .{verdict.name.lower()}. by anna"):
            queue.answer(1, again, "bert")
    held.withdraw()
    queue.close()
    assert len(told.answers) == 1


def test_ask_is_no_answer(make: Make) -> None:
    queue, told = make(), Told()
    queue.ask(connect(), OPINION, told)
    with pytest.raises(RequestError, match="no answer"):
        queue.answer(1, Verdict.ASK, "anna")
    with pytest.raises(RequestError, match="characters"):
        queue.answer(1, Verdict.ALLOW, "anna", reason="x" * (queues.MAX_REASON + 1))
    assert queue.held == 1 and not told.answers


def test_what_never_was_cannot_be_answered(make: Make) -> None:
    queue = make()
    with pytest.raises(RequestError, match="never was"):
        queue.answer(1, Verdict.ALLOW, "anna")


def test_numbers_are_never_used_again(make: Make) -> None:
    """Otherwise an agent could put another action under the number that a person is about to approve."""
    queue = make()
    first, second = Told(), Told()
    queue.ask(connect(80), OPINION, first).withdraw()
    queue.ask(connect(81), OPINION, second)
    with pytest.raises(RequestError, match="gone before the answer"):
        queue.answer(1, Verdict.ALLOW, "anna")
    assert [question.number for question in queue.waiting()] == [2]
    assert not first.answers and not second.answers


def test_no_answer_in_time_is_no(make: Make) -> None:
    queue, told = make(0.02), Told()
    queue.ask(connect(), OPINION, told)
    answer = told.wait()
    assert answer.verdict is Verdict.DENY and answer.by == "nobody" and "within 0.02 s" in answer.reason
    with pytest.raises(RequestError, match="nobody answered in time"):
        queue.answer(1, Verdict.ALLOW, "anna")
    assert queue.held == 0


def test_a_late_answer_is_no_answer_even_before_the_time_out_is_told(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, told = make(0.0), Told()
    monkeypatch.setattr(queue, "_watch", lambda: None)  # whoever ends it is late
    queue.ask(connect(), OPINION, told)
    with pytest.raises(RequestError, match="nobody answered in time"):
        queue.answer(1, Verdict.ALLOW, "anna")
    assert not told.answers


def test_each_question_has_its_own_time(make: Make) -> None:
    queue = make(0.05)
    told = [Told() for _ in range(20)]
    for index, one in enumerate(told):
        queue.ask(connect(index), OPINION, one)
        time.sleep(0.005)
    assert {one.wait().verdict for one in told} == {Verdict.DENY}
    again = Told()  # the thread may have ended meanwhile
    queue.ask(connect(), OPINION, again)
    assert again.wait().verdict is Verdict.DENY


def test_one_thread_for_any_number_of_questions_and_none_before(make: Make) -> None:
    before = threads()
    queue = make()
    assert threads() == before
    for port in range(500):
        queue.ask(connect(port), OPINION, Told())
    assert threads() == before + 1


def test_without_a_thread_nothing_is_held(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    queue, told = make(), Told()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            queue.ask(connect(), OPINION, told)
    assert queue.held == 0
    queue.ask(connect(), OPINION, told)  # and the next one is tried anew
    queue.answer(2, Verdict.ALLOW, "anna")
    assert told.wait().verdict is Verdict.ALLOW


def test_what_is_withdrawn_is_not_told(make: Make) -> None:
    queue, told = make(0.05), Told()
    held = queue.ask(connect(), OPINION, told)
    held.withdraw()
    held.withdraw()
    later = Told()
    queue.ask(connect(), OPINION, later)
    later.wait()
    assert not told.answers


def test_too_many_are_denied(make: Make) -> None:
    queue = make(limit=3)
    told = [Told() for _ in range(5)]
    for port, one in enumerate(told):
        queue.ask(connect(port), OPINION, one)
    assert [len(one.answers) for one in told] == [0, 0, 0, 1, 1]
    assert told[4].wait().verdict is Verdict.DENY and "3 actions" in told[4].wait().reason
    queue.answer(1, Verdict.ALLOW, "anna")
    more = Told()
    queue.ask(connect(), OPINION, more)
    assert not more.answers


def test_close_denies_what_waits_and_what_comes(make: Make) -> None:
    queue = make()
    told = [Told() for _ in range(3)]
    queue.ask(connect(1), OPINION, told[0])
    queue.answer(1, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    queue.ask(connect(2), OPINION, told[1])
    queue.close()
    assert told[1].wait().verdict is Verdict.DENY
    queue.ask(connect(3), OPINION, told[2])
    assert told[2].wait().verdict is Verdict.DENY and queue.held == 0


def test_what_is_remembered_of_the_past_is_bounded(make: Make) -> None:
    queue = make()
    for _ in range(queues._REMEMBERED + 100):
        queue.ask(connect(), OPINION, Told()).withdraw()
    assert len(queue._endings) == queues._REMEMBERED
    with pytest.raises(RequestError, match="not held"):
        queue.answer(1, Verdict.ALLOW, "anna")


# ---- for the session ----


def test_an_answer_for_the_session_answers_its_likes_now_and_later(make: Make) -> None:
    queue = make()
    same, other, later = [Told() for _ in range(3)], Told(), Told()
    for one in same:
        queue.ask(connect(80), OPINION, one)
    queue.ask(connect(81), OPINION, other)
    outcome = queue.answer(2, Verdict.ALLOW, "anna", scope=Scope.SESSION, reason="fine")
    assert outcome.answered == 3
    assert {one.wait() for one in same} == {Answer(Verdict.ALLOW, "anna", "fine")}
    queue.ask(connect(80), OPINION, later)
    assert later.wait() == Answer(Verdict.ALLOW, "anna", "fine")
    assert not other.answers and queue.held == 1


@pytest.mark.parametrize(
    ("action", "opinion"),
    [
        (connect(81), OPINION),
        (connect(80, session="another"), OPINION),
        (Action(Kind.NET_SEND, connect(80).subject, connect(80).origin), OPINION),
        (connect(80), Opinion(Verdict.ASK, "behaviour: it has read secrets")),
    ],
    ids=["subject", "session", "kind", "rule"],
)
def test_an_answer_for_the_session_is_for_nothing_else(make: Make, action: Action, opinion: Opinion) -> None:
    queue, told, waits = make(), Told(), Told()
    queue.ask(connect(80), OPINION, Told())
    queue.ask(action, opinion, waits)
    queue.answer(1, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    queue.ask(action, opinion, told)
    assert not waits.answers and not told.answers and queue.held == 2


def test_an_answer_once_is_for_one(make: Make) -> None:
    queue, first, second, third = make(), Told(), Told(), Told()
    queue.ask(connect(), OPINION, first)
    queue.ask(connect(), OPINION, second)
    queue.answer(1, Verdict.ALLOW, "anna")
    queue.ask(connect(), OPINION, third)
    assert first.wait().verdict is Verdict.ALLOW and not second.answers and not third.answers


def test_only_an_approval_can_be_for_the_session(make: Make) -> None:
    queue, told = make(), Told()
    queue.ask(connect(), OPINION, told)
    for verdict in (Verdict.DENY, Verdict.KILL):
        with pytest.raises(RequestError, match="only an approval"):
            queue.answer(1, verdict, "anna", scope=Scope.SESSION)
    assert not told.answers


@pytest.mark.parametrize(
    "program",
    [Program("/bin/sh", ("sh", "x"), truncated=True), Program("/bin/sh", ("sh", "\ufffd"))],
    ids=["cut", "no text"],
)
def test_what_was_not_read_in_full_is_like_nothing(make: Make, program: Program) -> None:
    """Two commands whose first arguments are equal may differ in what was cut off, or in what is no text."""
    queue, told = make(), Told()
    queue.ask(run(program), OPINION, told)
    with pytest.raises(RequestError, match="once only"):
        queue.answer(1, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    assert not told.answers and queue.held == 1
    queue.answer(1, Verdict.ALLOW, "anna")
    assert told.wait().verdict is Verdict.ALLOW


def test_answers_for_the_session_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "MAX_GRANTS", 2)
    queue = make()
    for port in (1, 2, 3):
        queue.ask(connect(port), OPINION, Told())
        if port < 3:
            queue.answer(port, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    with pytest.raises(RequestError, match="approve it once"):
        queue.answer(3, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    assert queue.held == 1


# ---- hooks, faults, threads ----


def test_the_owner_is_told_when_something_is_held_and_when_nothing_is(make: Make, hooks: Hooks) -> None:
    queue = make()
    one, _ = queue.ask(connect(1), OPINION, Told()), queue.ask(connect(2), OPINION, Told())
    assert hooks.held == [1]
    one.withdraw()
    assert hooks.held == [1]
    queue.answer(2, Verdict.DENY, "anna")
    assert hooks.held == [1, 0]
    queue.ask(connect(3), OPINION, Told()).withdraw()
    assert hooks.held == [1, 0, 1, 0]
    queue.ask(connect(4), OPINION, Told())
    queue.close()
    assert hooks.held == [1, 0, 1, 0, 1, 0]


def test_the_owner_is_told_when_time_is_over(make: Make, hooks: Hooks) -> None:
    empty = threading.Event()

    def look() -> None:
        if hooks.queue and hooks.queue.held == 0:
            empty.set()

    queue = make(0.01, on_change=look)
    queue.ask(connect(), OPINION, Told())
    assert empty.wait(20)


def test_an_answer_that_cannot_be_told_ends_the_sandbox(make: Make, hooks: Hooks) -> None:
    def fail(_: Answer) -> None:
        raise ValueError

    queue, told = make(), Told()
    queue.ask(connect(), OPINION, fail)
    queue.ask(connect(), OPINION, told)
    assert queue.answer(1, Verdict.ALLOW, "anna", scope=Scope.SESSION).answered == 2
    assert hooks.killed == ["an answer could not be told (ValueError)"]
    assert told.wait().verdict is Verdict.ALLOW


def test_a_time_out_that_cannot_be_told_ends_the_sandbox_and_no_thread(make: Make, hooks: Hooks) -> None:
    def fail(_: Answer) -> None:
        raise ValueError

    queue, told, later = make(0.01), Told(), Told()
    queue.ask(connect(), OPINION, fail)
    queue.ask(connect(), OPINION, told)
    assert told.wait().verdict is Verdict.DENY
    queue.ask(connect(), OPINION, later)
    assert later.wait().verdict is Verdict.DENY
    assert hooks.killed == ["an answer could not be told (ValueError)"]


def test_an_owner_that_fails_ends_the_sandbox(make: Make, hooks: Hooks) -> None:
    def fail() -> None:
        raise OSError

    queue, told = make(on_change=fail), Told()
    queue.ask(connect(), OPINION, told)
    queue.answer(1, Verdict.DENY, "anna")
    assert len(hooks.killed) == 2 and told.wait().verdict is Verdict.DENY


class Register:
    """Keeps what it is told, with how many answers had been told by then; or fails."""

    def __init__(self, told: Told, error: Exception | None = None) -> None:
        self.told, self.error = told, error
        self.kept: list[tuple[Ended, int]] = []

    def question_ended(self, ended: Ended) -> None:
        if self.error is not None:
            raise self.error
        self.kept.append((ended, len(self.told.answers)))


@pytest.mark.parametrize("ending", Ending)
def test_how_a_question_ended_is_recorded_before_its_caller_is_told(make: Make, ending: Ending) -> None:
    told = Told()
    register = Register(told)
    queue = make(0.02 if ending is Ending.TIMED_OUT else LONG, registers=[register])
    before = time.time()
    held = queue.ask(connect(), OPINION, told)
    (question,) = queue.waiting() or (None,)
    if ending is Ending.ANSWERED:
        queue.answer(1, Verdict.ALLOW, "anna", reason="because")
        with pytest.raises(RequestError):
            queue.answer(1, Verdict.DENY, "bert")
    elif ending is Ending.TIMED_OUT:
        told.wait()
    elif ending is Ending.WITHDRAWN:
        held.withdraw()
        held.withdraw()
    queue.close()
    ((ended, answers),) = register.kept
    assert (ended.ending, answers, ended.through) == (ending, 0, 1)
    assert question is None or ended.question == question
    assert before <= ended.question.asked_at <= ended.at
    assert ended.timeout == (0.02 if ending is Ending.TIMED_OUT else LONG)
    if ending is Ending.ANSWERED:
        assert ended.answer == Answer(Verdict.ALLOW, "anna", "because")
    else:
        assert (ended.answer.verdict, ended.answer.by) == (Verdict.DENY, "nobody")


def test_all_that_an_answer_for_the_session_answers_is_recorded_with_its_question(make: Make) -> None:
    told = Told()
    register = Register(told)
    queue = make(registers=[register])
    for port in (80, 80, 81):
        queue.ask(connect(port), OPINION, Told())
    queue.answer(2, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    assert [(each.question.number, each.through, each.scope) for each, _ in register.kept] == [
        (2, 2, Scope.SESSION),
        (1, 2, Scope.SESSION),
    ]


def test_an_answer_that_cannot_be_recorded_is_no_and_ends_the_sandbox(make: Make, hooks: Hooks) -> None:
    told, other = Told(), Told()
    queue = make(registers=[Register(told, OSError("a secret"))])
    queue.ask(connect(), OPINION, told)
    queue.ask(connect(81), OPINION, other).withdraw()
    with pytest.raises(RequestError, match="cannot be recorded, so the action is denied"):
        queue.answer(1, Verdict.ALLOW, "anna")
    assert told.wait().verdict is Verdict.DENY
    assert hooks.killed == ["its records cannot be written (OSError)"] * 2
    assert not other.answers


def test_an_answer_may_ask_again(make: Make) -> None:
    queue, told = make(), Told()

    def ask_again(_: Answer) -> None:
        queue.ask(connect(2), OPINION, told)

    queue.ask(connect(1), OPINION, ask_again)
    queue.answer(1, Verdict.ALLOW, "anna")
    queue.answer(2, Verdict.ALLOW, "anna")
    assert told.wait().verdict is Verdict.ALLOW


def test_many_threads_ask_answer_withdraw_and_run_out_of_time(make: Make, hooks: Hooks) -> None:
    """Each question has exactly one end, and the last thing the owner sees is an empty queue."""
    queue = make(0.05)
    told: list[Told] = []
    stop = threading.Event()

    def ask() -> None:
        for index in range(300):
            one = Told()
            told.append(one)
            held = queue.ask(connect(index % 7), OPINION, one)
            if index % 5 == 0:
                held.withdraw()
                one.event.set()

    def answer() -> None:
        while not stop.is_set():
            for question in queue.waiting(limit=10):
                try:
                    queue.answer(question.number, Verdict.ALLOW, "anna")
                except RequestError:
                    continue

    askers = [threading.Thread(target=ask) for _ in range(4)]
    answerers = [threading.Thread(target=answer) for _ in range(2)]
    for thread in askers + answerers:
        thread.start()
    for thread in askers:
        thread.join()
    for one in told:
        assert one.event.wait(20)
    stop.set()
    for thread in answerers:
        thread.join()
    assert queue.held == 0 and not hooks.killed
    assert all(len(one.answers) <= 1 for one in told)
    assert sum(len(one.answers) for one in told) >= 4 * 300 * 4 // 5


def test_a_request_that_names_another_method_is_like_nothing(make: Make) -> None:
    """Which one, and so what a later one would do, is not compared."""
    queue, told = make(), Told()
    asked = Request(Endpoint(Transport.TCP, "192.0.2.1", 80), "GET", "/a", Meaning.OVERRIDDEN)
    queue.ask(Action(Kind.HTTP_REQUEST, asked, Origin("sandbox", "session")), OPINION, told)
    with pytest.raises(RequestError, match="once only"):
        queue.answer(1, Verdict.ALLOW, "anna", scope=Scope.SESSION)
    queue.answer(1, Verdict.ALLOW, "anna")
    assert [answer.verdict for answer in told.answers] == [Verdict.ALLOW]


def test_what_is_held_says_whether_it_can_be_taken_back(make: Make) -> None:
    queue = make()
    asked = Request(Endpoint(Transport.TCP, "192.0.2.1", 80), "POST", "/a")
    for kind, subject in ((Kind.HTTP_REQUEST, asked), (Kind.FILE_OPEN, File("/a", Access.WRITE))):
        queue.ask(Action(kind, subject, Origin("sandbox", "session")), OPINION, Told())
    page = waiting.page("sandbox", queue, {"after": 0})["waiting"]
    assert [each["reversible"] for each in page] == ["no", "until-applied"]
    assert [waiting.read_waiting(each).reversible for each in page] == ["no", "until-applied"]


# ---- what is shown ----


PROCESS = Process(
    4711,
    12,
    99,
    "/usr/bin/python3",
    ("python3", "-c", "evil\x1b[2J"),
    (Ancestor(3, "/bin/sh"), Ancestor(2, "/bin/a b")),
)


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        (Endpoint(Transport.TCP, "192.0.2.1", 80), "192.0.2.1:80 (tcp)"),
        (Endpoint(Transport.UDP, "2001:db8::1", 53), "[2001:db8::1]:53 (udp)"),
        (
            Endpoint(Transport.TCP, "192.0.2.1", 443, "example.org", protocol="tls"),
            "example.org:443 (192.0.2.1, tcp, tls)",
        ),
        (Endpoint(Transport.UNIX, path="/tmp/a (tcp)"), "unix '/tmp/a (tcp)'"),
        (Endpoint(Transport.UNIX), "unix socket without a name"),
        (Program("/tmp/evil", ("/usr/bin/git", "push")), "/tmp/evil with the arguments: /usr/bin/git push"),
        (
            Program("/tmp/x", ("a b", "'"), True, "/bin/sh"),
            "/tmp/x (run by /bin/sh) with the arguments: 'a b' ''\"'\"'' [...]",
        ),
        (Program("/tmp/x with the arguments: y"), "'/tmp/x with the arguments: y' with the arguments: "),
        (File("/a -> /b", Access.READ), "read '/a -> /b'"),
        (File("/a", Access.WRITE, "/b"), "write /a -> /b"),
        (KernelCall("mount", 1, "no"), ""),
        (Request(Endpoint(Transport.TCP, "192.0.2.1", 80), "GET", "/a b"), "GET at 192.0.2.1:80 (tcp): '/a b'"),
        (
            Request(Endpoint(Transport.TCP, "192.0.2.1", 80), "GET", "/a", Meaning.OVERRIDDEN),
            "GET (which names another method or path for the server) at 192.0.2.1:80 (tcp): /a",
        ),
        (Query("warehouse", "select", ("t", "u v")), "select of warehouse: t 'u v'"),
        (Operation("tickets", "createTicket", "POST"), "createTicket of tickets (POST)"),
        (Operation("tickets", "GET /a) of x (", "PO ST"), "'GET /a) of x (' of tickets ('PO ST')"),
        (Verb(("a", "b c")), "a 'b c'"),
    ],
    ids=str,
)
def test_a_subject_is_described_so_that_nothing_in_it_can_look_like_something_else(subject: Subject, text: str) -> None:
    assert waiting.describe(subject) == text


def test_texts_are_cut(make: Make) -> None:
    queue = make()
    long = "\udcff" * 200_000
    process = Process(1, 1, 1, long, (long,) * 1000, tuple(Ancestor(1, long) for _ in range(1000)))
    origin = Origin("sandbox", "session", process=process)
    opinion = Opinion(Verdict.ASK, long, long)
    for _ in range(waiting.PAGE + 1):
        queue.ask(Action(Kind.PROCESS_EXEC, Program(long, (long,) * 1000), origin), opinion, Told())
        queue.ask(Action(Kind.FILE_RENAME, File(long, Access.WRITE, long), origin), opinion, Told())
    answer = waiting.page("sandbox", queue, {"after": 0})
    assert len(json.dumps(answer)) < registry.MAX_LONG_MESSAGE
    assert answer["more"] and len(answer["waiting"]) == waiting.PAGE


# ---- over the control socket ----


@pytest.fixture
def server(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, make: Make) -> Iterator[Server]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    made = Server()
    made.core.supervision = SimpleNamespace(approvals=make())
    yield made
    made.close()


def test_pending_shows_what_an_enforcer_saw(server: Server) -> None:
    queue = server.core.supervision.approvals
    origin = Origin("standinx", "session", 4, 2, PROCESS)
    queue.ask(Action(Kind.NET_CONNECT, Endpoint(Transport.TCP, "192.0.2.1", 80), origin), OPINION, Told())
    (found,) = resolver.list_waiting()
    assert (found.id, found.number, found.sandbox) == ("standinx-1", 1, "standinx")
    assert (found.action, found.subject) == ("net.connect", "192.0.2.1:80 (tcp)")
    assert (found.session, found.step, found.exec) == ("session", 4, 2)
    assert (found.rule, found.reason) == (OPINION.rule, OPINION.reason)
    assert (found.pid, found.inner_pid, found.exe, found.argv) == (4711, 12, PROCESS.exe, PROCESS.argv)
    assert found.parents == ("/bin/sh", "/bin/a b")
    assert 0 < found.seconds_left <= LONG and abs(found.since - time.time()) < 60


def test_thousands_are_all_listed(server: Server) -> None:
    queue = server.core.supervision.approvals
    for port in range(2345):
        queue.ask(connect(port), OPINION, Told())
    found = resolver.list_waiting()
    assert [one.number for one in found] == list(range(1, 2346))


def test_an_answer_comes_from_who_the_kernel_says(server: Server) -> None:
    told = Told()
    server.core.supervision.approvals.ask(connect(), OPINION, told)
    done = resolver.answer("stand-1", Verdict.ALLOW, scope=Scope.SESSION, reason="fine")
    assert (done.id, done.action, done.count) == ("standinx-1", "net.connect 192.0.2.1:80 (tcp)", 1)
    answer = told.wait()
    assert answer.verdict is Verdict.ALLOW and answer.reason == "fine"
    assert answer.by.endswith(f"(uid {os.geteuid()}, pid {os.getpid()})")
    with pytest.raises(RequestError, match="not held: it was answered"):
        resolver.answer("standinx-1", Verdict.ALLOW)


@pytest.mark.parametrize("name", ["", "-", "-1", "standinx", "standinx-", "standinx-x", "standinx--1", "standinx-²"])
def test_what_is_no_id_is_refused(server: Server, name: str) -> None:
    told = Told()
    server.core.supervision.approvals.ask(connect(), OPINION, told)
    with pytest.raises(RequestError):
        resolver.answer(name, Verdict.ALLOW)
    assert not told.answers


def test_the_beginning_of_a_number_is_another_number(server: Server) -> None:
    queue = server.core.supervision.approvals
    for port in range(12):
        queue.ask(connect(port), OPINION, Told())
    resolver.answer("standinx-1", Verdict.ALLOW)
    with pytest.raises(RequestError, match="not held"):
        resolver.answer("standinx-1", Verdict.ALLOW)
    assert queue.held == 11


WRONG: list[dict[str, Any]] = [
    {"number": True},
    {"number": "1"},
    {"number": 1.0},
    {"number": -1},
    {"number": 2**70},
    {"number": None},
    {"verdict": "ask"},
    {"verdict": "ALWAYS"},
    {"verdict": 0},
    {"verdict": ["allow"]},
    {"scope": "forever"},
    {"scope": ["once"]},
    {"scope": None},
    {"reason": 5},
    {"reason": None},
    {"reason": ["because"]},
    {"reason": "x" * 1001},
    {"id": "nobodyxx"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:40])
def test_a_malformed_answer_is_none(server: Server, wrong: dict[str, Any]) -> None:
    told = Told()
    server.core.supervision.approvals.ask(connect(), OPINION, told)
    message = {"verb": "answer", "id": "standinx", "number": 1, "verdict": "allow", "scope": "once", "reason": ""}
    answer = server.exchange(json.dumps(message | wrong).encode())
    assert answer is not None and answer["error"] and answer["exit_code"] == 125
    assert not told.answers and server.is_alive()
    assert server.exchange(json.dumps(message).encode()) == {"action": "net.connect 192.0.2.1:80 (tcp)", "answered": 1}


@pytest.mark.parametrize("after", [True, "0", -1, 1.5, [], None], ids=str)
def test_a_malformed_pending_is_refused(server: Server, after: object) -> None:
    answer = server.exchange(json.dumps({"verb": "pending", "id": "standinx", "after": after}).encode())
    assert answer is not None and "whole number" in answer["error"]
    assert server.is_alive()


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare(1)")
def test_a_peer_in_a_user_namespace_of_its_own_is_turned_away(server: Server) -> None:
    """It has our user id, as an agent may have, and found the socket, as no agent may."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1])\n"
        'try: s.send(b\'{"verb": "list"}\'); print(s.recv(99))\n'
        "except OSError as error: print(b'')\n"
    )
    words = [sys.executable, "-c", code, server.path]
    inside = subprocess.run(["unshare", "--user", "--map-root-user", *words], capture_output=True, timeout=60)
    if inside.returncode != 0:
        pytest.skip(f"no user namespaces here: {inside.stderr!r}")
    outside = subprocess.run(words, capture_output=True, timeout=60)
    assert inside.stdout == b"b''\n" and b"standinx" in outside.stdout


def test_who_is_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    assert Peer(os.getpid(), me).is_operator()
    assert not Peer(os.getpid(), me + 1).is_operator()
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not Peer(gone.pid, 0).is_operator()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert Peer(gone.pid, 0).is_operator()
    assert not Peer(gone.pid, 1000).is_operator()
    first, second = socket.socketpair()
    assert peers.peer_of(first).pid == os.getpid()
    first.close()
    second.close()


# ---- the commands ----


def test_the_commands_escape_what_an_agent_wrote(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    queue = server.core.supervision.approvals
    evil = "/tmp/\x1b[2J\r\u202e\n[bold]"
    origin = Origin("standinx", "session", 0, 2, PROCESS)
    queue.ask(Action(Kind.PROCESS_EXEC, Program(evil, (evil,)), origin), OPINION, Told())
    commands.show_pending(as_json=False)
    text = capsys.readouterr().out
    assert "standinx-1  process.exec" in text and "[bold]" in text and "\\u202e" in text and "\\x1b" in text
    assert all(line.isprintable() for line in text.splitlines()) and "\r" not in text
    assert "claims" in text and "/usr/bin/python3 (pid 4711, inside 12)" in text
    commands.show_pending(as_json=True)
    (found,) = json.loads(capsys.readouterr().out)
    assert evil in found["subject"] and found["id"] == "standinx-1"
    assert commands.answer_all(["standinx-1"], Verdict.DENY, reason="no") == 0
    text = capsys.readouterr().out
    assert text.startswith("denied standinx-1: process.exec") and len(text.splitlines()) == 1 and "\x1b" not in text


def test_many_are_not_all_printed_for_people(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for port in range(commands.MAX_SHOWN + 7):
        server.core.supervision.approvals.ask(connect(port), OPINION, Told())
    commands.show_pending(as_json=False)
    text = capsys.readouterr().out
    assert "and 7 more" in text and text.count("asked by") == commands.MAX_SHOWN
    commands.show_pending(as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == commands.MAX_SHOWN + 7


def test_several_are_answered_and_those_that_cannot_be_are_told(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [Told() for _ in range(3)]
    for port, one in enumerate(told):
        server.core.supervision.approvals.ask(connect(port), OPINION, one)
    assert commands.answer_all(["standinx-1", "standinx-9", "standinx-3"], Verdict.KILL) == 125
    output = capsys.readouterr()
    assert output.out.count("denied, sandbox killed: standinx-") == 2
    assert output.err == "corral: standinx-9: this action is not held: it never was\n"
    assert [one.answers[0].verdict for one in told[::2]] == [Verdict.KILL] * 2 and not told[1].answers
