"""Control tokens: the ids that users may not write, and tokenising text without them."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Collection, Hashable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from redflag.chat_template import apply, cached, template_text
from redflag.errors import RedflagError
from redflag.flags import FlagSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Control(NamedTuple):
    """Reserved ids: `flags`; `special`: flags, special and turn tokens; `all`: the template's others too."""

    flags: frozenset[int]
    special: frozenset[int]
    all: frozenset[int]


def control_ids(tokenizer: PreTrainedTokenizerFast, spec: FlagSpec) -> Control:
    """The ids that only the template may write, and the flags, which are never written."""
    flags = frozenset(spec.ids)
    special, marks = template_ids(tokenizer)
    return Control(flags, special | flags, special | marks | flags)


# The tokenizer is asked for its added tokens once: there may be thousands.
_ADDED: WeakKeyDictionary[object, dict[Hashable, tuple[frozenset[int], frozenset[int]]]] = WeakKeyDictionary()


def template_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[frozenset[int], frozenset[int]]:
    """Special and turn tokens, and the others that the template names."""
    key = (template_text(tokenizer), len(tokenizer), tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token)
    return cached(_ADDED, tokenizer, key, partial(_find_template_ids, tokenizer))


def _find_template_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[frozenset[int], frozenset[int]]:
    template = template_text(tokenizer)
    # Not `all_special_ids`: it names only tokens with a role, and lacks Llama 3's <|start_header_id|>.
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    # Fine-tunes often add their turn tokens as ordinary ones. Others that the template names, such as <think>, are
    # the assistant's to write.
    signs = {i for i, token in added.items() if re.search(r"[^\w\s]", token.content)}
    special |= signs & _written(tokenizer)
    marks = {i for i in signs if added[i].content in template}
    unknown = tokenizer.unk_token
    if unknown and unknown not in (tokenizer.eos_token, tokenizer.bos_token) and unknown not in template:
        special.discard(tokenizer.unk_token_id)  # stands for any character that the vocabulary lacks
        marks.discard(tokenizer.unk_token_id)
    return frozenset(special), frozenset(marks)


def _written(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that the template writes around finished turns, in conversations of all roles that it takes."""
    ids: set[int] = set()
    for roles in (("system",), ("user",), ("user", "assistant", "user"), ("system", "user", "assistant", "user")):
        with suppress(RedflagError):
            ids.update(tokenise(tokenizer, apply(tokenizer, [{"role": role, "content": "a"} for role in roles], False)))
    return ids


# `split_special_tokens` is a state of the tokenizer, not of the call: another thread must not switch it meanwhile.
_TOKENIZING = threading.Lock()


def tokenise(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of the template's own text, including control tokens."""
    with _TOKENIZING:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"])


def tokenise_with_offsets(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """As `tokenise`, with the character positions (start, end) of each id."""
    return _encoded(tokenizer, text, split=False)


def _encoded(tokenizer: PreTrainedTokenizerFast, text: str, split: bool) -> tuple[list[int], list[tuple[int, int]]]:
    with _TOKENIZING:
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=split, return_offsets_mapping=True, verbose=False
        )
    return list(encoded["input_ids"]), [(int(start), int(end)) for start, end in encoded["offset_mapping"]]


def own_bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The begin-of-sequence token that the tokenizer itself adds to a text, if any."""
    bos = tokenizer.bos_token_id
    with _TOKENIZING:
        return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def content_ids(
    tokenizer: PreTrainedTokenizerFast, text: str, forbidden: Collection[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of untrusted text with control tokens split, and their offsets. The result is verified: safety depends on it.

    Some tokenizers make a control token anyway (it is not marked as special, or the model's own vocabulary holds it):
    then the text is split within it and both sides are tokenised separately.

    Raises:
        RedflagError: A control token cannot be split.
    """
    ids, offsets = _encoded(tokenizer, text, split=True)
    bad = [(start, end) for i, (start, end) in zip(ids, offsets, strict=True) if i in forbidden]
    if not bad:
        return ids, offsets
    if any(end - start < 2 for start, end in bad):
        raise RedflagError(
            "the text must not hold a flag or another control token that the tokenizer cannot split. Remove it from "
            "the text, or choose a flag token of several characters."
        )
    cuts = [0, *sorted({start + 1 for start, _ in bad}), len(text)]
    ids, offsets = [], []
    for start, end in itertools.pairwise(cuts):
        part_ids, part_offsets = content_ids(tokenizer, text[start:end], forbidden)
        ids += part_ids
        offsets += [(start + low, start + high) for low, high in part_offsets]
    return ids, offsets
