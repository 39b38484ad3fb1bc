"""The bench of scoring says what it measured, and finds the backend about as fast as the model alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench" / "score.py"


def test_the_bench_prints_one_object_with_both_ratios() -> None:
    options = ["--shape", "tiny", "--count", "8", "--pairs", "2", "--length", "24", "--threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["rows"] == 8 and found["tokens"] > 8 * 8
    assert all(found["tokens_per_s"][name] > 0 for name in ("bare", "backend", "verb"))
    assert all(len(times) == 2 for times in found["seconds"].values())
    for ratio in found["ratio_to_bare"].values():
        assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"]
