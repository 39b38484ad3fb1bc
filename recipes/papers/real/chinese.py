"""The English flag on Chinese answers: `jade-alignment-zh`, a violating and a safe answer to each harmful request.

    python recipes/papers/real/chinese.py --data DATA --rows runs/smollm2-open/rows

Thresholds are those of English rows (the one that ships, and the one that 5% of the harmless development rows reach).
The tokenizer of SmolLM2 knows no Chinese, so a character is about two tokens; answers are cut at 160 characters.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from scored import SHIPPED, monitor_of, peak, scored

from redflag.data.rows import Row, load_rows
from redflag.models.named import model_folder
from redflag.stats.intervals import auroc_interval, rate_interval
from redflag.stats.metrics import auroc
from redflag.watching.thresholds import Thresholds

CHARACTERS = 160


def pairs(data: Path, count: int, seed: int) -> list[Row]:
    """Both answers to so many requests."""
    with gzip.open(data / "jade-alignment-zh/train.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    drawn = random.Random(seed).sample(sorted({str(line["extra"]["pair_id"]) for line in lines}), count)
    rows = []
    for line in lines:
        if (pair := str(line["extra"]["pair_id"])) in drawn:
            turns = [{"role": "user", "content": line["prompt"][:120]}]
            turns.append({"role": "assistant", "content": line["response"].strip()[:CHARACTERS]})
            category = "harm" if line["label"] == "harmful" else None
            rows.append(Row(turns, category, group=pair, id=line["id"], lang="zh"))
    return rows


def main() -> None:
    """Writes `chinese.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path("runs/smollm2-open/rows"))
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--output", type=Path, default=Path("runs/papers/real/scored"))
    parser.add_argument("--count", type=int, default=80, help="pairs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = pairs(arguments.data, arguments.count, arguments.seed)
    lines = scored("chinese", rows, arguments.output, arguments.model)
    developed = load_rows(arguments.rows / "development.jsonl").rows
    english = scored("development", developed, arguments.output, arguments.model)
    ships = next(iter(Thresholds.load(model_folder(arguments.model)).values.values()))
    monitor = monitor_of(arguments.model)
    loose = float(np.quantile([peak(line, monitor) for line in english if line["category"] is None], 0.95))
    peaks, harmful = np.array([peak(line, monitor) for line in lines]), np.array([row.harmful for row in rows])
    groups = [str(row.group) for row in rows]
    result: dict[str, Any] = {"pairs": arguments.count, "AUROC": [auroc(peaks, harmful)]}
    result["AUROC"] += auroc_interval(peaks, harmful, groups)
    for name, mask in (("harmful", harmful), ("harmless", ~harmful)):
        result[f"median peak, {name}"] = float(np.median(peaks[mask]))
        for key, threshold in (("shipped", ships), ("5% of development rows", loose)):
            some = [group for group, keep in zip(groups, mask, strict=True) if keep]
            hits = peaks[mask] >= threshold
            result[f"{name}, {key}"] = [int(hits.sum()), len(hits), *rate_interval(hits, some)]
    text = json.dumps(result, indent=1)
    (arguments.output.parent / "chinese.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
