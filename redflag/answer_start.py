"""Where a prompt ends and an answer begins, as the chat template itself writes finished answers.

A generation prompt should end exactly there. Some do not: gpt-oss's lets the model choose a channel first, releases
for thinking open a thought. Whatever the model then writes would be measured and shown as its answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from redflag.chat_template import apply, sentinel, template_text
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
_KEPT = 64  # ends of prompts whose continuation is remembered

_STARTS: WeakKeyDictionary[object, dict[tuple[str, str], str]] = WeakKeyDictionary()


def answer_start(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message], last: str, prompt: str) -> str:
    """What has to stand behind a rendered prompt so that it ends where an answer begins; mostly nothing.

    Args:
        tokenizer: The model's tokenizer.
        turns: The turns that were rendered, with stand-ins for their contents.
        last: What the last stand-in in `prompt` is found by; up to its end, the prompt is not the template's.
        prompt: The rendered prompt.

    Raises:
        RedflagError: The prompt ends elsewhere, and how it would go on cannot be told.
    """
    tail = behind(prompt, last)
    known = _STARTS.setdefault(tokenizer, {})
    key = (template_text(tokenizer), tail)
    if key not in known:
        if len(known) >= _KEPT:
            known.clear()
        known[key] = _find(tokenizer, turns, last, tail)
        if known[key]:
            say_once(
                f"the chat template's prompt ends in {_end(tail)!r}, before an answer begins: {known[key]!r} is put "
                "behind it in training, scoring and serving"
            )
    return known[key]


def _find(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message], last: str, tail: str) -> str:
    answer = sentinel()
    try:
        finished = apply(tokenizer, [*turns, {"role": "assistant", "content": answer}], False)
    except RedflagError:  # No answer may follow such turns; then only a thought can be told.
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
                f"the chat template's prompt ends in {_end(tail)!r} and its answers stand behind {_end(before)!r}, so "
                "it is unknown where an answer begins: give the model a template that prompts as it writes answers"
            )
    opened = opened_thought(tail + missing)
    if opened is None:
        return missing
    closing = thought_end(opened)
    known = closing in template_text(tokenizer) or closing in tokenizer.get_vocab()
    if not known:
        raise RedflagError(
            f"the chat template's prompt ends inside a thought ({opened[0]!r}) that nothing closes ({closing!r} is "
            "unknown to template and tokenizer), so the model's thoughts would be judged and shown as its answer: "
            "close the thought in the template"
        )
    # As released models write an empty thought: <think>\n\n</think>\n\n
    lines = "\n" * max(0, 2 - (len(tail + missing) - len((tail + missing).rstrip("\n"))))
    return f"{missing}{lines}{closing}\n\n"


def behind(text: str, last: str) -> str:
    """What the template wrote behind the last stand-in, without the white space that may be the content's own."""
    found = [match.end() for match in re.finditer(last, text)]
    return text[found[-1] if found else 0 :].lstrip()


def opened_thought(text: str) -> re.Match[str] | None:
    """The last opening of a thought that is not closed behind it."""
    for match in reversed(list(_OPENING.finditer(text))):
        return None if thought_end(match) in text[match.end() :] else match
    return None


def thought_end(opening: re.Match[str]) -> str:
    """What closes a thought that was opened so."""
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
    """Logs a warning, the first time that there is reason to."""
    _log.warning(sentence)
