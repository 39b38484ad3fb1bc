"""Probabilities as colour on a terminal.

The lightness of the background shades falls steadily, so their order is seen with any colour vision and in greyscale;
text labelled harmful is underlined.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO

# Lowest probability of each shade and its xterm-256 background: pale yellow to dark brown.
SHADES: tuple[tuple[float, int | None], ...] = (
    (0.0, None),
    (0.01, 230),
    (0.05, 222),
    (0.2, 214),
    (0.5, 166),
    (0.9, 88),
)
RESET = "\x1b[0m"
BOLD = "\x1b[1m"
DIM = "\x1b[2m"
_LIGHT = frozenset({230, 222, 214})


def wants_colour(choice: str, stream: TextIO | None = None) -> bool:
    """Whether to colour: "always", "never", or "auto": on a terminal, unless NO_COLOR is set."""
    if choice == "auto":
        stream = stream or sys.stdout
        return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return choice == "always"


def paint(pieces: Iterable[tuple[str, float | None, bool]], coloured: bool) -> Iterator[str]:
    """Colours pieces of text: each with a flag probability (None: no background) and whether it is labelled harmful.

    Without colour, `[[` and `]]` enclose harm.
    """
    inside = False
    for text, probability, harmful in pieces:
        if not coloured and harmful != inside:
            yield "[[" if harmful else "]]"
        inside = harmful
        yield span(printable(text), probability, harmful) if coloured else printable(text)
    if inside and not coloured:
        yield "]]"


def span(text: str, probability: float | None, harmful: bool = False) -> str:
    """`text` on the background of its probability; underlined, and red where it has no shade, if it is harmful."""
    shade = None if probability is None else next(s for low, s in reversed(SHADES) if probability >= low)
    codes = []
    if shade is not None:
        codes.append(f"48;5;{shade};38;5;{16 if shade in _LIGHT else 231}")
    if harmful:
        codes.append("4" if shade is not None else "4;38;5;166")
    if not codes:
        return text
    # Line by line: a background across a line's end would fill the terminal's whole width.
    start = f"\x1b[{';'.join(codes)}m"
    return "\n".join(start + line + RESET if line else "" for line in text.split("\n"))


def style(code: str, text: str, coloured: bool = True) -> str:
    """Text in a style, such as `BOLD`."""
    return f"{code}{text}{RESET}" if coloured else text


def legend(labels: bool = False) -> str:
    """One line that explains the colours; with `labels`, also the underline of what is labelled harmful."""
    highs = [low for low, _ in SHADES[1:]] + [1.0]
    parts = [span(f" {low:g}-{high:g} ", low) for (low, _), high in zip(SHADES, highs, strict=True)]
    line = "p(flag) before each token: " + "".join(parts)
    return f"{line}  labelled harmful: {span('like this', None, True)}" if labels else line


def printable(text: str) -> str:
    """Replaces control characters, so that no file and no model controls the terminal."""
    return "".join(c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "\ufffd" for c in text)
