"""Renders prompts: training, scoring and serving all turn messages into ids here.

The text comes from the model's own chat template. The ids are those of the stock tokenizer, unless an untrusted text
would produce a control token; then that text is tokenised separately, with control tokens split into ordinary ones. So
no role, spelling or Unicode form in a user's text becomes a flag or an end of turn.

Every rendering is verified: each message's text appears, in order, and the prompt ends where an answer begins. Two
texts may be missing: the reasoning of earlier turns (`reasoning_content`), which most templates leave out on purpose,
and white space around a message.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from redflag.answer_start import answer_start, say_once
from redflag.chat_template import FALLBACK_TEMPLATE as FALLBACK_TEMPLATE
from redflag.chat_template import apply, reads_clock, roles_in_parts, sentinel, template_text
from redflag.control_tokens import Control, content_ids, control_ids, own_bos, tokenise
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.messages import Message, checked
from redflag.stand_ins import Conversation, HiddenTextError, StandIn, Style
from redflag.thoughts import ThoughtMarks, thought_marks
from redflag.tool_definitions import Tool, checked_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RenderedRow(NamedTuple):
    """A conversation in ids.

    Attributes:
        prompt_ids: Everything up to where the last assistant turn starts.
        response_ids: That turn's thought, if it has one, and its content, T tokens.
        offsets: T pairs of character positions (start, end) in the content; (0, 0) in the thought.
        tail_ids: Ids that end the turn, usually one end-of-turn token.
        thought_offsets: For each token of the thought and its end marker, the first of the response, a pair of
            positions in the thought's text. Empty without a thought.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    offsets: list[tuple[int, int]]
    tail_ids: list[int]
    thought_offsets: list[tuple[int, int]] = []  # noqa: RUF012


class Piece(NamedTuple):
    """A part of a rendered prompt that was tokenised on its own.

    Attributes:
        text: "" if the ids stand for no text of the conversation.
        offsets: Character positions (start, end) of each id, if they were asked for.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]] | None = None


class Guarded(NamedTuple):
    """A rendered conversation in which every control token is the template's.

    Attributes:
        style: Form of its tool calls.
        thinking: Whether it leaves room for a thought.
        added: Text added behind the template's own.
        mark: Stands in the conversation in place of inserted ids; "" without any.
    """

    conversation: Conversation
    style: Style
    thinking: bool
    added: str
    mark: str
    pieces: list[Piece]

    @property
    def ids(self) -> list[int]:
        """The ids of all pieces."""
        return [token_id for piece in self.pieces for token_id in piece.ids]


def render_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    spec: FlagSpec,
    preface: str = "",
    thinking: bool = False,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Ids of a conversation up to the beginning of the answer; with `thinking`, to the beginning of its thought.

    A trailing assistant message is a prefill: the ids end with its content, to be continued. `preface` is an operator's
    text at the head of the system turn (which is added if missing); a flag's text in it becomes the flag. `tools` are
    definitions that the template shows; if its answers begin in a channel (gpt-oss), the ids then end before the
    channel, since a call has another one.

    Raises:
        RedflagError: Messages or tools are empty or malformed, or the chat template refuses them, does not show them,
            or does not end where an answer begins.
    """
    guarded, prefill = guarded_prompt(tokenizer, messages, spec, preface, thinking, tools)
    return guarded.ids + prefill


def guarded_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    spec: FlagSpec,
    preface: str,
    thinking: bool,
    tools: Sequence[Tool],
) -> tuple[Guarded, list[int]]:
    """As `render_prompt`, before the ids are joined: the conversation, and the ids of a prefill."""
    turns = checked(messages)
    tools = checked_tools(tools)
    prefill: list[int] = []
    if turns[-1]["role"] == "assistant":
        if len(turns) == 1:
            raise RedflagError("the conversation must have a user or system turn before the assistant's.")
        if thinking:
            raise RedflagError("thinking must be off behind a prefill, which is the beginning of an answer")
        prefill = text_ids(tokenizer, _answer(turns.pop()), spec)
    channel = not tools or bool(prefill)
    if not preface:
        return _guarded(tokenizer, turns, spec, thinking=thinking, tools=tools, channel=channel), prefill
    mark = sentinel()
    if turns[0]["role"] == "system":
        turns[0]["content"] = f"{mark}\n\n{turns[0]['content']}"
    else:
        turns.insert(0, {"role": "system", "content": mark})
    flags = {flag.token: flag.id for flag in spec.flags if flag.token and flag.id is not None}
    inserted: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, sorted(flags, key=len, reverse=True)))})", preface):
        inserted += [flags[piece]] if piece in flags else text_ids(tokenizer, piece, spec)
    return _guarded(tokenizer, turns, spec, (mark, inserted), thinking, tools, channel), prefill


