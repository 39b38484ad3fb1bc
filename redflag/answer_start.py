"""Where a prompt ends and an answer begins, as the chat template itself writes finished answers.

A generation prompt should end exactly there. Some do not: gpt-oss's lets the model choose a channel first, and thinking
models' opens a thought. The model's next tokens would be measured and shown as its answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from redflag.chat_template import apply, cached, sentinel, template_text
from redflag.control_tokens import template_ids, tokenise
from redflag.errors import RedflagError
from redflag.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

# The tags that released models open a thought with: <think>, [THINK], <|START_THINKING|>, ◁think▷, <|channel>thought.
_OPENING = re.compile(
    r"(?P<before>[<\[◁]\|?)(?P<start>START_|start_|begin_of_)?(?P<name>(?:\w+:)?(?i:think|thinking|thought|reasoning))"
    r"(?P<after>\|?[>\]▷])|(?P<channel><\|channel>thought)"
)
_ENDS = {"START_": "END_", "start_": "end_", "begin_of_": "end_of_", None: "/"}

_STARTS: WeakKeyDictionary[object, dict[Hashable, str]] = WeakKeyDictionary()


def answer_start(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message], last: str, prompt: str) -> str:
    """The text to add to a rendered prompt so that it ends where an answer begins; usually empty.

    Args:
        turns: The turns that were rendered, with stand-ins for their contents.
        last: Pattern of the last stand-in in `prompt`; only the text behind it is the template's.
        prompt: The rendered prompt.

    Raises:
        RedflagError: The prompt ends elsewhere, and its continuation cannot be derived.
    """
    tail = behind(prompt, last)

    def find() -> str:
        missing = _missing(tokenizer, turns, last, tail)
        if missing:
            say_once(
                f"the chat template's prompt ends in {_end(tail)!r}, before an answer begins: {missing!r} is put "
                "behind it in training, scoring and serving"
            )
        return missing

    return cached(_STARTS, tokenizer, (template_text(tokenizer), tail), find)


def _missing(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message], last: str, tail: str) -> str:
    answer = sentinel()
    try:
        finished = apply(tokenizer, [*turns, {"role": "assistant", "content": answer}], False)
    except RedflagError:  # The template allows no answer behind such turns; then only a thought is detected.
        finished = ""
    special, marks = template_ids(tokenizer)
    before = behind(finished, last).partition(answer)[0] if answer in finished else None
    missing = ""
    if before is not None:
        if before.startswith(tail):
            between = before[len(tail) :]
            if (special | marks).intersection(tokenise(tokenizer, between)) or opened_thought(tail):
                missing = between if between.strip() else ""
        elif not _bare(tail).startswith(_bare(before)) and not _bare(before).startswith(_bare(tail)):
            raise RedflagError(
                f"the chat template's prompt must end where its answers begin (it ends in {_end(tail)!r}, answers "
                f"stand behind {_end(before)!r}). Use a template whose generation prompt matches its finished answers."
            )
    opened = opened_thought(tail + missing)
    if opened is None:
        return missing
    closing = thought_end(opened)
    is_known = closing in template_text(tokenizer) or closing in tokenizer.get_vocab()
    if not is_known:
        raise RedflagError(
            f"the chat template's prompt must not end inside a thought ({opened[0]!r}; {closing!r} is unknown to "
            "template and tokenizer). The model's thoughts would be judged and shown as its answer. Close the thought "
            "in the template."
        )
    # As released models write an empty thought: <think>\n\n</think>\n\n
    lines = "\n" * max(0, 2 - (len(tail + missing) - len((tail + missing).rstrip("\n"))))
    return f"{missing}{lines}{closing}\n\n"


def behind(text: str, last: str) -> str:
    """The template's text behind the last stand-in, without white space that may belong to the content."""
    ends = [match.end() for match in re.finditer(last, text)]
    return text[ends[-1] if ends else 0 :].lstrip()


def opened_thought(text: str) -> re.Match[str] | None:
    """The last opening of a thought that is not closed afterwards."""
    for match in reversed(list(_OPENING.finditer(text))):
        return None if thought_end(match) in text[match.end() :] else match
    return None


def thought_end(opening: re.Match[str]) -> str:
    """The closing mark that belongs to an opening."""
    if opening["channel"]:
        return "<channel|>"
    return opening["before"] + _ENDS[opening["start"]] + opening["name"] + opening["after"]


def _bare(text: str) -> str:
    """A text without empty thoughts and white space."""
    text = "".join(text.split())
    for match in list(_OPENING.finditer(text)):
        text = text.replace(match[0] + thought_end(match), "")
    return text


def _end(text: str) -> str:
    return text if len(text) <= 60 else f"...{text[-60:]}"


@lru_cache(maxsize=64)
def say_once(sentence: str) -> None:
    """Logs a warning, once per text."""
    _log.warning(sentence)
