"""The one prompt rendering: training, scoring and serving all turn messages into ids here.

The text comes from the model's own chat template. The ids are those of the stock tokenizer, unless somebody's text would
make it produce a special token; then that text is tokenised apart, with special tokens split into ordinary ones. So
no role, spelling or Unicode form makes a flag, nor any other control token, from what a user wrote.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from redflag.errors import RedflagError
from redflag.flags import FlagSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")

# For tokenizers without a chat template.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)


class RenderedRow(NamedTuple):
    """A conversation in ids.

    Attributes:
        prompt_ids: Everything up to where the last assistant turn starts.
        response_ids: That turn's content, T tokens.
        offsets: T pairs of character positions (start, end) in the content.
        tail_ids: What ends the turn, usually one end-of-turn token.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    offsets: list[tuple[int, int]]
    tail_ids: list[int]


def render_prompt(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], spec: FlagSpec
) -> list[int]:
    """Ids of a conversation up to where the assistant writes on.

    A trailing assistant message is a prefill: the ids end with its content, to be continued.

    Raises:
        RedflagError: The messages are empty or malformed, or the chat template refuses them.
    """
    messages = _checked(messages)
    if messages[-1]["role"] != "assistant":
        return _guarded(tokenizer, messages, spec)
    if len(messages) == 1:
        raise RedflagError(
            "the conversation has only an assistant turn: the model needs a user or system turn to answer"
        )
    prefill, _ = _content_ids(tokenizer, messages[-1]["content"], spec)
    return _guarded(tokenizer, messages[:-1], spec) + prefill


def render_response(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], spec: FlagSpec
) -> RenderedRow:
    """Ids of a conversation whose last turn is the assistant's, split where the response begins and ends.

    The prompt is rendered exactly as `render_prompt` renders it when serving, and the response is tokenised on its own,
    as a model writes it.

    Raises:
        RedflagError: As `render_prompt`; also where the last turn is not the assistant's or is empty.
    """
    messages = _checked(messages)
    if messages[-1]["role"] != "assistant" or len(messages) == 1:
        raise RedflagError(
            f"the last turn is the {messages[-1]['role']}'s and {len(messages)} turn(s) are there: a response is judged, "
            "so the conversation must end with an assistant turn that answers something"
        )
    prompt = _guarded(tokenizer, messages[:-1], spec)
    ids, offsets = _content_ids(tokenizer, messages[-1]["content"], spec)
    if not ids:
        raise RedflagError("the response is empty, so there is nothing to judge: drop the row")
    sentinel = secrets.token_hex(12)
    whole = _template(tokenizer, [*messages[:-1], {"role": "assistant", "content": sentinel}], False)
    tail = _tokenise(tokenizer, whole.rpartition(sentinel)[2]) if tokenizer.chat_template else []
    special = set(tokenizer.all_special_ids)
    end = next((i for i, token in enumerate(tail) if token in special), None)
    if end is not None:
        tail = tail[: end + 1]
    else:
        tail = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return RenderedRow(prompt, ids, offsets, tail)


def template_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Names the prompt template in force; thresholds are refused where it differs."""
    template = tokenizer.chat_template or FALLBACK_TEMPLATE
    return hashlib.sha256(str(template).encode()).hexdigest()[:16]


def _checked(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if not messages:
        raise RedflagError("the conversation is empty, so there is nothing to answer: give at least one user message")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise RedflagError(
                f"message {number} has no text content: each message is {{'role': ..., 'content': 'text'}}"
            )
        if message.get("role") not in ROLES:
            raise RedflagError(f"message {number} has the role {message.get('role')!r}: use one of {', '.join(ROLES)}")
        checked.append({"role": message["role"], "content": message["content"]})
    if not any(message["content"].strip() for message in checked):
        raise RedflagError("every message of the conversation is empty: write a prompt")
    return checked


def _template(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], generate: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=generate,
            chat_template=tokenizer.chat_template or FALLBACK_TEMPLATE,
            enable_thinking=False,  # read by templates with a thinking mode (Qwen3); others ignore it
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise RedflagError(
            f"the chat template refuses the turns {roles} ({error}): reorder them or merge the system turn"
        )


def _guarded(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]], spec: FlagSpec) -> list[int]:
    flags = set(spec.ids)
    special = set(tokenizer.all_special_ids) | flags
    sentinels = {secrets.token_hex(12): message["content"] for message in messages}
    skeleton = _template(
        tokenizer, [{"role": m["role"], "content": s} for m, s in zip(messages, sentinels, strict=True)], True
    )
    whole = _tokenise(tokenizer, _template(tokenizer, messages, True))
    expected = [i for i in _tokenise(tokenizer, skeleton) if i in special]
    if [i for i in whole if i in special] == expected and not flags.intersection(whole):
        return _with_bos(tokenizer, whole)
    ids = []
    for piece in re.split(f"({'|'.join(sentinels)})", skeleton):
        if piece in sentinels:
            ids += _content_ids(tokenizer, sentinels[piece], spec)[0]
        elif piece:
            ids += _tokenise(tokenizer, piece)
    if flags.intersection(ids):
        raise RedflagError("the chat template itself holds a flag token: give the model a template without it")
    return _with_bos(tokenizer, ids)


def _with_bos(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """A chat template brings its own begin-of-sequence token; the fallback does not."""
    bos = tokenizer.bos_token_id
    if tokenizer.chat_template or bos is None or tokenizer("a")["input_ids"][:1] != [bos]:
        return ids
    return [bos, *ids]


def _tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"])


def _content_ids(
    tokenizer: PreTrainedTokenizerFast, text: str, spec: FlagSpec
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of what somebody wrote, special tokens taken apart; verified, because everything rests on it."""
    encoded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    ids = list(encoded["input_ids"])
    if set(spec.ids).intersection(ids):
        raise RedflagError(
            "the text holds a flag token that the tokenizer does not take apart, and a flag is never accepted from a "
            "user: mark the flag as a special token (redflag.flags.attach does)"
        )
    return ids, [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
