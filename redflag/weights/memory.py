"""Keeps the memory of large tensors between steps of training on a CPU, which glibc would return each time.

glibc asks the kernel for every tensor of more than 32 MB, and returns the memory with the tensor; new memory is zeroed
and faulted in page by page, which can cost as much as the arithmetic. Memory that is never returned is fragmented by
batches of many lengths, and grows. So it is kept, and returned as a whole when it has grown.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_KEEP = {-4: 0, -1: 2**31 - 1, -2: 1 << 28}  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
_RETURN = {-4: 65_536, -1: 1 << 17, -2: 1 << 17}  # glibc's defaults
_OTHERS = ("tcmalloc", "jemalloc", "mimalloc")  # allocators that keep memory themselves, if preloaded
_GROWTH = 1.5  # limit, as a multiple of what a step without kept memory needs; docs/log.md compares others


class KeepMemory(TrainerCallback):
    """Keeps memory while a model trains on the CPU with glibc's allocator; does nothing otherwise."""

    def __init__(self) -> None:
        self._libc: Any = None
        self._needed = 0
        self._fresh = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts keeping memory."""
        self._libc = _glibc() if args.device.type == "cpu" else None
        self._needed, self._fresh = 0, True
        self._set(_KEEP)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Returns the memory if it has grown too much."""
        if self._libc is None:
            return
        held = _held()
        if self._fresh:
            self._needed, self._fresh = max(self._needed, held), False
        elif held > _GROWTH * self._needed:
            self._libc.malloc_trim(0)
            self._fresh = True

    on_substep_end = on_prediction_step = on_step_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores glibc's defaults and returns the memory."""
        self._set(_RETURN)
        if self._libc is not None:
            self._libc.malloc_trim(0)

    def _set(self, values: dict[int, int]) -> None:
        for name, value in values.items():
            if self._libc is not None:
                self._libc.mallopt(name, value)


def _glibc() -> Any:
    """The C library, if it is glibc and its own allocator is in use."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        if platform.libc_ver()[0] != "glibc" or any(name in maps for name in _OTHERS):
            return None
        libc = ctypes.CDLL(None)
    except OSError:
        return None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _held() -> int:
    """Resident memory of the process, bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
