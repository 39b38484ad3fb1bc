"""Structured output: the tokens that a JSON schema allows next, by llguidance.

Redflag chooses tokens itself, or checks those that a server chose; flags are measured before either, over the whole
vocabulary.

A schema is a user's text, and a key or constant in it can spell a flag or an end of turn. Where only one text may
follow, llguidance allows the tokens that the tokenizer makes of it, which would be the control token. So llguidance
gets the tokenizer with random names for the control tokens, and they are removed from every mask.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from redflag.backends import Grammar, Matcher
from redflag.control_tokens import control_ids
from redflag.errors import RedflagError
from redflag.flags import FlagSpec

LONGEST_SCHEMA = 1 << 16
# One space, or a line end with indentation. JSON allows any amount, and an undecided model would write nothing else.
_WHITE_SPACE = r"( |\n[ \t]{0,32})"


class _Vocabulary(NamedTuple):
    """A tokenizer in llguidance."""

    trie: Any  # an `LLTokenizer`
    eos_ids: frozenset[int]
    forbidden: frozenset[int]  # all other control tokens
    allowed: int  # mask of all ids but the forbidden ones


class Grammars:
    """Makes grammars for one tokenizer; the first call builds a trie (0.5 to 11 s for released tokenizers)."""

    def __init__(self, tokenizer: Any, spec: FlagSpec, eos_ids: frozenset[int]) -> None:
        self._tokenizer, self._spec, self._eos_ids = tokenizer, spec, eos_ids
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of a JSON schema: every response that ends by itself is JSON that the schema allows.

        Raises:
            RedflagError: The schema cannot be enforced in full, or llguidance is missing.
        """
        try:
            import llguidance
        except ImportError as error:
            raise RedflagError(
                "The package llguidance must be there for structured output. Install it: pip install "
                "'redflag-llm[structured]'."
            ) from error
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise _refused(f"it is not JSON: {error}") from error
        if not isinstance(schema, Mapping) or "x-guidance" in schema:  # which would have less enforced
            raise _refused("it must be a JSON object without x-guidance")
        if len(text) > LONGEST_SCHEMA:
            raise _refused(f"it has {len(text)} characters, and {LONGEST_SCHEMA} are allowed")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _read_vocabulary(self._tokenizer, self._spec, self._eos_ids)
            vocabulary = self._vocabulary
        options: Any = {"whitespace_flexible": True, "whitespace_pattern": _WHITE_SPACE}
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)
        except ValueError as error:
            raise _refused(str(error)) from error
        # Warnings too: they name what would not be enforced.
        _, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary.trie)
        if messages:
            raise _refused("; ".join(messages))
        matcher = llguidance.LLMatcher(vocabulary.trie, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return _Grammar(matcher, vocabulary)


class _Grammar:
    def __init__(self, matcher: Any, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def begin(self) -> Matcher:
        return _Matcher(self._matcher.deep_copy(), self._vocabulary)

    def after(self, token_ids: Sequence[int]) -> Grammar:
        matcher = self._matcher.deep_copy()
        if matcher.try_consume_tokens(list(token_ids)) != len(token_ids):
            raise RuntimeError("the grammar does not allow what was written")
        return _Grammar(matcher, self._vocabulary)


class _Matcher:
    def __init__(self, matcher: Any, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def mask(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar failed: {self._matcher.get_error()}")
        return (int.from_bytes(mask, "little") & self._vocabulary.allowed).to_bytes(len(mask), "little")

    def accept(self, token_id: int) -> bool:
        if token_id in self._vocabulary.forbidden:
            return False
        if token_id in self._vocabulary.eos_ids:  # A matcher at its end takes no token at all.
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.try_consume_tokens([token_id]) == 1)


def _read_vocabulary(tokenizer: Any, spec: FlagSpec, eos_ids: frozenset[int]) -> _Vocabulary:
    import llguidance

    control = control_ids(tokenizer, spec).special | eos_ids
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described["padding"] = described["truncation"] = None
    _rename(described, control)
    try:
        trie = llguidance.LLTokenizer(json.dumps(described, ensure_ascii=False), eos_token=sorted(eos_ids))
    except ValueError as error:
        raise RedflagError(
            f"The tokenizer must be one that llguidance can read, for structured output (it says: {error})."
        ) from error
    forbidden = control - eos_ids
    # llguidance's masks are whole 32-bit words.
    allowed = (1 << 32 * -(-trie.vocab_size // 32)) - 1
    for token_id in forbidden:
        allowed &= ~(1 << token_id)
    return _Vocabulary(trie, eos_ids, forbidden, allowed)


def _rename(described: dict[str, Any], control: Collection[int]) -> None:
    """Gives control tokens random names in the description of a tokenizer (`tokenizer.json`)."""
    names = {token_id: f"<{secrets.token_hex(16)}>" for token_id in control}
    for token in described["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token_id, name): token_id for name, token_id in model["vocab"].items()}
    else:  # Unigram: pairs of name and score
        model["vocab"] = [[names.get(i, name), score] for i, (name, score) in enumerate(model["vocab"])]


def _refused(why: str) -> RedflagError:
    return RedflagError(f"The JSON schema must be one that can be enforced in full ({why[:500].strip()}). Simplify it.")
