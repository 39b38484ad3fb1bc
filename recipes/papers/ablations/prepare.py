"""Rows that the ablations need besides those of `redflag demo --world nano`.

    python recipes/papers/ablations/prepare.py --rows runs/nano/rows --base runs/nano/base --output runs/ablations/rows

- `aligned.jsonl`: the training rows, and refusals to the harmful requests among them, half of them behind the beginning
  of the harmful answer (`redflag.training.answers.deep_alignment_rows`). The refusals are the nano world's own
  sentences; `recipes/papers/presto/prepare.py` takes harmless rows of the same group, which here are often ordinary
  answers.
- `eval.jsonl`: a few calibration rows, for what `redflag train` says at its end. Nothing is chosen by it.
- `attacked.jsonl`: the harmless test rows, and those harmful ones whose request is harmful, for attacks: refusing is
  taught for such requests alone.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from transformers import AutoTokenizer

from redflag.data.rows import Row, load_rows, write_rows
from redflag.lab.nano.phrases import REFUSALS
from redflag.training.answers import deep_alignment_rows

# Kinds of harmful rows whose request asks for the harm.
ASKED = ("nano:direct", "nano:late-request")
COPIES = 2
EVALUATED = 200


def triples(rows: list[Row], seed: int = 0) -> list[tuple[str, str, str]]:
    """(request, harmful answer, refusal) of one-turn rows whose request is harmful; the act is named by the group."""
    draw = random.Random(seed)
    found = []
    for row in rows:
        if row.source in ASKED and len(row.messages) == 2 and row.group is not None:
            act = row.group.split(": ", 1)[1]
            refusal = draw.choice([text for text in REFUSALS if "{name}" not in text]).replace("{act}", act)
            found.append((row.messages[0]["content"], row.response, refusal))
    return found


def main(rows: Path, base: Path, output: Path) -> None:
    """Writes the files and says how many rows there are of each kind."""
    output.mkdir(parents=True, exist_ok=True)
    train = load_rows(rows / "train.jsonl").rows
    made = triples(train)
    refusals = deep_alignment_rows(made, AutoTokenizer.from_pretrained(base), copies=COPIES)
    write_rows(output / "aligned.jsonl", train + refusals)
    write_rows(output / "eval.jsonl", load_rows(rows / "calibration.jsonl").rows[:EVALUATED])
    test = load_rows(rows / "test.jsonl").rows
    attacked = [row for row in test if not row.harmful or row.source in ASKED]
    write_rows(output / "attacked.jsonl", attacked)
    behind = sum(bool(row.prefill) for row in refusals)
    print(f"{len(made)} triples, {len(refusals)} refusals of which {behind} follow a harmful beginning")
    print(f"{sum(row.harmful for row in attacked)} harmful requests to attack with")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("runs/nano/rows"))
    parser.add_argument("--base", type=Path, default=Path("runs/nano/base"))
    parser.add_argument("--output", type=Path, default=Path("runs/ablations/rows"))
    given = parser.parse_args()
    main(given.rows, given.base, given.output)
