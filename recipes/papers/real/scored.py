"""Rows scored by a flag with `redflag score`, which goes on where it was cut short; shared by the scripts beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redflag.data.rows import Row, write_rows
from redflag.models.named import model_folder
from redflag.scoring.scored import read_scored
from redflag.watching.monitor import Monitor, MonitorConfig
from redflag.watching.thresholds import Thresholds
from redflag.weights.precision import Machine

SHIPPED = "smollm2-135m"
DTYPE = "bfloat16" if Machine.here().cpu_bf16 else "float32"  # emulated, it is 50 times slower


def scored(name: str, rows: Sequence[Row], folder: Path, model: str, *, prompts: bool = False) -> list[dict[str, Any]]:
    """The rows with their probabilities, in order; `prompts` measures before the answer only."""
    folder.mkdir(parents=True, exist_ok=True)
    given, made = folder / f"{name}.rows.jsonl", folder / f"{name}.jsonl"
    if not made.exists():
        write_rows(given, rows)
        command = [sys.executable, "-m", "redflag.cli", "score", "--model", model, "--input", str(given)]
        command += ["--max_length", "448", "--dtype", DTYPE, "--output", str(made)]
        command += ["--prompts", "true"] if prompts else []
        print(" ".join(command[1:]), flush=True)
        subprocess.run(command, check=True)
    found = read_scored(made)
    assert [line["id"] for line in found] == [row.id for row in rows], f"{made} holds other rows: delete it"
    return found


def monitor_of(model: str | Path) -> MonitorConfig:
    """The monitor of a model's thresholds; the maximum where it has none."""
    folder = Path(model_folder(model))
    return Thresholds.load(folder).monitor if (folder / "thresholds.json").exists() else MonitorConfig()


def peak(line: dict[str, Any], monitor: MonitorConfig) -> float:
    """The highest score along an answer, which is what thresholds are compared with."""
    scores = Monitor(monitor, len(line["peak"]))
    for probs in line["flag_probs"]:
        scores.feed(probs)
    return max(scores.peak)
