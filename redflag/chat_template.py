"""The model's chat template: which one is used, whether it reads text or parts, and whether it reads the clock."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from string import ascii_lowercase
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

from redflag.errors import RedflagError
from redflag.messages import ROLES, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# For tokenizers without a chat template.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'] | capitalize }}\n{{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant\n{% endif %}"
)

# Conversations that a template is tried with; some refuse a system turn, or a second one of the user's.
PROBES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))

# Read by templates with a thinking mode, the first by Qwen3's, the second by DeepSeek V3.1's; others ignore both.
SWITCHES: dict[bool | None, dict[str, bool]] = {
    None: {},
    False: {"enable_thinking": False},
    True: {"enable_thinking": True, "thinking": True},
}

_CACHED = 64  # values per tokenizer in a cache of `cached`
_Value = TypeVar("_Value")


def cached(
    cache: WeakKeyDictionary[object, dict[Hashable, _Value]],
    tokenizer: object,
    key: Hashable,
    find: Callable[[], _Value],
) -> _Value:
    """The value of `find` for a tokenizer and a key, computed at the first call."""
    values = cache.setdefault(tokenizer, {})
    if key in values:
        return values[key]
    value = find()
    if len(values) >= _CACHED:
        values.clear()
    values[key] = value
    return value


def sentinel(length: int = 24) -> str:
    """A random text that no message contains; letters only, which normalisers leave unchanged."""
    return "".join(ascii_lowercase[byte % 26] for byte in secrets.token_bytes(length))


def template_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """The template's Jinja source; of several named templates the default one.

    Raises:
        RedflagError: There are several and none is named default.
    """
    if not tokenizer.chat_template:
        return FALLBACK_TEMPLATE
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise RedflagError(
            "one of several chat templates must be named default (got "
            f"{', '.join(tokenizer.chat_template)}). Set tokenizer.chat_template to the one to use."
        ) from error


def apply(
    tokenizer: PreTrainedTokenizerFast,
    turns: Sequence[Message],
    generate: bool,
    thinking: bool | None = False,
    tools: Sequence[Message] = (),
    *,
    in_parts: frozenset[str] | None = None,
    head: str = "",
) -> str:
    """The conversation as the template writes it; with `generate`, to be continued.

    `thinking` switches the template's thinking mode; None leaves that to the template. Not every template shows
    `tools`, definitions as in `redflag.tool_definitions`. The last two are for trying out a template: the roles whose
    content is passed in parts (None: those that it needs), and Jinja source to put before it.

    Raises:
        RedflagError: The template refuses the turns, or does not show their contents.
    """
    import jinja2

    if in_parts is None:
        in_parts = roles_in_parts(tokenizer)
    contents = [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if turn["role"] in in_parts and turn["content"] is not None
        else turn
        for turn in turns
    ]
    try:
        return tokenizer.apply_chat_template(
            contents,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=generate,
            chat_template=head + template_text(tokenizer),
            **SWITCHES[thinking],
        )
    except (jinja2.TemplateError, AttributeError, LookupError, TypeError, ValueError) as error:
        roles = [turn["role"] for turn in turns]
        raise RedflagError(
            f"the chat template refuses the turns {roles} ({error}). Reorder them or merge the system turn."
        ) from error


_IN_PARTS: WeakKeyDictionary[object, dict[Hashable, frozenset[str]]] = WeakKeyDictionary()


def roles_in_parts(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    """The roles whose content the template reads only as a list of parts; determined once, by trying.

    Raises:
        RedflagError: A user's content appears neither from text nor from parts.
    """
    return cached(_IN_PARTS, tokenizer, template_text(tokenizer), partial(_find_roles_in_parts, tokenizer))


def _find_roles_in_parts(tokenizer: PreTrainedTokenizerFast) -> frozenset[str]:
    refusal: RedflagError | None = None
    for roles in PROBES:
        turns = [{"role": role, "content": sentinel()} for role in roles]
        for in_parts in (frozenset[str](), frozenset(ROLES), frozenset(ROLES) - {"system"}):
            try:
                text = apply(tokenizer, turns, True, in_parts=in_parts)
            except RedflagError as error:
                refusal = refusal or error
                continue
            # A list printed literally does not count as text.
            if all(turn["content"] in text for turn in turns) and "'type'" not in text:
                return in_parts
    raise refusal or RedflagError(
        "the chat template must show a user's content, as text or as a list of parts. The model would see empty "
        "prompts. Set tokenizer.chat_template to the template that the model was trained with."
    )


def reads_clock(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the template writes the time of rendering into prompts, so that they change from day to day."""
    for roles in PROBES:
        turns = [{"role": role, "content": "a"} for role in roles]
        with suppress(RedflagError):
            day = sentinel()
            clock = f"{{% macro strftime_now(format) %}}{day}{{% endmacro %}}"  # in place of transformers' own
            if day in apply(tokenizer, turns, True, head=clock):
                return True
    return False
