"""Caches the keys and values of the last prompt and response for the next prompt with the same beginning.

Stopping a stream, editing its end and streaming again costs only the edited part. Only one cache is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any


class PrefixSlot:
    """Holds at most one cache. Taking empties the slot, so two streams never write into the same cache."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cached: tuple[Any, list[int], Mapping[int, Any]] | None = None

    def put(self, cache: Any, token_ids: list[int], measured: Mapping[int, Any] | None = None) -> None:
        """Stores a cache that holds exactly `token_ids`, in place of the previous one.

        `measured` is what was measured before tokens, by their positions; the position behind the last may be there.
        """
        with self._lock:
            self._cached = (cache, token_ids, measured or {})

    def take(
        self, token_ids: Sequence[int], needed: Sequence[int] = (), stored: dict[int, Any] | None = None
    ) -> tuple[Any, int] | None:
        """Returns the stored cache, cropped to the common prefix with a prompt.

        Args:
            token_ids: The new prompt.
            needed: Positions in it, ascending and above 0, whose measurements are needed. The cache is cropped so that
                those which were not stored can be made.
            stored: Gets the stored measurements of the others.

        Returns:
            The cache and how many of the prompt's tokens it holds: at least one, and at most all but the last, which
            must be run to get logits. None if nothing can be reused; the stored cache is then freed.
        """
        with self._lock:
            cached, self._cached = self._cached, None
        if cached is None:
            return None
        cache, cached_ids, measured = cached
        common = _common_prefix(cached_ids, token_ids[:-1])
        # What stands before token p is measured by running token p - 1.
        missing = next((p for p in needed if p <= common and p not in measured), None)
        common = common if missing is None else missing - 1
        if common == 0 or not crop(cache, len(cached_ids) - common):
            return None
        if stored is not None:
            stored.update((p, measured[p]) for p in needed if p <= common)
        return cache, common

    def clear(self) -> None:
        """Frees the stored cache."""
        with self._lock:
            self._cached = None


def crop(cache: Any, count: int) -> bool:
    """Removes the last `count` tokens from a transformers cache, if that leaves exactly the earlier state.

    A sliding-window layer that has filled its window has dropped keys that the shorter state would need, and a
    recurrent layer cannot be rewound: their caches are not cropped.

    Returns:
        Whether the cache is now shorter by `count`; otherwise it is unchanged.
    """
    if count == 0:
        return True
    for layer in cache.layers:
        window_full = getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window
        recurrent = hasattr(layer, "conv_states")
        if window_full or recurrent or not getattr(layer, "is_croppable", True):
            return False
    # A negative number means "remove this many" in all of transformers 5; the meaning of a positive one has changed.
    cache.crop(-count)
    return True


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
