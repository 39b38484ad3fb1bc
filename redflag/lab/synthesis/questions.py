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
    """One question to a model.

    Attributes:
        messages: The conversation. A last assistant message is the beginning of the answer, to be continued.
        temperature: 0 always takes the most likely token.
        max_tokens: Maximum number of tokens of the answer.
        seed: Seed of sampling; distinguishes repeated questions.
    """

    messages: tuple[Mapping[str, str], ...]
    temperature: float = 1.0
    max_tokens: int = 512
    seed: int = 0

    def key(self, identity: str) -> str:
        """The key of its answer: a SHA-256 in hex of the model's identity and the whole question."""
        turns = [[message["role"], message["content"]] for message in self.messages]
        asked = [identity, turns, self.temperature, self.max_tokens, self.seed]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        text: The generated text, without a prefill.
        finish: `stop`, `length` (cut off by the limit), or `refused` (the server refused the question).
        tokens_in: Tokens of the question, as far as known.
        tokens_out: Tokens of the answer, as far as known.
    """

    text: str
    finish: str = "stop"
    tokens_in: int = 0
    tokens_out: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TypeError(f"text must be a text (got {self.text!r})")


class Model(Protocol):
    """A text generator."""

    @property
    def identity(self) -> str:
        """Identifies the model, so that answers of different models are not mixed up."""
        ...

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """Asks all questions, and passes on each answer as it arrives, in any order.

        Args:
            keep: Callback with the index of a question and its answer. Called from one thread at a time.

        Raises:
            RedflagError: The model cannot be reached any more; answers passed on before are valid.
        """
        ...


class KeptAnswers:
    """A model whose answers are cached in a JSONL file (`redflag.kept.Kept`), each as soon as it arrives.

    A question that occurs several times in a list is asked once.

    Attributes:
        asked: Number of questions sent to the model.
        tokens_in: Tokens of these questions.
        tokens_out: Tokens of their answers.

    Example:
        ```python
        kept = KeptAnswers(Endpoint("http://127.0.0.1:8000/v1", "writer"), "answers.jsonl")
        kept.ask([Question(({"role": "user", "content": "Hi"},))])  # [Reply(text='Hello.', ...)]
        ```
    """

    def __init__(self, model: Model, path: str | Path) -> None:
        """Reads the cached answers.

        Raises:
            RedflagError: The file cannot be read.
        """
        self.asked = self.tokens_in = self.tokens_out = 0
        self._model = model
        self._lock = threading.Lock()
        self._kept = Kept(path, Reply)

    def __len__(self) -> int:
        return len(self._kept)

    def ask(
        self, questions: Sequence[Question], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> list[Reply]:
        """Answers in the order of the questions, kept ones and new ones.

        Args:
            questions: What is asked.
            on_progress: Callback that gets how many of the questions have answers, after each.

        Raises:
            RedflagError: The model cannot be asked any further. What it answered is kept.
        """
        keys = [question.key(self._model.identity) for question in questions]
        open_keys = list(dict.fromkeys(key for key in keys if key not in self._kept))
        first = {key: question for key, question in zip(reversed(keys), reversed(questions), strict=True)}
        done = len(set(keys)) - len(open_keys)

        def keep(index: int, reply: Reply) -> None:
            nonlocal done
            with self._lock:
                self._kept.add(open_keys[index], reply)
                self.asked += 1
                self.tokens_in += reply.tokens_in
                self.tokens_out += reply.tokens_out
                done += 1
                on_progress(done, len(first))

        if open_keys:
            self._model.ask([first[key] for key in open_keys], keep)
        return [self._kept[key] for key in keys]
