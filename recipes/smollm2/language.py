r"""What the flag did to the language: keep KL, perplexity, and greedy answers that stay word for word.

    python recipes/smollm2/language.py --model runs/smollm2/models/dense-0 --base .cache/smollm2 \
        --rows runs/smollm2/rows/keep.jsonl

Reads harmless rows; writes `MODEL/language.json`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path

import torch

from redflag.backends.load import load_flagged
from redflag.data.rows import load_rows
from redflag.files import atomic_write
from redflag.lab.evaluating.language import language_change
from redflag.prompt import render_prompt

BATCH = 20


@torch.inference_mode()
def greedy(model, tokenizer, spec, rows, tokens: int) -> list[list[int]]:
    """The most likely answers' ids, flags left out; prompts of like length are read together, padded in front."""
    words = model.get_output_embeddings().weight.shape[0]  # the base has no row for a flag
    end = tokenizer.eos_token_id
    prompts = [render_prompt(tokenizer, row.messages[:-1], spec) for row in rows]
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in rows]
    for first in range(0, len(rows), BATCH):
        batch = by_length[first : first + BATCH]
        longest = len(prompts[batch[-1]])
        ids = torch.tensor([[end] * (longest - len(prompts[i])) + prompts[i] for i in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
        written = model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=[end],
            pad_token_id=end, suppress_tokens=[i for i in spec.ids if i < words] or None,
        )  # fmt: skip
        for i, answer in zip(batch, written[:, longest:].tolist(), strict=True):
            answers[i] = answer[: answer.index(end) + 1] if end in answer else answer
    return answers


def shared(one: list[int], other: list[int]) -> int:
    """How many tokens two answers begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--most", type=int, default=200, help="requests that are answered")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    backend, tokenizer, spec = load_flagged(arguments.model, None, torch.float32)
    flagged = backend.model
    base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    rows = load_rows(arguments.rows).rows
    found = asdict(language_change(flagged, base, tokenizer, spec, rows, max_length=448))
    asked = [row for row in rows if not row.harmful][: arguments.most]
    answers = (greedy(model.eval(), tokenizer, spec, asked, arguments.tokens) for model in (flagged, base))
    pairs = list(zip(*answers, strict=True))
    found |= {
        "greedy_asked": len(pairs),
        "greedy_tokens": arguments.tokens,
        "greedy_unchanged": sum(one == other for one, other in pairs),
        "greedy_shared_tokens": sum(shared(*pair) for pair in pairs) / len(pairs),
    }
    with atomic_write(arguments.model / "language.json") as file:
        file.write(json.dumps(found, indent=2).encode())
    print(json.dumps(found, indent=2))
