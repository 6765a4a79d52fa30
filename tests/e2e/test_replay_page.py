"""The page of a replay in a real browser: it plays, it loads nothing, and nothing that an agent said does anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from corral.actions import ToolCall, Verdict
from corral.log.calls import WithCalls
from corral.log.conversations import tree_of
from corral.log.events import Event
from corral.log.html import write_html
from corral.log.payloads import Payloads
from corral.log.timeline import Timeline
from tests.e2e.browser import Browser, is_installed
from tests.unit.recorded import ORIGIN, Shelf, decision, run, session, syscall, used, written

pytestmark = pytest.mark.skipif(
    not is_installed() and not os.environ.get("CI"), reason="no browser (Debian: chromium-headless-shell)"
)

COUNT = 1200
"""Records of the session; a page of the time line shows 500."""
ELSEWHERE = "http://192.0.2.7/x"
HOSTILE = (
    "</script><script>owned = 1</script>",
    f"<img src='{ELSEWHERE}' onerror='owned = 2'>",
    f"<iframe src='{ELSEWHERE}'></iframe><link rel=stylesheet href='{ELSEWHERE}'>",
    "<svg onload='owned = 3'>",
    "\"><b onmouseover='owned = 4'>",
    "javascript:owned=5",
    "<!--<script>",
    "]]></script >",
    "`${owned = 6}`",
    f"<meta http-equiv=refresh content='0;url={ELSEWHERE}'>",
    f"<style>@import '{ELSEWHERE}'; body {{ background: url({ELSEWHERE}) }}</style>",
    "__proto__",
    "\x1b]0;owned\x07\x1b[2J\x9b31m",
    "safe\u202egnp.exe\u2066\u2069\u200b",
    "\u2028owned = 7\u2029\x00",
)

RECORDED_TIMERS = """
window.waits = [];
window.setTimeout = (callback, wait) => { waits.push(wait); window.next = callback; return waits.length; };
"""
"""Time stands still until a test says so, which also sees for how long the page wanted to wait."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as made:
        made.call("Page.addScriptToEvaluateOnNewDocument", source=RECORDED_TIMERS)
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole session from its log: what an agent can say, then a second apart what it tried."""
    said = [decision(run(each, each, each), Verdict.DENY, each, reason=each, answered_by=each) for each in HOSTILE]
    tried = [decision(syscall(f"call{number}"), Verdict.DENY) for number in range(COUNT - len(HOSTILE) - 4)]
    line = Timeline(Shelf(written(session(*said, *tried))), "session-1")
    path = tmp_path_factory.mktemp("page") / "page.html"
    with path.open("w", encoding="utf-8") as file:
        assert write_html(file, line, HOSTILE[0], about=[(each, each) for each in HOSTILE]) == COUNT
    return path


@pytest.fixture
def opened(browser: Browser, page: Path) -> Browser:
    browser.open(page)
    return browser


def status(browser: Browser) -> str:
    return str(browser.evaluate("document.getElementById('status').textContent"))


def rows(browser: Browser) -> int:
    return int(browser.evaluate("document.getElementById('items').childElementCount"))


def test_what_an_agent_said_is_shown_as_text_and_does_nothing(opened: Browser) -> None:
    structure = opened.evaluate("[...document.querySelectorAll('script, style, iframe, img, svg, link, b')].length")
    assert structure == 3, "the data, the script, the style"
    opened.evaluate("for (const each of document.querySelectorAll('#items details')) each.open = true")
    opened.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    shown = str(opened.evaluate("document.getElementById('items').textContent"))
    for text in (
        "</script><script>owned = 1</script>",
        "onerror='owned = 2'",
        "<svg onload='owned = 3'>",
        "\\u202egnp",
    ):
        assert text in shown, "it is not shown as it was said"
    assert shown.replace("\n", "").isprintable()
    assert opened.evaluate("document.title").startswith("</script>")
    opened.click("#items li:nth-child(5) summary")
    assert opened.evaluate("typeof owned") == "undefined"
    assert opened.evaluate("document.querySelectorAll('script, iframe, img, svg, link, b').length") == 2
    # Nothing was even tried that the policy had to stop, nothing failed, and nobody was asked anything.
    told = {name for name, _ in opened.events}
    assert not told & {
        "Audits.issueAdded",
        "Log.entryAdded",
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Page.javascriptDialogOpening",
        "Page.frameRequestedNavigation",
        "Page.windowOpen",
    }


def test_it_asks_for_nothing(opened: Browser, page: Path) -> None:
    opened.press("n")
    opened.evaluate("for (const each of document.querySelectorAll('#items details')) each.open = true")
    opened.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert opened.requests() == [page.as_uri()]
    assert not opened.has_connected()


@pytest.mark.parametrize(
    "attempt",
    [
        f"fetch('{ELSEWHERE}').then(() => 'loaded', () => 'refused')",
        f"new Promise((done) => {{ const made = new Image(); made.onload = () => done('loaded');"
        f" made.onerror = () => done('refused'); made.src = '{ELSEWHERE}'; }})",
        "(() => { try { document.body.innerHTML = '<p>'; return 'written'; } catch { return 'refused'; } })()",
        "(() => { try { return eval('1'); } catch { return 'refused'; } })()",
        "(() => { const made = document.createElement('script'); try { made.text = 'owned = 8';"
        " document.body.append(made); } catch {} return typeof owned === 'undefined' ? 'refused' : 'ran'; })()",
        "(() => { try { document.body.setAttribute('onclick', 'owned = 9'); document.body.click(); } catch {}"
        " return typeof owned === 'undefined' ? 'refused' : 'ran'; })()",
    ],
    ids=["fetch", "image", "markup", "eval", "script", "handler"],
)
def test_should_markup_get_in_all_the_same_the_policy_of_the_page_stops_it(opened: Browser, attempt: str) -> None:
    """The second wall: the protocol evaluates in the page's own context, where its policy holds."""
    assert opened.evaluate(attempt) == "refused"
    assert not opened.has_connected()


