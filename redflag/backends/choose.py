"""From logits to a step: measure the flags, hide them, sample a token. The order matters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from redflag.backends import Matcher, Sampling
from redflag.trace import Logprobs, Step
from redflag.weights.precision import widest


def measure(logits: torch.Tensor, flag_ids: torch.Tensor) -> torch.Tensor:
    """Flag probabilities over the whole vocabulary, flags included.

    Args:
        logits: Raw logits, float32, shape `(..., V)`.
        flag_ids: The K flag ids, int64.

    Returns:
        Probabilities in [0, 1], float32, shape `(..., K)`. A position whose logits cannot be normalised (NaN or an
        infinite sum) is NaN in all K.

    Example:
        >>> measure(torch.zeros(1, 4), torch.tensor([3]))
        tensor([[0.2500]])
    """
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    total = torch.where(torch.isfinite(total), total, torch.nan)
    return torch.exp(logits.index_select(-1, flag_ids) - total)


class Chooser:
    """Samples the tokens of B responses that are decoded in one batch.

    transformers' own processors do the work, in the order in which `generate` applies them. Row i has its own
    generator, seeded with `seed + i`, so its samples do not depend on the rows beside it.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        flag_ids: torch.Tensor,
        device: torch.device,
        watch: Sequence[int] = (),
    ) -> None:
        """Prepares the processors.

        Args:
            prompts: B prompts; only a repetition penalty reads them.
            flag_ids: The K flag ids, on `device`, which is that of the logits.
            watch: Ids that are measured in place of the flags.
        """
        self._flag_ids = flag_ids
        self._watch = torch.tensor(list(watch), dtype=torch.long, device=device) if watch else flag_ids
        self._greedy = sampling.greedy
        self._logprobs = sampling.logprobs
        self._generators: list[torch.Generator | None] = [
            None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed + row)
            for row in range(len(prompts))
        ]
        grammar = sampling.grammar
        self._matchers: list[Matcher] = [] if grammar is None else [grammar.begin() for _ in prompts]
        self._flags = flag_ids.tolist() if self._matchers else []
        self._penalty = None
        self._seen: list[torch.Tensor] = []
        if sampling.repetition_penalty != 1.0:
            self._penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            self._seen = [torch.tensor([list(prompt)], device=device) for prompt in prompts]
        warpers = LogitsProcessorList()
        if not self._greedy:
            if sampling.temperature != 1.0:
                warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                warpers.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                warpers.append(MinPLogitsWarper(sampling.min_p))
        self._warpers = warpers

    @torch.inference_mode()
    def step(self, logits: torch.Tensor, rows: Sequence[int]) -> list[Step]:
        """Measures and chooses for the rows that are still running.

        Args:
            logits: Raw logits of the next position, shape `(len(rows), V)`, any float type. Overwritten.
            rows: For each row of `logits`, which of the B responses it belongs to.

        Returns:
            One step per row. A row whose logits cannot be normalised has NaN probabilities and an arbitrary token.

        Raises:
            RuntimeError: The grammar leaves no token to choose.
        """
        # 1. Measure, before anything changes the logits. 2. Hide the flags. 3. Choose among the rest.
        scores = logits.float()
        probs = measure(scores, self._watch)
        scores[:, self._flag_ids] = -math.inf
        language = None if self._logprobs is None else torch.log_softmax(scores, dim=-1)
        if self._matchers:
            # The grammar comes after the measurement, which is over all tokens.
            scores.masked_fill_(self._refused(rows, scores.shape[-1]), -math.inf)
        if self._penalty is not None:
            # Row by row: responses differ in length, and the penalty needs a rectangular tensor of ids.
            scores = torch.cat([self._penalty(self._seen[row], scores[i : i + 1]) for i, row in enumerate(rows)])
        if self._greedy:
            tokens = scores.argmax(dim=-1, keepdim=True)
        else:
            tokens = self._draw(self._warpers(None, scores), rows)
        # One transfer per step: float32 holds every id below 2^24 exactly.
        table = torch.cat([tokens.float(), probs], dim=-1).tolist()
        steps = [Step(int(token), tuple(flags)) for token, *flags in table]
        if language is not None:
            named = self._named(language, tokens)
            steps = [step._replace(logprobs=logprobs) for step, logprobs in zip(steps, named, strict=True)]
        if self._matchers:
            for row, step in zip(rows, steps, strict=True):
                if not self._matchers[row].accept(step.token_id) and not any(map(math.isnan, step.flag_probs)):
                    raise RuntimeError(f"token {step.token_id} was chosen, which the grammar does not allow")
        if self._penalty is not None:
            for i, row in enumerate(rows):
                self._seen[row] = torch.cat([self._seen[row], tokens[i : i + 1]], dim=-1)
        return steps

    def _named(self, language: torch.Tensor, tokens: torch.Tensor) -> list[Logprobs]:
        """Log-probabilities of the chosen tokens, shape `(B, 1)`, and of the most likely ones."""
        most = language.topk(min(self._logprobs or 0, language.shape[-1]), dim=-1)
        rows = zip(language.gather(-1, tokens).tolist(), most.indices.tolist(), most.values.tolist(), strict=True)
        # Impossible tokens are left out, above all the flags.
        return [
            Logprobs(chosen, tuple((i, value) for i, value in zip(ids, values, strict=True) if value > -math.inf))
            for [chosen], ids, values in rows
        ]

    def _refused(self, rows: Sequence[int], vocabulary: int) -> torch.Tensor:
        """True where a row's grammar does not allow a token, shape `(len(rows), V)`."""
        allowed = np.zeros((len(rows), vocabulary), dtype=bool)
        for i, row in enumerate(rows):
            mask = np.frombuffer(self._matchers[row].mask(), dtype=np.uint8)
            bits = np.unpackbits(mask, bitorder="little")[:vocabulary]
            allowed[i, : len(bits)] = bits
        allowed[:, self._flags] = False
        if not allowed.any(axis=-1).all():
            raise RuntimeError("the grammar leaves no token to choose")
        return torch.from_numpy(~allowed).to(self._flag_ids.device)

    def _draw(self, scores: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """One token per row by inverting the cumulative distribution, shape `(len(rows), 1)`.

        `torch.multinomial` needs V random numbers instead of one, and on a GPU its check for NaN is an assertion that
        kills the process. A token of probability 0 is never sampled: the cumulative sum does not grow at it, and the
        sampled point lies below the total even after rounding. In single precision neither is certain if a device adds
        in another order; then the likeliest token replaces an impossible one.
        """
        wide = widest(scores.device)
        probs = torch.softmax(scores, dim=-1)
        sums = probs.cumsum(dim=-1, dtype=wide)
        points = torch.cat(
            [torch.rand((1, 1), dtype=wide, device=sums.device, generator=self._generators[row]) for row in rows]
        )
        tokens = torch.searchsorted(sums, points * sums[:, -1:], right=True)
        tokens = tokens.clamp_max_(sums.shape[-1] - 1)  # beyond the end only where there is NaN
        if wide == torch.float64:
            return tokens
        return torch.where(probs.gather(-1, tokens) > 0, tokens, probs.argmax(dim=-1, keepdim=True))
