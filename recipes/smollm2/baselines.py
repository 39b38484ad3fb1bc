"""Baselines on the rows the flag is trained and tested on, recorded as flags are.

    python recipes/smollm2/baselines.py --output runs/smollm2 --base .cache/smollm2 --seed 0
    python recipes/smollm2/baselines.py --output runs/smollm2 --names "token head" --tuned

Writes `<output>/baselines/seed-0/<name>/`: `test.parquet`, and `calibration.parquet` for the development rows. What is
there is not made again. Probes named together read the model in one pass over each file of rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from redflag.data.rows import load_rows
from redflag.lab.baselines.record_baselines import record_baselines
from redflag.weights.precision import Machine

BASELINES = ("tfidf", "last-layer probe", "all-layer probe", "mlp probe", "token head", "own words")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--names", nargs="+", default=list(BASELINES), help='"fixed position" too: it trains a model')
    parser.add_argument("--tuned", action="store_true", help="the token head on a fine-tuned copy: seed-N-tuned")
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
        folder / (f"seed-{arguments.seed}" + ("-tuned" if arguments.tuned else "")),
        seed=arguments.seed,
        max_length=448,
        options={"token head": {"backbone": "tuned", "tuning": {"passes": 1}}} if arguments.tuned else None,
        hidden_dir=folder / "hidden",  # The same for every seed; at most 2 GB, which may be deleted afterwards.
        bf16=Machine.here().cpu_bf16,
    )
    for name, baseline in done.items():
        print(f"{name}, seed {arguments.seed}: {baseline.seconds:.0f} s")
