"""The verb `show`: rows, scored rows or traces in colour."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from redflag.data.options import RowOptions
from redflag.data.rows import Row, load_rows
from redflag.data.summary import report_skipped
from redflag.errors import RedflagError
from redflag.terminal.paint import BOLD, DIM, RESET, legend, paint, printable, wants_colour
from redflag.trace import Alarm, Done, Halt, Reflection, Text, Thought, Trace, read_traces

Pieces = Iterable[tuple[str, float | None, bool]]
# Model folder -> a function that gives a row's tokens as the trainer sees them: text, flag target, whether it is harm.
TokenView = Callable[[str], Callable[[Row], Pieces]]


@dataclass
class ShowArguments(RowOptions):
    """Rows, scored rows or traces in colour."""

    file: str = field(metadata={"help": "Rows, a file of `redflag score`, or traces."})
    model: str | None = field(
        default=None,
        metadata={"help": "Show rows token by token with their training labels, as this model reads them."},
    )
    limit: int = field(default=10, metadata={"help": "Most entries to show; 0 shows all."})
    only: Literal["all", "harmful", "harmless"] = field(default="all", metadata={"help": "Which entries to show."})
    unlabelled: Literal["stop", "skip", "harmless"] = field(
        default="harmless", kw_only=True, metadata={"help": "What a row does whose label is null."}
    )
    color: Literal["auto", "always", "never"] = field(
        default="auto", metadata={"help": "auto: on a terminal, unless NO_COLOR is set."}
    )


ARGUMENTS = ShowArguments
POSITIONAL = "file"


def run(arguments: ShowArguments, token_view: TokenView | None = None) -> int:
    """The verb.

    Args:
        arguments: What is to be shown.
        token_view: Encodes rows for `model`; `show_labels` gives it, as this module imports no trainer.

    Raises:
        RedflagError: The file cannot be read, or holds nothing that can be shown.
    """
    if arguments.limit < 0:
        raise RedflagError(f"limit is {arguments.limit}, but it counts entries: give 0 for all, or more")
    coloured = wants_colour(arguments.color)
    kind = what_is_in(arguments.file)
    if arguments.model is not None and kind != "rows":
        raise RedflagError(f"{arguments.file} holds {kind}, which have their tokens already: leave out --model")
    entries: Iterable[str]
    if kind == "traces":
        traces = read_traces(arguments.file)
        entries = (
            show_trace(trace, coloured)
            for trace in traces
            if _wanted(trace.meta.get("category") is not None, arguments.only)
        )
    elif kind == "scored rows":
        records = _records(arguments.file)
        entries = (
            show_scored(record, coloured)
            for record in records
            if _wanted(record.get("category") is not None, arguments.only)
        )
    else:
        view = None
        if arguments.model is not None:
            if token_view is None:
                raise RedflagError("the token view is not available here: leave out --model")
            view = token_view(arguments.model)
        rows = load_rows(arguments.file, on_bad_row="skip", **arguments.row_options())
        report_skipped(rows.skipped)
        entries = (
            show_row(row, coloured, view(row) if view else None) for row in rows if _wanted(row.harmful, arguments.only)
        )
    if coloured:
        print(legend(labels=True) + "\n")
    shown = 0
    for entry in itertools.islice(entries, arguments.limit or None):
        print(entry + "\n")
        shown += 1
    if not shown:
        raise RedflagError(f"{arguments.file} holds nothing to show under --only {arguments.only}: show all")
    return 0


def what_is_in(file: str) -> Literal["rows", "scored rows", "traces"]:
    """Looks at the first line: traces and scored rows have keys of their own, everything else is read as rows."""
    path = Path(file)
    if not path.is_file() or path.suffix == ".parquet":
        return "rows"
    try:
        record = next(_records(file), None)
    except RedflagError:
        return "rows"
    if isinstance(record, dict) and {"flag_probs", "events"} <= record.keys():
        return "traces"
    if isinstance(record, dict) and {"flag_probs", "tokens"} <= record.keys():
        return "scored rows"
    return "rows"


def show_row(row: Row, coloured: bool, tokens: Pieces | None = None) -> str:
    """A row: its head, its turns, and the response, underlined from the onset; or `tokens` in place of the response."""
    verdict = row.category or "harmless"
    if row.harmful:
        verdict += f" from character {row.onset or 0}"
    lines = [_head(coloured, row.id, verdict, row.source, row.group)]
    for message in row.messages[:-1]:
        lines += _extras(message, coloured)
        lines.append(_turn(coloured, message["role"], printable(message["content"])))
    lines += _extras(row.messages[-1], coloured)
    onset = (row.onset or 0) if row.harmful else len(row.response)
    parts: Pieces = [(row.response[:onset], None, False), (row.response[onset:], None, row.harmful)]
    lines.append(_turn(coloured, "assistant", "".join(paint(parts if tokens is None else tokens, coloured))))
    return "\n".join(lines)


def _extras(message: Mapping[str, Any], coloured: bool) -> list[str]:
    """What a turn holds beside its text: thoughts and tool calls."""
    lines = printable(message.get("reasoning_content", "")).splitlines()
    calls = [printable(json.dumps(call, ensure_ascii=False)) for call in message.get("tool_calls", ())]
    return [_dim(f"    | {line}", coloured) for line in lines] + [_dim(f"    > {call}", coloured) for call in calls]


def show_scored(record: Mapping[str, Any], coloured: bool) -> str:
    """A row of `redflag score`: its tokens, each on the background of its highest flag probability."""
    category, onset = record.get("category"), record.get("onset")
    try:
        tokens, probs = record["tokens"], [max(step) for step in record["flag_probs"]]
        harmful = [onset is not None and i >= onset for i in range(len(tokens))]
        text = "".join(paint(zip(tokens, probs, harmful, strict=True), coloured))
    except (KeyError, TypeError, ValueError) as error:
        raise RedflagError(f"a scored row is damaged ({error!r}): score the rows again") from None
    verdict = (category or "harmless") + (f" from token {onset}" if onset is not None else "")
    verdict += f", highest p(flag) {max(probs, default=0.0):.4g}"
    return "\n".join([_head(coloured, record.get("id"), verdict, record.get("source"), record.get("group")), text])


def show_trace(trace: Trace, coloured: bool) -> str:
    """A trace: its text where it was recorded, else its token ids, and its events."""
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
        elif told := event.describe():
            lines.append(f"  {printable(told)}")
            if isinstance(event, Reflection):
                lines += [_dim(f"    | {line}", coloured) for line in printable(event.text).splitlines()]
    return "\n".join(lines)


def _head(coloured: bool, *parts: str | None) -> str:
    text = " · ".join(printable(part) for part in parts if part)
    return f"{BOLD}{text}{RESET}" if coloured else text


def _dim(text: str, coloured: bool) -> str:
    return f"{DIM}{text}{RESET}" if coloured else text


def _turn(coloured: bool, role: str, text: str) -> str:
    return f"{DIM}{role}:{RESET} {text}" if coloured else f"{role}: {text}"


def _wanted(harmful: bool, only: str) -> bool:
    return only == "all" or (only == "harmful") == harmful


def _records(file: str) -> Iterator[Any]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb") as stream:
            for line in stream:
                number += 1
                if line.strip():
                    yield json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise RedflagError(f"{file}:{number}: cannot be read ({error}): write the file again") from None
