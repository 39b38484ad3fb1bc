"""The verb `show`: rows, scored rows or traces in colour, and rows as the trainer sees them."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from redflag.bounds import check_bounds, option
from redflag.data.options import RowOptions
from redflag.data.rows import Row, load_rows
from redflag.data.summary import report_skipped
from redflag.errors import RedflagError
from redflag.terminal.paint import BOLD, DIM, legend, paint, printable, style, wants_colour
from redflag.trace import Alarm, Done, Halt, Reflection, Text, Thought, Trace, read_traces

Pieces = Iterable[tuple[str, float | None, bool]]


@dataclass
class ShowArguments(RowOptions):
    """Rows, scored rows or traces in colour; with a model, rows as the trainer sees them."""

    file: str = field(metadata={"help": "Rows, a file of `redflag score`, or traces."})
    model: str | None = option(None, "Show rows token by token with their training labels, as this model reads them.")
    limit: int = option(10, "Maximum number of entries; 0 shows all.", least=0)
    only: Literal["all", "harmful", "harmless"] = option("all", "Which entries to show.")
    unlabelled: Literal["stop", "skip", "harmless"] = field(
        default="harmless", kw_only=True, metadata={"help": "Treatment of rows whose label is null."}
    )
    color: Literal["auto", "always", "never"] = option("auto", "auto: on a terminal, unless NO_COLOR is set.")
    placement: str = option("dense", "With --model: first, open, insert, until or dense.")


ARGUMENTS = ShowArguments
POSITIONAL = "file"


def run(arguments: ShowArguments) -> int:
    """The verb.

    Raises:
        RedflagError: The file cannot be read, or has no entries to show.
    """
    check_bounds(arguments)
    coloured = wants_colour(arguments.color)
    kind = what_is_in(arguments.file)
    if arguments.model is not None and kind != "rows":
        raise RedflagError(f"model must be left out (got {kind}, which have their tokens already).")
    items: Iterable[tuple[bool, Any]]  # whether it is harmful, and the trace, scored row or row
    show: Callable[[Any, bool], str]
    if kind == "traces":
        show, items = show_trace, ((t.meta.get("category") is not None, t) for t in read_traces(arguments.file))
    elif kind == "scored rows":
        show, items = show_scored, ((r.get("category") is not None, r) for r in _records(arguments.file))
    else:
        view = None if arguments.model is None else token_view(arguments.model, arguments.placement)
        rows = load_rows(arguments.file, on_bad_row="skip", **arguments.row_options())
        report_skipped(rows.skipped)
        show, items = partial(show_row, view=view), ((row.harmful, row) for row in rows)
    if coloured:
        print(legend(labels=True) + "\n")
    shown = 0
    wanted = (item for harmful, item in items if arguments.only in ("all", "harmful" if harmful else "harmless"))
    for item in itertools.islice(wanted, arguments.limit or None):
        print(show(item, coloured) + "\n")
        shown += 1
    if not shown:
        raise RedflagError(f"{arguments.file} must have entries for --only {arguments.only} (got none).")
    return 0


def what_is_in(file: str) -> Literal["rows", "scored rows", "traces"]:
    """The kind of file, by the keys of its first line: traces, scored rows, or else rows."""
    path = Path(file)
    if not path.is_file() or path.suffix == ".parquet":
        return "rows"
    try:
        record = next(_records(file), None)
    except RedflagError:
        return "rows"
    keys = record.keys() if isinstance(record, dict) else set()
    if "flag_probs" not in keys:
        return "rows"
    return "traces" if "events" in keys else "scored rows" if "tokens" in keys else "rows"


def show_row(row: Row, coloured: bool, view: Callable[[Row], Pieces] | None = None) -> str:
    """A row: its head, its turns, and the response, underlined from the onset; with a `token_view` token by token."""
    verdict = row.category or "harmless"
    if row.harmful:
        verdict += f" from character {row.onset or 0}"
    lines = [_head(coloured, row.id, verdict, row.source, row.group)]
    for message in row.messages[:-1]:
        lines += _extras(message, coloured)
        lines.append(_turn(coloured, message["role"], printable(message["content"])))
    lines += _extras(row.messages[-1], coloured)
    onset = (row.onset or 0) if row.harmful else len(row.response)
    response: Pieces = [(row.response[:onset], None, False), (row.response[onset:], None, row.harmful)]
    lines.append(_turn(coloured, "assistant", "".join(paint(view(row) if view else response, coloured))))
    return "\n".join(lines)


def token_view(model: str, placement: str) -> Callable[[Row], Pieces]:
    """A row's response tokens as (text, flag target, harmful); target 1 is a flag, 0 none, None unjudged."""
    from transformers import AutoTokenizer

    from redflag.flags import FlagSpec
    from redflag.training.encode import IGNORE, PlacementConfig, encode, place

    spec = FlagSpec.load(model)
    config = PlacementConfig(placement)  # type: ignore[arg-type]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise RedflagError(f"the tokenizer in {model} cannot be loaded ({error}). Train the model again.") from None

    def view(row: Row) -> Pieces:
        example = encode(row, tokenizer, spec)
        placed = place(example, config, spec)
        for i in range(example["response_start"], len(placed.input_ids)):
            label = placed.flag_labels[i]
            target = None if label == IGNORE else float(label > 0)
            yield tokenizer.decode([placed.input_ids[i]]), target, label > 0

    return view


