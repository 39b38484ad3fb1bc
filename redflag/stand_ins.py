"""Stand-ins: harmless texts in place of untrusted ones, to find out a chat template's own text.

A conversation rendered with stand-ins shows where its texts appear, whether all of them do, and which control tokens
are the template's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING, Any, NamedTuple

from redflag.chat_template import apply, sentinel
from redflag.control_tokens import Control
from redflag.errors import RedflagError
from redflag.messages import Message, fill
from redflag.tool_definitions import Tool, fill_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class StandIn(NamedTuple):
    """Harmless text in place of another; the white space around it is kept, since some templates strip it."""

    before: str
    name: str
    after: str

    def __str__(self) -> str:
        return self.before + self.name + self.after


PLACES = 6  # letters that number a stand-in


def _stand_in(content: str, mark: str, number: int) -> StandIn | None:
    """A stand-in, named by a common mark and a number, so that one short pattern finds thousands of them."""
    core = content.strip()
    if not core:  # Templates test whether a content is empty, so a blank one is not replaced.
        return None
    before, _, after = content.partition(core)
    return StandIn(before, mark + "".join(ascii_lowercase[number // 26**place % 26] for place in range(PLACES)), after)


class Text(NamedTuple):
    """An untrusted text in message `number`; `forbidden` are the ids that it must not become.

    Texts in definitions of tools have the kind `definition`, and belong to no message.
    """

    number: int
    kind: str
    text: str
    forbidden: frozenset[int]
    stand_in: StandIn | None


class Style(NamedTuple):
    """Form of tool calls for the template: arguments as JSON text, and None for missing content."""

    json_text: bool = False
    no_content: bool = False


class HiddenTextError(RedflagError):
    """The chat template leaves out a message's text."""


class Conversation:
    """Messages whose texts can be replaced before the template sees them.

    Names, ids and keys are replaced all together, by `aliases`: they are never tokenised separately.
    """

    def __init__(self, messages: Sequence[Message], control: Control, tools: Sequence[Tool] = ()) -> None:
        self.messages = messages
        self.tools = tools
        self.mark = sentinel()
        self.texts: list[Text] = []
        self.aliases: dict[str, str] = {}
        for number, message in enumerate(messages):
            # The assistant's text may contain marks such as <think>, which it may write.
            spoken = control.special if message["role"] == "assistant" else control.all

            def note(kind: str, text: str, number: int = number, spoken: frozenset[int] = spoken) -> str:
                if kind in ("content", "reasoning", "argument"):
                    stand_in = _stand_in(text, self.mark, len(self.texts))
                    forbidden = spoken if kind == "content" else control.all
                    self.texts.append(Text(number, kind, text, forbidden, stand_in))
                elif text:
                    # Some templates check the length of an id.
                    self.aliases.setdefault(text, sentinel(len(text)) if kind == "id" else sentinel())
                return text

            fill(message, note)
        self._spoken = len(self.texts)

        def note_name(kind: str, text: str) -> str:
            if kind != "definition" and text and text not in self.aliases:
                self.aliases[text] = sentinel()
            return text

        def note_text(kind: str, text: str) -> str:
            if kind == "definition" and text not in self.aliases:  # Schemas repeat names, as in `required`.
                stand_in = _stand_in(text, self.mark, len(self.texts))
                self.texts.append(Text(-1, kind, text, control.all, stand_in))
            return text

        for note_each in (note_name, note_text):
            fill_tools(tools, note_each)
        self.stand_ins = [item.stand_in for item in self.texts]

    @property
    def pattern(self) -> str:
        """Pattern of all names: one pattern for each would take time quadratic in their number."""
        return f"{self.mark}[a-z]{{{PLACES}}}"

    @property
    def styles(self) -> Sequence[Style]:
        if not any("tool_calls" in message for message in self.messages):
            return [Style()]
        return [Style(json_text, no_content) for json_text in (False, True) for no_content in (False, True)]

    def turns(self, apart: Sequence[StandIn | None], style: Style, aliased: bool = False) -> list[dict[str, Any]]:
        """The turns with stand-ins for some texts, and for all names or none."""
        texts = self._filled(apart)

        def replace(kind: str, text: str) -> str:
            if kind in ("content", "reasoning", "argument"):
                return next(texts)
            return self.aliases.get(text, text) if aliased else text

        turns = [fill(message, replace) for message in self.messages]
        for turn in turns:
            if style.no_content and "tool_calls" in turn and not turn["content"].strip():
                turn["content"] = None
            for call in turn.get("tool_calls", []) if style.json_text else []:
                function = call["function"]
                if not isinstance(function["arguments"], str):
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return turns

    def definitions(self, apart: Sequence[StandIn | None], aliased: bool = False) -> list[dict[str, Any]]:
        """The definitions of tools likewise."""
        texts = self._filled(apart, self._spoken)

        def replace(kind: str, text: str) -> str:
            if kind == "definition" and text not in self.aliases:
                return next(texts)
            return self.aliases.get(text, text) if aliased else text

        return fill_tools(self.tools, replace)

    def _filled(self, apart: Sequence[StandIn | None], start: int = 0) -> Iterator[str]:
        pairs = zip(self.texts[start:], apart[start:], strict=True)
        return (str(stand_in) if stand_in else item.text for item, stand_in in pairs)

    def _hidden(self, text: str) -> str:
        """The first text that does not appear in a rendering with stand-ins; "" if all do."""
        position = 0
        for item in self.texts:
            if item.stand_in is None or item.kind in ("reasoning", "definition"):
                continue
            # Some templates move system turns, and reorder arguments.
            ordered = item.kind == "content" and self.messages[item.number]["role"] != "system"
            place = text.find(item.stand_in.name, position if ordered else 0)
            if place < 0:
                return self._named(
                    item.number, "the text" if item.kind == "content" else f"the {item.kind} {item.text!r}"
                )
            position = place if ordered else position
        for number, message in enumerate(self.messages):
            for call in message.get("tool_calls", ()):
                if self.aliases[call["function"]["name"]] not in text:
                    return self._named(number, f"the function {call['function']['name']!r}")
        names = (tool["function"]["name"] for tool in self.tools)
        return next((f"the tool {name!r}" for name in names if self.aliases[name] not in text), "")

    def _named(self, number: int, what: str) -> str:
        return f"{what} of message {number} (role {self.messages[number]['role']}) in its place"

    def skeleton(self, tokenizer: PreTrainedTokenizerFast, thinking: bool = False) -> tuple[Style, str]:
        """The conversation rendered with stand-ins, in the first style in which all of it appears.

        Raises:
            HiddenTextError: The template does not show a text.
            RedflagError: The template refuses the turns.
        """
        refusal: RedflagError | None = None
        for style in self.styles:
            try:
                tools = self.definitions(self.stand_ins, aliased=True)
                text = apply(tokenizer, self.turns(self.stand_ins, style, aliased=True), True, thinking, tools)
            except RedflagError as error:
                refusal = refusal or error
                continue
            hidden = self._hidden(text)
            if not hidden:
                return style, text
            refusal = refusal or HiddenTextError(
                f"the chat template does not show {hidden}, so the model would not see it. Leave it out, or use a "
                "template that shows it."
            )
        assert refusal is not None
        raise refusal
