"""Where a thought begins and ends, as the chat template itself writes finished answers that have one.

With thinking on a prompt ends inside the thought, whoever opens it in practice, the template (DeepSeek R1) or the model
(Qwen3, gpt-oss): so it is known of every token whether it is a thought's or an answer's. The thought ends with ids, not
with text: the spelled-out `</think>` that a model or a user writes in ordinary tokens ends nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from redflag.answer_start import answer_start, behind, opened_thought, thought_end
from redflag.chat_template import apply, sentinel, template_text
from redflag.control_tokens import template_ids, tokenise
from redflag.errors import RedflagError
from redflag.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ThoughtMarks(NamedTuple):
    """What stands around a thought.

    Attributes:
        opening: What has to stand behind the rendered prompt so that it ends inside the thought; "" where it does.
        before_end: What ends the thought's text, usually a line break.
        end_ids: The ids that end it: `</think>`, or gpt-oss's six from `<|end|>` to `<|message|>`.
        before_answer: What stands between them and the answer, usually an empty line.
    """

    opening: str
    before_end: str
    end_ids: tuple[int, ...]
    before_answer: str


_KEPT = 64  # ends of prompts whose marks are remembered
_MARKS: WeakKeyDictionary[object, dict[tuple[str, str], ThoughtMarks | None]] = WeakKeyDictionary()


def thought_marks(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message] = (), last: str = "", prompt: str = ""
) -> ThoughtMarks | None:
    """What stands around the thought behind a prompt; None where the template has no thinking mode, or the tokenizer no
    token of its own that ends a thought.

    Args:
        tokenizer: The model's tokenizer.
        turns: The turns that were rendered, with stand-ins for their contents; none: a lone question.
        last: What the last stand-in in `prompt` is found by.
        prompt: The prompt, rendered with thinking on.
    """
    if not tokenizer.chat_template:
        return None
    if not turns:
        last = sentinel()
        turns = [{"role": "user", "content": last}]
        try:
            prompt = apply(tokenizer, turns, True, thinking=True)
        except RedflagError:  # Not with thinking on.
            return None
    tail = behind(prompt, last)
    known = _MARKS.setdefault(tokenizer, {})
    key = (template_text(tokenizer), tail)
    if key not in known:
        if len(known) >= _KEPT:
            known.clear()
        known[key] = _find(tokenizer, turns, last, tail)
    return known[key]


def thinks_by_itself(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a prompt for which nobody has switched thinking on or off leaves room for a thought."""
    if thought_marks(tokenizer) is None:
        return False
    last = sentinel()
    turns = [{"role": "user", "content": last}]
    closed = apply(tokenizer, turns, True)
    return apply(tokenizer, turns, True, thinking=None) != closed + answer_start(tokenizer, turns, last, closed)


def _find(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message], last: str, tail: str) -> ThoughtMarks | None:
    thought, answer = sentinel(), sentinel()
    # The second name is gpt-oss's.
    spoken = {"role": "assistant", "content": answer, "reasoning_content": thought, "thinking": thought}
    try:
        finished = behind(apply(tokenizer, [*turns, spoken], False, thinking=True), last)
    except RedflagError:  # No answer may follow such turns; then only an opened thought can be told.
        finished = ""
    head, _, rest = finished.partition(thought)
    between, found, _ = rest.partition(answer)
    if found and head.startswith(tail):
        return _marks(tokenizer, head[len(tail) :], between)
    opening = opened_thought(tail)
    if opening is None:
        return None
    return _marks(tokenizer, "", f"\n{thought_end(opening)}\n\n")


def _marks(tokenizer: PreTrainedTokenizerFast, opening: str, between: str) -> ThoughtMarks | None:
    added = tokenizer.added_tokens_decoder
    special, marks = template_ids(tokenizer)
    ids = tokenise(tokenizer, between)
    control = [i for i, token in enumerate(ids) if token in added or token in special | marks]
    if not control:
        return None
    end_ids = tuple(ids[control[0] : control[-1] + 1])
    first, final = (str(tokenizer.convert_ids_to_tokens(ids[i])) for i in (control[0], control[-1]))
    return ThoughtMarks(opening, between.partition(first)[0], end_ids, between.rpartition(final)[2])
