"""Training rows: their format, and how they are read from files, data sets and lists.

A row is one JSON object:

```
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}],
 "category": "weapons", "onset": 41, "group": "q17", "source": "...", "id": "..."}
```

The last assistant turn is the response. `category` null or absent means that the response is harmless. `onset` is the
character of the response where harm begins; absent, a harmful response is harmful from its first character.
The thought before an answer is that turn's `reasoning_content` (`reasoning` and `thinking` are read too); `<think>` in
the content is content. The thought of a harmless row is harmless; that of a harmful row is unknown, unless
`thought_onset` gives the character of the thought where harm begins. `onset` always counts in the content.
`lang` and `onset_source` are for reports: results are given per language, and natural onsets separately from
constructed ones. `forecast` lists `[character, probability of harm from there on]`, as `redflag synthesize` writes it;
a third number is the number of continuations that were judged.

Other formats of public sets are read too: `prompt` + `response` (+ `label`), `messages` that end before the answer +
`response`, and those of `shapes.py`. A `label` decides if there is one: in such sets `category` is often the topic of
the *prompt*, so a benign row is harmless whatever its `category`, and a harmful one takes its category from there.

Extra keys are ignored, and counted in `Rows.ignored`. But a key that looks like a misspelt `category`, `onset` or
`label` makes a row bad, because ignoring it would turn a harmful row into a harmless one; `columns` maps or drops it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from redflag.bounds import check_choice
from redflag.data.forecast_points import checked_forecast
from redflag.data.labels import Unlabelled, category_of
from redflag.data.shapes import ALL_KEYS, KEYS, Cells, Columns, check_columns, lookalike, rows_in
from redflag.data.sources import Provenance, describe, open_source
from redflag.data.turns import conversation, kind
from redflag.errors import RedflagError
from redflag.files import atomic_write

ONSET_SOURCES = ("constructed", "natural")


@dataclass(frozen=True)
class Row:
    """One labelled conversation.

    Attributes:
        messages: `{"role", "content"}` turns; the last one, the assistant's, is the response. If the source has them,
            also `tool_calls`, `reasoning_content`, `tool_call_id`, `name` (see `turns.py`).
        category: Kind of harm in the response; None in a harmless row.
        onset: Character offset in the response where harm begins; None in a harmful row means 0.
        group: Rows that ask the same thing share a group; splits never divide it.
        user: Author of the request, if known.
        source: Data set or file that the row comes from.
        lang: Language of the response, such as "en".
        onset_source: "constructed" (the row was built around the onset) or "natural" (the onset was found in existing
            text); None = unknown.
        prefill: Number of characters of the response that the client supplied before the refusal; 0 = the refusal
            comes at once. None in a row that does not teach refusals.
        forecast: Points `[character, probability]` in order: the probability that an answer with the same beginning up
            to this character turns out harmful. A third number counts the continuations judged.
        forecast_category: Kind of harm forecast in a harmless row; in a harmful row it is the category.
        thought_onset: Character offset in the response's thought where harm begins; None in a harmful row means that
            it is unknown whether the thought is harmful.
    """

    messages: list[dict[str, Any]]
    category: str | None = None
    onset: int | None = None
    group: str | None = None
    user: str | None = None
    source: str | None = None
    id: str | None = None
    lang: str | None = None
    onset_source: str | None = None
    prefill: int | None = None
    forecast: list[list[float]] | None = None
    forecast_category: str | None = None
    thought_onset: int | None = None

    @property
    def harmful(self) -> bool:
        """Whether the response holds harm."""
        return self.category is not None

    @property
    def response(self) -> str:
        """The text of the last assistant turn."""
        return str(self.messages[-1]["content"])

    def to_dict(self) -> dict[str, Any]:
        """The row as written to files, without empty keys."""
        return {key: value for key in KEYS if (value := getattr(self, key)) is not None}


@dataclass(frozen=True)
class BadRow:
    """An unusable row: the file, its line (1-based; in other sources the number of the row), and the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Rows:
    """Result of `load_rows`.

    Attributes:
        rows: The usable rows, in the order of the source.
        skipped: The rows left out: bad ones with `on_bad_row="skip"`, unlabelled ones with `unlabelled="skip"`.
        ignored: Extra keys and the number of rows that hold them.
        files: The files read, in order; empty for other sources.
        sha256: Hash of the file's bytes on disk; for several files, of their digests in order; for other sources, of
            the canonical JSON of the records.
        decided_by: Column by which rows are harmful or harmless ("" = neither label nor category), and their number.
        read_as: Digest of the options that changed how records are read; "" if there are none.
    """

    rows: list[Row]
    skipped: list[BadRow] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    sha256: str = ""
    decided_by: dict[str, int] = field(default_factory=dict)
    read_as: str = ""

    @property
    def fingerprint(self) -> str:
        """Identifies these rows: `sha256`, and the options that changed how records are read, if any."""
        return f"{self.sha256}/{self.read_as}" if self.read_as else self.sha256

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class RecordReader:
    """Turns records into rows, and counts their keys.

    `ignored` and `decided_by` are as in `Rows`, the other fields as in `load_rows`.

    Raises:
        RedflagError: `columns` or another option is invalid.
    """

    columns: Columns = field(default_factory=dict)
    labels: Mapping[str, str | None] | None = None
    unlabelled: Literal["stop", "skip", "harmless"] = "stop"
    unanswered: Literal["stop", "keep"] = "stop"
    ignored: Counter[str] = field(default_factory=Counter)
    decided_by: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        check_choice("unlabelled", self.unlabelled, ("stop", "skip", "harmless"))
        check_choice("unanswered", self.unanswered, ("stop", "keep"))
        check_columns(self.columns)

    @property
    def digest(self) -> str:
        """Digest of the options that change how records are read; "" if there are none."""
        options = [self.columns, self.labels, self.unlabelled]
        if options == [{}, None, "stop"]:
            return ""
        return hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]

    def read(self, record: Any) -> list[Row | ValueError]:
        """The rows of a record (usually one), each a row or the error that makes it bad."""
        if isinstance(record, ValueError):
            return [record]
        try:
            candidates = rows_in(record, self.columns)
        except ValueError as error:
            return [error]
        rows: list[Row | ValueError] = []
        for candidate in candidates:
            try:
                rows.append(self._row(candidate))
            except ValueError as error:
                rows.append(error)
        return rows

    def _row(self, candidate: Cells) -> Row:
        cells = candidate.values
        for key in cells:
            if key in ALL_KEYS:
                continue
            name = str(key)
            if (close := lookalike(name)) is not None and close not in cells:
                raise ValueError(
                    f"unknown key {key!r}, which looks like {close!r}. Rename it, map it with columns ("
                    f"--columns '{json.dumps({close: name})}'), or drop it with --columns '{json.dumps({name: None})}'"
                )
            self.ignored[name] += 1
        messages = conversation(cells, self.unanswered == "keep")
        category = category_of(cells, candidate.label_column, self.labels, self.unlabelled)
        row = _checked(cells, messages, category)
        by = candidate.label_column if "label" in cells else "category" if cells.get("category") is not None else ""
        self.decided_by[by] += 1
        return row


