"""Recorded responses as columns, from which every figure is computed, whatever method measured the probabilities.

A `Recording` holds all judged steps of N responses end to end in one array, and columns with one entry per response. On
disk it is one Parquet file, a response per row. A flag, a probe and a bag of words record the same way, so every table
is a function of recordings, and a threshold can be changed without running anything again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from redflag.errors import RedflagError
from redflag.files import atomic_write
from redflag.flags import FlagSpec
from redflag.scoring.scored import read_scored

Indices = npt.NDArray[np.int64]

FORMAT = 1  # of the Parquet file
# One entry per response; a column that a file lacks is None throughout.
COLUMNS = (
    *("id", "category", "onset", "onset_source", "group", "source", "lang", "turns", "truncated"),
    "thought_tokens",  # number of first steps that belong to a thought
)


@dataclass(frozen=True)
class Recording:
    """N responses with S judged steps in all, and K flag probabilities at each.

    Attributes:
        categories: K names of flags.
        probs: S x K float32 probabilities, response after response: T before its tokens, then those that end the turn.
        starts: N + 1 offsets: response i has steps `starts[i]` to `starts[i + 1]`.
        lengths: N numbers of response tokens (the steps beyond them end the turn).
        token_ids: The response tokens end to end; None if not recorded.
        columns: `COLUMNS` -> N values. `category` None is a harmless response; `onset` is a token index or None.
        meta: Source of the measurements, as JSON: model, run id, rows' hash, ...
    """

    categories: tuple[str, ...]
    probs: npt.NDArray[np.float32]
    starts: Indices
    lengths: Indices
    columns: dict[str, list[Any]]
    token_ids: npt.NDArray[np.int32] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def harmful(self) -> npt.NDArray[np.bool_]:
        """Which of the N responses are harmful."""
        return np.array([category is not None for category in self.columns["category"]], dtype=bool)

    def steps(self, i: int) -> npt.NDArray[np.float32]:
        """All judged probabilities of response i: (T + tail) x K."""
        return self.probs[self.starts[i] : self.starts[i + 1]]

    def select(self, chosen: Sequence[int] | npt.NDArray[Any]) -> Recording:
        """The responses with these indices, or those where a mask is true, in that order."""
        index = np.asarray(chosen)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        columns = {name: [values[i] for i in index] for name, values in self.columns.items()}
        steps, tokens = self.starts[:-1][index], _offsets(self.lengths)[:-1][index]
        return self._cut(steps, np.diff(self.starts)[index], tokens, self.lengths[index], columns)

    @property
    def thoughts(self) -> Indices:
        """Number of first steps that belong to a thought, for each of the N responses; 0 without one."""
        counts = self.columns.get("thought_tokens") or [None] * len(self)
        return np.array([count or 0 for count in counts], dtype=np.int64)

    def part(self, name: Literal["thought", "answer"]) -> Recording:
        """The answers of all responses, or the thoughts of those that have one, as separate responses.

        Onsets then count from the answer's first token; a thought has none.
        """
        thoughts = self.thoughts
        if name == "thought":
            whole = self.select(thoughts > 0)
            thoughts = whole.thoughts
            columns = {**whole.columns, "onset": [None] * len(whole), "thought_tokens": [None] * len(whole)}
            return whole._cut(whole.starts[:-1], thoughts, _offsets(whole.lengths)[:-1], thoughts, columns)
        if not thoughts.any():
            return self
        onsets = [
            None if onset is None else onset - int(skipped)
            for onset, skipped in zip(self.columns["onset"], thoughts, strict=True)
        ]
        columns = {**self.columns, "onset": onsets, "thought_tokens": [None] * len(self)}
        steps, tokens = self.starts[:-1] + thoughts, _offsets(self.lengths)[:-1] + thoughts
        return self._cut(steps, np.diff(self.starts) - thoughts, tokens, self.lengths - thoughts, columns)

    def _cut(
        self, steps: Indices, counts: Indices, tokens: Indices, lengths: Indices, columns: dict[str, list[Any]]
    ) -> Recording:
        """Responses that begin at these steps and tokens of this recording, and have so many of each."""
        token_ids = None if self.token_ids is None else self.token_ids[_spans(tokens, lengths)]
        probs = self.probs[_spans(steps, counts)]
        return Recording(self.categories, probs, _offsets(counts), lengths, columns, token_ids, self.meta)

    @classmethod
    def of(
        cls,
        categories: Sequence[str],
        responses: Iterable[Mapping[str, Any]],
        meta: Mapping[str, Any] | None = None,
    ) -> Recording:
        """Gathers scored rows, as `redflag score` writes them.

        Args:
            categories: K names of flags.
            responses: Each with `flag_probs` (T x K) and optionally `tail_probs` (M x K), `token_ids` and `COLUMNS`.
            meta: Stored unchanged.
        """
        flags = len(categories)
        pieces, lengths, counts, tokens = [], [], [], []
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for response in responses:
            tail = response.get("tail_probs")
            probs = [response["flag_probs"]] if tail is None else [response["flag_probs"], tail]
            arrays = [np.asarray(part, dtype=np.float32).reshape(len(part), flags) for part in probs]
            pieces += arrays
            lengths.append(len(arrays[0]))
            counts.append(sum(map(len, arrays)))
            tokens.append(response.get("token_ids"))
            for name in COLUMNS:
                columns[name].append(response.get(name))
        token_ids = None
        if tokens and all(ids is not None for ids in tokens):
            token_ids = np.fromiter((token for ids in tokens for token in ids or ()), dtype=np.int32)
        return cls(
            tuple(categories),
            np.concatenate([np.zeros((0, flags), np.float32), *pieces]),
            _offsets(counts),
            np.array(lengths, dtype=np.int64),
            columns,
            token_ids,
            dict(meta or {}),
        )

    def save(self, path: str | Path) -> Path:
        """Writes one Parquet file, atomically."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        table: dict[str, Any] = {
            "flag_probs": pa.LargeListArray.from_arrays(self.starts * len(self.categories), self.probs.reshape(-1)),
            "tokens": self.lengths,
        }
        if self.token_ids is not None:
            table["token_ids"] = pa.LargeListArray.from_arrays(_offsets(self.lengths), self.token_ids)
        types = {"onset": pa.int64(), "turns": pa.int64(), "thought_tokens": pa.int64(), "truncated": pa.bool_()}
        for name, values in self.columns.items():
            if name == "thought_tokens" and not self.thoughts.any():
                continue
            table[name] = pa.array(values, types.get(name, pa.string()))
        head = json.dumps({"format": FORMAT, "categories": self.categories, "meta": self.meta})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            pq.write_table(pa.table(table).replace_schema_metadata({"redflag": head}), file, compression="zstd")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Reads a file of `save`, the JSONL of `redflag score`, or that of recorded traces (then without onsets).

        Raises:
            RedflagError: The file cannot be read or has another format.
        """
        path = Path(path)
        if path.suffix != ".parquet":
            return _from_lines(path)
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path).combine_chunks()
            head = json.loads(table.schema.metadata[b"redflag"])
            if head["format"] != FORMAT:
                raise ValueError(f"it has format {head['format']!r}, and this version of redflag reads {FORMAT}")
            flags = len(head["categories"])
            lists = table["flag_probs"].chunk(0) if len(table) else pa.array([], pa.large_list(pa.float32()))
            tokens = table["token_ids"].chunk(0) if "token_ids" in table.column_names and len(table) else None
            lacking = {"thought_tokens"} - set(table.column_names)  # files without thoughts have no such column
            return cls(
                tuple(head["categories"]),
                lists.values.to_numpy().reshape(-1, flags),
                np.asarray(lists.offsets.to_numpy() if len(table) else [0], dtype=np.int64) // flags,
                table["tokens"].to_numpy(),
                {name: [None] * len(table) if name in lacking else table[name].to_pylist() for name in COLUMNS},
                None if tokens is None else tokens.values.to_numpy(),
                head["meta"],
            )
        except OSError as error:
            raise RedflagError(f"{path} cannot be read ({error.strerror or error}). Give a recording.") from error
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise RedflagError(
                f"{path} must be a recording ({type(error).__name__}: {error}). Give a file that redflag wrote."
            ) from error


def recorded(path: str | Path, spec: FlagSpec) -> Recording | None:
    """The recording in a file, in place of a model; None if the file holds conversations or does not exist.

    Thresholds belong to the run, the prompt template and the flags of a model, which a recording names in its `meta`.

    Raises:
        RedflagError: It was not recorded with this run of the model and this prompt template, or does not say so.
    """
    path = Path(path)
    if not path.is_file() or not _is_recording(path):
        return None
    recording = Recording.load(path)
    meta = {**recording.meta, "categories": list(recording.categories)}
    for key, what, ours in (
        ("run_id", "run", spec.run_id),
        ("template_hash", "prompt template", spec.template_hash),
        ("categories", "flags", list(spec.categories)),
    ):
        if (theirs := meta.get(key)) != ours:
            fault = f"was recorded with {what} {theirs!r}" if theirs is not None else f"names no {what} (meta {key!r})"
            raise RedflagError(
                f"{path} {fault}, but the model has {what} {ours!r}. Thresholds from it would not hold. Give a "
                "recording of this model, or conversations to measure with it."
            )
    return recording


def _is_recording(path: Path) -> bool:
    """Whether a file holds probabilities; it is not checked any further."""
    try:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                return b"redflag" in (pq.read_schema(path).metadata or {})
            except pa.ArrowException:
                return False
        return "flag_probs" in _first_record(path)
    except (OSError, RecursionError):
        return False


def _first_record(path: Path) -> dict[str, Any]:
    """The object in a file's first line; empty if there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except ValueError:
        return {}
    return first if isinstance(first, dict) else {}


