"""Generates texts for synthesis with a model in this process, or any backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from redflag.backends import Backend, Sampling
from redflag.backends.open import open_writer
from redflag.flags import FlagSpec
from redflag.lab.synthesis.questions import Question, Reply
from redflag.prompt import render_prompt
from redflag.weights.stamp import stamped_name


class LocalModel:
    """Generates answers with a backend. Flags are never chosen.

    With a backend that completes prompts in batches, questions with equal settings and consecutive seeds share a batch;
    each is sampled with its own seed, so its answer does not depend on the others, up to rounding.
    """

    def __init__(
        self, backend: Backend, tokenizer: Any, spec: FlagSpec, identity: str, *, batch_size: int = 16
    ) -> None:
        self.identity = identity
        self._backend = backend
        self._tokenizer = tokenizer
        self._spec = spec
        self._batch_size = batch_size if hasattr(backend, "complete") else 1
        self._hidden = set(spec.ids) | set(backend.eos_ids)

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Reply], None]) -> None:
        """As `redflag.lab.synthesis.questions.Writer.ask`; a question that does not fit the context is `refused`."""
        context = getattr(self._backend, "context_length", None)
        prompts = [render_prompt(self._tokenizer, list(question.messages), self._spec) for question in questions]
        fitting = []
        for index, prompt in enumerate(prompts):
            if context is None or len(prompt) < context:
                fitting.append(index)
            else:
                keep(index, Reply("", "refused", len(prompt)))
        for batch in _batches(questions, fitting, self._batch_size):
            first = questions[batch[0]]
            sampling = Sampling(first.max_tokens, first.temperature, seed=first.seed)
            responses = self._complete([prompts[index] for index in batch], sampling)
            for index, ids in zip(batch, responses, strict=True):
                ended = bool(ids) and ids[-1] in self._backend.eos_ids
                text = self._tokenizer.decode([i for i in ids if i not in self._hidden], skip_special_tokens=True)
                keep(index, Reply(text, "stop" if ended else "length", len(prompts[index]), len(ids)))

    def _complete(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        if complete := getattr(self._backend, "complete", None):
            responses = complete(prompts, sampling, batch_size=self._batch_size)
        else:  # a batch of one
            responses = [list(self._backend.stream(prompt, sampling)) for prompt in prompts]
        return [[step.token_id for step in steps] for steps in responses]


def load_local(name: str | Path, *, device: str = "auto", dtype: str = "auto", batch_size: int = 16) -> LocalModel:
    """A model from a folder or the hub, flagged or not."""
    backend, tokenizer, spec = open_writer(name, device=device, dtype=dtype)
    return LocalModel(backend, tokenizer, spec, f"local {stamped_name(name)}", batch_size=batch_size)


def _batches(questions: Sequence[Question], indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Neighbours of equal settings whose seeds follow each other, `size` at most: indices of questions."""
    batch: list[int] = []
    for index in indices:
        if batch:
            first, this = questions[batch[0]], questions[index]
            expected = (first.temperature, first.max_tokens, first.seed + len(batch))
            if len(batch) == size or (this.temperature, this.max_tokens, this.seed) != expected:
                yield batch
                batch = []
        batch.append(index)
    if batch:
        yield batch
