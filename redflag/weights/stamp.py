"""What tells the files of one model from those of another, for caches of what a model said."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

# Besides `config.json`: what a model computes with, and how texts become its tokens.
FILES = (
    *("*.safetensors", "*.bin", "adapter_config.json", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "chat_template*"),
)


def model_stamp(name: str | Path) -> list[Any]:
    """What changes when a model's folder is written again: its configuration, the size and time of its other files.

    Thresholds and records beside them do not count: they change nothing of what the model says.

    A copy that does not keep the files' times counts as another model. Of a name on a hub nothing is known: all such
    names have one stamp.
    """
    folder = Path(name)
    files = [folder] if folder.is_file() else sorted(path for pattern in FILES for path in folder.glob(pattern))
    config = folder / "config.json"
    return [
        config.read_text(encoding="utf-8") if config.exists() else None,
        [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    ]


def stamped_name(name: str | Path) -> str:
    """A model's name; of local files the last part, with a short hash of their stamp."""
    if not Path(name).exists():
        return str(name)
    digest = hashlib.sha256(json.dumps(model_stamp(name)).encode()).hexdigest()[:8]
    return f"{Path(name).name} {digest}"
