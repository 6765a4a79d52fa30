"""A time line as one HTML file that needs nothing else, and the parts that reports share with it.

What a record says is an agent's text, so there are two ways into a page and no third: as an element's text through
:func:`html.escape`, or as JSON in a data block in which no ``<`` stands, from where the page's own script takes it by
``textContent``. Should one of them fail, the content security policy (CSP level 3) is the second wall: it forbids every
script and style but the page's own, by their hash, and every request.

The template is a dozen lines, so it needs no template library.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from importlib.resources import files
from itertools import islice
from typing import TextIO

from corral.actions import Verdict
from corral.log.conversations import Tree, use_words
from corral.log.items import Item, ItemKind, shown_line
from corral.log.narration import money

MAX_ITEMS = 100_000
"""Items of one file; a browser has all of them in memory."""
_DEEPEST = 6
"""Depths that the style sheet tells apart."""
_PLACES = 100
_NO_VERDICT = "none"
_KINDS = tuple(ItemKind)
_VERDICTS = tuple(Verdict)


def page(title: str, body: Iterable[str], script: str = "") -> Iterator[str]:
    """The pieces of a page around a ``body`` that is HTML already. ``title`` is text.

    ``script`` is the page's own; nothing in it may come from a record.
    """
    style = resource("page.css")
    policy = [
        "default-src 'none'",
        f"style-src {_source(style)}",
        f"script-src {_source(script)}" if script else "script-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{escape("; ".join(policy))}">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
    yield f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
    yield from body
    if script:
        yield f"<script>{script}</script>\n"
    yield "</body>\n</html>\n"


def text(words: str) -> str:
    """Text of a record as HTML has it: one line, printable, no markup, with a direction of writing of its own."""
    return escape(shown_line(words))


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names with their texts, those without one left out."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs if value)
    return f'<dl class="facts">{rows}</dl>\n'


@cache
def resource(name: str) -> str:
    """A file that is part of every page."""
    return files("corral.log").joinpath("page", name).read_text("utf-8")


def _source(content: str) -> str:
    """The hash by which a policy names an inline script or style (CSP level 3, section 2.3.1)."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


# ---- the time line ----


def write_html(
    file: TextIO,
    items: Iterable[Item],
    title: str,
    *,
    about: Iterable[tuple[str, str]] = (),
    limit: int = MAX_ITEMS,
    tree: Tree | None = None,
) -> int:
    """Writes a page that plays ``items``, and returns how many are in it.

    ``about`` are facts about the session that stand above it, as its conversations do (``tree``). Of more than
    ``limit`` items the first are in it, and the page says so. Items are taken one by one: no more than one is in
    memory. Raises OSError, and what taking an item raises.
    """
    count = 0

    def body() -> Iterator[str]:
        nonlocal count
        yield facts(about)
        if tree is not None and (tree.conversations or tree.unexplained):
            yield from _tree(tree)
        yield from _controls()
        yield '<ol id="items" aria-label="Time line"></ol>\n'
        yield "<noscript><p>This page shows its records with a script of its own; it loads nothing.</p></noscript>\n"
        yield '<script type="application/json" id="data">'
        yield f'{{"kinds":{_json([kind.value for kind in _KINDS])},'
        yield f'"verdicts":{_json([verdict.name.lower() for verdict in _VERDICTS])},"items":['
        given = iter(items)
        for each in islice(given, limit):
            yield f"{',' if count else ''}\n{_json(_row(each))}"
            count += 1
        yield "\n]}</script>\n"
        if next(given, None) is not None:
            yield f'<p class="note">Only the first {limit} records are in this file; the log has more.</p>\n'

    for piece in page(title, body(), resource("timeline.js")):
        file.write(piece)
    return count


