"""Sources of rows: files, folders, patterns, data sets, lists. Yields raw records; `rows.py` reads them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redflag.data.readers import NAMED_SUFFIXES, SUFFIXES, Records, read_file
from redflag.errors import RedflagError

# OWNER/NAME, or a folder in the hub's layout; then `:CONFIGURATION`, then `:SPLIT`. The drive of a Windows path belongs
# to the folder.
_WITH_CONFIG = re.compile(r"(?P<name>(?:[A-Za-z]:[\\/])?[^:]+):(?P<config>[\w.+-]*)(?::(?P<split>[^*?]+))?")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass
class Provenance:
    """The files read so far, and the SHA-256 of each (or of the records, for sources other than files)."""

    files: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """One digest for all: the file's own if there is one file, otherwise the digest of the digests."""
        if len(self.digests) == 1:
            return self.digests[0]
        return hashlib.sha256("\n".join(self.digests).encode()).hexdigest()


def open_source(source: Any, split: str, provenance: Provenance) -> Iterator[tuple[str, Records]]:
    """Yields each part of the source: its name, and its records numbered from 1. Provenance is complete at the end."""
    if isinstance(source, (str, Path)):
        source = [source]
    elif isinstance(source, Mapping):
        raise RedflagError(
            f"the source must not be a mapping (got keys {list(source)[:5]}). Choose one split or give a list of rows."
        )
    items = list(source) if isinstance(source, (list, tuple)) else source
    if isinstance(items, list) and items and all(isinstance(item, (str, Path)) for item in items):
        for item in items:
            if (address := hub_address(item)) is not None:
                name, config, own_split = address
                yield from open_source(_hub(name, config, own_split or split), split, provenance)
                continue
            for path in _paths(item):
                data = _read(path)
                provenance.digests.append(hashlib.sha256(data).hexdigest())
                provenance.files.append(str(path))
                yield str(path), read_file(path, data)
        return
    try:
        iterator = iter(items)
    except TypeError:
        raise RedflagError(
            f"the source must be a file, a folder, a data set's name or a list of rows (got {describe(source)})."
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


def hub_address(item: str | Path) -> tuple[str, str | None, str | None] | None:
    """Data set, configuration and split in a name; None if it can only be files.

    The form is `OWNER/NAME:CONFIGURATION:SPLIT`. The configuration may be empty (`OWNER/NAME::SPLIT`), and everything
    after the name may be left out. A file or folder with the whole name takes precedence. `OWNER/NAME` may also be a
    folder, which is then read as its card (`README.md`) says.

    Example:
        >>> hub_address("allenai/wildguardmix:wildguardtrain:train")
        ('allenai/wildguardmix', 'wildguardtrain', 'train')
        >>> hub_address("PKU-Alignment/BeaverTails::30k_train")
        ('PKU-Alignment/BeaverTails', None, '30k_train')
        >>> hub_address("C:\\\\rows.jsonl"), hub_address("C:/data/rows.jsonl")
        (None, None)
    """
    if not isinstance(item, str) or Path(item).expanduser().exists():
        return None
    parts = _WITH_CONFIG.fullmatch(item)
    if parts is not None and not item.endswith(NAMED_SUFFIXES):
        name = parts["name"]
        if _HUB_NAME.fullmatch(name) or Path(name).expanduser().is_dir():
            return name, parts["config"] or None, parts["split"]
    if _HUB_NAME.fullmatch(item) and not re.fullmatch(r"\.[A-Za-z]\w*", Path(item).suffix):
        return item, None, None
    return None


def _paths(item: str | Path) -> list[Path]:
    """The files of a name: a file, a folder or a pattern."""
    path = Path(item).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
        if not files:
            other = " (.json files are read only if named themselves)" if any(path.rglob("*.json")) else ""
            raise RedflagError(f"the folder {path} must hold files ending in {', '.join(SUFFIXES)} (got none{other}).")
        return files
    if path.exists():
        if not path.name.endswith(NAMED_SUFFIXES):
            raise RedflagError(
                f"the name of a file of rows must end in one of {', '.join(NAMED_SUFFIXES)} (got {path})."
            )
        return [path]
    if any(c in str(path) for c in "*?["):
        parts = path.parts[1:] if path.is_absolute() else path.parts
        root = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(p for p in root.glob(str(Path(*parts))) if p.is_file())
        if not files:
            raise RedflagError(f"no file matches {path}. Check the pattern and the folder it starts from.")
        return files
    raise RedflagError(f"{path} must be a file or folder of rows (it does not exist). Check the path.")


def _hub(name: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # a dozen types, from DNS to a missing split
        reason = str(error)
        if names := _available(reason, r"(?:available configs:|not found\. Available:) "):
            raise RedflagError(
                f"configuration must be one of {', '.join(names)} for the data set {name} "
                f"(got {config or 'none'}). Write it behind the name, such as {name}:{names[0]}:{split}"
            ) from error
        if names := _available(reason, r"Should be one of "):
            address = f"{name}:{config or ''}:{names[0]}"
            raise RedflagError(
                f"split must be one of {', '.join(names)} for the data set {name} (got {split}). Give --split "
                f"{names[0]}, or write it behind the name: {address}"
            ) from error
        if "scripts are no longer supported" in reason:
            raise RedflagError(
                f"the data set {name} must be files of rows (it is a loading script, which datasets "
                f"{datasets.__version__} does not run). Download its data files and give their folder"
            ) from error
        reason = reason.splitlines()[0] if reason else type(error).__name__
        raise RedflagError(
            f"{name!r} is neither a file nor a data set that loads from the hub with split {split!r} ({reason}). Check "
            "the name and the connection."
        ) from error


def _available(reason: str, before: str) -> list[str]:
    """The names that an error of `datasets` lists behind some words; empty for another error."""
    listed = re.search(before + r"\[(.*?)\]", reason)
    return re.findall(r"'([^']*)'", listed[1]) if listed else []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RedflagError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error


def describe(source: Any) -> str:
    """Names a source in an error."""
    return repr(str(source)) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
