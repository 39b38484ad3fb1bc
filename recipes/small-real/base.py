"""The base model of the recipe: a tokenizer and a small Llama, from scratch, on `rows/pretrain.jsonl`.

    python recipes/small-real/base.py --output runs/small-real

Cached: a finished model of the same settings and data is left as it is; an interrupted run is continued.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from redflag.models.pretrain import pretrain, train_tokenizer

VOCABULARY = 4096
# 1.1 million parameters, tied head: what a core can bring near its best within a quarter of an hour.
SHAPE = {"hidden_size": 128, "layers": 3, "heads": 4, "intermediate_size": 352}
# Many small steps: with a few million tokens in all, the number of updates counts for more than their quality.
SCHEDULE = {"batch_size": 8, "learning_rate": 4e-3}


def build(output: Path, tokens: int, max_minutes: float) -> Path:
    """Trains tokenizer and model into `output/base`."""
    lines = (output / "rows" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line)["messages"] for line in lines]
    tokenizer = train_tokenizer((m["content"] for c in conversations for m in c), VOCABULARY)
    return pretrain(
        conversations, tokenizer, output / "base", **SHAPE, **SCHEDULE, tokens=tokens, max_minutes=max_minutes
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/small-real"))
    parser.add_argument("--tokens", type=int, default=6_000_000, help="budget in tokens")
    parser.add_argument(
        "--max-minutes", "--max_minutes", type=float, default=13, help="wall-clock limit of the training loop"
    )
    arguments = parser.parse_args()
    build(arguments.output, arguments.tokens, arguments.max_minutes)
