"""Reads files of rows record by record: JSON lines, a JSON array, CSV, TSV, Parquet.

A record that cannot be read is yielded as a ValueError with the reason, and the line (or number) where it stands.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read in any folder. A `.json` file is read only if it is named itself: folders hold other JSON too.
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".ndjson", ".ndjson.gz")
NAMED_SUFFIXES = (*SUFFIXES, ".json", ".json.gz")

# A record is a JSON value, or the error in its place.
Records = Iterator[tuple[int, Any]]

_BOM = b"\xef\xbb\xbf"
_FIELD_LIMIT = 2**31 - 1  # characters of a CSV cell; csv's own limit, 131,072, is shorter than some answers


class TextRecord(dict[str, Any]):
    """A record of a text-only format: numbers, lists and objects have yet to be parsed."""


def read_file(path: Path, data: bytes) -> Records:
    """Yields (line, record) of a file; of a JSON array or a Parquet file, (number from 1, record)."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet(data)
    if name.endswith((".csv", ".tsv")):
        return _table(path, data, "\t" if name.endswith(".tsv") else ",")
    return _json(path, data) if name.endswith(".json") else _lines(path, data)


def _lines(path: Path, data: bytes) -> Records:
    stream: Any = io.BytesIO(data)
    if path.suffix == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    number = 0
    while True:
        try:
            line = stream.readline()
        except (OSError, EOFError, zlib.error) as error:
            # The records before the damage have been yielded already; the damage itself is one bad row.
            yield number + 1, _damaged(error)
            return
        if not line:
            return
        number += 1
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, ValueError(f"not UTF-8 (byte {error.start})")
        except json.JSONDecodeError as error:
            yield number, ValueError(f"malformed JSON ({error.msg} at column {error.colno})")
        except ValueError as error:  # a number of thousands of digits
            yield number, ValueError(f"malformed JSON ({str(error).partition(';')[0]})")
        except RecursionError:
            yield number, ValueError("malformed JSON (nested too deeply)")


def _json(path: Path, data: bytes) -> Records:
    """A `.json` file: one array of records, one record over several lines, or JSON lines under another name."""
    try:
        whole = _whole(path, data).removeprefix(_BOM)
    except ValueError:
        yield from _lines(path, data)  # yields the records before the damage
        return
    if not whole.lstrip().startswith(b"["):
        try:
            record = json.loads(whole)
        except (ValueError, RecursionError):
            yield from _lines(path, data)
        else:
            yield 1, record
        return
    try:
        yield from enumerate(json.loads(whole), 1)
    except UnicodeDecodeError as error:
        yield whole.count(b"\n", 0, error.start) + 1, ValueError(f"not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        yield error.lineno, ValueError(f"malformed JSON ({error.msg} at column {error.colno}), so the array is unread")
    except ValueError as error:
        yield 1, ValueError(f"malformed JSON ({str(error).partition(';')[0]})")
    except RecursionError:
        yield 1, ValueError("malformed JSON (nested too deeply)")


def _table(path: Path, data: bytes, delimiter: str) -> Records:
    """CSV with a header; an empty cell is null. Numbered by the line where a record begins."""
    try:
        whole = _whole(path, data).removeprefix(_BOM)
        text = whole.decode("utf-8")
    except UnicodeDecodeError as error:
        yield whole.count(b"\n", 0, error.start) + 1, ValueError(f"not UTF-8 (byte {error.start})")
        return
    except ValueError as error:
        yield 1, error
        return
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, ValueError(f"malformed CSV ({error})")
            if header is None:
                return
            continue
        if not cells:
            continue
        if header is None:
            header = cells
            if doubles := sorted({name for name in header if header.count(name) > 1}):
                yield line, ValueError(f"the header must name each column once (got {doubles[0]!r} twice). Rename one")
                return
        elif len(cells) != len(header):
            yield line, ValueError(f"the number of cells must be that of the header, {len(header)} (got {len(cells)})")
        else:
            yield line, TextRecord((name, cell or None) for name, cell in zip(header, cells, strict=True))


def _parquet(data: bytes) -> Records:
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(io.BytesIO(data)).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pyarrow.lib.ArrowException, OSError) as error:
        yield number + 1, ValueError(f"not a readable parquet file ({str(error).splitlines()[0]})")


def _whole(path: Path, data: bytes) -> bytes:
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"the compressed file is damaged or cut off here ({error})")
