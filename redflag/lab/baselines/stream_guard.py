"""An external streaming guard, used through its own interface: Qwen3Guard-Stream (arXiv 2510.14276).

Its code comes with its weights and runs only with `trust_remote_code=True`. The interface, by its model card and the
code of its users: `stream_generate(ids)` is a generator that gives logits (risk and category of a response, the same of
a prompt) and is sent further ids; `stream_moderate_from_ids(ids, role, stream_state)` is the same with words instead of
logits: `risk_level` and `risk_prob` of the winning level; `close_stream(stream_state)` ends it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.guard.detokenize import Detokenizer
from redflag.lab.baselines import Cost
from redflag.lab.baselines.shared import BaselineContext, Floats, Read, Timing, multiplied_weights
from redflag.progress import track
from redflag.scoring.recording import Recording


def stream_guard(
    context: BaselineContext, path: str | Path | None = None, *, trust_remote_code: bool = False, strict: bool = True
) -> StreamGuard | None:
    """The guard in a local folder; None without a folder.

    Args:
        path: Folder of Qwen3Guard-Stream, code included.
        strict: Whether "controversial" counts as harmful.

    Raises:
        RedflagError: The code is not trusted, or the folder holds no such guard.
    """
    if path is None:
        return None
    if not Path(path).is_dir():
        raise RedflagError(f"path must be a local folder (got {path}). A guard is never downloaded.")
    if not trust_remote_code:
        raise RedflagError(
            f"trust_remote_code must be True to run the guard's own Python code in {path}. Read it first."
        )
    from transformers import AutoModel, AutoTokenizer

    local = {"trust_remote_code": True, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **local)
        model = AutoModel.from_pretrained(path, dtype="auto", **local)
    except Exception as error:  # Foreign code, a damaged file: it shows itself in a dozen ways.
        raise RedflagError(
            f"{path} must be the whole folder of a Qwen3Guard-Stream model ({str(error).partition(chr(10))[0]})."
        ) from error
    return StreamGuard(context, model.to(context.device).eval(), tokenizer, Path(path).name, strict)


class StreamGuard:
    """Feeds a guard what is written and reads its verdict after each of its tokens.

    A guard with another tokenizer is given whole words, each once the next one has begun (the last one when the turn
    ends); between two verdicts the last one holds.
    """

    def __init__(self, context: BaselineContext, model: Any, tokenizer: Any, called: str, strict: bool = True) -> None:
        if not hasattr(model, "stream_generate") and not hasattr(model, "stream_moderate_from_ids"):
            raise RedflagError(
                f"{called} must have stream_generate or stream_moderate_from_ids (got neither). Without them it cannot "
                "judge a response that is being written. Give a Qwen3Guard-Stream model."
            )
        self.name = "stream guard"
        self._same_tokens = tokenizer.get_vocab() == context.tokenizer.get_vocab()
        held = "" if self._same_tokens else "; it reads whole words, and its last verdict holds in between"
        counted = "controversial or unsafe" if strict else "unsafe"
        self.what = (
            f"{called} through its own streaming interface: probability of {counted}; not trained on these rows{held}."
        )
        self._context, self._model, self._tokenizer = context, model, tokenizer
        self._harmful = {"unsafe", "controversial"} if strict else {"unsafe"}
        self._timing, self._fed = Timing(), 0

    def fit(self, train: Sequence[Row]) -> None:
        """Nothing is trained."""

    def score(self, rows: Sequence[Row]) -> Recording:
        reads = self._context.read(rows)
        with self._timing.measuring(sum(len(read.judged_ids) for read in reads)):
            probs = [self._judged(read) for read in track(reads, f"scoring {self.name}", len(reads), "rows")]
        return self._context.record(reads, probs, self.name)

    def cost(self) -> Cost:
        passes = self._fed / self._timing.steps if self._timing.steps else 1.0
        return self._context.cost(
            self._timing,
            2.0 * multiplied_weights(self._model) * passes,
            "on top of the model's forward pass: a second model, one token at a time; the time holds the prompts'",
        )

    @torch.inference_mode()
    def _judged(self, read: Read) -> Floats:
        user, opening = self._prompt(read.row.messages[:-1])
        talk = _Talk(self._model, self._harmful)
        try:
            talk.prompt(user)
            verdict = 0.0
            for token in opening:
                verdict = talk.feed(token)
            probs = np.empty(len(read.judged_ids), dtype=np.float32)
            for i, tokens in enumerate(self._arriving(read)):
                for token in tokens:
                    verdict = talk.feed(token)
                self._fed += len(tokens)
                probs[i] = verdict
            return probs
        finally:
            talk.close()

    def _arriving(self, read: Read) -> Iterator[list[int]]:
        """For each step the guard's tokens that are new before it."""
        if self._same_tokens:
            yield from ([], *([token] for token in read.judged_ids[:-1]))
            return
        yield []
        waiting = ""
        pieces = map(Detokenizer(self._context.tokenizer).push, read.judged_ids[: read.tokens])
        for i, piece in zip(range(1, len(read.judged_ids)), pieces, strict=False):
            waiting += piece
            begun = re.search(r"\s+\S*$", waiting)
            # The end of the turn has no text: the last word is complete.
            cut = len(waiting) if i == read.tokens else begun.start() if begun else 0
            ready, waiting = waiting[:cut], waiting[cut:]
            yield self._ids(ready)
        for _ in range(read.tokens + 1, len(read.judged_ids)):
            yield []

    def _prompt(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Ids up to the end of the user's turn, and those with which the assistant's begins."""
        options = {"tokenize": False, "enable_thinking": False}
        user = str(self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=False, **options)).rstrip()
        whole = str(self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **options))
        return self._ids(user), self._ids(whole[len(user) :])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


class _Talk:
    """One conversation with the guard."""

    def __init__(self, model: Any, harmful: set[str]) -> None:
        self.model, self.harmful = model, harmful
        self.state: Any = None
        self.by_logits = hasattr(model, "stream_generate") and hasattr(model, "response_risk_level_map")

    def prompt(self, ids: Sequence[int]) -> None:
        """Feeds everything before the assistant's turn."""
        tokens = torch.tensor(list(ids), device=self.model.device)
        if self.by_logits:
            self.state = self.model.stream_generate(tokens)
            next(self.state)
        else:
            _, self.state = self.model.stream_moderate_from_ids(tokens, role="user", stream_state=None)

    def feed(self, token: int) -> float:
        """One more token of the assistant's turn; returns the probability of harm after it."""
        one = torch.tensor(token, device=self.model.device)
        if self.by_logits:
            logits = self.state.send(one.reshape(1))[0].reshape(-1, len(self.model.response_risk_level_map))[-1]
            probs = torch.softmax(logits.float(), dim=-1).tolist()
            levels = {int(key): str(level).lower() for key, level in self.model.response_risk_level_map.items()}
            return min(1.0, sum(p for i, p in enumerate(probs) if levels[i] in self.harmful))
        result, self.state = self.model.stream_moderate_from_ids(one, role="assistant", stream_state=self.state)
        # Only the winning level's probability is returned; another level has at most the rest.
        prob = float(result["risk_prob"][-1])
        return prob if str(result["risk_level"][-1]).lower() in self.harmful else 1.0 - prob

    def close(self) -> None:
        """Frees what the guard keeps for this conversation."""
        if self.state is not None and hasattr(self.model, "close_stream"):
            self.model.close_stream(self.state)
        self.state = None
