"""Equal and nearly equal texts, found exactly.

Two texts are nearly equal when their sets of shingles (runs of three words, of the normalised text) have a Jaccard
similarity of at least the threshold. Candidates come from an index of rare shingles (the prefix filter of Chaudhuri and
others, ICDE 2006): sets that are similar enough share one of their first `n - ceil(threshold * n) + 1` shingles in any
fixed order, so no pair is missed, and each candidate is compared. MinHash would be faster for millions of long texts,
but would miss some.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

from redflag.errors import RedflagError

SHINGLE = 3  # words


def normalised(text: str) -> str:
    """The text in small letters, without accents, punctuation and repeated white space.

    Example:
        >>> normalised("  How do I... bake a CAFÉ-style cake?")
        'how do i bake a cafe style cake'
    """
    # A compatibility form may hold capitals (㎩ is Pa), and small letters may come apart again.
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    plain = "".join(" " if not (c.isalnum() or c.isspace()) else c for c in plain if not unicodedata.combining(c))
    return re.sub(r"\s+", " ", plain).strip()


def shingles(text: str) -> frozenset[str]:
    """Runs of three words; the whole text if it is shorter. Empty only without any letter or digit."""
    words = normalised(text).split()
    if not words:
        return frozenset()
    if len(words) < SHINGLE:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1))


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    """Jaccard similarity in [0, 1]; 1 of two empty sets."""
    return len(one & other) / len(one | other) if one or other else 1.0


def distinct(texts: Sequence[str], threshold: float = 0.8) -> list[int]:
    """Indices of the texts that are not nearly equal to an earlier one that stays.

    Args:
        threshold: Jaccard similarity from which texts count as nearly equal; 1 drops equal sets alone.

    Returns:
        Indices in ascending order. Equal texts (normalised) are never both there; no two of those there reach the
        threshold, and each one left out reaches it with one of them.

    Example:
        >>> distinct(["How do I bake bread?", "how do i bake bread", "How do I steal bread?"])
        [0, 2]
    """
    if not 0.0 < threshold <= 1.0:
        raise RedflagError(f"the threshold must be above 0 and at most 1 (got {threshold}).")
    sets = [shingles(text) for text in texts]
    counts = Counter(shingle for one in sets for shingle in one)
    index: dict[str, list[int]] = defaultdict(list)
    unique: list[int] = []
    blank: list[int] = []  # texts without a word are equal to each other
    for number, current in enumerate(sets):
        ordered = sorted(current, key=lambda shingle: (counts[shingle], shingle))
        # A rounding error in the product must not make the prefix shorter than it has to be.
        prefix = ordered[: len(ordered) - math.ceil(threshold * len(ordered) - 1e-9) + 1]
        candidates = {earlier for shingle in prefix for earlier in index[shingle]} if current else set(blank)
        if any(similarity(current, sets[earlier]) >= threshold for earlier in candidates):
            continue
        unique.append(number)
        if not current:
            blank.append(number)
        for shingle in prefix:
            index[shingle].append(number)
    return unique
