"""The flag and a probe on the same base together: their log-odds mixed, step by step, in one monitor.

    python recipes/smollm2/together.py --output runs/smollm2-open --flag dense-0 --probe mlp-probe

Needs the scores of both (`run.py`). The mixture (0: the flag alone, 1: the probe alone) and the monitor are chosen on
development rows as `table.py` chooses monitors; the test rows are read once.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from table import CHOSEN_BY, choose_monitor, detection, peaks, read

from redflag.scoring.recording import Recording
from redflag.stats.metrics import tpr_at_fpr

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def mixed(flag: Recording, probe: Recording, share: float) -> Recording:
    """A recording of the same responses whose log-odds are the mean of both, weighted."""
    if flag.columns["id"] != probe.columns["id"] or (flag.starts != probe.starts).any():
        raise SystemExit("both must hold the same responses, in the same order and with the same tokens")
    odds = [np.log(p) - np.log1p(-p) for p in (r.probs.astype(np.float64).clip(1e-9, 1 - 1e-9) for r in (flag, probe))]
    log_odds = (1 - share) * odds[0] + share * odds[1]
    return replace(flag, probs=(1 / (1 + np.exp(-log_odds))).astype(np.float32))


def main() -> None:
    """Chooses, measures and prints one line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-open"))
    parser.add_argument("--flag", default="dense-0")
    parser.add_argument("--probe", default="mlp-probe")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    models, probes = arguments.output / "models", arguments.output / "baselines" / f"seed-{arguments.seed}"
    flag, probe = models / arguments.flag, probes / arguments.probe
    # A baseline's recording of development rows is called calibration.
    development = [Recording.load(flag / "development.jsonl"), Recording.load(probe / "calibration.parquet")]
    test = [Recording.load(flag / "test.jsonl"), Recording.load(probe / "test.parquet")]
    ways = []
    for share in SHARES:
        both = mixed(*development, share)
        monitor = choose_monitor(both)
        found = peaks(both, monitor)
        ways.append((sum(tpr_at_fpr(found, both.harmful, rate).tpr for rate in CHOSEN_BY), share, monitor))
    _, best, _ = max(ways, key=lambda way: way[0])
    rows = read(arguments.output / "rows" / "test.jsonl")
    reviewed = np.array([row["extra"].get("sure") is not None for row in rows])
    for _, share, monitor in ways:
        if share in (0.0, best, 1.0):
            recording = mixed(*test, share)
            scores = peaks(recording, monitor)
            line = {"share of the probe": share, "monitor": monitor, "chosen": share == best}
            for name, chosen in (("all", np.ones(len(rows), bool)), ("reviewed", reviewed)):
                line[name] = {k: v for k, v in detection(scores, recording, chosen).items() if k != "harmful"}
            print(json.dumps(line))


if __name__ == "__main__":
    main()
