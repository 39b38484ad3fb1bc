"""Runs the model over rows: recordings of responses or of prompts, from which thresholds are set."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

from redflag.calibrating.arguments import CalibrateArguments
from redflag.data.rows import Row
from redflag.data.summary import report_skipped
from redflag.progress import track
from redflag.scoring.earlier import score_earlier, with_histories
from redflag.scoring.fitting import renderable, report_cut
from redflag.scoring.processes import World
from redflag.scoring.prompts import FlagReader, score_prompts, sound_prompts
from redflag.scoring.recording import Recording
from redflag.scoring.score import score
from redflag.scoring.scored import Probs, as_recorded
from redflag.scoring.scorer import context_limit, measured_together


def record_responses(
    arguments: CalibrateArguments, rows: Sequence[Row], memory: bool
) -> tuple[Recording, list[list[Probs]] | None]:
    """Measures responses, and with `memory` the earlier answers of each one's conversation: T x K, oldest first.

    Raises:
        RedflagError: The model cannot be loaded or reached, or a row cannot be measured.
    """
    with ExitStack() as stack:
        scorer, tokenizer, spec = arguments.scorer(World(), stack)
        limit = context_limit(arguments.max_length, scorer.context_length)
        earlier = None
        if arguments.on_bad_row == "skip":
            rows, bad = renderable(tokenizer, spec, rows)
            report_skipped(bad)
        if memory:
            count = len(rows)
            rows, histories = with_histories(tokenizer, spec, rows, limit)
            if left_out := count - len(rows):
                print(f"{left_out} conversations did not fit the context and are left out", file=sys.stderr)
            earlier = score_earlier(scorer, histories, arguments.batch_size)
        scored = score(scorer, tokenizer, spec, rows, batch_size=arguments.batch_size, max_length=limit)
        responses = []
        cut: Counter[str] = Counter()
        for item in track(scored, "measuring", len(rows), "rows", measured_together(scorer, arguments.batch_size)):
            cut.update(truncated=item.truncated, prompt_truncated=item.prompt_truncated)
            # A harmful row without an onset counts as harmful from its first token, but that is not a marked onset.
            has_onset = item.row.onset is not None
            responses.append(
                {
                    **as_recorded(item),
                    "token_ids": None,
                    "onset": item.onset if has_onset else None,
                    "onset_source": (item.row.onset_source or "labelled") if has_onset else None,
                }
            )
        report_cut(cut)
    return Recording.of(spec.categories, responses), earlier


def record_prompts(arguments: CalibrateArguments, rows: Sequence[Row]) -> Recording:
    """Measures prompts as `redflag score --prompts` does: one step each, before the answer's first token.

    Raises:
        RedflagError: As `record_responses`.
    """
    with ExitStack() as stack:
        scorer, tokenizer, spec = arguments.scorer(World(), stack)
        limit = context_limit(arguments.max_length, scorer.context_length)
        reader = FlagReader(scorer, spec)
        if arguments.on_bad_row == "skip":
            rows, bad = sound_prompts(reader, tokenizer, spec, rows, limit)
            report_skipped(bad)
        scored = score_prompts(reader, tokenizer, spec, rows, batch_size=arguments.batch_size, max_length=limit)
        prompts = list(
            track(scored, "measuring", len(rows), "prompts", measured_together(scorer, arguments.batch_size))
        )
        report_cut({"prompt_truncated": sum(item["prompt_truncated"] for item in prompts)})
    return Recording.of(spec.categories, prompts)