def load_rows(
    source: str | Path | Iterable[Any],
    *,
    columns: Columns | None = None,
    labels: Mapping[str, str | None] | None = None,
    on_bad_row: Literal["stop", "skip"] = "stop",
    unlabelled: Literal["stop", "skip", "harmless"] = "stop",
    split: str = "train",
    unanswered: Literal["stop", "keep"] = "stop",
) -> Rows:
    """Reads rows.

    Args:
        source: A file of JSON lines, CSV or TSV (with a header; an empty cell is null), all also `.gz`, or Parquet; a
            `.json` file of one array; a folder (all such files in it but `.json`, sorted), a glob pattern, or a list of
            any of these; a data set on the hub, as `OWNER/NAME`, `OWNER/NAME:CONFIGURATION:SPLIT` or
            `OWNER/NAME::SPLIT`; a `datasets.Dataset`; an iterable of mappings or rows.
        columns: redflag's key -> the source's key, such as `{"prompt": "question", "response": "answer", "label":
            "toxic"}`; several make a row of each (`{"response": ["a", "b"], "label": ["a_bad", "b_bad"]}`). redflag's
            keys are those of the row and `prompt`, `response`, `label`. The source's key -> None drops a column.
        labels: Value of the label (as text; true and false in lower case) -> category, or None for harmless; if
            `category` is an object of booleans, its names -> category. Without `labels`, `harmful` and `unsafe` mean
            the row's own category, or "harm" if it has none; `benign`, `harmless`, `unharmful` and `safe` mean
            harmless, and so does true in a column `is_safe`; any other value is bad.
        on_bad_row: "stop" raises at the first bad row; "skip" leaves it out and lists it in `Rows.skipped`.
        unlabelled: Treatment of a null label: "stop" = the row is bad, "skip" leaves it out, "harmless" keeps it.
        split: Split of a data set on the hub, if the name has none.
        unanswered: Treatment of a conversation without a response: "stop" = a bad row; "keep" = a prompt, whose
            `messages` end before the response.

    Raises:
        RedflagError: The source cannot be read, a row is bad (naming file, line and reason), or no row is usable.

    Example:
        >>> rows = load_rows([{"prompt": "Hi", "response": "Take that!", "label": "harmful", "category": "insult"}])
        >>> rows.rows[0].category, rows.rows[0].response
        ('insult', 'Take that!')
    """
    check_choice("on_bad_row", on_bad_row, ("stop", "skip"))
    reader = RecordReader(dict(columns or {}), labels, unlabelled, unanswered)
    rows: list[Row] = []
    skipped: list[BadRow] = []
    provenance = Provenance()
    for name, records in open_source(source, split, provenance):
        for line, record in records:
            for row in reader.read(record):
                if isinstance(row, Row):
                    rows.append(row)
                    continue
                bad = BadRow(name, line, str(row))
                if on_bad_row == "stop" and not isinstance(row, Unlabelled):
                    raise RedflagError(f"{bad}. Fix the row, or skip such rows with on_bad_row=skip.")
                skipped.append(bad)
    if not rows:
        what = f"all {len(skipped)} rows were left out (first: {skipped[0]})" if skipped else "it is empty"
        raise RedflagError(f"no usable row in {describe(source)}: {what}. Give a source of rows.")
    return Rows(
        rows,
        skipped,
        dict(reader.ignored),
        tuple(provenance.files),
        provenance.sha256,
        dict(reader.decided_by),
        reader.digest,
    )