def render_text(tokenizer: PreTrainedTokenizerFast, text: str, spec: FlagSpec) -> list[int]:
    """Ids of a plain prompt, without a chat template; control tokens in it are split into ordinary ones.

    Raises:
        RedflagError: The text is empty, or holds a control token that cannot be split.
    """
    checked([{"role": "user", "content": text}])
    if not text.strip():
        raise RedflagError("the prompt must not be empty.")
    return own_bos(tokenizer) + text_ids(tokenizer, text, spec)


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str, spec: FlagSpec) -> list[int]:
    """Ids of a text alone, control tokens in it split into ordinary ones."""
    return content_ids(tokenizer, text, control_ids(tokenizer, spec).special)[0]


def render_response(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], spec: FlagSpec) -> RenderedRow:
    """Ids of a conversation whose last turn is the assistant's, split where the response begins and ends.

    The prompt is rendered exactly as `render_prompt` renders it when serving, and the response is tokenised on its own,
    as a model writes it. Where the last turn has a thought (`reasoning_content`) and the template a thinking mode, the
    prompt is that with thinking on, and the response is thought, what ends it, and content. Other templates leave the
    thought out.

    Raises:
        RedflagError: As `render_prompt`; also where the last turn is not the assistant's or is empty.
    """
    turns = checked(messages)
    if turns[-1]["role"] != "assistant" or len(turns) == 1:
        raise RedflagError(
            "the conversation must end with an assistant turn that answers another one (got "
            f"{len(turns)} turn(s), the last one the {turns[-1]['role']}'s)."
        )
    last = turns.pop()
    response = _answer(last)
    marks = thought_marks(tokenizer) if last.get("reasoning_content", "").strip() else None
    prompt = _guarded(tokenizer, turns, spec, thinking=marks is not None).ids
    control = control_ids(tokenizer, spec)
    ids, offsets = content_ids(tokenizer, response, control.special)
    if not ids:
        raise RedflagError("the response must not be empty. Drop the row.")
    thought_offsets: list[tuple[int, int]] = []
    if marks is not None:
        thought, thought_offsets = _thought(tokenizer, last["reasoning_content"], marks, control)
        # The answer as it is written behind a thought, and which of its characters each token has.
        lead = len(marks.before_answer)
        ids, offsets = content_ids(tokenizer, marks.before_answer + response, control.special)
        offsets = [(0, 0)] * len(thought) + [(max(0, start - lead), max(0, end - lead)) for start, end in offsets]
        ids = thought + ids
    answer = sentinel()
    whole = apply(tokenizer, [*turns, {"role": "assistant", "content": answer}], False)
    _, separator, after = whole.rpartition(answer)
    tail = tokenise(tokenizer, after) if separator and tokenizer.chat_template else []
    end = next((i for i, token in enumerate(tail) if token in control.all), None)
    if end is not None:
        tail = tail[: end + 1]
    else:
        tail = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return RenderedRow(prompt, ids, offsets, tail, thought_offsets)


