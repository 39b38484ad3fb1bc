#!/usr/bin/env python3
"""`redflag score` as a Ray Data pipeline: the same file, written by as many scorers as a cluster has room for.

    python recipes/scale/ray/score.py --model MODEL --input rows.jsonl --output scored.jsonl --workers 2

Rows travel in the chunks that `redflag score` makes, so the same rows share a batch and the output is the same byte for
byte (on equal machines). Ray starts dead workers anew and repeats their chunks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext

from redflag.backends.open import open_scorer
from redflag.data.rows import Row, load_rows
from redflag.files import atomic_write
from redflag.flags import FlagSpec
from redflag.scoring.score import BATCHES, as_json, context_limit, score


class Scorer:
    """One worker: the model, loaded once, and chunks of rows that come to it."""

    def __init__(self, model: str, device: str, dtype: str, batch_size: int, max_length: int | None) -> None:
        self.scorer, self.tokenizer, self.spec = open_scorer(model, device=device, dtype=dtype)
        self.batch_size, self.max_length = batch_size, context_limit(max_length, self.scorer.context_length)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Chunks of rows in, their lines of `scored.jsonl` out."""
        return {
            "first": list(batch["first"]),
            "lines": [self.lines(*item) for item in zip(*batch.values(), strict=True)],
        }

    def lines(self, first: int, rows: str) -> str:
        chunk = [Row(**row) for row in json.loads(rows)]
        options: dict[str, Any] = {"batch_size": self.batch_size, "max_length": self.max_length, "first": int(first)}
        scored = score(self.scorer, self.tokenizer, self.spec, chunk, **options)
        return "".join(
            json.dumps(as_json(item, self.tokenizer), ensure_ascii=False, allow_nan=False) + "\n" for item in scored
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="flagged model; a path that every machine can read, or a hub name"
    )
    parser.add_argument("--input", required=True, help="rows; read by this process alone")
    parser.add_argument("--output", required=True, help="written by this process alone")
    parser.add_argument("--workers", type=int, default=2, help="scorers, each with the model")
    parser.add_argument("--cpus", type=float, default=1, help="... cores of each")
    parser.add_argument("--gpus", type=float, default=0, help="... GPUs of each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=16)
    parser.add_argument("--max-length", "--max_length", type=int)
    parser.add_argument("--address", help="of a running cluster; default: a new one of this machine's cores")
    arguments = parser.parse_args()

    FlagSpec.load(arguments.model)  # said now, and not by every worker, if it is no flagged model
    rows = load_rows(arguments.input).rows
    size = arguments.batch_size * BATCHES
    chunks = [
        {"first": first, "rows": json.dumps([dataclasses.asdict(row) for row in rows[first : first + size]])}
        for first in range(0, len(rows), size)
    ]
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=False)
    DataContext.get_current().execution_options.preserve_order = True
    found = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
        Scorer,
        batch_size=1,
        compute=ActorPoolStrategy(size=arguments.workers),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
        fn_constructor_args=(
            arguments.model,
            arguments.device,
            arguments.dtype,
            arguments.batch_size,
            arguments.max_length,
        ),
    )
    expected = 0
    with atomic_write(arguments.output) as file:
        for chunk in found.iter_rows():
            assert chunk["first"] == expected, "Ray gave the chunks back in another order"
            file.write(chunk["lines"].encode())
            expected += size
    ray.shutdown()
    print(f"{len(rows)} rows scored by {arguments.workers} workers: {arguments.output}")


if __name__ == "__main__":
    main()
