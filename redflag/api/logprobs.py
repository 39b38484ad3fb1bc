"""Log-probabilities of what was shown: kept as the engine gives them, and handed out with the text they belong to."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from redflag.backends import AsyncBackend, Sampling
from redflag.guard.detokenize import Detokenizer
from redflag.trace import Logprobs, Step, Text, Trace

_IMPOSSIBLE = -9999.0  # OpenAI's and vLLM's number for what has none that JSON knows


class Token(NamedTuple):
    """One token that was shown.

    Attributes:
        text: Its text; of a character that is spread over several tokens the last one has it, the others have none.
        logprob: In nats, of the language distribution.
        top: The most likely tokens there with theirs.
        offset: Characters of the response before it.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int


class ShownLogprobs:
    """The log-probabilities of one response's shown tokens.

    A token is named once its text has been shown and not before: not where it is held back, taken back, part of a stop
    text or of a flag's text that was taken out, or hidden (an end of sequence, a reflection).
    """

    def __init__(self, trace: Trace, tokenizer: Any, hidden_ids: frozenset[int], context: Sequence[int] = ()) -> None:
        """Starts before the first token.

        Args:
            trace: The response's, growing.
            tokenizer: The model's.
            hidden_ids: Ids that have no text: flags and ends of sequence.
            context: Ids that the response continues without a break.
        """
        self._trace = trace
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids
        self._pieces = Detokenizer(tokenizer, context)
        self._measured: dict[int, tuple[int, Logprobs]] = {}
        self._waiting: deque[Token] = deque()  # released, and their text not shown yet
        self._text = ""  # shown, and not yet matched with tokens
        self._offset = 0

    def of(self, backend: AsyncBackend) -> AsyncBackend:
        """The engine, whose log-probabilities are kept from now on."""
        return _Kept(backend, self._trace, self._measured)

    def shown(self, event: Text) -> list[Token]:
        """The tokens whose text is shown with this event, those that earlier events had released among them."""
        for position, token_id in enumerate(event.token_ids, event.position):
            measured_id, logprobs = self._measured.pop(position)
            assert measured_id == token_id, "another token was measured at this position"
            if token_id not in self._hidden_ids:
                top = tuple((self._name(i), value) for i, value in logprobs.top if i not in self._hidden_ids)
                chosen = logprobs.chosen if math.isfinite(logprobs.chosen) else _IMPOSSIBLE
                self._waiting.append(Token(self._pieces.push(token_id), chosen, top, 0))
        self._text += event.text
        found = []
        while self._waiting and self._text:
            token = self._waiting[0]
            if self._text.startswith(token.text):
                found.append(token._replace(offset=self._offset))
                self._offset += len(token.text)
                self._text = self._text[len(token.text) :]
            elif token.text.startswith(self._text):
                break  # the rest of its text is held
            self._waiting.popleft()  # named, or its text was taken out
        return found

    def _name(self, token_id: int) -> str:
        text = str(self._tokenizer.decode([token_id]))
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        # A lone token loses the space that SentencePiece writes before a word.
        return f" {text}" if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" ") else text


class _Kept:
    """An engine whose log-probabilities are kept, by the position that each token takes in the response."""

    def __init__(self, backend: AsyncBackend, trace: Trace, measured: dict[int, tuple[int, Logprobs]]) -> None:
        self.eos_ids = backend.eos_ids
        self.logprob_mode = backend.logprob_mode
        self.upper_bound = backend.upper_bound
        self._backend = backend
        self._trace = trace
        self._measured = measured

    async def astream(
        self, token_ids: Sequence[int], sampling: Sampling, watch: Sequence[int] = ()
    ) -> AsyncIterator[Step]:
        position = len(self._trace.token_ids)
        steps: Any = self._backend.astream(token_ids, sampling, watch)
        try:
            async for step in steps:
                if sampling.logprobs is not None:
                    if step.logprobs is None:
                        raise ConnectionError("the engine gave no log-probability")
                    self._measured[position] = (step.token_id, step.logprobs)
                    position += 1
                yield step
        finally:
            await steps.aclose()

    async def aclose(self) -> None:
        await self._backend.aclose()


def in_chat(tokens: Sequence[Token]) -> dict[str, Any]:
    """As `/v1/chat/completions` gives them."""
    return {"content": [_named(t.text, t.logprob, t.top) for t in tokens], "refusal": None}


def in_text(tokens: Sequence[Token]) -> dict[str, Any]:
    """As `/v1/completions` gives them."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(token.top) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _named(text: str, logprob: float, top: Sequence[tuple[str, float]] | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}
    return entry if top is None else {**entry, "top_logprobs": [_named(*one) for one in top]}
