"""Where sentences end in a text that comes in pieces, one per token."""

from __future__ import annotations

import re
from collections import deque

# A full stop may be part of a number or a name unless white space follows; these marks need none.
_END = re.compile(r"[.!?…][\"'”’»)\]*_]*$")
_CLOSED = re.compile(r"(\n|[。！？][\"'”’」』）]*)$")


class Sentences:
    """Counts the tokens of complete sentences.

    A sentence ends before a piece that begins with white space and follows one of `. ! ? …` (closing quotes and
    brackets may stand between), after `。 ！ ？`, and around a line break. An end inside a piece does not count: a
    token is released as a whole, and would release the beginning of the next sentence.

    Example:
        >>> sentences = Sentences()
        >>> [sentences.whole(piece, upto) for upto, piece in enumerate(["It", " costs", " 3", ".", "5", ".", " So"], 1)]
        [0, 0, 0, 0, 0, 0, 6]
    """

    def __init__(self) -> None:
        self._tail = ""
        self._tokens = 0
        self._ends: deque[int] = deque()
        self._whole = 0

    def whole(self, piece: str, upto: int) -> int:
        """Adds the next token's text.

        Args:
            piece: The text; may be empty.
            upto: Number of tokens that may be released; it never falls.

        Returns:
            How many of them form complete sentences.
        """
        if piece and (piece[0] == "\n" or (piece[0].isspace() and _END.search(self._tail))):
            self._ends.append(self._tokens)
        self._tokens += 1
        # Enough text for closing quotes behind a full stop.
        self._tail = (self._tail + piece)[-8:]
        if piece and _CLOSED.search(self._tail):
            self._ends.append(self._tokens)
        while self._ends and self._ends[0] <= upto:
            self._whole = self._ends.popleft()
        return self._whole
