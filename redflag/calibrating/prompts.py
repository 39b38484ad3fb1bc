"""Measures prompts for their thresholds: one step each, before the answer's first token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from redflag.calibrating.arguments import CalibrateArguments
from redflag.data.rows import Row
from redflag.progress import track
from redflag.scoring.recording import Recording


def measured_prompts(arguments: CalibrateArguments, rows: Sequence[Row]) -> Recording:
    """Measures prompts as `redflag score --prompts` does.

    Raises:
        RedflagError: The model cannot be loaded or reached, or a row cannot be measured.
    """
    from redflag.data.summary import report_skipped
    from redflag.scoring.fitting import report_cut
    from redflag.scoring.processes import World
    from redflag.scoring.prompts import FlagReader, score_prompts, sound_prompts
    from redflag.scoring.scorer import context_limit

    with ExitStack() as stack:
        scorer, tokenizer, spec = arguments.scorer(World(), stack)
        reader = FlagReader(scorer, spec)
        limit = context_limit(arguments.max_length, reader.context_length)
        if arguments.on_bad_row == "skip":
            rows, bad = sound_prompts(reader, tokenizer, spec, rows, limit)
            report_skipped(bad)
        scored = score_prompts(reader, tokenizer, spec, rows, batch_size=arguments.batch_size, max_length=limit)
        measured = list(track(scored, "measuring", len(rows), "prompts"))
        report_cut({"prompt_truncated": sum(item["prompt_truncated"] for item in measured)})
        return Recording.of(spec.categories, measured)
