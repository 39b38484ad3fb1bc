"""Where a thought begins and ends, as the chat template itself writes finished answers that have one.

With thinking on, a prompt ends inside the thought, whether the template opens it (DeepSeek R1) or the model does
(Qwen3, gpt-oss). So every token is known to belong to the thought or to the answer. Ids end the thought, not text: a
`</think>` spelled out in ordinary tokens ends nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from redflag.answer_start import answer_start, behind, opened_thought, thought_end
from redflag.chat_template import apply, cached, sentinel, template_text
from redflag.control_tokens import template_ids, tokenise
from redflag.errors import RedflagError
from redflag.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ThoughtMarks(NamedTuple):
    """The texts and ids around a thought.

    Attributes:
        opening: Text to add to the rendered prompt so that it ends inside the thought; "" if it does already.
        before_end: Text between the thought and `end_ids`, usually a line break.
        end_ids: The ids that end it: `</think>`, or gpt-oss's six from `<|end|>` to `<|message|>`.
        before_answer: Text between them and the answer, usually an empty line.
    """

    opening: str
    before_end: str
    end_ids: tuple[int, ...]
    before_answer: str


_MARKS: WeakKeyDictionary[object, dict[Hashable, ThoughtMarks | None]] = WeakKeyDictionary()


def thought_marks(
    tokenizer: PreTrainedTokenizerFast, turns: Sequence[Message] = (), last: str = "", prompt: str = ""
) -> ThoughtMarks | None:
    """The marks of the thought behind a prompt; None if the template has no thinking mode, or no token ends a thought.

    Args:
        turns: The turns that were rendered, with stand-ins for their contents; none: a lone question.
        last: Pattern of the last stand-in in `prompt`.
        prompt: The prompt, rendered with thinking on.
    """
    if not tokenizer.chat_template:
        return None
    if not turns:
        last = sentinel()
        turns = [{"role": "user", "content": last}]
        try:
            prompt = apply(tokenizer, turns, True, thinking=True)
        except RedflagError:  # The template refuses it with thinking on.
            return None
    tail = behind(prompt, last)
    find = partial(_find, tokenizer, turns, last, tail)
    return cached(_MARKS, tokenizer, (template_text(tokenizer), tail), find)


def thinks_by_itself(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a prompt leaves room for a thought if thinking is switched neither on nor off."""
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
    except RedflagError:  # The template allows no answer behind such turns; then only an opened thought is detected.
        finished = ""
    head, _, rest = finished.partition(thought)
    between, separator, _ = rest.partition(answer)
    if separator and head.startswith(tail):
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