def test_it_is_searched(opened: Browser) -> None:
    assert rows(opened) == 500 and f"of {COUNT} shown" in status(opened)
    opened.press("/")
    opened.type("CALL77")
    assert "of 11 shown" in status(opened), "77 and 770 to 779, whatever the case"
    assert rows(opened) == 11
    opened.evaluate("document.getElementById('search').value = ''")
    opened.type("owned = 1")
    assert "of 1 shown" in status(opened)
    opened.click("input[name=verdict][value=deny]")
    assert rows(opened) == 0 and status(opened).startswith("nothing matches")


def test_places_are_found(opened: Browser) -> None:
    opened.press("g")
    opened.type("#700")
    opened.press("Enter")
    assert "record 700," in status(opened)
    assert opened.evaluate("document.getElementById('page').textContent") == "page 2 of 3"
    current = "document.querySelector('[aria-current] .number').textContent"
    assert opened.evaluate(current) == "#700"
    for said, number in (("1:05", 65), ("90s", 90), ("0:10:00", 600)):
        opened.evaluate(f"document.getElementById('go').value = '{said}'")
        opened.press("Enter")
        assert f"record {number}," in status(opened)
    opened.evaluate("document.getElementById('go').value = 'nowhere'")
    opened.press("Enter")
    assert "no such place" in status(opened)
    opened.evaluate("document.activeElement.blur()")
    for key, number in (("n", 601), ("p", 600), ("ArrowRight", 610), ("ArrowLeft", 600)):
        opened.press(key)
        assert f"record {number}," in status(opened)
    opened.evaluate("(() => { const seek = document.getElementById('seek'); seek.value = '1100';"
                    " seek.dispatchEvent(new Event('input')); })()")  # fmt: skip
    assert "record 1100," in status(opened)


@pytest.mark.parametrize(("speed", "wait"), [("1", 1000), ("4", 250), ("0.25", 4000)])
def test_it_plays_as_fast_as_is_said(opened: Browser, speed: str, wait: int) -> None:
    """Its records are a second apart."""
    opened.evaluate(f"document.getElementById('speed').value = '{speed}'")
    opened.click("#play")
    assert opened.evaluate("document.getElementById('play').textContent") == "Pause"
    for _ in range(5):
        opened.evaluate("next()")
    assert opened.evaluate("waits") == [wait] * 6
    assert "record 5," in status(opened)
    opened.click("#play")
    assert opened.evaluate("document.getElementById('play').textContent") == "Play"


# ---- calls of models ----


@pytest.fixture
def conversations(browser: Browser, tmp_path: Path) -> Browser:
    """A page about two conversations, one of which began the other; all that an agent can say is in them."""

    def acted(step: int, tool: str = "", *, unexplained: bool = False) -> Event:
        origin = replace(ORIGIN, step=step, tool=tool, unexplained=unexplained)
        return decision(replace(run(), origin=origin))

    calls = [ToolCall(said, said, said) for said in HOSTILE]
    events = [
        used(opened=5, tools=(ToolCall("call_1", "shell", "{}"), *calls)),
        acted(5, "call_1"),
        used(HOSTILE[0], HOSTILE[1], conversation=HOSTILE[2], parent="c0ffee", opened=6, finish=HOSTILE[3]),
        acted(6),
        acted(0, unexplained=True),
        acted(5, HOSTILE[1]),
        acted(0, unexplained=True),
    ]
    shelf = Shelf(written(session(*events)))
    tree = tree_of(shelf, "session-1")
    store = Payloads(tmp_path / "store")
    path = tmp_path / "page.html"
    with path.open("w", encoding="utf-8") as file:
        write_html(file, WithCalls(Timeline(shelf, "session-1"), store, tree), "t", tree=tree)
    browser.open(path)
    return browser


def test_conversations_are_a_tree_whose_buttons_go_to_their_records(conversations: Browser) -> None:
    assert conversations.evaluate("document.querySelectorAll('#tree > details').length") == 2
    assert conversations.evaluate("document.querySelectorAll('#tree .depth1').length") == 1
    conversations.evaluate("for (const each of document.querySelectorAll('#tree details')) each.open = true")
    conversations.evaluate("document.querySelector('#tree .depth1 .place').click()")
    assert "record 4," in status(conversations)
    assert conversations.evaluate("document.querySelector('#items li:nth-child(4)').className") == "depth1"
    assert (
        conversations.evaluate("document.querySelector('#items li:nth-child(4) .step').textContent") == "step 5, call_1"
    )
    assert conversations.evaluate("typeof owned") == "undefined"
    assert conversations.evaluate("document.querySelectorAll('script, iframe, img, svg, link, b').length") == 2


def test_what_no_answer_explains_is_gone_to_and_shown_alone(conversations: Browser) -> None:
    for number in (6, 8):
        conversations.evaluate("document.getElementById('go').value = 'unexplained'")
        conversations.evaluate("document.getElementById('go').focus()")
        conversations.press("Enter")
        assert f"record {number}," in status(conversations)
    conversations.evaluate("document.getElementById('go').value = 'tool call_1'")
    conversations.press("Enter")
    assert "record 3," in status(conversations)
    conversations.click("#unexplained")
    assert rows(conversations) == 2
    assert conversations.evaluate("document.querySelectorAll('#items .unexplained').length") == 2
    conversations.click("#unexplained")
    conversations.evaluate("document.activeElement.blur()")
    conversations.press("/")
    conversations.type("UNEXPLAINED")
    assert rows(conversations) == 2
