"""Learning answers: cross-entropy on their tokens, plain or constrained, and rows for deep alignment.

Both come from "Safety alignment should be made more than just a few tokens deep" (Qi et al., arXiv 2406.05946).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from redflag.data.rows import Row
from redflag.errors import RedflagError
from redflag.training.encode import onset_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def places_in_answer(row_N: torch.Tensor) -> torch.Tensor:
    """Place of each answer token in its own answer, from 1; tokens of one row stand next to each other."""
    index = torch.arange(len(row_N), device=row_N.device)
    begins = torch.ones_like(index, dtype=torch.bool)
    begins[1:] = row_N[1:] != row_N[:-1]
    return index - torch.where(begins, index, 0).cummax(0).values + 1 if len(index) else index


def constraint_weights(
    log_probs_N: torch.Tensor, reference_N: torch.Tensor, places_N: torch.Tensor, beta: float
) -> torch.Tensor:
    """Weights of the constrained cross-entropy: 2 (1 - sigmoid(b (log pi - log pi_ref))), at least 0.001.

    The more the trained model already prefers a token over the reference, the less it is learnt, so the model stays
    near the reference there. b is `beta`, times 5 at the first token and times 20 at tokens 2 to 5, whose probabilities
    decide whether a model refuses. No gradient flows through the weights.

    Args:
        log_probs_N: Log-probability of each token under the trained model, nats.
        reference_N: The same under the reference.
        places_N: Place of the token in its answer, from 1.
    """
    factor = torch.where(places_N == 1, 5.0, torch.where(places_N <= 5, 20.0, 1.0))
    weights = 2 * torch.sigmoid(-beta * factor * (log_probs_N.detach() - reference_N.detach()))
    return weights.clamp(min=1e-3)


def deep_alignment_rows(
    triples: Iterable[tuple[str, str, str]],
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    copies: int = 1,
    share: float = 0.5,
    most: int = 100,
) -> list[Row]:
    """Refusals, some of them after the beginning of a harmful answer, for `answers="marked"`.

    Each copy is sampled independently: with probability `share` the refusal follows the first c tokens of the harmful
    answer, c uniform from 1 to min(`most`, its length); otherwise the refusal comes at once. The published recipe
    samples in every epoch; here an epoch is a copy. A space separates the two texts where neither brings one.

    Args:
        triples: (prompt, harmful answer, refusal).
        tokenizer: Counts the tokens.
        seed: Each sample depends only on this seed, the triple's number and the copy's number.
        copies: Rows per triple.
        share: Share of the rows with a prefill.
        most: Longest prefill, tokens.

    Returns:
        Rows without category, whose `prefill` says how many characters the model did not write.

    Raises:
        RedflagError: A text is empty, or a number is out of bounds.
    """
    if not 0 <= share <= 1 or most < 1 or copies < 1:
        raise RedflagError(
            f"share must be between 0 and 1, most and copies at least 1 (got share {share}, most {most}, copies "
            f"{copies})."
        )
    rows = []
    for number, texts in enumerate(triples):
        prompt, harmful, refusal = texts
        if not all(text.strip() for text in texts):
            raise RedflagError(f"triple {number} must have a prompt, an answer and a refusal (got an empty text).")
        for copy in range(copies):
            draw = random.Random(f"deep/{seed}/{number}/{copy}")
            before = drawn_prefill(harmful, refusal, tokenizer, draw, share, most)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": before + refusal}]
            rows.append(
                Row(
                    messages,
                    group=f"deep-{number}",
                    source="deep-alignment",
                    id=f"deep-{number}-{copy}",
                    prefill=len(before),
                )
            )
    return rows


def drawn_prefill(
    harmful: str,
    refusal: str,
    tokenizer: PreTrainedTokenizerFast,
    draw: random.Random,
    share: float = 0.5,
    most: int = 100,
    onset: int | None = None,
) -> str:
    """The beginning of a harmful answer that a refusal follows, as in `deep_alignment_rows`; or none.

    Args:
        onset: Character where harm begins: a prefill reaches past it, also where that takes more than `most` tokens.
    """
    if draw.random() >= share:
        return ""
    offsets = tokenizer(harmful, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    least = 1 if onset is None else min(onset_token(offsets, onset) + 1, len(offsets))
    before = harmful[: offsets[draw.randint(least, max(least, min(most, len(offsets)))) - 1][1]]
    return before if before[-1:].isspace() or refusal[:1].isspace() else before + " "
