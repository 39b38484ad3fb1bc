"""Baselines on the rows the flags are trained and tested on, recorded as flags are.

    python recipes/small-real/baselines.py --output runs/small-real --seed 0

They are those of `redflag.lab.baselines`, and read the base model before it got its flag. Writes
`<output>/baselines/seed-0/<name>/`: `test.parquet`, and `calibration.parquet` for the development rows; what is there
is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from redflag.data.rows import load_rows
from redflag.lab.baselines.record_baselines import record_baselines

MAX_LENGTH = 256  # As flags are scored.
BASELINES = ("tfidf", "last-layer probe", "all-layer probe", "token head", "mlp probe")


def main(output: Path, base: Path, names: Sequence[str], seed: int) -> None:
    """Trains and scores the baselines of one seed."""
    train, development, test = (
        load_rows(output / "rows" / f"{name}.jsonl").rows for name in ("train", "development", "test")
    )
    folder = output / "baselines"
    done = record_baselines(
        names,
        base,
        None,
        train,
        test,
        development,
        folder / f"seed-{seed}",
        seed=seed,
        max_length=MAX_LENGTH,
        hidden_dir=folder / "hidden",  # The same for every seed; some gigabytes, which may be deleted afterwards.
    )
    for name, baseline in done.items():
        print(f"{name}, seed {seed}: {baseline.seconds:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/small-real"))
    parser.add_argument("--base", type=Path, help="base model; default: <output>/base")
    parser.add_argument("--names", nargs="+", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.output, arguments.base or arguments.output / "base", arguments.names, arguments.seed)
