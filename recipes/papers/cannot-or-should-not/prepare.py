"""Rows to learn refusals from, made of public sets.

    python recipes/papers/cannot-or-should-not/prepare.py --data DATA --output runs/cannot-or-should-not

DATA holds the sets as gzipped JSONL (`coconot-contrast/train.jsonl.gz` and so on; see README.md). No set there says of
each answer whether it is a refusal. What is used instead, and how far it can be believed, stands beside each source in
`SOURCES` and in README.md. The answers listed in `read.tsv` were read one by one, come from sets that nothing is learnt
from, and only measure.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from redflag.errors import RedflagError
from redflag.files import atomic_write

Record = dict[str, Any]


def extra(row: Record, key: str) -> Any:
    """A key of the set's own."""
    return (row.get("extra") or {}).get(key)


# File, most rows, what its rows say: refusal (True, False, None), by whose word.
SOURCES: list[tuple[str, int, Callable[[Record], bool | None], str]] = [
    (
        "gptfuzz-labeled/train.jsonl.gz",
        2000,
        lambda row: row["label"] == "benign",
        "people: the answer is harmful or not; to questions that are all harmful, so that the rest are refusals, "
        "some of them partial",
    ),
    (
        "refusal-direction/train.jsonl.gz",
        3000,
        lambda row: (
            {"0": True, "1": False}.get(str(extra(row, "substring_jailbreak")))
            if row["category"] != "harmless"
            else extra(row, "intervention") == "actadd"
        ),
        "a list of phrases on harmful requests; on harmless ones by construction: refusal was induced, or not",
    ),
    (
        "deep-alignment-pairs/train.jsonl.gz",
        1000,
        lambda row: extra(row, "kind") == "refusal",
        "construction: a refusal and a harmful answer to each request",
    ),
    ("derta-malicious-tuning/train.jsonl.gz", 300, lambda row: False, "construction: answers that comply"),
    ("alpaca-safety-topics/train.jsonl.gz", 1500, lambda row: False, "construction: ordinary instructions"),
    ("dolly-safety-topics/train.jsonl.gz", 400, lambda row: False, "construction: ordinary instructions"),
    ("gpteacher-roleplay/train.jsonl.gz", 1000, lambda row: False, "construction: ordinary role play"),
    ("codealpaca-2k/train.jsonl.gz", 500, lambda row: False, "construction: ordinary instructions"),
]
# Kinds of refusal: CoCoNot labels requests, not answers; its evaluation prompts are the only ones to be had here.
KINDS = "prompts/coconot-eval.jsonl.gz"
# Requests, harmful or not.
REQUESTS = [
    ("prompts/coconot-contrast-eval.jsonl.gz", False),
    ("prompts/strongreject.jsonl.gz", True),
    ("prompts/simplesafetytests.jsonl.gz", True),
    ("prompts/catqa-en.jsonl.gz", True),
    ("prompts/harmfulqa.jsonl.gz", True),
    ("prompts/ailuminate-demo-en.jsonl.gz", True),
]


def labelled(data: Path, seed: int) -> Iterator[Record]:
    """All rows."""
    draw = random.Random(seed)
    for name, most, refusal, _ in SOURCES:
        rows = [row for row in _read(data / name) if row.get("prompt") and refusal(row) is not None]
        for row in draw.sample(rows, min(most, len(rows))):
            yield _row(name, row, refusal=refusal(row), prompt_label=_prompt_label(name, row))
    for row in _read(data / KINDS):
        safety = row["category"].startswith("Requests with safety concerns")
        yield _row(KINDS, row, refusal_category=row["category"], prompt_label="harmful" if safety else "benign")
    for name, harmful in REQUESTS:
        rows = list(_read(data / name))
        for row in draw.sample(rows, min(800, len(rows))):
            yield _row(name, row, prompt_label="harmful" if harmful else "benign")


def _prompt_label(name: str, row: Record) -> str | None:
    if name.startswith("refusal-direction"):
        return "benign" if row["category"] == "harmless" else "harmful"
    if name.startswith(("alpaca", "dolly", "codealpaca", "gpteacher")):
        return "benign"
    return "harmful" if name.startswith(("gptfuzz", "deep", "derta")) else None


def _row(name: str, row: Record, **labels: Any) -> Record:
    keys = ("id", "prompt", "response", "lang")
    return {key: row.get(key) for key in keys if row.get(key)} | {"source": name.partition("/")[0], **labels}


def _read(path: Path) -> Iterator[Record]:
    if not path.exists():
        print(f"left out, for it is not there: {path}")
        return
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def main(data: Path, output: Path, seed: int) -> None:
    """Writes `train.jsonl`, and `read.jsonl`: the rows that were read one by one, and what they are."""
    rows = list(labelled(data, seed))
    if not rows:
        raise RedflagError(f"{data} holds none of the sets, so there is nothing to learn from: name their folder")
    output.mkdir(parents=True, exist_ok=True)
    _write(output / "train.jsonl", rows)
    said = dict(line.split("\t") for line in (Path(__file__).parent / "read.tsv").read_text().splitlines()[1:])
    paths = [p for p in sorted(data.glob("*/*.jsonl.gz")) if any(name.startswith(f"{p.parent.name}-") for name in said)]
    found = [row | {"prompt": row.get("prompt") or row["messages"][-1]["content"]} for p in paths for row in _read(p)]
    read = [_row(row["id"], row, refusal=said[row["id"]] == "1") for row in found if row["id"] in said]
    _write(output / "read.jsonl", read)
    print(f"{len(rows)} rows to learn from, {len(read)} read one by one, in {output}")
    for source, count in Counter((row["source"], row.get("refusal")) for row in rows).items():
        print(f"  {source[0]}: {count} ({ {True: 'refusals', False: 'no refusals', None: 'requests'}[source[1]] })")


def _write(path: Path, rows: list[Record]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/cannot-or-should-not"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.data, arguments.output, arguments.seed)
