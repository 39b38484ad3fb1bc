"""Shared by the demos: stages that are skipped when they are done, and quiet libraries."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from redflag.files import keep_json, kept_json

# Settings of a training run of which only the result is wanted.
UNATTENDED: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False}


class Stages:
    """Which stages are done, with a fingerprint of their settings and of all stages before."""

    def __init__(self, path: Path, log: Callable[[str], None]) -> None:
        self.path, self.log, self.chain = path, log, ""
        self.seconds: dict[str, float] = {}
        self.done: dict[str, Any] = kept_json(path) or {}

    def run(self, name: str, settings: dict[str, Any], files: Iterable[Path], make: Callable[[], object]) -> bool:
        """Makes a stage's files and returns True, unless they exist from the same settings and earlier stages."""
        self.chain = hashlib.sha256((self.chain + name + json.dumps(settings, sort_keys=True)).encode()).hexdigest()
        cached = self.done.get(name, {})
        self.seconds[name] = float(cached.get("seconds", 0.0))
        if cached.get("fingerprint") == self.chain and all(path.exists() for path in files):
            self.log(f"== {name}: done before")
            return False
        self.log(f"== {name}")
        start = time.monotonic()
        make()
        self.seconds[name] = round(time.monotonic() - start, 1)
        self.done[name] = {"fingerprint": self.chain, "seconds": self.seconds[name]}
        keep_json(self.path, self.done, indent=2)
        self.log(f"   {self.seconds[name]:.0f} s")
        return True


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the loading bars and notices of libraries, which would drown the demo's own output."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    loggers = [logging.getLogger(name) for name in ("trl", "peft", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
