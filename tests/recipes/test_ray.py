"""The recipe for a Ray cluster: it can be read, and on two local workers it writes what `redflag score` writes."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from redflag.scoring import score

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "scale" / "ray" / "score.py"


def test_the_recipe_can_be_read_and_asks_redflag_for_what_there_is() -> None:
    tree = ast.parse(RECIPE.read_text())
    asked = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "redflag.scoring.score"
    ]
    names = [alias.name for node in asked for alias in node.names]
    assert names and all(hasattr(score, name) for name in names)


@pytest.mark.skipif(not os.environ.get("REDFLAG_RAY"), reason="ray is no dependency: install it and set REDFLAG_RAY=1")
def test_two_local_workers_write_what_one_process_writes(origin: Path, tmp_path: Path) -> None:
    model, rows = origin / "model", origin / "rows.jsonl"
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    score.run(score.ScoreArguments(model=str(model), input=str(rows), output=str(one), batch_size=1))
    python = os.environ.get("REDFLAG_RAY_PYTHON", sys.executable)
    command = [python, str(RECIPE), "--model", str(model), "--input", str(rows), "--output", str(two)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(RECIPE.parents[3])
    options = ["--workers", "2", "--batch_size", "1"]
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert two.read_bytes() == one.read_bytes()
