"""Files of traces; the steps and events in them can be imported from here too.

Standard library only, so that traces can be read where no model can be run.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast, get_args

from redflag.errors import RedflagError
from redflag.events import Alarm as Alarm
from redflag.events import Done as Done
from redflag.events import Escalation as Escalation
from redflag.events import Event as Event
from redflag.events import Facts as Facts
from redflag.events import Forced as Forced
from redflag.events import Halt as Halt
from redflag.events import Logprobs as Logprobs
from redflag.events import Reflection as Reflection
from redflag.events import Resume as Resume
from redflag.events import Step as Step
from redflag.events import Text as Text
from redflag.events import Thought as Thought
from redflag.events import Trace as Trace
from redflag.files import append_line, atomic_write

TRACE_FORMAT = 1


def write_traces(
    path: str | os.PathLike[str], traces: Iterable[Trace], *, text: bool = False, append: bool = False
) -> int:
    """Writes traces as JSONL, one trace per line, one array per column.

    A line is an object with `format`, `id`, `categories`, `token_ids` (T), `flag_probs` and `scores` (K arrays of T),
    `events`, `meta` and `text`; after a thought also `answer_at`. Floats are preserved bit by bit; those that JSON
    lacks are the strings `"nan"`, `"inf"` and `"-inf"`.

    Args:
        path: `.gz` compresses.
        traces: Read once, one trace in memory at a time.
        text: Also write `Trace.text` and the text of the `Text` events; otherwise only numbers.
        append: Add to the file instead of replacing it. Every line is one write, so a process that is killed damages at
            most the line that it was writing.

    Returns:
        The number of traces written.

    Raises:
        RedflagError: A trace or the file cannot be written. Without `append` nothing has changed.
    """
    path = Path(path)
    if append:
        return _append(path, traces, text)
    count = 0
    with atomic_write(path) as file:
        # No name and no time in the header: the same traces give the same bytes.
        packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.suffix == ".gz" else None
        target = cast(BinaryIO, packed) if packed else file
        for trace in traces:
            target.write(trace_line(trace, text=text))
            count += 1
        if packed:
            packed.close()
    return count


def read_traces(path: str | os.PathLike[str]) -> Iterator[Trace]:
    """Reads a file written by `write_traces`, one trace at a time.

    Raises:
        RedflagError: A line is not a complete trace of this format; the message names file and line.
    """
    path = Path(path)
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for line in cast(BinaryIO, file):
                number += 1
                if line.strip():
                    yield _from_line(line, f"{path}, line {number}")
    except (EOFError, OSError, zlib.error) as error:
        where = f"{path}, after line {number}" if number else f"{path}"
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise RedflagError(f"{where}: cannot be read ({reason}). Record the traces again or fix the path.") from error


def trace_line(trace: Trace, *, text: bool = False) -> bytes:
    """A trace as one line of the file that `write_traces` writes.

    Raises:
        RedflagError: The trace cannot be written.
    """
    steps, flags = len(trace.token_ids), len(trace.categories)
    for name, rows, allowed in (("flag_probs", trace.flag_probs, {steps}), ("scores", trace.scores, {0, steps})):
        if len(rows) not in allowed or any(len(row) != flags for row in rows):
            raise RedflagError(
                f"{name} of trace {trace.id!r} must be {steps} tokens x {flags} categories. Give one row per token."
            )
    try:
        _expect(_all_of(int, trace.token_ids), "token_ids are not integers")
        record = {
            "format": TRACE_FORMAT,
            "id": trace.id,
            "categories": list(trace.categories),
            "token_ids": trace.token_ids,
            "flag_probs": _columns(trace.flag_probs, flags),
            "scores": _columns(trace.scores, flags),
            "events": _pack_events(trace, text),
            "meta": trace.meta,
            "text": trace.text if text else None,
        }
        if trace.answer_at != 0:
            record["answer_at"] = trace.answer_at
        return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
    except RedflagError:
        raise
    except (TypeError, ValueError) as error:
        raise RedflagError(
            f"trace {trace.id!r} cannot be written as JSON ({error}). Use plain integers as token ids, and only "
            "strings, finite numbers, lists and dictionaries in meta."
        ) from error


def _append(path: Path, traces: Iterable[Trace], text: bool) -> int:
    if path.suffix == ".gz":
        raise RedflagError(
            f"cannot append to the compressed file {path}, which could not be read any more if cut off. Append to a "
            "plain .jsonl file and compress it afterwards."
        )
    count = 0
    try:
        append_line(path, b"", mode=0o666)  # The file exists even if there are no traces.
        for trace in traces:
            append_line(path, trace_line(trace, text=text), mode=0o666)
            count += 1
    except OSError as error:
        raise RedflagError(
            f"cannot append to {path} ({error.strerror or error}). {count} of the traces were added before. Free space "
            "or fix the permissions, and repeat with the others."
        ) from error
    return count


def _columns(rows: Sequence[Sequence[float]], flags: int) -> list[list[float | str]]:
    columns = zip(*rows, strict=True) if rows else [()] * flags
    return [[_pack_number(value) for value in column] for column in columns]


def _pack_number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


def _pack_events(trace: Trace, text: bool) -> list[dict[str, Any]]:
    """Events as objects; neighbouring texts of one part as one, whose `counts` say how many tokens each released."""
    packed: list[dict[str, Any]] = []
    after: tuple[str, int] | None = None  # kind and position that the next text must have to join the one before
    for event in trace.events:
        kind = type(event).__name__.lower()
        if not isinstance(event, Text | Thought):
            values = {item.name: getattr(event, item.name) for item in fields(event)}
            for name in _names(type(event), "float"):
                values[name] = _pack_number(values[name])
            if "token_ids" in values:
                values["token_ids"] = list(values["token_ids"])
            if not text and "text" in values:
                values["text"] = ""
            packed.append({"kind": kind, **values})
            after = None
            continue
        start, count = event.position, len(event.token_ids)
        if list(event.token_ids) != trace.token_ids[start : start + count]:
            raise RedflagError(
                f"the tokens released at {start} must be those of trace {trace.id!r}. Record both from one session."
            )
        if (kind, start) != after:
            packed.append({"kind": kind, "position": start, "counts": []} | ({"texts": []} if text else {}))
        packed[-1]["counts"].append(count)
        if text:
            packed[-1]["texts"].append(event.text)
        after = kind, start + count
    return packed


_KEYS = ("format", "id", "categories", "token_ids", "flag_probs", "scores", "events", "meta", "text")
_TEXTS: dict[str, Any] = {"text": Text, "thought": Thought}
_EVENTS: dict[str, Any] = {name: kind for kind in get_args(Event) if (name := kind.__name__.lower()) not in _TEXTS}


def _names(kind: Any, *types: str) -> list[str]:
    """The fields of an event that are of some types, as they are written down."""
    return [item.name for item in fields(kind) if item.type in types]


def _from_line(line: bytes, where: str) -> Trace:
    try:
        record = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else ", and the line has no end: the writer was probably killed"
        raise RedflagError(f"{where}: not JSON ({error}){cut}. Delete the line or record it again.") from error
    try:
        return _unpack(record)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise RedflagError(f"{where}: not a trace ({error}). Delete the line or record it again.") from error


def _unpack(record: Any) -> Trace:
    _expect(isinstance(record, dict), "a line is not an object")
    _expect("format" in record, "it has no format number")
    _expect(record["format"] == TRACE_FORMAT, f"format {record['format']!r}, this version reads {TRACE_FORMAT}")
    _expect(not (unknown := sorted(set(record) - {*_KEYS, "answer_at"})), f"unknown keys {unknown}")
    _expect(not (missing := [key for key in _KEYS if key not in record]), f"missing keys {missing}")
    _expect(isinstance(record["id"], str), f"id {record['id']!r} is not a string")
    _expect(record["text"] is None or isinstance(record["text"], str), "text is not a string")
    _expect(isinstance(record["meta"], dict), "meta is not an object")
    categories, token_ids = record["categories"], record["token_ids"]
    _expect(_all_of(str, categories), "categories are not strings")
    _expect(_all_of(int, token_ids), "token_ids are not integers")
    trace = Trace(
        id=record["id"],
        categories=tuple(categories),
        token_ids=token_ids,
        flag_probs=_rows(record, "flag_probs", len(token_ids), len(categories)),
        scores=_rows(record, "scores", len(token_ids), len(categories), may_lack=True),
        meta=record["meta"],
        text=record["text"],
        answer_at=record.get("answer_at", 0),
    )
    begins = trace.answer_at
    _expect(begins is None or (type(begins) is int and 0 <= begins <= len(token_ids)), f"answer_at is {begins!r}")
    _expect(isinstance(record["events"], list), "events are not a list")
    # An alarm's position may be behind tokens that were taken back because of it.
    takes = {kind for kind, event in _EVENTS.items() if event.counts_as == "taken"}
    taken_back = [e["token_ids"] for e in record["events"] if isinstance(e, dict) and e.get("kind") in takes]
    most = len(token_ids) + max(map(len, taken_back), default=0)
    for packed in record["events"]:
        trace.events.extend(_unpack_event(packed, token_ids, most))
    return trace


def _unpack_event(packed: dict[str, Any], token_ids: list[int], most: int) -> Iterator[Event]:
    _expect(isinstance(packed, dict), f"event {packed!r} is not an object")
    values = dict(packed)
    kind = values.pop("kind", None)
    position = values["position"]
    _expect(_all_of(int, [position]) and 0 <= position <= most, f"event at position {position!r}")
    if kind in _TEXTS:
        counts = values["counts"]
        texts = values.get("texts", [""] * len(counts))
        _expect(_all_of(int, counts) and all(count >= 0 for count in counts), "counts are not whole numbers")
        _expect(_all_of(str, texts) and len(texts) == len(counts), "texts and counts differ in length")
        _expect(position + sum(counts) <= len(token_ids), "text beyond the last token")
        for count, text in zip(counts, texts, strict=True):
            yield _TEXTS[kind](position, tuple(token_ids[position : position + count]), text)
            position += count
        return
    _expect(kind in _EVENTS, f"unknown kind of event {kind!r}")
    for name in _names(_EVENTS[kind], "float"):
        values[name] = _number(values[name])
    if _EVENTS[kind].counts_as:
        _expect(_all_of(int, values["token_ids"]), "hidden token_ids are not integers")
        values["token_ids"] = tuple(values["token_ids"])
    words = [values[name] for name in _names(_EVENTS[kind], "str", "str | None") if name in values]
    _expect(all(word is None or isinstance(word, str) for word in words), f"event with {words!r} for words")
    yield _EVENTS[kind](**values)


def _rows(record: dict[str, Any], name: str, steps: int, flags: int, may_lack: bool = False) -> list[tuple[float, ...]]:
    columns = record[name]
    _expect(isinstance(columns, list) and len(columns) == flags, f"{name} are not {flags} columns")
    if may_lack and all(column == [] for column in columns):
        return []
    _expect(all(isinstance(column, list) for column in columns), f"{name} are not columns")
    _expect(all(len(column) == steps for column in columns), f"{name} are not {steps} long")
    if not columns:
        return [()] * steps
    return list(zip(*([_number(value) for value in column] for column in columns), strict=True))


def _number(value: Any) -> float:
    if type(value) is float:
        return value
    _expect(type(value) is int or value in ("nan", "inf", "-inf"), f"{value!r} is not a number")
    return float(value)


def _all_of(kind: type, values: Any) -> bool:
    # By `type`, not `isinstance`: true is not a token id.
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise ValueError(otherwise)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
