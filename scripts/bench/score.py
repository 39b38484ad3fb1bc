#!/usr/bin/env python3
"""Scoring throughput against the bare forward pass of the same model over the same batches.

    python scripts/bench/score.py                                    # 0.1b on a CPU, float32
    python scripts/bench/score.py --model MODEL --rows rows.jsonl    # a flagged model's folder and rows
    python scripts/bench/score.py --shape 1b --device cuda --dtype bfloat16

Three things are timed on the same rows, in turn (bare, backend, verb, bare, ...):

- bare: the model's own forward pass over the batches that scoring makes (rows of like length, padded on the right), ids
  to full logits, which are dropped. It includes making the tensors from lists; nothing is read back or written.
- backend: `HFBackend.score`: the same batches, the K flag probabilities of every response position as numpy arrays.
- verb: all of `redflag score` from loaded rows to a written file: chat template, tokenizer, backend, JSON lines.

Tokens are those of prompts and responses, without padding. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {  # hidden, layers, heads, key/value heads, MLP, vocabulary
    "tiny": (64, 2, 4, 2, 128, 2_000),
    "0.1b": (576, 12, 9, 3, 1536, 49_152),
    "0.5b": (896, 24, 14, 2, 4864, 151_936),
    "1b": (2048, 16, 32, 8, 8192, 128_256),
    "8b": (4096, 32, 32, 8, 14336, 128_256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.1b", help="a random model of this size")
    parser.add_argument("--model", help="a flagged model's folder instead")
    parser.add_argument("--rows", help="... and rows for it")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--count", type=int, default=16, help="rows")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="words of the longest response of a random row")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine, on a CPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import torch

    torch.set_num_threads(arguments.threads)
    backend, tokenizer, spec, rows = given(arguments) if arguments.model else drawn(arguments)
    runs = ways(arguments, backend, tokenizer, spec, rows)
    load_before = os.getloadavg()[0]
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for pair in range(-1, arguments.pairs):  # the first is for warming up
        for name, call in runs.items():
            started = clock()
            call()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            if pair >= 0:
                seconds[name].append(clock() - started)
        print(
            f"pair {pair + 1}: { {name: round(times[-1], 3) for name, times in seconds.items() if times} }",
            file=sys.stderr,
        )
    tokens = sum(len(prompt) + len(response) for prompt, response in runs["bare"].pairs)
    result = {
        "model": arguments.model or arguments.shape,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "rows": len(rows),
        "tokens": tokens,
        "batch_size": arguments.batch_size,
        "tokens_per_s": {name: round(tokens / statistics.median(times), 1) for name, times in seconds.items()},
        "ratio_to_bare": {name: ratios(seconds["bare"], seconds[name]) for name in ("backend", "verb")},
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "seconds": seconds,
    }
    print(json.dumps(result))


def ratios(bare: list[float], other: list[float]) -> dict[str, Any]:
    """Throughput against that of the bare pass just before."""
    each = sorted(b / o for b, o in zip(bare, other, strict=True))
    return {"median": round(statistics.median(each), 3), "least": round(each[0], 3), "most": round(each[-1], 3)}


class Bare:
    """The forward pass as a user would call it, over the batches that scoring makes of these rows."""

    def __init__(self, model: Any, pairs: list[tuple[list[int], list[int]]], batch_size: int) -> None:
        from redflag.scoring.score import BATCHES

        self.model, self.pairs = model, pairs
        self.batches: list[list[list[int]]] = []
        for start in range(0, len(pairs), batch_size * BATCHES):
            rows = sorted(([*p, *r] for p, r in pairs[start : start + batch_size * BATCHES]), key=len)
            self.batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def __call__(self) -> None:
        import torch

        with torch.inference_mode():
            for rows in self.batches:
                width = max(map(len, rows))
                ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.model.device)
                self.model(input_ids=ids, use_cache=False)


def ways(arguments: Any, backend: Any, tokenizer: Any, spec: Any, rows: list[Any]) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    from redflag.scoring.fitting import fit
    from redflag.scoring.score import BATCHES, score_to_file

    fitted = [fit(tokenizer, spec, row, i, backend.context_length) for i, row in enumerate(rows)]
    pairs = [(item.prompt_ids, item.response_ids + item.tail_ids) for item in fitted]

    def measured() -> None:
        window = arguments.batch_size * BATCHES
        for start in range(0, len(pairs), window):
            backend.score(pairs[start : start + window], batch_size=arguments.batch_size)

    def verb() -> None:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as silent:
            said, sys.stderr = sys.stderr, silent
            try:
                options = {"rows_sha256": "", "batch_size": arguments.batch_size, "max_length": backend.context_length}
                score_to_file(backend, tokenizer, spec, rows, Path(folder) / "scored.jsonl", **options)
            finally:
                sys.stderr = said

    return {"bare": Bare(backend._model, pairs, arguments.batch_size), "backend": measured, "verb": verb}


def given(arguments: Any) -> tuple[Any, Any, Any, list[Any]]:
    """A flagged model and the first rows of a file."""
    from redflag.backends.load import load_flagged
    from redflag.data.rows import load_rows

    backend, tokenizer, spec = load_flagged(arguments.model, arguments.device, arguments.dtype)
    return backend, tokenizer, spec, load_rows(arguments.rows).rows[: arguments.count]


def drawn(arguments: Any) -> tuple[Any, Any, Any, list[Any]]:
    """A random model in a realistic shape, and rows of random words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from redflag.backends.hf import HFBackend
    from redflag.data.rows import Row
    from redflag.flags import FlagSpec, attach
    from redflag.models.pretrain import train_tokenizer

    torch.manual_seed(0)
    hidden, layers, heads, kv_heads, mlp, vocabulary = SHAPES[arguments.shape]
    words = [f"word{i}" for i in range(500)]
    tokenizer = train_tokenizer([" ".join(words)], 1200)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.device(arguments.device):
        model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype))
    spec = attach(model, tokenizer, FlagSpec.of("harm"))
    draw = random.Random(0)
    rows = [
        Row(
            [
                {"role": "user", "content": " ".join(draw.choices(words, k=arguments.length // 8))},
                {"role": "assistant", "content": " ".join(draw.choices(words, k=draw.randint(8, arguments.length)))},
            ],
            category="harm" if i % 3 == 0 else None,
            id=str(i),
        )
        for i in range(arguments.count)
    ]
    return HFBackend(model, tokenizer, spec), tokenizer, spec, rows


if __name__ == "__main__":
    main()
