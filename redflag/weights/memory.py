"""Training on a CPU keeps the memory of its large tensors from step to step, where glibc would return it each time.

glibc asks the kernel for every tensor of more than 32 MB, and gives it back with the tensor; what is asked for anew is
zeroed and faulted in page by page, which can cost as much as the arithmetic. Memory that is never given back is cut
into pieces by batches of many lengths, and grows. So it is kept, and given back as a whole when it has grown.
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
_OTHERS = ("tcmalloc", "jemalloc", "mimalloc")  # preloaded, they keep memory by themselves
_GROWTH = 1.5  # times what a step needs that began with nothing kept; docs/log.md has others


class KeepMemory(TrainerCallback):
    """Does so while a model trains on the CPU, in programs that use glibc's allocator; otherwise nothing."""

    def __init__(self) -> None:
        self._libc: Any = None
        self._needed = 0
        self._fresh = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps memory from now on."""
        self._libc = _glibc() if args.device.type == "cpu" else None
        self._needed, self._fresh = 0, True
        self._set(_KEEP)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Returns what has become too much."""
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
        """Leaves everything as it was."""
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
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
