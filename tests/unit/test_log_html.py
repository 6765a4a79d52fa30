"""A time line as HTML: no text of a record becomes markup or script, and the page can load nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.actions import Verdict
from corral.log.html import facts, page, text, write_html
from corral.log.items import MAX_DETAIL, MAX_LINE, Item, ItemKind, make_item

HOSTILE = (
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "<!--<script>",
    "]]>--><svg/onload=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "\x1b]0;owned\x07\x1b[2J",
    "safe\u202egnp.exe\u2066\u2069\u200b",
    "\u2028\u2029\x00\ud800\udcff",
    "javascript:alert(1)&lt;&#60;",
    "https://evil.example/x.png url(https://evil.example/)",
)


class Page(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text of each."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style"):
            self.texts.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.texts[-1] = (self._open, self.texts[-1][1] + data)
        else:
            self.texts.append((self._open, data))

    def all(self, tag: str) -> list[str]:
        return [found for name, found in self.texts if name == tag]

    def structure(self) -> list[tuple[str, dict[str, str | None]]]:
        return self.elements


def render(items: list[Item], title: str = "session", about: list[tuple[str, str]] | None = None) -> str:
    file = io.StringIO()
    assert write_html(file, items, title, about=about or []) == len(items)
    return file.getvalue()


def hostile(said: str, number: int = 0) -> Item:
    return make_item(number, ItemKind.SYSTEM_CALL, 1.5, 0.5, said, [(said, said)], step=1, verdict=Verdict.DENY)


def data_of(found: Page) -> Any:
    (content,) = [each for each in found.all("script") if each.startswith("{")]
    return json.loads(content)


EMPTY = Page(render([])).structure()


@pytest.mark.parametrize("said", HOSTILE)
def test_hostile_text_becomes_no_markup(said: str) -> None:
    content = render([hostile(said)], said, [(said, said)])
    found = Page(content)
    # The same elements and attributes as a page about nothing, but for the one fact about the session.
    added: list[tuple[str, dict[str, str | None]]] = [("dt", {}), ("dd", {})]
    start = EMPTY.index(("dl", {"class": "facts"})) + 1
    assert found.structure() == [*EMPTY[:start], *added, *EMPTY[start:]]
    assert content.replace("\n", "").isprintable()
    assert content.encode().decode() == content


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(), max_size=40), max_size=5), st.text(st.characters(), max_size=40))
def test_any_text_becomes_no_markup(said: list[str], title: str) -> None:
    content = render([hostile(each, number) for number, each in enumerate(said)], title)
    found = Page(content)
    assert found.structure() == EMPTY
    assert content.replace("\n", "").isprintable()
    rows = data_of(found)["items"]
    assert [row[0] for row in rows] == list(range(len(said)))


def test_data_are_what_the_items_say() -> None:
    items = [
        make_item(7, ItemKind.FLOW, 10.0, 1.25, "a <b> & c", [("lines", "one\ntwo\x1b[31m")], step=3),
        make_item(9, ItemKind.APPROVAL, 11.0, 2.0, "d", verdict=Verdict.KILL),
    ]
    data = data_of(Page(render(items)))
    kinds, verdicts = data["kinds"], data["verdicts"]
    first, second = data["items"]
    told = ["a <b> & c", [["lines", "one\ntwo\\x1b[31m"]], "", 0, "", 0]
    assert first == [7, kinds.index("flow"), 10.0, 1.25, 3, -1, *told]
    assert second[5] == verdicts.index("kill")


def test_the_data_block_has_no_markup_at_all() -> None:
    content = render([hostile("<>&</SCRIPT >")])
    block = content.split('id="data">')[1].split("</script>")[0]
    assert not set(block) & set("<>&") and block.isascii()


def test_the_policy_names_what_is_in_the_page_and_nothing_else() -> None:
    found = Page(render([hostile("x")]))
    policies = [each for tag, each in found.elements if each.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.split(" ", 1) for rule in str(policies[0]["content"]).split("; "))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'" and rules["form-action"] == "'none'"

    def named(content: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    (style,) = found.all("style")
    (script,) = [each for each in found.all("script") if not each.startswith("{")]
    assert rules["style-src"] == named(style) and rules["script-src"] == named(script)
    # It stands before all that it is about.
    tags = [tag for tag, _ in found.elements]
    assert [each for each in tags if each in ("meta", "style", "script", "body")][:2] == ["meta", "meta"]
    assert tags.index("style") > max(index for index, tag in enumerate(tags) if tag == "meta")


def test_nothing_is_loaded_and_no_attribute_runs() -> None:
    content = render([hostile("x")])
    found = Page(content)
    for tag, attributes in found.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "audio", "video", "a")
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style", "action")]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", content.replace("// ", ""))
    script = content.rsplit("<script>", 1)[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|fetch\(", script)


def test_controls_are_named_for_those_who_do_not_see_them() -> None:
    found = Page(render([]))
    assert ("html", {"lang": "en"}) in found.elements
    for tag, attributes in found.elements:
        if tag == "input" and attributes.get("type") == "range":
            assert attributes.get("aria-label")
        if tag == "ol":
            assert attributes.get("aria-label")
    assert any(attributes.get("role") == "status" for _, attributes in found.elements)
    assert "Play" in found.all("button")


def test_of_too_many_items_the_first_are_in_it_and_the_page_says_so() -> None:
    file = io.StringIO()
    taken: list[int] = []

    def items() -> Any:
        for number in range(1000):
            taken.append(number)
            yield hostile("x", number)

    assert write_html(file, items(), "t", limit=3) == 3
    assert len(taken) == 4
    assert "Only the first 3 records" in file.getvalue()
    assert len(data_of(Page(file.getvalue()))["items"]) == 3


def test_items_are_bounded() -> None:
    found = hostile("\U000e0001" * 100_000)
    assert len(found.line) <= MAX_LINE * 10 + 3 and len(found.details[0].text) <= MAX_DETAIL * 10 + 3
    many = make_item(1, ItemKind.FLOW, 0.0, 0.0, "x", [(f"n{index}", "y") for index in range(1000)])
    assert len(many.details) == 64 and "937 more" in many.details[-1].text


def test_a_page_without_a_script_allows_none() -> None:
    content = "".join(page("t<", [f"<p>{text('<b>')}</p>", facts([("a", "<i>"), ("b", "")])]))
    found = Page(content)
    assert "script" not in [tag for tag, _ in found.elements] and "b" not in [tag for tag, _ in found.elements]
    assert "script-src 'none'" in str(found.elements) and found.all("p") == ["<b>"] and found.all("dd") == ["<i>"]