def _thought(
    tokenizer: PreTrainedTokenizerFast, text: str, marks: ThoughtMarks, control: Control
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a thought with those that end it, and which of its characters each of them has."""
    text = text.strip("\n")
    ids, offsets = content_ids(tokenizer, text + marks.before_end, control.all.union(marks.end_ids[:1]))
    return [*ids, *marks.end_ids], [*offsets, *[(len(text), len(text))] * len(marks.end_ids)]


def template_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identifies the prompt template; thresholds of another template are refused.

    Changes to its text (contents given as parts, a thought closed) are part of the hash. Its variable text is not: a
    date, of which `check_template` warns, or tools that a system turn lists.
    """
    name = [template_text(tokenizer)]
    with suppress(RedflagError):  # Whether it is usable is checked elsewhere.
        added, listed = _added(tokenizer), sorted(roles_in_parts(tokenizer))
        name += [added, *listed] if added or listed else []
    return hashlib.sha256("\0".join(name).encode()).hexdigest()[:16]


def check_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Tries the chat template before a model is trained or served, and warns, once, where prompts tell the day's date.

    Raises:
        RedflagError: A user's content would not appear, or the prompt does not end where an answer begins.
    """
    _added(tokenizer)
    if reads_clock(tokenizer):
        say_once(
            "the chat template writes the current date into prompts, so served prompts differ from those of the "
            "calibration, and template_hash does not show it. Write a fixed date into the template before training."
        )


def _added(tokenizer: PreTrainedTokenizerFast) -> str:
    """The text added behind the prompt of a single question."""
    name = sentinel()
    turns = [{"role": "user", "content": name}]
    return answer_start(tokenizer, turns, name, apply(tokenizer, turns, True))


def _guarded(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    spec: FlagSpec,
    insert: tuple[str, list[int]] = ("", []),
    thinking: bool = False,
    tools: Sequence[Tool] = (),
    channel: bool = True,
) -> Guarded:
    """The conversation in pieces whose ids hold no control token but the template's.

    `insert` puts an operator's ids in the place of a mark; they are left out while the rest is verified. Without
    `channel` the ids end before the channel in which an answer begins, if there is one.

    Rendering stand-ins for the contents shows the template's own text. Contents with a control token are tokenised
    separately; if contents form one only together, or with the template's text, all contents are.
    """
    control = control_ids(tokenizer, spec)
    conversation = Conversation(messages, control, tools)
    mark, inserted = insert
    try:
        style, skeleton = conversation.skeleton(tokenizer, thinking)
    except HiddenTextError as error:
        if mark:
            raise RedflagError(_NO_REFLECTIONS) from error
        raise
    skeleton_turns = conversation.turns(conversation.stand_ins, style, aliased=True)
    if thinking:
        marks = thought_marks(tokenizer, skeleton_turns, conversation.pattern, skeleton)
        if marks is None:
            raise RedflagError(
                "thinking must be off for this conversation. The chat template has no thought behind such a prompt."
            )
        added = marks.opening
    else:
        added = answer_start(tokenizer, skeleton_turns, conversation.pattern, skeleton)
        if not channel and "<|channel|>" in added:
            added = ""
    expected = [i for i in tokenise(tokenizer, skeleton + added) if i in control.special]
    if control.flags.intersection(expected):
        raise RedflagError("the chat template must not contain a flag token. Use a template without it.")
    dirty = [
        item.stand_in if item.forbidden.intersection(tokenise(tokenizer, item.text)) else None
        for item in conversation.texts
    ]
    for name in conversation.aliases:
        if control.all.intersection(tokenise(tokenizer, name)):
            raise RedflagError(
                f"names, ids and keys of tools and calls must not contain a control token (got {name!r})."
            )
    for apart in (dirty, conversation.stand_ins):
        filled = conversation.turns(apart, style), conversation.definitions(apart)
        text = apply(tokenizer, filled[0], True, thinking, filled[1]) + added
        render = partial(_spliced_contents, tokenizer, text, conversation, apart)
        # A chat template writes its own begin-of-sequence token; the fallback does not.
        bos = Piece("", [] if tokenizer.chat_template else own_bos(tokenizer))
        guarded = Guarded(conversation, style, thinking, added, mark, render((mark, [])))
        if [i for i in guarded.ids if i in control.special] == expected:
            if inserted:
                clean, guarded = guarded, guarded._replace(pieces=render(insert))
                if len(guarded.ids) != len(clean.ids) + len(inserted):
                    raise RedflagError(_NO_REFLECTIONS)
            return guarded._replace(pieces=[bos, *guarded.pieces])
    raise RedflagError(
        "the chat template must not make control tokens out of contents. A user could forge turns or flags. Use a "
        "template that writes contents unchanged."
    )


_NO_REFLECTIONS = (
    "the chat template must show the system turn exactly once for examples of reflections. Leave them out "
    "(reflect.system), or use a model whose template has a system turn."
)


def _spliced_contents(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    conversation: Conversation,
    apart: Sequence[StandIn | None],
    insert: tuple[str, list[int]],
) -> list[Piece]:
    """Ids of a rendered conversation, with the texts behind the stand-ins tokenised separately."""
    named = {
        stand_in.name: (stand_in, item) for stand_in, item in zip(apart, conversation.texts, strict=True) if stand_in
    }
    if not named:
        return _spliced(text, insert, partial(_plain, tokenizer))
    literal, *pieces = re.split(f"({conversation.pattern})", text)
    ids: list[Piece] = []
    for name, following in zip(pieces[::2], pieces[1::2], strict=True):
        stand_in, item = named[name]
        # White space that the template left around a content is tokenised with it.
        before = stand_in.before if literal.endswith(stand_in.before) else ""
        after = stand_in.after if following.startswith(stand_in.after) else ""
        literal = literal[: len(literal) - len(before)]
        if literal:
            ids += _spliced(literal, insert, partial(_plain, tokenizer))
        core = item.text.strip()
        if item.kind in ("argument", "definition"):  # It stands in JSON, as templates mostly write definitions too.
            core = json.dumps(core, ensure_ascii=False)[1:-1]
        ids += _spliced(before + core + after, insert, partial(content_ids, tokenizer, forbidden=item.forbidden))
        literal = following[len(after) :]
    if literal:
        ids += _spliced(literal, insert, partial(_plain, tokenizer))
    return ids


def _spliced(
    text: str, insert: tuple[str, list[int]], ids_of: Callable[[str], tuple[list[int], list[tuple[int, int]] | None]]
) -> list[Piece]:
    """A text, with the ids of `insert` in the place of its mark."""
    mark, inserted = insert
    if not mark or mark not in text:
        return [Piece(text, *ids_of(text))]
    before, _, after = text.partition(mark)
    parts = [Piece(part, *(ids_of(part) if part else ([], None))) for part in (before, after)]
    return [parts[0], Piece("", inserted), parts[1]]


def _plain(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], None]:
    return tokenise(tokenizer, text), None


def _answer(turn: Message) -> str:
    """The text of the assistant's last turn."""
    if "tool_calls" in turn:
        raise RedflagError(
            "the last turn must not call tools, since only text is judged. End the conversation before it."
        )
    return str(turn["content"])
