"""A classifier on the answers that were read one by one, beside phrases alone.

python recipes/papers/cannot-or-should-not/measure.py runs/cannot-or-should-not/classifier
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from redflag.data.sources import Provenance
from redflag.lab.refusals import PhraseClassifier, RefusalClassifier, load_taxonomy
from redflag.lab.refusals.held_out import figures_of
from redflag.lab.refusals.pairs import read_labelled


def main(folders: list[Path], rows: Path) -> None:
    """Prints macro-F1, its interval and the confusion matrix of each."""
    pairs = read_labelled([str(rows)], Provenance())
    truth = np.array([int(bool(pair.refusal)) for pair in pairs])
    judges = {str(folder): RefusalClassifier.load(folder) for folder in folders}
    for name, judge in {"phrases": PhraseClassifier(load_taxonomy()), **judges}.items():
        guess = (judge.judge(pairs).refusal >= 0.5).astype(int)
        found = figures_of(truth, guess, [pair.group for pair in pairs], ["no refusal", "refusal"], seed=0)
        low, high = found["macro_f1_interval"]
        (kept, false), (missed, hit) = found["confusion"]
        print(
            f"{name}: macro-F1 {found['macro_f1']:.3f} ({low:.3f} to {high:.3f}); {hit} of {hit + missed} refusals "
            f"found, {false} of {kept + false} other answers taken for one"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--rows", type=Path, default=Path("runs/cannot-or-should-not/read.jsonl"))
    arguments = parser.parse_args()
    main(arguments.folders, arguments.rows)
