"""Baselines on the rows the flag is trained and tested on, recorded as flags are.

    python recipes/smollm2/baselines.py --output runs/smollm2 --base .cache/smollm2 --seed 0

Writes `<output>/baselines/seed-0/<name>/`: `test.parquet`, and `calibration.parquet` for the development rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from redflag.data.rows import load_rows
from redflag.lab.baselines.run import record_baselines

BASELINES = ("tfidf", "last-layer probe")  # all-layer probe: 7.8 GB of hidden states for these rows

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--names", nargs="+", default=list(BASELINES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, development, test = (
        load_rows(arguments.output / "rows" / f"{name}.jsonl").rows for name in ("train", "development", "test")
    )
    folder = arguments.output / "baselines"
    done = record_baselines(
        arguments.names,
        arguments.base,
        None,
        train,
        test,
        development,
        folder / f"seed-{arguments.seed}",
        seed=arguments.seed,
        max_length=448,
        hidden_dir=folder / "hidden",  # The same for every seed; some gigabytes, which may be deleted afterwards.
    )
    for name, baseline in done.items():
        print(f"{name}, seed {arguments.seed}: {baseline.seconds:.0f} s")
