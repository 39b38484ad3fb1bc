"""Token ids in, text out, token by token: whole characters only, nothing after a stop text, never a flag's text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from redflag.errors import RedflagError


class Detokenizer:
    """Decodes a response token by token, special tokens left out.

    The pieces put together, `flush` included, are what `tokenizer.decode(ids, skip_special_tokens=True)` gives for the
    whole response (without `clean_up_tokenization_spaces`, which rewrites text that is already out). A character that
    is spread over several tokens comes with its last one. Bytes still incomplete at the end come from `flush` as the
    replacement character U+FFFD, as in `decode`; invalid bytes in the middle likewise, though a tokenizer with byte
    fallback may show another number of replacement characters than `decode` does.

    Example:
        ```python
        detokenizer = Detokenizer(tokenizer)
        text = "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()
        ```
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        """Starts before the first token.

        Args:
            tokenizer: A fast tokenizer of transformers.
            context: Ids that the response continues without a break, such as a prefill. Only their last few matter:
                a tokenizer that drops the space before the first word keeps it then.

        Raises:
            RedflagError: The tokenizer is not backed by the tokenizers library.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RedflagError(
                f"{type(tokenizer).__name__} is not backed by the tokenizers library, whose decode stream is needed to "
                "show whole characters; load the model's fast tokenizer."
            )
        self._backend = backend
        self._last = list(context[-8:])
        self._pending: list[int] = []
        self._stream = self._restart()

    def push(self, token_id: int) -> str:
        """The text that a token completes; "" while a character is incomplete or for a special token."""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception:  # The library raises its plain Exception where bytes are invalid in a run: start behind it.
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
        """What is still incomplete, as `decode` shows it. The response is over."""
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
    """Cuts a text at the first stop text and takes flags' texts out, however they fall across pieces.

    Text that may yet turn out to be the beginning of either is held; no piece that leaves completes a flag's text, not
    even one that was split by another flag. Work per character does not grow with the length of the text.

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
        # What was shown last, as far as it can be part of a pattern, and behind it what is held.
        self._line = ""
        self._shown = 0
        self.stop_text: str | None = None  # which one came

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self.stop_text is not None

    def push(self, text: str) -> str:
        """What may be shown now."""
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
        """What was held and is no stop text or flag after all. The text is over."""
        return "" if self.stopped else self._show(len(self._line))

    def _cut(self, patterns: tuple[str, ...]) -> str:
        # The longest first, so that nothing of it stays when a shorter one is its end.
        found = max((pattern for pattern in patterns if self._line.endswith(pattern)), key=len, default="")
        if found:
            self._line = self._line[: max(self._shown, len(self._line) - len(found))]
        return found

    def _held(self) -> int:
        longest = 0
        for pattern in self._patterns:
            if pattern[0] not in self._line:  # Nearly always.
                continue
            for length in range(min(len(pattern) - 1, len(self._line)), longest, -1):
                if self._line.endswith(pattern[:length]):
                    longest = length
                    break
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
            tokenizer: A fast tokenizer of transformers.
            hidden_ids: Ids without text: end-of-sequence ids (not every tokenizer calls them special) and flags.
            context: Ids that the response continues without a break.
            stop: Texts that end the response.
            remove: Flags' texts.
            until: An id from which on there is no text: what ends a thought.
            skip: Characters that are left out as long as there is no other: white space between thought and answer.
            marks: Ids in place of whose text stands another, also where they have none: for a reader of tool calls
                (`redflag.tool_prompt.mark_ids`), who takes it out again.
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
        """The stop text that has come; None without one."""
        return self._filter.stop_text

    def push(self, token_id: int) -> str:
        """The text that may be shown after this token."""
        self._over = self._over or token_id == self._until
        if self._over or token_id in self._hidden_ids:
            return ""
        piece = self._detokenizer.push(token_id)
        if token_id in self._marks:
            # What comes with it belongs to the tokens before.
            piece = piece.removesuffix(self._tokenizer.convert_ids_to_tokens(token_id)) + self._marks[token_id]
        if self._skip and (piece := piece.lstrip(self._skip)):
            self._skip = ""
        return self._filter.push(piece)

    def flush(self) -> str:
        """What is left when the response has ended by itself."""
        return self._filter.push(self._detokenizer.flush()) + self._filter.flush()
