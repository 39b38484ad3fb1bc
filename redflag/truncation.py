"""Truncates conversations that are too long for the context, the same way in training, scoring and baselines.

Serving does not truncate: a prompt that leaves no room for a response is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from redflag.control_tokens import content_ids, control_ids
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.messages import Message
from redflag.prompt import render_prompt, render_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Render = Callable[[Sequence[Message]], "list[int] | None"]


class FittedRow(NamedTuple):
    """A conversation in ids that fit the context.

    Attributes:
        prompt_ids: At least one id.
        response_ids: The response, or as much of its beginning as fits.
        tail_ids: Ids that end the turn, as far as they fit.
        offsets: As in `RenderedRow`, for the whole response.
        prompt_truncated: Whether turns, or the front of one, were left out.
        response_truncated: Whether the response lost its end.
        thought_offsets: As in `RenderedRow`, as far as the thought fits.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    tail_ids: list[int]
    offsets: list[tuple[int, int]]
    prompt_truncated: bool
    response_truncated: bool
    thought_offsets: list[tuple[int, int]] = []  # noqa: RUF012


def fit_row(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], spec: FlagSpec, max_length: int | None
) -> FittedRow:
    """Ids of a conversation, at most `max_length` of them: the prompt is cut first, so that the response stays.

    Raises:
        RedflagError: As `render_response`; also for a `max_length` below 2: the first response token is judged from a
            prompt token's position.
    """
    row = render_response(tokenizer, messages, spec)
    if max_length is None:
        return FittedRow(row.prompt_ids, row.response_ids, row.tail_ids, row.offsets, False, False, row.thought_offsets)
    if max_length < 2:
        raise RedflagError(f"max_length must be at least 2 (got {max_length}): a prompt token and a response token.")
    response = row.response_ids[: max_length - 1]
    tail = row.tail_ids[: max_length - 1 - len(response)]
    limit = max_length - len(response) - len(tail)
    thought = row.thought_offsets[: len(response)]
    prompt = fit_prompt(tokenizer, messages[:-1], spec, limit, row.prompt_ids, thinking=bool(thought))
    return FittedRow(
        prompt,
        response,
        tail,
        row.offsets,
        len(prompt) < len(row.prompt_ids),
        len(response) < len(row.response_ids),
        thought,
    )


def fit_prompt(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    spec: FlagSpec,
    limit: int,
    ids: list[int] | None = None,
    thinking: bool = False,
) -> list[int]:
    """Ids of a prompt, at most `limit` of them.

    The beginning of the sequence and the system turn stay. The oldest exchanges are left out whole (a user turn with
    all that follows it up to the next one, so that roles still alternate); if the last one alone is too long, its first
    message loses the front of its text. A system turn beside which nothing else fits is left out. If even that is not
    enough, the template's own ids lose their front.

    Args:
        limit: Maximum number of ids, at least 1.
        ids: Result of `render_prompt`, if computed already.

    Raises:
        RedflagError: As `render_prompt`.
    """
    if ids is None:
        ids = render_prompt(tokenizer, messages, spec, thinking=thinking)
    if len(ids) <= limit:
        return ids

    def render(turns: Sequence[Message]) -> list[int] | None:
        try:
            return render_prompt(tokenizer, turns, spec, thinking=thinking)
        except RedflagError:  # Some templates refuse the shortened conversation.
            return None

    count = next((i for i, turn in enumerate(messages) if turn["role"] != "system"), len(messages))
    system, exchanges = list(messages[:count]), _exchanges(messages[count:])
    control = control_ids(tokenizer, spec).special

    def offsets(text: str) -> list[tuple[int, int]]:
        return content_ids(tokenizer, text, control)[1]

    heads: list[list[Message]] = [system, []] if system else [[]]
    for head in heads if exchanges else []:
        shorter = _drop_oldest(render, head, exchanges, limit) or _cut_front(
            render, head, exchanges[-1], limit, offsets
        )
        if shorter:
            return shorter
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id and limit > 1 else []
    return begin + ids[len(ids) - limit + len(begin) :]


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages in groups, each beginning with a user turn, except possibly the first."""
    groups: list[list[Message]] = []
    for message in messages:
        if message["role"] == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return groups


def _drop_oldest(render: Render, head: list[Message], exchanges: list[list[Message]], limit: int) -> list[int] | None:
    """The prompt with as many of the newest exchanges as fit; None if not even the last one does."""
    best: list[int] | None = None
    low, high = 0, len(exchanges) - 1  # bounds of the number of exchanges to drop
    while low <= high:
        dropped = (low + high) // 2
        ids = render([*head, *(turn for group in exchanges[dropped:] for turn in group)])
        if ids is not None and len(ids) <= limit:
            best, high = ids, dropped - 1
        else:
            low = dropped + 1
    return best


def _cut_front(
    render: Render,
    head: list[Message],
    exchange: list[Message],
    limit: int,
    offsets_of: Callable[[str], list[tuple[int, int]]],
) -> list[int] | None:
    """The prompt with the last exchange, its first text without its front; None if no rest of that text fits."""
    first: dict[str, Any] = dict(exchange[0])
    text = first["content"]
    offsets = offsets_of(text)
    cut = 0  # tokens of the text that are left out
    ids = render([*head, *exchange])
    while ids is not None and len(ids) > limit:
        cut += len(ids) - limit
        if cut >= len(offsets) or not text[offsets[cut][0] :].strip():
            return None
        ids = render([*head, {**first, "content": text[offsets[cut][0] :]}, *exchange[1:]])
    return ids
