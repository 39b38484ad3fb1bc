"""Answers cached in a file, so that no question is asked twice and interrupted work can continue."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from redflag.errors import RedflagError
from redflag.files import append_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Answer = TypeVar("Answer", bound="DataclassInstance")


class Kept(Generic[Answer]):
    """Answers in a JSONL file by key.

    Each answer is appended at once, as one line in one call; a line cut off by a crash is skipped. Thread-safe. Several
    processes may share a file; each sees the answers that were in it when it started.

    Args:
        path: The file, created with the first answer.
        kind: The dataclass of the answers; its fields are those of a line, besides `key`.

    Raises:
        RedflagError: The file cannot be read.
    """

    def __init__(self, path: str | Path, kind: Callable[..., Answer]) -> None:
        self._path = Path(path)
        self._kind = kind
        self._lock = threading.Lock()
        self._answers = self._load()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def add(self, key: str, answer: Answer) -> None:
        """Caches an answer.

        Raises:
            RedflagError: The file cannot be written.
        """
        line = json.dumps({"key": key, **asdict(answer)}).encode() + b"\n"
        with self._lock:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                append_line(self._path, line)
            except OSError as error:
                raise RedflagError(
                    f"{self._path} must be writable (got {error.strerror or error}): answers are kept in it. Make "
                    "room or fix the path, and repeat the command"
                ) from error
            self._answers[key] = answer

    def _load(self) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return answers
        except OSError as error:
            raise RedflagError(
                f"{self._path} must be readable (got {error.strerror or error}): answers are kept in it, and all would "
                "be asked again. Fix the path or choose another one"
            ) from error
        for line in lines:
            try:
                record: dict[str, Any] = json.loads(line)
                key = str(record.pop("key"))
                answers[key] = self._kind(**record)
            except (AttributeError, KeyError, RecursionError, TypeError, ValueError):  # cut off by a crash
                continue
        return answers
