"""Parsers of the formats in which models write calls of tools: content is passed on, calls wait for the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from redflag.tool_prompt import MARK, ToolUse

State = Literal["shown", "held", "hidden"]


@dataclass(frozen=True)
class Call:
    """One call; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


def chat_call(identity: str, name: str, arguments: Any) -> dict[str, Any]:
    """A call in a chat's shape; `arguments` as JSON text, or unpacked."""
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


AsCall = Callable[[Any, Any], "Call | None"]


class Parser(Protocol):
    """Takes text in pieces of any size. The content that it returns may still have marks."""

    @property
    def state(self) -> State:
        """State of the latest text."""

    def push(self, text: str) -> str:
        """Returns what is certainly content."""

    def finish(self) -> list[str | Call]:
        """Returns what was held, in order."""


def parser_of(use: ToolUse, marks: frozenset[str], as_call: AsCall) -> Parser:
    """The parser of a format; `marks` are those that are tokens, `as_call` checks name and arguments."""
    marked = {text: (MARK if text in marks else "") + text for text in use.format.marks}
    opening = use.opening
    for text, mark in marked.items():
        opening = opening.replace(text, mark)
    if use.format.name == "harmony":
        return _Harmony(opening, as_call)
    if use.format.name in ("llama", "json"):
        return _Whole(opening, as_call, marked.get("<|python_tag|>", ""))
    return _Marked(opening, as_call, marked)


class _Marked:
    """Hermes and Mistral: a mark, anywhere, opens calls.

    | format | call |
    |---|---|
    | Hermes | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
    | Mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]` |
    | ... since its version 11 | `[TOOL_CALLS]name[ARGS]{...}`, with `[CALL_ID]id` before `[ARGS]` or without |
    """

    def __init__(self, opening: str, as_call: AsCall, marked: Mapping[str, str]) -> None:
        self._as_call = as_call
        self._marked = marked
        self._mark = marked["<tool_call>" if "<tool_call>" in marked else "[TOOL_CALLS]"]
        self._opening = opening
        self._held = opening
        self._tail = ""  # of content: white space, which may come before a call, and what may begin a mark

    @property
    def state(self) -> State:
        return "held" if self._held else "shown"

    def push(self, text: str) -> str:
        if self._held:
            self._held += text
            return ""
        text = self._tail + text
        at = text.find(self._mark)
        if at >= 0:
            self._tail, self._held = "", text[at:]
            return text[:at].rstrip()
        lengths = range(min(len(self._mark) - 1, len(text)), 0, -1)
        begun = next((length for length in lengths if text.endswith(self._mark[:length])), 0)
        at = len(text[: len(text) - begun].rstrip())
        self._tail = text[at:]
        return text[:at]

    def finish(self) -> list[str | Call]:
        if not self._held:
            return [self._tail]
        split = self._hermes if "<tool_call>" in self._marked else self._mistral
        items = [item for part in self._held.split(self._mark)[1:] for item in split(part)]
        # The model did not write the opening of a forced call.
        return items if any(isinstance(item, Call) for item in items) else [self._held[len(self._opening) :]]

    def _hermes(self, part: str) -> Iterator[str | Call]:
        body, _, after = part.partition(self._marked["</tool_call>"])
        calls = calls_of(body, self._as_call)
        yield from calls
        yield after if calls else body + after

    def _mistral(self, part: str) -> Iterator[str | Call]:
        identity, arguments = (re.escape(self._marked[text]) for text in ("[CALL_ID]", "[ARGS]"))
        named = rf"\s*([\w.:/-]+)\s*(?:{identity}\s*\w+\s*)?(?:{arguments})?(\s*\{{.*)"
        match = re.fullmatch(named, part, re.DOTALL)
        if match is None:
            calls = calls_of(part, self._as_call)
            yield from calls
            if not calls:
                yield part
            return
        values = json_values(match[2]) or []
        call = self._as_call(match[1], values[0]) if len(values) == 1 else None
        yield call if call is not None else part


class _Whole:
    """Llama 3 and plain JSON: all of the answer is calls or none, since JSON in a text may be an example.

    `{"name": ..., "parameters": {...}}` or with `arguments`, several of them or a list, in a fence or not. Behind the
    opening of a forced call the first value counts.
    """

    def __init__(self, opening: str, as_call: AsCall, tag: str) -> None:
        self._as_call = as_call
        self._tag = tag
        self._opening = opening
        self._sure = bool(opening)  # it begins like a call, so all of it waits for the end
        self._held: str | None = opening  # None: all of it is content

    @property
    def state(self) -> State:
        return "shown" if self._held is None else "held"

    def push(self, text: str) -> str:
        if self._held is None:
            return text
        self._held += text
        if self._sure:
            return ""
        bare = self._bare()
        begins = None if self._tag.startswith(bare) else _begins_call(bare)
        self._sure = begins is True
        if begins is not False:
            return ""
        text, self._held = self._held, None
        return text

    def finish(self) -> list[str | Call]:
        if self._held is None:
            return []
        calls = calls_of(self._bare(), self._as_call, first=bool(self._opening))
        return [*calls] if calls else [self._held[len(self._opening) :]]

    def _bare(self) -> str:
        text = (self._held or "").lstrip()
        return text.removeprefix(self._tag).lstrip() if self._tag else text


