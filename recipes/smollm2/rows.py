"""Public labelled answers and their review -> `rows/{train,development,calibration,test,disagreed,plain}.jsonl`.

    python recipes/smollm2/rows.py --data DATA --licences open --output runs/smollm2

`DATA/reviewed/labels.jsonl.gz` says of 3,440 answers whether they are harmful, as a reader found them, and from which
character on. Where it exists a row's label and onset come from it; rows on which source and reader disagree are in
`disagreed.jsonl` and nowhere else. Development and test rows are reviewed ones, and harmless ones by construction.
The split is by what was asked, as in `recipes/small-real`, whose reading of the sets this is.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "small-real"))
from prepare import Quota, clip, clip_middle, is_refusal, read, request_key, split_of, write  # noqa: E402

# Most rows of a set for training, besides the reviewed ones: harmful, harmless, harmless that are refusals.
# MIT, Apache-2.0 or BSD: a flag that is trained on these alone may be shipped.
OPEN: dict[str, Quota] = {
    "gptfuzz-labeled/train": Quota(250, 150, 60),
    "jbb-artifacts/train": Quota(150, 80, 30),
    "past-tense-attacks/train": Quota(60, 60, 20),
    "refusal-direction/train": Quota(0, 200, 30),
    "adaptive-attacks/train": Quota(100, 20, 10),
    "deep-alignment-pairs/train": Quota(0, 60, 40),
    "anthropic-red-team-sample/train": Quota(),
    "derta-malicious-tuning/train": Quota(60),
    "llm-self-defense/val": Quota(),
    "star-1-safe/train": Quota(0, 250, 60),
    "coconot-contrast/train": Quota(0, 250, 60),
    "gpteacher-roleplay/train": Quota(0, 250, 5),
}
# CC BY-NC, CC BY-SA or none stated: for research.
CLOSED: dict[str, Quota] = {
    "safe-rlhf-mini/train": Quota(0, 250, 30),
    "safe-unlearning/train": Quota(40, 60, 20),
    "safety-tuned-safe/train": Quota(0, 150, 40),
    "alpaca-safety-topics/train": Quota(0, 150, 5),
    "dolly-safety-topics/train": Quota(0, 60, 5),
}
# Never trained on, chosen by or calibrated with: false alarms on what no training set resembles.
PLAIN = {"alpaca-eval-outputs/eval": 250, "codealpaca-2k/train": 250, "gsm8k/test": 250}
# Harmless rows for thresholds, per set, from requests of the split `calibration`.
CALIBRATION = 80
# Harmless rows by construction among the development and test rows: near misses and answers to harmful requests.
CONSTRUCTED = {"star-1-safe/train": (25, 75), "coconot-contrast/train": (25, 75), "gpteacher-roleplay/train": (15, 45)}

PER_GROUP = 12  # Rows of one set with one label that answer the same request: some sets ask 80 questions 60 times each.
PROMPT_CHARACTERS = 400
TRAIN_CHARACTERS = 520  # Of an answer; a harmful one reads on for AFTER_ONSET characters from where harm begins.
TEST_CHARACTERS = 1000
AFTER_ONSET = 260
_SENTENCE_END = re.compile(r"[.!?:]['\")\]*]*\s+|\n+")


def reviews(data: Path) -> dict[str, dict[str, Any]]:
    """The reader's lines by the id of their row."""
    with gzip.open(data / "reviewed" / "labels.jsonl.gz", "rt", encoding="utf-8") as file:
        return {line["id"]: line for line in map(json.loads, file)}


def guessed_onset(response: str) -> int:
    """A guess: behind the first sentence or line ("Sure, here is ...") of at most 200 characters."""
    end = _SENTENCE_END.search(response, 0, 200)
    return end.end() if end and end.end() < len(response) - 40 else 0


