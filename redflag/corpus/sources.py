"""Where rows come from: files, folders, patterns, data sets, lists. Yields raw records; `rows.py` reads them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redflag.errors import RedflagError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# A record is a JSON value, or the error that stood in its place.
Records = Iterator[tuple[int, Any]]


@dataclass
class Provenance:
    """The files read so far, and the SHA-256 of each (or of the records, for sources that are no files)."""

    files: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """One digest for all: the file's own where there is one file, else the digest of the digests."""
        if len(self.digests) == 1:
            return self.digests[0]
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()


def open_source(source: Any, split: str, provenance: Provenance) -> Iterator[tuple[str, Records]]:
    """Yields each part of the source: its name, and its records numbered from 1. Provenance is complete at the end."""
    if isinstance(source, (str, Path)):
        source = [source]
    elif isinstance(source, Mapping):
        raise RedflagError(
            f"the source is a mapping with keys {list(source)[:5]}: choose one split or give a list of rows"
        )
    items = list(source) if isinstance(source, (list, tuple)) else source
    if isinstance(items, list) and items and all(isinstance(item, (str, Path)) for item in items):
        for item in items:
            paths = _paths(item)
            if paths is None:
                yield from open_source(_hub(str(item), split), split, provenance)
                continue
            for path in paths:
                data = _read(path)
                provenance.digests.append(hashlib.sha256(data).hexdigest())
                provenance.files.append(str(path))
                yield str(path), _parquet(path, data) if path.suffix == ".parquet" else _lines(path, data)
        return
    try:
        iterator = iter(items)
    except TypeError:
        raise RedflagError(
            f"rows cannot be read from {describe(source)}: give a file, a folder, a data set's name or a list of rows"
        ) from None
    digest = hashlib.sha256()
    yield "<rows>", _numbered(iterator, digest)
    provenance.digests.append(digest.hexdigest())


def _numbered(iterator: Iterator[Any], digest: Any) -> Records:
    for number, record in enumerate(iterator, 1):
        if hasattr(record, "to_dict"):
            record = record.to_dict()
        digest.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\n")
        yield number, record


def _paths(item: str | Path) -> list[Path] | None:
    """Files that a name stands for; None when it can only be a data set on the hub."""
    path = Path(item).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
        if not found:
            raise RedflagError(f"the folder {path} holds no rows: put files ending in {', '.join(SUFFIXES)} there")
        return found
    if path.exists():
        if not path.name.endswith((*SUFFIXES, ".json", ".json.gz", ".ndjson")):
            raise RedflagError(f"{path} is no file of rows: its name should end in one of {', '.join(SUFFIXES)}")
        return [path]
    if any(c in str(path) for c in "*?["):
        parts = path.parts[1:] if path.is_absolute() else path.parts
        root = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(p for p in root.glob(str(Path(*parts))) if p.is_file())
        if not found:
            raise RedflagError(f"no file matches {path}: check the pattern and the folder it starts from")
        return found
    name = str(item)
    if isinstance(item, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.suffix:
        return None
    raise RedflagError(f"there is no file or folder {path}: check the path the rows should be read from")


def _hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # a dozen kinds, from DNS to a missing split; all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RedflagError(
            f"{name!r} is no file here and cannot be had from the hub as a data set with split {split!r} ({reason}): "
            "check the name and the connection"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RedflagError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _lines(path: Path, data: bytes) -> Records:
    stream: Any = io.BytesIO(data)
    if path.suffix == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    number = 0
    while True:
        try:
            line = stream.readline()
        except (OSError, EOFError, zlib.error) as error:
            # What came before the damage has been yielded already; the damage itself is one bad row.
            yield number + 1, ValueError(f"the compressed file is damaged or cut off here ({error})")
            return
        if not line:
            return
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
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


def _parquet(path: Path, data: bytes) -> Records:
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


def describe(source: Any) -> str:
    """Names a source in an error."""
    return repr(str(source)) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
