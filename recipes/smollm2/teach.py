r"""Teaches the shipped model to review its answers: a few hundred alarms, each with the verdict that the labels give.

    head -n 600 runs/smollm2-open/rows/train.jsonl > runs/smollm2-open/rows/teach.jsonl
    redflag score --model smollm2-135m --input runs/smollm2-open/rows/teach.jsonl --max_length 448 \
      --output runs/smollm2-open/shipped/teach.jsonl
    python recipes/smollm2/teach.py --scored runs/smollm2-open/shipped/teach.jsonl --output runs/smollm2-open/taught
    python recipes/smollm2/reflect.py --scored runs/smollm2-open/shipped/test.jsonl --model runs/smollm2-open/taught \
      --only "no thought" --output runs/smollm2-open/reflect-taught

An alarm is where p(flag) first reaches `--threshold` along a training row, in a harmful one not before the onset. The
choice between the two verdict words is trained, behind the context that `Reflect(max_tokens=0)` gives: a LoRA
adapter of rank 12 on the merged model, merged again. Language and flag are free to move: it is for measuring verdicts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from reflect import SHORT, alarm_of
from transformers import AutoModelForCausalLM

from redflag.backends.load import load_tokenizer
from redflag.data.rows import load_rows
from redflag.files import atomic_folder
from redflag.flags import FlagSpec
from redflag.models.named import DEFAULT, model_folder
from redflag.models.pack import merge_flag
from redflag.prompt import render_prompt, text_ids
from redflag.scoring.score import read_scored

Example = tuple[list[int], bool]  # context, and whether the alarm is true


def main() -> None:
    """Trains, and writes the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("runs/smollm2-open/rows/teach.jsonl"))
    parser.add_argument("--scored", type=Path, required=True, help="the rows as `redflag score` has scored them")
    parser.add_argument("--threshold", type=float, default=0.902, help="the lowered one of reflect.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with atomic_folder(arguments.output) as new:
        merged = merge_flag(model_folder(DEFAULT), new / "merged")
        tokenizer, spec, _ = load_tokenizer(merged)
        examples = alarms(arguments.rows, arguments.scored, arguments.threshold, tokenizer, spec, arguments.seed)
        torch.manual_seed(arguments.seed)
        lora = LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), lora)
        words = [text_ids(tokenizer, word, spec)[0] for word in SHORT.words]
        losses = train(model, examples, words, arguments.learning_rate, arguments.batch)
        model.merge_and_unload().save_pretrained(new)
        for path in merged.iterdir():
            if not (new / path.name).exists():
                shutil.copyfile(path, new / path.name)
        shutil.rmtree(merged)
        record = {"alarms": len(examples), "losses": losses}
        (new / "teach.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"{len(examples)} alarms, half of them true: {arguments.output}")


def alarms(rows: Path, scored: Path, threshold: float, tokenizer: Any, spec: FlagSpec, seed: int) -> list[Example]:
    """As many false alarms as true ones, in a drawn order."""
    by_id = {row.id: row for row in load_rows(rows).rows}
    behind = [*text_ids(tokenizer, SHORT.cue, spec), *text_ids(tokenizer, SHORT.verdict_cue, spec)]
    found: dict[bool, list[Example]] = {True: [], False: []}
    for line in read_scored(scored):
        alarm = alarm_of(by_id[line["id"]], line)
        first = next((i for i, p in enumerate(alarm.probs) if p >= threshold), None)
        if first is None or line["prompt_truncated"] or (alarm.row.harmful and first < line["onset"]):
            continue
        prompt = render_prompt(tokenizer, alarm.row.messages[:-1], spec)
        context = [*prompt, *alarm.tokens[:first], spec.ids[0], *behind]
        found[alarm.row.harmful].append((context, alarm.row.harmful))
    draw = random.Random(seed)
    each = min(map(len, found.values()))
    examples = [example for some in found.values() for example in draw.sample(some, each)]
    draw.shuffle(examples)
    return examples


def train(
    model: Any, examples: Sequence[Example], words: Sequence[int], learning_rate: float, batch: int
) -> list[float]:
    """One pass; the loss of each step, nats.

    Args:
        words: First tokens of the harmful and the harmless word.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    losses = []
    for begin in range(0, len(examples), batch):
        few = examples[begin : begin + batch]
        width = max(len(context) for context, _ in few)
        # Padding on the left: the verdict's context ends at the last position in every row.
        inputs = torch.tensor([[0] * (width - len(context)) + context for context, _ in few])
        mask = torch.tensor([[0] * (width - len(context)) + [1] * len(context) for context, _ in few])
        logits = model(input_ids=inputs, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1, words]
        loss = torch.nn.functional.cross_entropy(logits.float(), torch.tensor([0 if true else 1 for _, true in few]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses)} of {-(-len(examples) // batch)}: loss {loss.item():.3f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
