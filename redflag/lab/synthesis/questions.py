"""Questions to a model, and a cache of its answers."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from redflag.kept import Kept


@dataclass(frozen=True)
class Question:
    """One question to a model."""

    # the conversation. A last assistant message is the beginning of the answer, to be continued
    messages: tuple[Mapping[str, str], ...]
    temperature: float = 1.0  # 0 always takes the most likely token
    max_tokens: int = 512  # maximum number of tokens of the answer
    seed: int = 0  # seed of sampling; distinguishes repeated questions

    def key(self, identity: str) -> str:
        """The key of its answer: a SHA-256 in hex of the model's identity and the whole question."""
        turns = [[message["role"], message["content"]] for message in self.messages]
        parts = [identity, turns, self.temperature, self.max_tokens, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str  # the generated text, without a prefill
    finish: str = "stop"  # `stop`, `length` (cut off by the limit), or `refused` (the server refused the question)
    tokens_in: int = 0  # tokens of the question, as far as known
    tokens_out: int = 0  # tokens of the answer, as far as known

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a text (got {self.text!r})")


class Writer(Protocol):
    """A text generator."""

    identity: str  # identifies the model, so that answers of different models are not mixed up

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """Asks all questions, and passes on each answer as it arrives, in any order.

        Args:
            keep: Callback with the index of a question and its answer. Called from one thread at a time.

        Raises:
            RedflagError: The model cannot be reached any more; answers passed on before are valid.
        """
        ...


class CachedWriter:
    """A writer whose answers are cached in a JSONL file (`redflag.kept.Kept`), each as soon as it arrives.

    Attributes:
        asked: Number of questions sent to the writer.
        tokens_in: Tokens of these questions.
        tokens_out: Tokens of their answers.

    Example:
        ```python
        writer = CachedWriter(RemoteWriter("http://127.0.0.1:8000/v1", "writer"), "answers.jsonl")
        writer.ask([Question(({"role": "user", "content": "Hi"},))])  # [Reply(text='Hello.', ...)]
        ```
    """

    def __init__(self, writer: Writer, path: str | Path) -> None:
        self.asked = self.tokens_in = self.tokens_out = 0
        self._writer = writer
        self._lock = threading.Lock()
        self._cache = Kept(path, Reply)

    def __len__(self) -> int:
        return len(self._cache)

    def ask(
        self, questions: Sequence[Question], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Reply]:
        """Answers in the order of the questions, cached and new ones; equal questions are asked once.

        Raises:
            RedflagError: The writer cannot be asked any further. Its answers so far are cached.
        """
        by_key = {question.key(self._writer.identity): question for question in questions}
        missing = [key for key in by_key if key not in self._cache]
        done = len(by_key) - len(missing)

        def keep(index: int, reply: Reply) -> None:
            nonlocal done
            with self._lock:
                self._cache.add(missing[index], reply)
                self.asked += 1
                self.tokens_in += reply.tokens_in
                self.tokens_out += reply.tokens_out
                done += 1
                on_progress(done, len(by_key))

        if missing:
            self._writer.ask([by_key[key] for key in missing], keep)
        return [self._cache[question.key(self._writer.identity)] for question in questions]
