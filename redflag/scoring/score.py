"""`redflag score`: the flag probabilities along given conversations, teacher-forced and batched.

The conversations are rendered exactly as in training and serving (`redflag.prompt`), and index i of `flag_probs` is
the probability that a guard measures just before token i of the response. A guard also judges the tokens that end the
turn (their text is never shown, but they can raise an alarm): their probabilities are separate, in `tail_probs`.

With `prompts` only the step before the answer is measured, for a flag or for a marker of ordinary tokens, and no answer
is needed (`redflag.scoring.prompts`).

Several processes can share the rows (`accelerate launch -m redflag.cli score ...`, see `redflag.scoring.shards`), and
servers can measure instead of a model in this process (`upstream`, see `redflag.backends.upstreams`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from redflag.data.rows import Row, load_rows
from redflag.data.summary import report_rows, report_skipped
from redflag.errors import RedflagError
from redflag.files import require_writable
from redflag.flags import FlagSpec
from redflag.scoring.arguments import ScoreArguments
from redflag.scoring.fitting import fit, renderable, row_name
from redflag.scoring.processes import World
from redflag.scoring.scored import Scored, as_json, as_recorded, read_scored
from redflag.scoring.scorer import BATCHES, Scorer, check_probs, context_limit, named, windows, write_records

# What other modules and recipes import from here.
__all__ = [
    "BATCHES",
    "ScoreArguments",
    "Scored",
    "as_json",
    "as_recorded",
    "context_limit",
    "read_scored",
    "renderable",
]

ARGUMENTS = ScoreArguments
POSITIONAL: str | None = None


def run(arguments: ScoreArguments) -> int:
    """The verb. All input is read before anything is computed, so that bad input costs no time."""
    output = Path(arguments.output)
    if output.is_dir():
        raise RedflagError(f"output must be a file ({output} is a folder).")
    if output.resolve() == Path(arguments.input).resolve():
        raise RedflagError(f"output must not be the input, which would be lost (got {output}).")
    require_writable(output, "output", file=True)
    world = World.here()
    if arguments.prompts:
        from redflag.scoring.prompts import run_prompts

        return run_prompts(arguments, world)
    if arguments.marker:
        raise RedflagError(
            f"prompts must be set with marker (got the marker {arguments.marker[0]!r}). A marker is measured only "
            "where an answer begins. Add --prompts."
        )
    rows = load_rows(arguments.input, on_bad_row=arguments.on_bad_row, **arguments.row_options())
    if world.rank == 0:
        report_rows(rows)
    with ExitStack() as stack:
        scorer, tokenizer, spec = arguments.scorer(world, stack, arguments.upper_bound)
        max_length = context_limit(arguments.max_length, scorer.context_length)
        usable = rows.rows
        if arguments.on_bad_row == "skip":
            usable, bad = renderable(tokenizer, spec, usable)
            if world.rank == 0:
                report_skipped(bad)
        written = score_to_file(
            scorer,
            tokenizer,
            spec,
            usable,
            output,
            rows_sha256=rows.fingerprint,
            batch_size=arguments.batch_size,
            max_length=max_length,
            world=world,
        )
    if written:
        print(f"{len(usable)} rows scored: {output}")
    return 0


def score_to_file(
    scorer: Scorer,
    tokenizer: Any,
    spec: FlagSpec,
    rows: Sequence[Row],
    output: str | Path,
    *,
    rows_sha256: str,
    batch_size: int = 16,
    max_length: int | None = None,
    world: World | None = None,
    on_scored: Callable[[int, Scored], None] = lambda number, item: None,
) -> bool:
    """Writes `scored.jsonl`, alone or together with other processes; continues an interrupted call.

    Chunks of 8 batches are kept or lost as one, so the same rows share a batch wherever a call was interrupted and for
    any number of processes: the file is the same byte for byte, on equal machines with equal threads.

    Args:
        rows: Conversations that end in the response.
        rows_sha256: Hash of the rows (from `redflag.data.rows.load_rows`); with other rows scoring starts again.
        world: This process and the others; None: from the environment (`accelerate launch`).
        on_scored: Called with the number and the measurement of each row that this process scores.

    Returns:
        Whether this process has written the file. False in all but the first of several processes; the file then
        exists.

    Raises:
        RedflagError: As `score`; or the file cannot be written (finished chunks are kept).
    """
    key: dict[str, Any] = {
        "rows": rows_sha256,
        "count": len(rows),
        "run_id": spec.run_id,
        "template": spec.template_hash,
        "max_length": max_length,
    }

    def records(start: int, stop: int) -> Iterator[dict[str, Any]]:
        part = rows[start:stop]
        scored = score(scorer, tokenizer, spec, part, batch_size=batch_size, max_length=max_length, first=start)
        for number, item in enumerate(scored, start):
            on_scored(number, item)
            yield as_json(item, tokenizer)

    world = world or World.here()
    return write_records(Path(output), len(rows), records, scorer=scorer, key=key, batch_size=batch_size, world=world)


def score(
    scorer: Scorer,
    tokenizer: Any,
    spec: FlagSpec,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    first: int = 0,
) -> Iterator[Scored]:
    """Measures rows in the order of the input.

    Args:
        rows: Conversations that end in the response.
        max_length: Longest prompt + response in tokens; None = no limit. A prompt that does not fit loses its
            oldest turns (`redflag.truncation.fit_prompt`); a response that does not fit even alone loses its end. Both
            are marked.
        first: Number of the first of these rows, for error messages.

    Raises:
        RedflagError: A row cannot be rendered, or the model gave invalid probabilities.
    """
    for window in windows(scorer, len(rows), batch_size):
        part = [(first + i, rows[i]) for i in window]
        fitted = [fit(tokenizer, spec, row, index, max_length) for index, row in part]
        pairs = [(item.prompt_ids, item.response_ids + item.tail_ids) for item in fitted]
        measured = named(part, scorer.score(pairs, batch_size=batch_size))
        for item, (index, row, probs) in zip(fitted, measured, strict=True):
            length = len(item.response_ids)
            shape = (length + len(item.tail_ids), len(spec.categories))
            if probs.shape != shape:
                raise RedflagError(
                    f"{row_name(row, index)}: the backend's probabilities must have the shape {shape} (got "
                    f"{probs.shape})."
                )
            check_probs(probs, row, index, "flag probability at response token {}")
            yield Scored(
                row,
                item.response_ids,
                probs[:length],
                probs[length:],
                item.onset,
                truncated=item.truncated,
                prompt_truncated=item.prompt_truncated,
                thought=item.thought,
            )