def _extras(message: Mapping[str, Any], coloured: bool) -> list[str]:
    """Thoughts and tool calls of a turn."""
    lines = [f"| {line}" for line in printable(message.get("reasoning_content", "")).splitlines()]
    lines += [f"> {printable(json.dumps(call, ensure_ascii=False))}" for call in message.get("tool_calls", ())]
    return [style(DIM, f"    {line}", coloured) for line in lines]


def show_scored(record: Mapping[str, Any], coloured: bool) -> str:
    """A row of `redflag score`: its tokens, each on the background of its highest flag probability."""
    category, onset = record.get("category"), record.get("onset")
    try:
        tokens, probs = record["tokens"], [max(step) for step in record["flag_probs"]]
        harmful = [onset is not None and i >= onset for i in range(len(tokens))]
        text = "".join(paint(zip(tokens, probs, harmful, strict=True), coloured))
    except (KeyError, TypeError, ValueError) as error:
        raise RedflagError(f"a scored row is damaged ({error!r}). Score the rows again.") from None
    verdict = (category or "harmless") + (f" from token {onset}" if onset is not None else "")
    verdict += f", highest p(flag) {max(probs, default=0.0):.4g}"
    return "\n".join([_head(coloured, record.get("id"), verdict, record.get("source"), record.get("group")), text])


def show_trace(trace: Trace, coloured: bool) -> str:
    """A trace: its text if it was recorded, else its token ids, and its events."""
    probs = [max(step, default=0.0) for step in trace.flag_probs]
    lines = [_head(coloured, trace.id, str(trace.meta.get("category") or ""), ", ".join(trace.categories), None)]
    released = [event for event in trace.events if isinstance(event, Text | Thought)]
    if any(event.text for event in released):
        spans = [probs[event.position : event.position + len(event.token_ids)] for event in released]
        pieces = [(event.text, max(span, default=0.0), False) for event, span in zip(released, spans, strict=True)]
    else:
        pieces = [(f"{token} ", p, False) for token, p in zip(trace.token_ids, probs, strict=True)]
    lines.append("".join(paint(pieces, coloured)))
    for event in trace.events:
        if isinstance(event, Alarm):
            lines.append(
                f"  alarm at token {event.position}: {event.category}, score {event.score:.4g} >= "
                f"{event.threshold:.4g}, {event.action}"
            )
        elif isinstance(event, Halt):
            why = printable(event.category or event.detail)
            lines.append(f"  halted at token {event.position}: {event.reason} {why}".rstrip())
            if event.text:
                lines.append(f"  replaced by: {printable(event.text)}")
        elif isinstance(event, Done):
            lines.append(f"  done at token {event.position}: {event.reason}")
        elif description := event.describe():
            lines.append(f"  {printable(description)}")
            if isinstance(event, Reflection):
                lines += [style(DIM, f"    | {line}", coloured) for line in printable(event.text).splitlines()]
    return "\n".join(lines)


def _head(coloured: bool, *parts: str | None) -> str:
    return style(BOLD, " · ".join(printable(part) for part in parts if part), coloured)


def _turn(coloured: bool, role: str, text: str) -> str:
    return style(DIM, f"{role}:", coloured) + f" {text}"


def _records(file: str) -> Iterator[Any]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as stream:
            for line in stream:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise RedflagError(f"{file}:{number} cannot be read ({error}).") from None