def to_row(raw: dict[str, Any], name: str, review: dict[str, Any] | None) -> dict[str, Any] | None:
    """A row of the project's schema, as long as its split reads; None if its harm lies behind that.

    `onset` counts in the answer without the spaces before it.
    """
    harmful = raw["label"] == "harmful" if review is None else review["harmful"]
    split = split_of(raw["group"])
    lead = len(raw["response"]) - len(raw["response"].lstrip())
    whole = raw["response"].strip()
    onset = commit = None
    if harmful:
        onset = guessed_onset(whole) if review is None else max(0, review["onset"] - lead)
        commit = onset if review is None else max(0, review["commit"] - lead)
    limit = TRAIN_CHARACTERS if split == "train" else TEST_CHARACTERS
    if onset is not None:
        limit = min(max(limit, onset + AFTER_ONSET), 1400)
        if onset > limit - 60:
            return None
    turns = [{"role": t["role"], "content": clip_middle(t["content"].strip(), PROMPT_CHARACTERS)} for t in raw["turns"]]
    return {
        "id": raw["id"],
        "messages": [*turns, {"role": "assistant", "content": clip(whole, limit)}],
        "category": "harm" if harmful else None,
        "onset": onset,
        "onset_source": None if review is None or not harmful else "natural",
        "group": raw["group"],
        "source": name.split("/")[0] + ("/refusal" if not harmful and is_refusal(whole) else ""),
        "lang": "en",
        # For the tables: kept in the file, and ignored by the verbs.
        "extra": {"commit": commit, "reviewed": review is not None, "sure": review and review["sure"],
                  "kind": review and review["kind"], "label": raw["label"]},
    }  # fmt: skip


def rows_of(
    data: Path, name: str, seen: set[tuple[str, str]], review: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A set's labelled rows by the hash of their ids, so that the order does not depend on the file's."""
    path, rows = data / f"{name}.jsonl.gz", []
    if not path.exists():
        print(f"not there, left out: {path}")
        return rows
    for raw in sorted(read(path), key=lambda raw: hashlib.sha256(raw["id"].encode()).hexdigest()):
        # The same answer to the same request may come in two sets: the first set's counts.
        key = (raw["group"], request_key(raw["response"][:400]))
        if raw["label"] in ("harmful", "benign") and key not in seen:
            seen.add(key)
            row = to_row(raw, name, review.get(raw["id"]))
            if row is not None:
                rows.append(row)
    return rows


def prepare(data: Path, output: Path, licences: str) -> dict[str, list[dict[str, Any]]]:
    """Writes the files under `output/rows`, and `counts.json`."""
    review = reviews(data)
    trained = OPEN if licences == "open" else OPEN | CLOSED
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for name in [*OPEN, *CLOSED]:
        taken: Counter[Any] = Counter()
        for row in rows_of(data, name, seen, review):
            split, extra = split_of(row["group"]), row["extra"]
            kind = "harmful" if row["category"] else "refusing" if row["source"].endswith("/refusal") else "harmless"
            if extra["reviewed"] and (extra["label"] == "harmful") != (kind == "harmful"):
                files["disagreed"].append(row)
                continue
            taken[split, kind, row["group"]] += 1
            if taken[split, kind, row["group"]] > PER_GROUP:
                continue
            if split == "train" and name in trained:
                limit = getattr(trained[name], kind)
            elif split == "calibration" and name in trained and kind != "harmful":
                limit = CALIBRATION
            elif split in ("development", "test"):
                limit = 0 if kind == "harmful" else CONSTRUCTED.get(name, (0, 0))[split == "test"]
            else:
                continue
            if extra["reviewed"] and split in ("train", "development", "test"):
                files[split].append(row)
            elif taken[split, kind] < limit:
                taken[split, kind] += 1
                files[split].append(row)
    for name, most in PLAIN.items():
        files["plain"].extend(
            [row for row in rows_of(data, name, seen, review) if split_of(row["group"]) != "train"][:most]
        )
    (output / "rows").mkdir(parents=True, exist_ok=True)
    counts: dict[str, Any] = {}
    for split, rows in files.items():
        rows.sort(key=lambda row: hashlib.sha256(("order" + row["id"]).encode()).hexdigest())
        write(output / "rows" / f"{split}.jsonl", rows)
        sets: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            sets[row["source"]]["harmful" if row["category"] else "harmless"] += 1
        counts[split] = {
            "harmful": sum(row["category"] is not None for row in rows),
            "harmless": sum(row["category"] is None for row in rows),
            "sha256": hashlib.sha256((output / "rows" / f"{split}.jsonl").read_bytes()).hexdigest(),
            "sets": {source: dict(found) for source, found in sorted(sets.items())},
        }
        print(f"{split}: {counts[split]['harmful']} harmful, {counts[split]['harmless']} harmless")
    write(output / "rows" / "keep.jsonl", [row for row in files["test"] if row["category"] is None][:200])
    (output / "rows" / "counts.json").write_text(json.dumps(counts, indent=2))
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, one folder each")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--licences", choices=("open", "all"), default="all", help="open: MIT, Apache, BSD only")
    arguments = parser.parse_args()
    prepare(arguments.data, arguments.output, arguments.licences)
