"""The text that has been written so far, token by token, as somebody who reads along has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_BROKEN = "\ufffd"


def growing_text(tokenizer: Any, token_ids: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text; a character of several tokens comes with its last one.

    The pieces end to end are the text of all tokens, but for a character that the last ones leave unfinished. A piece
    depends on the tokens up to its own alone.

    Args:
        tokenizer: A tokenizer of transformers.
        token_ids: The response.
    """
    # Some tokenizers drop the space of a first token, so a piece is read off behind tokens whose text is known.
    known, first = 0, 0
    for end in range(1, len(token_ids) + 1):
        before = tokenizer.decode(token_ids[first:known], skip_special_tokens=True) if known > first else ""
        text = tokenizer.decode(token_ids[first:end], skip_special_tokens=True)
        # Four tokens with nothing but pieces of characters are no character any more.
        if text.endswith(_BROKEN) and end - known < 4:
            yield ""
            continue
        yield text[len(before) :]
        first, known = known, end
