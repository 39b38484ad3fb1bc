"""Positions of the earlier answers of a conversation in the ids of its prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from redflag.chat_template import apply
from redflag.control_tokens import tokenise_with_offsets
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.messages import Message
from redflag.prompt import Guarded, guarded_prompt
from redflag.tool_definitions import Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Span = tuple[int, int]


def answer_spans(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    spec: FlagSpec,
    preface: str = "",
    thinking: bool = False,
    tools: Sequence[Tool] = (),
) -> tuple[list[int], tuple[Span, ...]]:
    """The spans of earlier assistant turns in a prompt.

    A span reaches from the first token of a turn's text, or of the arguments of its calls, to the token behind the last
    one, which ends the turn: a guard judges that too. A turn without any text has none, and neither has a prefill,
    which is a part of the answer to come. Thoughts of earlier turns are left out, as templates do. Arguments are those
    of `redflag.prompt.render_prompt`.

    Returns:
        The ids of the prompt without a prefill, and for each turn its first token and the one behind its last.

    Raises:
        RedflagError: As `redflag.prompt.render_prompt`; or the template changes a text, so that an answer cannot be
            found.
    """
    guarded, _ = guarded_prompt(tokenizer, messages, spec, preface, thinking, tools)
    turns = guarded.conversation.messages
    if not any(turn["role"] == "assistant" for turn in turns):
        return guarded.ids, ()
    places = _places(tokenizer, guarded)
    offsets: list[Span] = []
    before = 0
    for piece in guarded.pieces:
        own = piece.offsets
        if own is None:
            own = tokenise_with_offsets(tokenizer, piece.text)[1] if piece.text else [(0, 0)] * len(piece.ids)
        offsets += [(before + start, before + end) for start, end in own]
        before += len(piece.text)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant" and number in places:
            first, last = min(start for start, _ in places[number]), max(end for _, end in places[number])
            inside = [i for i, (start, end) in enumerate(offsets) if start < end and start < last and end > first]
            if not inside:
                raise RedflagError(
                    f"memory is not possible with this tokenizer, which has no offsets (message {number})."
                )
            spans.append((max(1, inside[0]), min(len(offsets), inside[-1] + 2)))
    return guarded.ids, tuple(spans)


def _places(tokenizer: PreTrainedTokenizerFast, guarded: Guarded) -> dict[int, list[Span]]:
    """Number of a message -> spans of characters of its texts in the prompt."""
    conversation, apart = guarded.conversation, guarded.conversation.stand_ins
    turns, tools = conversation.turns(apart, guarded.style), conversation.definitions(apart)
    skeleton = apply(tokenizer, turns, True, guarded.thinking, tools) + guarded.added
    literal, *pieces = re.split(f"({conversation.pattern})", skeleton.replace(guarded.mark, "", 1))
    named = {item.stand_in.name: item for item in conversation.texts if item.stand_in is not None}
    text = "".join(piece.text for piece in guarded.pieces)
    places: dict[int, list[Span]] = {}
    position = len(literal)
    for name, following in zip(pieces[::2], pieces[1::2], strict=True):
        item = named[name]
        core = item.text.strip().replace(guarded.mark, "") if guarded.mark else item.text.strip()
        # As it is, or as JSON, in one of the two ways in which templates write that.
        forms = [core, *(json.dumps(core, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))]
        written = next((form for form in forms if text.startswith(form + following, position)), None)
        if written is None:
            raise RedflagError(
                f"memory is not possible in this conversation: the chat template changes the text of message "
                f"{item.number}, so the earlier answers cannot be found in the prompt."
            )
        if item.kind != "reasoning":
            places.setdefault(item.number, []).append((position, position + len(written)))
        position += len(written) + len(following)
    return places
