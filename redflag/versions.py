"""Versions of packages, for records of results."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def versions(*names: str) -> dict[str, str]:
    """Name -> version of the installed packages; redflag itself is not installed in a checkout on `PYTHONPATH`.

    Example:
        >>> versions("no-such-package")
        {}
    """
    installed = {}
    for name in names:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
