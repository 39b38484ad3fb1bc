"""The script that sweeps the refusal rate, and the kinds of refusals it is tried on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


KINDS = ("safety", "incomplete", "unsupported")


RESPOND = "respond"


def script(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep = script(ROOT / "scripts" / "sweep_refusal_rate.py")