def _offsets(counts: Sequence[int] | Indices) -> Indices:
    """Where each of N pieces begins that lie end to end, and where the last one ends: N + 1."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _spans(starts: Indices, counts: Indices) -> Indices:
    """Indices of slices of an array, one slice after the other."""
    before = _offsets(counts)[:-1]
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def _from_lines(path: Path) -> Recording:
    try:
        first = _first_record(path)
    except OSError as error:
        raise RedflagError(f"{path} cannot be read ({error.strerror}). Give a recording.") from error
    if "events" in first:
        from redflag.trace import read_traces

        traces = list(read_traces(path))
        flagged = traces[0].categories
        if any(trace.categories != flagged for trace in traces):
            raise RedflagError(f"{path} must not hold traces of different flags. Split the file.")
        names_of = ("flag_probs", "token_ids", "id", "thought_tokens")
        return Recording.of(flagged, ({name: getattr(t, name) for name in names_of} | t.meta for t in traces))
    scored = read_scored(path)
    if not scored:
        raise RedflagError(f"{path} must hold responses (got none). Run `redflag score` to write it.")
    flags = len(scored[0]["peak"])
    names = sorted({row["category"] for row in scored if row["category"] is not None})
    # Scored rows do not name their flags: a single flag is for all harm, several are named in the model's redflag.json.
    if flags == 1 or len(names) != flags:
        names = ["harm"] if flags == 1 else [f"flag {k}" for k in range(flags)]
    return Recording.of(scored[0].get("markers", names), scored)
