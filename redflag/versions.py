"""Versions of packages, for the records of what was made."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> dict[str, str]:
    """Name -> version, of those that are installed: from a checkout on `PYTHONPATH`, redflag itself is not.

    Example:
        >>> versions("no-such-package")
        {}
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
