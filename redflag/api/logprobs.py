"""Log-probabilities of released tokens, sent together with their text."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from redflag.backends import AsyncStreams, Sampling
from redflag.guard.detokenize import Detokenizer
from redflag.trace import Logprobs, Step, Text, Trace

_IMPOSSIBLE = -9999.0  # what OpenAI and vLLM send in place of -inf


class Token(NamedTuple):
    """One released token.

    Attributes:
        text: A character that takes several tokens is the last one's; the others have "".
        logprob: In nats, of the language distribution.
        top: The most likely tokens at this step, with their log-probabilities.
        offset: Characters of the response before it.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


class ShownLogprobs:
    """The log-probabilities of one response's released tokens.

    A token is listed with its text and never before: not while it is held back, and not at all if it was taken back,
    belongs to a stop text or to the text of a flag, or is hidden (end of sequence, reflection).
    """

    def __init__(self, trace: Trace, tokenizer: Any, hidden_ids: frozenset[int], context: Sequence[int] = ()) -> None:
        """`hidden_ids` (flags, ends of sequence) have no text; the response continues the ids of `context`."""
        self._trace = trace
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        self._pieces = Detokenizer(tokenizer, context)
        self._measured: dict[int, tuple[int, Logprobs]] = {}
        self._waiting: deque[Token] = deque()  # released, but their text was not
        self._text = ""  # released, but not yet matched with tokens
        self._offset = 0

    def of(self, engine: AsyncStreams) -> AsyncStreams:
        """Wraps an engine whose log-probabilities are to be recorded."""
        return _Recorded(engine, self._trace, self._measured)

    def shown(self, event: Text) -> list[Token]:
        """The tokens whose text is released by this event; earlier events may have released the tokens."""
        for position, token_id in enumerate(event.token_ids, event.position):
            measured_id, logprobs = self._measured.pop(position)
            assert measured_id == token_id, "another token was measured at this position"
            if token_id not in self._hidden_ids:
                top = tuple((self._name(i), value) for i, value in logprobs.top if i not in self._hidden_ids)
                chosen = logprobs.chosen if math.isfinite(logprobs.chosen) else _IMPOSSIBLE
                self._waiting.append(Token(self._pieces.push(token_id), chosen, top, 0))
        self._text += event.text
        tokens = []
        while self._waiting and self._text:
            token = self._waiting[0]
            if self._text.startswith(token.text):
                tokens.append(token._replace(offset=self._offset))
                self._offset += len(token.text)
                self._text = self._text[len(token.text) :]
            elif token.text.startswith(self._text):
                break  # the rest of its text is held back
            self._waiting.popleft()  # listed, or its text was taken out
        return tokens

    def _name(self, token_id: int) -> str:
        text = str(self._tokenizer.decode([token_id]))
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        # A lone token loses the space that SentencePiece writes before a word.
        return f" {text}" if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" ") else text


class _Recorded:
    """An engine whose log-probabilities are recorded by the token's position in the response."""

    def __init__(self, engine: AsyncStreams, trace: Trace, measured: dict[int, tuple[int, Logprobs]]) -> None:
        self._engine = engine
        self._trace = trace
        self._measured = measured

    async def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncGenerator[Step, None]:
        position = len(self._trace.token_ids)
        async with aclosing(self._engine.astream(token_ids, sampling, watch)) as steps:
            async for step in steps:
                if sampling.logprobs is not None:
                    if step.logprobs is None:
                        raise ConnectionError("the engine gave no log-probability")
                    self._measured[position] = (step.token_id, step.logprobs)
                    position += 1
                yield step


def in_chat(tokens: Sequence[Token]) -> dict[str, Any]:
    """In the shape of `/v1/chat/completions`."""
    return {"content": [_named(t.text, t.logprob, t.top) for t in tokens], "refusal": None}


def in_text(tokens: Sequence[Token]) -> dict[str, Any]:
    """In the shape of `/v1/completions`."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _named(text: str, logprob: float, top: Sequence[tuple[str, float]] | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
    return entry if top is None else {**entry, "top_logprobs": [_named(*one) for one in top]}
