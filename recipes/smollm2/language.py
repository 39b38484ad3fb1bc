r"""What the flag did to the language: keep KL, perplexity, and greedy answers that stay word for word.

    python recipes/smollm2/language.py --model runs/smollm2/models/dense-0 --base .cache/smollm2 \
        --rows runs/smollm2/rows/keep.jsonl

Reads harmless rows; writes `MODEL/language.json`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from redflag.backends.load import load_flagged
from redflag.data.rows import load_rows
from redflag.files import atomic_write
from redflag.lab.evaluating.language import language_change
from redflag.prompt import render_prompt


@torch.inference_mode()
def greedy(model, tokenizer, spec, rows, tokens: int) -> list[list[int]]:
    """The most likely answers' ids, flags left out."""
    words = model.get_output_embeddings().weight.shape[0]  # the base has no row for a flag
    answers = []
    for row in rows:
        ids = torch.tensor([render_prompt(tokenizer, row.messages[:-1], spec)])
        ended = [tokenizer.eos_token_id]
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=ended,
            pad_token_id=ended[0], suppress_tokens=[i for i in spec.ids if i < words] or None,
        )  # fmt: skip
        answers.append(said[0, ids.shape[1] :].tolist())
    return answers


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
    pairs = zip(*(greedy(m.eval(), tokenizer, spec, asked, arguments.tokens) for m in (flagged, base)), strict=True)
    same = [one == other for one, other in pairs]
    found |= {"greedy_unchanged": sum(same), "greedy_asked": len(same), "greedy_tokens": arguments.tokens}
    with atomic_write(arguments.model / "language.json") as file:
        file.write(json.dumps(found, indent=2).encode())
    print(json.dumps(found, indent=2))