class _Harmony:
    """gpt-oss: messages in channels, behind a prompt that ends in `<|start|>assistant`.

    | message | is |
    |---|---|
    | `to=functions.name` before or behind `<|channel|>commentary`, `<|message|>{...}` | a call |
    | `<|channel|>final<|message|>`, or `commentary` to nobody | content |
    | `<|channel|>analysis<|message|>`, anything that is not the assistant's | never shown |
    """

    def __init__(self, opening: str, as_call: AsCall) -> None:
        self._as_call = as_call
        self._header: str | None = "assistant"  # of the message that begins; None in its body
        self._kind: Literal["call", "content", "thought", "over"] = "thought"  # of the body
        self._name = self._body = ""  # of a call
        self._rest = ""  # what may begin a mark
        self._marked = False  # there was a mark, so it is not a plain answer
        self._written = False  # content was shown, from which that of a further message is set off
        self._held: list[str | Call] = []
        self.push(opening)

    @property
    def state(self) -> State:
        if self._header is not None or self._kind in ("thought", "over"):
            return "hidden"
        return "held" if self._kind == "call" else "shown"

    def push(self, text: str) -> str:
        pieces = re.split(rf"{MARK}(<\|\w+\|>)", self._rest + text)
        # A mark may come in two pieces.
        at = pieces[-1].find(MARK)
        self._rest, pieces[-1] = (pieces[-1][at:], pieces[-1][:at]) if at >= 0 else ("", pieces[-1])
        shown = self._text(pieces[0])
        for mark, following in zip(pieces[1::2], pieces[2::2], strict=True):
            self._mark(mark)
            shown += self._text(following)
        return shown

    def finish(self) -> list[str | Call]:
        if not self._marked:  # without any channel it is a plain answer
            return [(self._header or "").removeprefix("assistant")]
        self._close()
        return self._held

    def _text(self, text: str) -> str:
        if self._header is not None:
            self._header += text
        elif self._kind == "call":
            self._body += text
        elif self._kind == "content" and text:
            between = "\n\n" if self._written and not self._body else ""
            self._written, self._body = True, "begun"
            return between + text
        return ""

    def _mark(self, mark: str) -> None:
        self._marked = True
        if self._kind == "over":
            return
        if mark in ("<|start|>", "<|end|>", "<|call|>"):
            self._close()
            self._header = ""
            if mark == "<|call|>":  # What follows would be a result, which is not the model's.
                self._header, self._kind = None, "over"
        elif self._header is not None and mark == "<|message|>":
            self._open(self._header)
        elif self._header is not None:
            self._header += mark

    def _open(self, header: str) -> None:
        self._header, self._body = None, ""
        call = re.search(r"\bto=functions\.([^\s<]+)", header)
        self._name = call[1] if call else ""
        if not header.startswith("assistant") or "<|channel|>analysis" in header:
            self._kind = "thought"
        else:
            self._kind = "call" if " to=" in header else "content"

    def _close(self) -> None:
        if self._header is None and self._kind == "call":
            values = json_values(self._body) or []
            call = self._as_call(self._name, values[0]) if len(values) == 1 else None
            self._held.append(call if call is not None else self._body)
        self._kind, self._body = "thought", ""


_FENCE = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)\s*```", re.DOTALL)
_KEYS = ("arguments", "function", "id", "name", "parameters", "type")


def _begins_call(text: str) -> bool | None:
    """Whether a text begins like calls in JSON; None if that needs more text. Leading white space was removed."""
    fence = re.match(r"```(?:json)?[^\S\n]*\n\s*", text)
    if fence is not None:
        text = text[fence.end() :]
    elif re.fullmatch(r"`{0,2}|```(j|js|jso|json)?[^\S\n]*", text):
        return None
    match = re.match(r'(?:\[\s*)?\{\s*"([^"\\]*)"', text)
    if match is not None:
        return match[1] in _KEYS
    begun = re.fullmatch(r'(?:\[\s*)?(?:\{\s*(?:"(\w*))?)?', text)
    return None if begun is not None and any(key.startswith(begun[1] or "") for key in _KEYS) else False


def calls_of(text: str, as_call: AsCall, *, first: bool = False) -> list[Call]:
    """The calls in JSON (objects or a list, maybe in a fence) that a text consists of; empty if any is invalid.

    With `first` the first value counts, whatever follows it.
    """
    fenced = _FENCE.fullmatch(text.strip())
    values = json_values(fenced[1] if fenced else text, first=first) or []
    calls = []
    for value in values:
        for item in value if isinstance(value, list) else [value]:
            call = _call_of(item, as_call)
            if call is None:
                return []
            calls.append(call)
    return calls


def _call_of(value: Any, as_call: AsCall) -> Call | None:
    if not isinstance(value, dict):
        return None
    function = value.get("function")
    inner = function if isinstance(function, dict) else value
    return as_call(inner.get("name", function), inner.get("arguments", inner.get("parameters")))


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_SEPARATORS = re.compile(r"[\s,;]*")
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)


def json_values(text: str, *, first: bool = False) -> list[Any] | None:
    """The JSON values of a text, with white space, commas or semicolons between; None if it has anything else.

    Example:
        >>> json_values('{"a": 1}; [2]\\n'), json_values('{"a": 1} and so on'), json_values("NaN")
        ([{'a': 1}, [2]], None, None)
    """
    values: list[Any] = []
    at = _behind_separators(text, 0)
    while at < len(text) and not (first and values):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        at = _behind_separators(text, at)
    return values


def _behind_separators(text: str, at: int) -> int:
    match = _SEPARATORS.match(text, at)
    return match.end() if match else at
