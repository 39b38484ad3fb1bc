"""Token ids in, text out, token by token: whole characters only, nothing after a stop text, never a flag's text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from redflag.errors import RedflagError


class Detokenizer:
    """Decodes a response token by token, special tokens left out.

    The pieces joined, `flush` included, are `tokenizer.decode(ids, skip_special_tokens=True)` of the whole response
    (without `clean_up_tokenization_spaces`, which rewrites text that was returned already). A character of several
    tokens comes with the last one. Incomplete bytes at the end become U+FFFD in `flush`, as in `decode`; invalid bytes
    in the middle too, but with byte fallback their number may differ from that of `decode`.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        """`context`: ids that the response continues without a break, such as a prefill.

        Raises:
            RedflagError: The tokenizer is not a fast one.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RedflagError(
                f"the tokenizer must be a fast one (got {type(tokenizer).__name__}). Whole characters need the decode "
                "stream of the tokenizers library. Load the model's fast tokenizer."
            )
        self._backend = backend
        # A tokenizer that drops the space before the first word keeps it behind a context.
        self._last = list(context[-8:])
        self._pending: list[int] = []
        self._stream = self._restart()

    def push(self, token_id: int) -> str:
        """The text that a token completes; "" while a character is incomplete or for a special token."""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # The library raises a plain Exception for invalid bytes: restart behind them.
            piece = self._tail()
            self._last = self._pending
            self._pending = []
            self._stream = self._restart()
            return piece
        if piece is None:
            return ""
        self._last, self._pending = self._pending, []
        return str(piece)

    def flush(self) -> str:
        """At the end of the response, what is incomplete, as `decode` shows it."""
        piece = self._tail()
        self._pending = []
        return piece

    def _tail(self) -> str:
        if not self._pending:
            return ""
        before = self._decode(self._last)
        both = self._decode(self._last + self._pending)
        return both[len(before) :] if both.startswith(before) else self._decode(self._pending)

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=True))

    def _restart(self) -> DecodeStream:
        return DecodeStream(ids=self._last, skip_special_tokens=True) if self._last else DecodeStream(None, True)


class TextFilter:
    """Cuts a text at the first stop text and removes flags' texts, also across pieces.

    Text that may be the beginning of either is held; no returned piece completes a flag's text, not even one that was
    split by another flag. Work per character does not grow with the length of the text.

    Example:
        >>> pieces = TextFilter(stop=["END"], remove=["<flag>"])
        >>> [pieces.push(piece) for piece in ("one <fl", "ag>two E", "ND three")], pieces.stopped
        (['one ', 'two ', ''], True)
    """

    def __init__(self, stop: Iterable[str] = (), remove: Iterable[str] = ()) -> None:
        self._stop = tuple(stop)
        self._remove = tuple(remove)
        self._patterns = self._stop + self._remove
        self._memory = max((len(pattern) for pattern in self._patterns), default=1) - 1
        # The last shown text that can be part of a pattern, `_shown` characters, and behind it the held text.
        self._line = ""
        self._shown = 0
        self.stop_text: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether there was a stop text."""
        return self.stop_text is not None

    def push(self, text: str) -> str:
        """Adds text, and returns what may be shown."""
        if self.stopped:
            return ""
        if not self._patterns:
            return text
        pieces = []
        for character in text:
            self._line += character
            if cut := self._cut(self._stop):
                self.stop_text = cut
                pieces.append(self._show(len(self._line)))
                break
            self._cut(self._remove)
            pieces.append(self._show(len(self._line) - self._held()))
        return "".join(pieces)

    def flush(self) -> str:
        """At the end of the text, what was held."""
        return "" if self.stopped else self._show(len(self._line))

    def _cut(self, patterns: tuple[str, ...]) -> str:
        # The longest, so that nothing of it stays when a shorter one is its end.
        pattern = max((pattern for pattern in patterns if self._line.endswith(pattern)), key=len, default="")
        if pattern:
            self._line = self._line[: max(self._shown, len(self._line) - len(pattern))]
        return pattern

    def _held(self) -> int:
        """Length of the longest end of the line that begins a pattern."""
        longest = 0
        for pattern in self._patterns:
            if pattern[0] not in self._line:  # the usual case
                continue
            lengths = range(min(len(pattern) - 1, len(self._line)), longest, -1)
            longest = next((length for length in lengths if self._line.endswith(pattern[:length])), longest)
        return longest

    def _show(self, upto: int) -> str:
        piece = self._line[self._shown : upto]
        self._shown = max(self._shown, upto)
        surplus = self._shown - self._memory
        if surplus > 0:
            self._line = self._line[surplus:]
            self._shown -= surplus
        return piece


class ResponseText:
    """The text of one response as its reader may see it: `Detokenizer`, then `TextFilter`."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        hidden_ids: Iterable[int] = (),
        context: Sequence[int] = (),
        stop: Iterable[str] = (),
        remove: Iterable[str] = (),
        until: int | None = None,
        skip: str = "",
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """Starts before the first token.

        Args:
            hidden_ids: Ids without text: end-of-sequence ids (not every tokenizer calls them special) and flags.
            context: Ids that the response continues without a break.
            stop: Texts that end the response; `remove`: flags' texts.
            until: The id that ends a thought; from it on there is no text.
            skip: Characters to strip from the beginning: white space between thought and answer.
            marks: Id -> text in place of its own (`redflag.tool_prompt.mark_ids`), for a reader of tool calls.
        """
        self._until = until
        self._over = False
        self._skip = skip
        self._marks = marks or {}
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, context)
        self._filter = TextFilter(stop, remove)
        self._hidden_ids = frozenset(hidden_ids)

    @property
    def stop_text(self) -> str | None:
        """The stop text that ended the response."""
        return self._filter.stop_text

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token."""
        self._over = self._over or token_id == self._until
        if self._over or token_id in self._hidden_ids:
            return ""
        piece = self._detokenizer.push(token_id)
        if token_id in self._marks:
            # Text in front of the mark's own belongs to the tokens before.
            piece = piece.removesuffix(self._tokenizer.convert_ids_to_tokens(token_id)) + self._marks[token_id]
        if self._skip and (piece := piece.lstrip(self._skip)):
            self._skip = ""
        return self._filter.push(piece)

    def flush(self) -> str:
        """The rest, when the response has ended by itself."""
        return self._filter.push(self._detokenizer.flush()) + self._filter.flush()
