"""Flag probabilities of the earlier answers of conversations, for thresholds with memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from redflag.data.rows import Row
from redflag.earlier_answers import Span, answer_spans
from redflag.flags import FlagSpec
from redflag.progress import track
from redflag.scoring.fitting import fit
from redflag.scoring.scored import Probs
from redflag.scoring.scorer import Scorer, measured_together, windows


def with_histories(
    tokenizer: Any, spec: FlagSpec, rows: Sequence[Row], max_length: int | None
) -> tuple[list[Row], list[tuple[list[int], tuple[Span, ...]]]]:
    """The rows that fit the context whole, each with its prompt and the spans of the earlier answers in it.

    A guard refuses a conversation that does not fit, so the others are left out.
    """
    whole, histories = [], []
    for number, row in enumerate(rows):
        fitted = fit(tokenizer, spec, row, number, max_length)
        if not fitted.prompt_truncated:
            whole.append(row)
            histories.append(answer_spans(tokenizer, row.messages[:-1], spec, thinking=fitted.thought > 0))
    return whole, histories


def score_earlier(
    scorer: Scorer, histories: Sequence[tuple[list[int], tuple[Span, ...]]], batch_size: int
) -> list[list[Probs]]:
    """For each conversation T x K probabilities of each earlier answer, oldest first; one pass over each prompt."""
    several = [(ids, spans) for ids, spans in histories if spans]
    pairs = [(ids[: spans[0][0]], ids[spans[0][0] : spans[-1][1]]) for ids, spans in several]
    together = measured_together(scorer, batch_size)
    parts = (pairs[window.start : window.stop] for window in windows(scorer, len(pairs), batch_size))
    scored = (probs for part in parts for probs in scorer.score(part, batch_size=batch_size))
    measured = iter(track(scored, "measuring earlier answers", len(pairs), "rows", together))
    answers: list[list[Probs]] = []
    for _, spans in histories:
        probs = next(measured) if spans else np.zeros(0, np.float32)  # from the first answer to the end of the last
        answers.append([probs[start - spans[0][0] : end - spans[0][0]] for start, end in spans])
    return answers
