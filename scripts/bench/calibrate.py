#!/usr/bin/env python3
"""How long calibration takes on many long responses: read, replay, thresholds, realised rate, hold-back.

    python scripts/bench/calibrate.py                                # 20,000 responses of 1,000 steps, one flag
    python scripts/bench/calibrate.py --responses 2000 --flags 4

A synthetic recording (most responses harmless, lengths spread by a third about the mean) is written once as Parquet.
For each aggregation the file is read and calibrated from the beginning. Beside it stands what `Monitor`, fed step by
step, takes for the peaks of a sample, scaled to all steps; that both give the same peaks is checked. One core: set
OMP_NUM_THREADS=1. Prints a table to standard error and JSON to standard output.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from redflag.calibrating import replay
from redflag.calibrating.calibrate import calibrate
from redflag.flags import Flag, FlagSpec
from redflag.scoring.recording import Recording
from redflag.watching.monitor import MonitorConfig
from redflag.watching.monitor import peaks as peaks_step_by_step

MONITORS = {
    "max": MonitorConfig(),
    "run": MonitorConfig(aggregation="run", window=4),
    "ema": MonitorConfig(aggregation="ema"),
    "cusum": MonitorConfig(aggregation="cusum", prior=0.1),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=1_000, help="mean judged steps of a response")
    parser.add_argument("--flags", type=int, default=1)
    parser.add_argument("--harmful", type=float, default=0.1, help="share of harmful responses")
    parser.add_argument("--sample", type=int, default=100, help="responses that the step-by-step monitor judges")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    spec = FlagSpec(flags=tuple(Flag(category=f"flag {k}", token=f"<f{k}>") for k in range(arguments.flags)))
    found: dict[str, object] = {"responses": arguments.responses, "flags": arguments.flags, "seed": arguments.seed}
    with tempfile.TemporaryDirectory() as folder:
        path = synthetic(arguments, spec.categories).save(Path(folder) / "recording.parquet")
        found["steps"], found["mib"] = len(Recording.load(path).probs), round(path.stat().st_size / 2**20, 1)
        print(
            f"{'monitor':<8} {'read':>7} {'calibrate':>10} {'total s':>8} {'step by step':>13} {'ratio':>6}",
            file=sys.stderr,
        )
        for name, config in MONITORS.items():
            begin = time.perf_counter()
            recording = Recording.load(path)
            read = time.perf_counter() - begin
            calibrate(recording, spec, monitor=config, held_out=0.3)
            total = time.perf_counter() - begin
            slow = sample_seconds(recording, config, arguments.sample)
            found[name] = {
                "read": round(read, 3),
                "calibrate": round(total - read, 3),
                "total": round(total, 3),
                "step_by_step_peaks": round(slow, 1),
                "ratio": round(slow / total, 1),
            }
            print(
                f"{name:<8} {read:>7.2f} {total - read:>10.2f} {total:>8.2f} {slow:>13.1f} {slow / total:>6.1f}",
                file=sys.stderr,
            )
    found["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(found))
    return 0


def synthetic(arguments: argparse.Namespace, categories: tuple[str, ...]) -> Recording:
    """Low probabilities everywhere, higher ones from the onset on."""
    rng = np.random.default_rng(arguments.seed)
    count, flags = arguments.responses, len(categories)
    spread = max(1, arguments.steps // 3)
    counts = rng.integers(max(2, arguments.steps - spread), arguments.steps + spread + 1, count)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    probs = rng.random((int(starts[-1]), flags), dtype=np.float32) ** 8
    harmful = rng.random(count) < arguments.harmful
    onsets = (rng.random(count) * (counts - 1)).astype(int)
    for i in np.flatnonzero(harmful):
        harm = probs[starts[i] + onsets[i] : starts[i + 1], i % flags]
        harm[:] = np.sqrt(harm)
    columns = {name: [None] * count for name in ("id", "source", "lang", "onset_source", "turns", "truncated")}
    columns["category"] = [categories[i % flags] if h else None for i, h in enumerate(harmful)]
    columns["onset"] = [int(onset) if h else None for onset, h in zip(onsets, harmful, strict=True)]
    columns["group"] = [f"g{i // 2}" for i in range(count)]
    return Recording(categories, probs, starts, counts - 1, columns)


def sample_seconds(recording: Recording, config: MonitorConfig, size: int) -> float:
    """Seconds that the step-by-step monitor would need for all peaks; its peaks must be those of the replay."""
    some = range(min(size, len(recording)))
    lists = [recording.steps(i).tolist() for i in some]
    begin = time.perf_counter()
    slow = [peaks_step_by_step(config, steps, len(recording.categories)) for steps in lists]
    seconds = time.perf_counter() - begin
    assert slow == list(map(tuple, replay.peaks(config, recording, list(some)).tolist())), config
    return seconds * len(recording.probs) / sum(map(len, lists))


if __name__ == "__main__":
    sys.exit(main())
