"""`redflag score --prompts`: flag probabilities of requests before the answer, from one forward pass for each.

If a flag comes first (a marker before refusals, refusal tokens), its probability after the prompt is the model's own
prediction of its answer, and no answer has to be sampled. It is measured exactly as a guard measures it before the
first token: row 0 of `redflag score`, the first step of a stream.

A row of the output has the keys of `redflag score` with T = 1: `flag_probs` holds one step, `token_ids` is null since
nothing was chosen yet, and `tokens` holds the text of the prompt's last turn, which `redflag show` colours. So
`Recording.load` and `scripts/sweep_refusal_rate.py` read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from redflag.data.rows import Row, load_rows
from redflag.data.summary import report_skipped
from redflag.errors import RedflagError
from redflag.flags import FlagSpec
from redflag.prompt import render_prompt
from redflag.scoring.fitting import row_name, split_by
from redflag.scoring.processes import World
from redflag.scoring.scored import row_fields
from redflag.scoring.scorer import Scorer, check_probs, context_limit, named, windows, write_records
from redflag.truncation import fit_prompt

if TYPE_CHECKING:
    from redflag.scoring.arguments import ScoreArguments


class Reader(Protocol):
    """Measures after a prompt: `FlagReader`, `redflag.scoring.marker.MarkerReader`.

    Attributes:
        source: The model in this process, or servers; with its `context_length`.
        room: Number of tokens that must fit behind the prompt.
        key: Further inputs of the figures besides rows and lengths, for the fingerprint of an unfinished file.
        forbidden: Texts that prompts must not contain.
    """

    source: Any
    room: int
    key: dict[str, Any]
    forbidden: tuple[str, ...]

    def read(self, prompts: Sequence[list[int]], batch_size: int) -> Iterable[dict[str, Any]]:
        """Per prompt, in order: `flag_probs` (1 x K) and further keys of the row."""


class FlagReader:
    """The flags' probabilities after a prompt; see `Reader`."""

    def __init__(self, scorer: Scorer, spec: FlagSpec) -> None:
        self.source: Any = scorer
        self.room = 1
        self.key: dict[str, Any] = {"run_id": spec.run_id, "template": spec.template_hash}
        self.forbidden: tuple[str, ...] = ()

    def read(self, prompts: Sequence[list[int]], batch_size: int) -> Iterator[dict[str, Any]]:
        """One forward pass for each prompt, of which only the last position is used."""
        # Row 0 is measured before the response's token, so any token serves as response.
        for probs in self.source.score([(prompt, prompt[-1:]) for prompt in prompts], batch_size=batch_size):
            yield {"flag_probs": probs[:1].tolist()}


def run_prompts(arguments: ScoreArguments, world: World) -> int:
    """The verb `score` with `prompts`."""
    rows = load_rows(arguments.input, on_bad_row=arguments.on_bad_row, unanswered="keep", **arguments.row_options())
    if world.rank == 0:
        report_skipped(rows.skipped)
    with ExitStack() as stack:
        reader: Reader
        if arguments.marker:
            from redflag.scoring.marker import open_markers

            reader, tokenizer, spec = open_markers(arguments, world, stack)
        else:
            scorer, tokenizer, spec = arguments.scorer(world, stack, arguments.upper_bound)
            reader = FlagReader(scorer, spec)
        max_length = context_limit(arguments.max_length, reader.source.context_length)
        usable = rows.rows
        if arguments.on_bad_row == "skip":
            usable, bad = sound_prompts(reader, tokenizer, spec, usable, max_length)
            if world.rank == 0:
                report_skipped(bad)
        batch_size = arguments.batch_size
        key = {"prompts": True, "rows": rows.fingerprint, "count": len(usable), "max_length": max_length, **reader.key}

        def records(start: int, stop: int) -> Iterator[dict[str, Any]]:
            part = usable[start:stop]
            return score_prompts(
                reader, tokenizer, spec, part, batch_size=batch_size, max_length=max_length, first=start
            )

        output, source = Path(arguments.output), reader.source
        if write_records(output, len(usable), records, scorer=source, key=key, batch_size=batch_size, world=world):
            print(f"{len(usable)} prompts scored: {output}")
    return 0


def score_prompts(
    reader: Reader,
    tokenizer: Any,
    spec: FlagSpec,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Measures after prompts, in the order of the input.

    Args:
        rows: Conversations; a last assistant turn is the response, and ignored.
        max_length: Maximum number of tokens of the prompt and the measured tokens behind it; None = no limit. A prompt
            that does not fit loses its oldest turns (`redflag.truncation.fit_prompt`).
        first: Number of the first of these rows, for error messages.

    Yields:
        The rows of the output as dictionaries: those of `redflag.scoring.scored.as_json` with T = 1.

    Raises:
        RedflagError: A prompt cannot be rendered, or the model gave invalid probabilities.
    """
    for window in windows(reader.source, len(rows), batch_size):
        part = [(first + i, rows[i]) for i in window]
        prompts = [_prompt_ids(reader, tokenizer, spec, row, index, max_length) for index, row in part]
        measured = named(part, reader.read([ids for ids, _ in prompts], batch_size))
        for (_, cut), (index, row, figures) in zip(prompts, measured, strict=True):
            yield _record(row, index, figures, cut)


def prompt_of(row: Row) -> list[dict[str, str]]:
    """The turns of a row before its response; of a row without one, all."""
    return row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages


def _prompt_ids(
    reader: Reader, tokenizer: Any, spec: FlagSpec, row: Row, index: int, max_length: int | None
) -> tuple[list[int], bool]:
    """Ids of a prompt, and whether it had to be cut."""
    messages = prompt_of(row)
    for text in reader.forbidden:
        if any(text in turn["content"] for turn in messages):
            raise RedflagError(
                f"{row_name(row, index)}: the prompt must not contain the marker {text!r}. A user could change its "
                "probability. Remove it from the text, or leave such rows out with on_bad_row=skip."
            )
    if max_length is not None and max_length <= reader.room:
        raise RedflagError(
            f"max_length must be above {reader.room}, the number of tokens behind the prompt (got {max_length})."
        )
    try:
        ids = render_prompt(tokenizer, messages, spec)
        limit = len(ids) if max_length is None else max_length - reader.room
        return fit_prompt(tokenizer, messages, spec, limit, ids), len(ids) > limit
    except RedflagError as error:
        raise RedflagError(f"{row_name(row, index)}: {error}") from error


def _record(row: Row, index: int, figures: dict[str, Any], cut: bool) -> dict[str, Any]:
    check_probs(np.asarray(figures["flag_probs"], dtype=np.float64), row, index, "probability after the prompt")
    return {
        "id": row.id,
        "token_ids": None,
        "tokens": [prompt_of(row)[-1]["content"]],
        "flag_probs": figures["flag_probs"],
        "tail_probs": [],
        "peak": figures["flag_probs"][0],
        "onset": None,
        **row_fields(row),
        "onset_source": None,
        "truncated": False,
        "prompt_truncated": cut,
        **{name: value for name, value in figures.items() if name != "flag_probs"},
    }


def sound_prompts(
    reader: Reader, tokenizer: Any, spec: FlagSpec, rows: Sequence[Row], max_length: int | None
) -> tuple[list[Row], list[str]]:
    """Splits rows into those whose prompts can be measured, and errors of the others."""
    return split_by(lambda row, index: _prompt_ids(reader, tokenizer, spec, row, index, max_length), rows)