def write_rows(path: str | Path, rows: Iterable[Row]) -> Path:
    """Writes rows as JSONL (gzipped when the name ends in `.gz`), whole or not at all.

    The same rows give the same bytes, so that hashes of written files can be compared.

    Raises:
        RedflagError: The file cannot be written; an older file of that name is unchanged.
    """
    path = Path(path)
    text = "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
    data = text.encode("utf-8")
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)
    return path


def _checked(cells: Mapping[str, Any], messages: list[dict[str, Any]], category: str | None) -> Row:
    """The row, its other keys checked; raises a ValueError with the reason if one is invalid."""
    for key in ("onset", "thought_onset"):
        if cells.get(key) is not None and category is None:
            raise ValueError(f"{key} must be left out in a row without category (got {cells[key]})")
    response, thought = messages[-1]["content"], messages[-1].get("reasoning_content", "")
    names = {
        key: _name(cells, key) for key in ("group", "user", "source", "id", "lang", "onset_source", "forecast_category")
    }
    row = Row(
        messages,
        category,
        onset=_position(cells, "onset", "within the response", response),
        prefill=_position(cells, "prefill", "shorter than the response", response),
        forecast=checked_forecast(cells.get("forecast"), response),
        thought_onset=_position(
            cells, "thought_onset", "within the thought", thought, "reasoning_content of the last assistant turn"
        ),
        **names,
    )
    if row.forecast_category is not None and category not in (None, row.forecast_category):
        raise ValueError(
            f"forecast_category must be left out in a row of category {category!r} (got {row.forecast_category!r}). It "
            "is for harmless rows"
        )
    if row.onset_source not in (None, *ONSET_SOURCES):
        raise ValueError(f"onset_source must be one of {', '.join(ONSET_SOURCES)} (got {row.onset_source!r})")
    return row


def _position(
    cells: Mapping[str, Any], key: str, rule: str, text: str, place: str = "the last assistant turn"
) -> int | None:
    """A position in `text`, in characters; None if the record has none."""
    position = cells.get(key)
    if position is None:
        return None
    if isinstance(position, bool) or not isinstance(position, int):
        raise ValueError(f"{key} must be a whole number (got {kind(position)})")
    if not 0 <= position < len(text):
        raise ValueError(
            f"{key} must be {rule} of {len(text)} characters (got {position}). It counts characters from 0 in {place}"
        )
    return position


def _name(cells: Mapping[str, Any], key: str) -> str | None:
    value = cells.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{key} must be a name (got {kind(value)})")
