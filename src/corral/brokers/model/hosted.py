"""What a request would have its upstream do by itself: run tools, fetch content, take what it keeps of others.

An upstream reaches what the sandbox does not. A tool that it runs (a search, MCP, a container), or a picture that it
fetches from an address, is a way out through the one door that is open. So tools are known by their type as those that
whoever asks runs himself; any other type is the upstream's, also one that is made up tomorrow, and content is
what the request itself has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from corral.brokers.model.asking import Asked, Unclear
from corral.modelapi.answer import Api, as_object

MAX_NAMED = 64
"""Tools and fields that are told of one request."""
_MAX_TYPE = 64

_OWN = {
    Api.CHAT: re.compile(r"function|custom"),
    Api.RESPONSES: re.compile(
        r"function|custom|namespace|tool_search|apply_patch|local_shell|shell|computer|computer_use_preview"
    ),
    Api.MESSAGES: re.compile(
        r"custom|(?:bash|text_editor|computer|computer_toolset|memory)_\d{8}|tool_search_tool_(?:bm25|regex)(?:_\d{8})?"
    ),
}
"""Types of tools that whoever asks runs, or that only look among the others."""
_SWITCHES = {
    "container": "container",
    "connectors": "connectors",
    "data_sources": "data_sources",
    "enable_search": "web_search",
    "mcp_servers": "mcp",
    "plugins": "plugins",
    "search_parameters": "web_search",
    "web_search": "web_search",
    "web_search_options": "web_search",
}
"""Fields of a request that are tools by another name: of OpenAI, Anthropic, Azure, xAI, OpenRouter, Alibaba."""
_STORED = frozenset(("prompt", "thread"))
"""Fields of a request by which an upstream takes instructions, tools or turns that it has, and nobody sees here."""
_ADDRESSES = frozenset(("audio_url", "file_url", "image_url", "video_url"))
_MEDIA = frozenset(("audio", "data", "file_data", "image", "input_audio", "video"))
"""Where content itself is, and some servers take an address as well."""
_IDS = frozenset(("file_id", "file_ids", "vector_store_ids"))
_NAMES = _ADDRESSES | _MEDIA | _IDS | {"definition", "source", "tool", "tools", "type", "url"}
"""What is read of content."""
_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://")
_GIVEN = {"tool_use": ("input",), "server_tool_use": ("input",), "mcp_tool_use": ("input",)}
_GIVEN_CALLS = ("action", "actions", "operation", "arguments", "input")
"""Where a turn has what a model has said to a tool, which nobody takes for content."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """Of one request."""

    tools: tuple[str, ...] = ()
    """Types of tools that its upstream would run."""
    content: tuple[str, ...] = ()
    """Fields that point to content which is not in the request."""


def hosted_of(asked: Asked) -> Hosted:
    """Raises Unclear."""
    found = _Found(asked.api)
    values = asked.values
    for name, value in values.items():
        plain = _plain(name, _NAMES | _STORED | frozenset(_SWITCHES))
        if plain in _SWITCHES and value not in (None, False, []):
            found.tools[_SWITCHES[plain]] = None
        elif plain in _STORED and value is not None and not (plain == "prompt" and asked.api is not Api.RESPONSES):
            found.content[plain] = None
        elif plain == "tools":
            found.take_tools(value)
    turns = "input" if asked.api is Api.RESPONSES else "messages"
    found.take_content([values.get(turns), values.get("system")])
    return Hosted(tuple(found.tools)[:MAX_NAMED], tuple(found.content)[:MAX_NAMED])


class _Found:
    """What there is in one request, each once."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.tools: dict[str, None] = {}
        self.content: dict[str, None] = {}

    def take_tools(self, tools: Any) -> None:
        waiting = [tools]
        while waiting:
            given = waiting.pop()
            if given is None:
                continue
            if type(given) is not list or not all(type(each) is dict for each in given):
                raise Unclear("`tools` must be a list of objects.")
            for tool in given:
                for name in tool:
                    _plain(name, _NAMES)
                if kind := self._hosted(tool):
                    self.tools[kind] = None
                elif tool.get("type") == "namespace":
                    waiting.append(tool.get("tools"))

    def _hosted(self, tool: dict[str, Any]) -> str:
        """Its type, where the upstream would run it."""
        kind = tool.get("type")
        if kind is None and self._api is not Api.RESPONSES:
            return ""  # a function, or a tool of the client's
        if type(kind) is not str or not kind.isprintable() or not 0 < len(kind) <= _MAX_TYPE:
            raise Unclear("The `type` of a tool must be the name of one.")
        if not _OWN[self._api].fullmatch(kind):
            if tool.get("model") is not None:
                raise Unclear(
                    f"The tool {kind} names a `model`: which is asked is what the request's own `model` says."
                )
            if kind.startswith("web_search") and tool.get("external_web_access") is False:
                return ""  # it looks into what the upstream has anyhow
            return kind
        is_shell = kind == "shell" and as_object(tool.get("environment")).get("type", "local") != "local"
        return "shell" if is_shell else ""

    def take_content(self, content: Any) -> None:
        waiting = [content]
        while waiting:
            value = waiting.pop()
            if type(value) is list:
                waiting.extend(value)
            elif type(value) is dict:
                waiting.extend(self._inside(value))

    def _inside(self, block: dict[str, Any]) -> Iterator[Any]:
        """What else of a block is content; notes what in it points elsewhere."""
        kind = block.get("type")
        given: Iterable[str] = ()
        if type(kind) is str:
            given = _GIVEN.get(kind, _GIVEN_CALLS if kind.endswith("_call") else ())
        for name, value in block.items():
            plain = _plain(name, _NAMES)
            if name in given:
                continue
            is_named = plain in _IDS and value not in (None, "", [])
            is_url = plain in _MEDIA and kind != "text" and _is_url(value)
            if is_named or is_url or (plain in _ADDRESSES and _is_elsewhere(value)):
                self.content[plain] = None
            elif plain == "source" and type(value) is dict and "url" in value:
                self.content["source.url"] = None
            elif plain == "tools" and kind != "mcp_list_tools":
                self.take_tools(value)
                continue
            elif plain == "definition" and kind == "tool_definition":
                self.take_tools([value])
                continue
            yield value


def _is_elsewhere(value: Any) -> bool:
    """Whether an address, alone or in an object, leads out of the request."""
    address = value.get("url") if type(value) is dict else value
    return address not in (None, "") and not (type(address) is str and address.startswith("data:"))


def _is_url(value: Any) -> bool:
    """Whether it, or one of several, is the address of something."""
    given = value if type(value) is list else [value]
    return any(type(each) is str and _URL.match(each) is not None for each in given)


def _plain(name: str, known: Iterable[str]) -> str:
    """The name, where it is not one of these in other letters: some servers take them for the same."""
    if name not in known and name.casefold() in known:
        raise Unclear(f"A request has no field {name[:100]!r}; names are written in small letters.")
    return name