def _json(value: object) -> str:
    """JSON that cannot end the element it is in, or begin another (HTML, section 4.12.1.3): ASCII without markup."""
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _row(item: Item) -> list[object]:
    return [
        item.number,
        _KINDS.index(item.kind),
        item.at,
        item.offset,
        item.step,
        -1 if item.verdict is None else _VERDICTS.index(item.verdict),
        item.line,
        [[detail.name, detail.text] for detail in item.details],
        item.tool,
        int(item.unexplained),
        item.conversation,
        min(item.depth, _DEEPEST),
    ]


def _tree(tree: Tree) -> Iterator[str]:
    """The conversations, each in the one that began it, with buttons that go to their records."""
    yield '<details id="tree" open><summary>Conversations with models</summary>\n'
    for each in tree.conversations:
        costs = "".join(f", {money(amount, currency)}" for currency, amount in each.spend.costs)
        begun = f", begun by {each.parent}" if each.parent else ""
        tokens = f"{each.spend.input_tokens} tokens in, {each.spend.output_tokens} out{costs}"
        head = f"Conversation {each.id or 'without a name'}{begun}: {each.spend.calls} calls, {tokens}"
        yield f'<details class="depth{min(each.depth, _DEEPEST)}"><summary>{text(head)}</summary>\n<ul>\n'
        for call in each.calls:
            opens = f" (step {call.opened})" if call.opened else ""
            yield f"<li>{_button(call.number)} {text(call.words)}{text(opens)}"
            uses = "".join(
                f"<li>{_button(use.first) if use.actions else ''} {text(use_words(use))}</li>" for use in call.tools
            )
            yield f"<ul>{uses}</ul></li>\n" if uses else "</li>\n"
        yield "</ul></details>\n"
    if tree.unexplained:
        places = " ".join(_button(number) for number in tree.places[:_PLACES])
        yield f'<p class="unexplained">{tree.unexplained} actions that no answer explains: {places}</p>\n'
    if tree.left_out:
        yield f'<p class="note">{tree.left_out} more calls are not shown: there were too many.</p>\n'
    yield "</details>\n"


def _button(number: int) -> str:
    return f'<button type="button" class="place" data-number="{number}">#{number}</button>'


def _controls() -> Iterator[str]:
    yield '<form id="filter" class="tools" role="search" aria-label="Play and filter"><div>'
    yield '<button type="button" id="play">Play</button>'
    yield '<button type="button" id="previous">Previous</button><button type="button" id="next">Next</button>'
    yield '<label>Speed <select id="speed">'
    for speed in (0.25, 0.5, 1, 2, 4, 8, 16, 64):
        yield f'<option value="{speed}"{" selected" if speed == 1 else ""}>{speed}×</option>'  # noqa: RUF001
    yield '</select></label><label>Search <input type="search" id="search" autocomplete="off"></label>'
    yield '<label>Go to <input id="go" size="14" autocomplete="off" placeholder="#12, step 3, tool ID, 1:05"></label>'
    yield "</div>"
    yield '<div><input type="range" id="seek" min="0" max="0" value="0" aria-label="Place in the time line"></div>'
    yield _boxes("Kinds", "kind", [kind.value for kind in _KINDS])
    yield '<label><input type="checkbox" id="unexplained"> only what no answer of a model explains</label>'
    yield _boxes("Verdicts", "verdict", [*(verdict.name.lower() for verdict in _VERDICTS), _NO_VERDICT])
    yield '<p id="status" class="note" role="status"></p>'
    yield '<div class="pages"><button type="button" id="earlier">Earlier page</button><span id="page"></span>'
    yield '<button type="button" id="later">Later page</button></div></form>\n'
    yield '<p class="note">Keys: space plays and pauses, n next, p previous, arrows 10 seconds back and on, / search,'
    yield " g go to a record, a step, or a time.</p>\n"


def _boxes(legend: str, name: str, values: Iterable[str]) -> str:
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}" value="{value}" checked> {value}</label>' for value in values
    )
    return f"<fieldset><legend>{legend}</legend>{boxes}</fieldset>"
