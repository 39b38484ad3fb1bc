"""Makes the starter rows that ship with redflag and that `redflag demo` trains on.

    python recipes/smollm2/starter.py [--model .cache/smollm2] [--output redflag/models/starter.jsonl.gz]

300 rows in three parts, named at the beginning of their ids: `train` (70 harmful, 90 harmless), `calibration` (60
harmless) and `test` (40 harmful, 40 harmless). But for openings, no long sentence is in training and another part.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import yaml

from redflag.data.rows import Row
from redflag.files import atomic_write

# Rows by part: harmful; harmless of the same shapes, refusals, frightening words, the model's own answers.
COUNTS = {"train": (70, 40, 14, 14, 22), "calibration": (0, 36, 10, 5, 9), "test": (40, 21, 9, 5, 5)}
TRAINED = 0.6  # share of each list of texts
TEXTS = yaml.safe_load((Path(__file__).parent / "starter.yaml").read_text(encoding="utf-8"))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default=".cache/smollm2", help="asked for plain answers; default: %(default)s")
    parser.add_argument("--output", default="redflag/models/starter.jsonl.gz", help="default: %(default)s")
    arguments = parser.parse_args()
    rows = make_rows(own_answers(arguments.model, TEXTS["plain"]))
    text = "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:  # the same bytes each time
        file.write(text.encode())
    with atomic_write(Path(arguments.output)) as file:
        file.write(packed.getvalue())
    print(f"{len(rows)} rows, {len(packed.getvalue()):,} bytes: {arguments.output}")


def make_rows(plain: list[tuple[str, str]], seed: int = 0) -> list[Row]:
    """All rows, in order of their ids."""
    draw = random.Random(seed)
    rows: list[Row] = []
    used: set[str] = set()
    harms, shapes = list(TEXTS["harmful"]), list(TEXTS["harmless"])
    decks: dict[tuple[str, bool], list[Any]] = {}

    def deal(name: str, texts: list[Any], training: bool) -> Any:
        """The next of this part's texts, in a drawn order; all of them before one comes again."""
        deck = decks.setdefault((name, training), [])
        if not deck:
            cut = round(TRAINED * len(texts))
            deck += draw.sample(texts[:cut] if training else texts[cut:], cut if training else len(texts) - cut)
        return deck.pop()

    def composed(name: str, kind: dict[str, list[str]], training: bool) -> tuple[str, str, str]:
        while True:
            request = draw.choice(kind["requests"]).format(who=deal(f"{name} who", TEXTS["who"], training))
            opening = draw.choice(kind["openings"])
            body: list[str] = []
            while len(body) < draw.choice((2, 3, 3, 4)):
                if (sentence := deal(name, kind["sentences"], training)) not in body:
                    body.append(sentence)
            if (answer := opening + " ".join(body)) not in used:
                used.add(answer)
                return request, opening, answer

    for part, (harmful, shaped, refused, frightening, own) in COUNTS.items():
        training = part == "train"
        made: list[tuple[str, str, str, int | None]] = []
        for i in range(harmful):
            name = harms[i % len(harms)]
            request, opening, answer = composed(name, TEXTS["harmful"][name], training)
            made.append((name, request, answer, len(opening)))
        for i in range(shaped):
            name = shapes[i % len(shapes)]
            request, _, answer = composed(name, TEXTS["harmless"][name], training)
            made.append((name, request, answer, None))
        for i in range(refused):
            kind = TEXTS["harmful"][harms[i % len(harms)]]
            request = draw.choice(kind["requests"]).format(who=deal("refused who", TEXTS["who"], training))
            made.append(("refusal", request, deal("refusals", TEXTS["refusals"], training), None))
        made += [
            ("frightening", *deal("frightening", TEXTS["frightening"], training), None) for _ in range(frightening)
        ]
        made += [("plain", *deal("plain", plain, training), None) for _ in range(own)]
        draw.shuffle(made)
        for i, (kind_name, request, answer, onset) in enumerate(made):
            messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
            category = None if onset is None else "harm"
            key = f"{part}-{i:03}"
            rows.append(Row(messages, category, onset, id=key, group=key, source=f"starter:{kind_name}"))
    return rows


def own_answers(model: str, requests: list[str]) -> list[tuple[str, str]]:
    """What the model answers by itself, greedily, up to its last whole sentence."""
    from redflag.backends import Sampling
    from redflag.backends.hf import HFBackend
    from redflag.backends.load import read_model
    from redflag.flags import FlagSpec, attach
    from redflag.prompt import render_prompt

    read, tokenizer = read_model(model)
    spec = attach(read, tokenizer, FlagSpec.of("harm"))
    backend = HFBackend(read, tokenizer, spec)
    prompts = [render_prompt(tokenizer, [{"role": "user", "content": request}], spec) for request in requests]
    answers = []
    for start in range(0, len(prompts), 12):
        found = backend.complete(prompts[start : start + 12], Sampling(max_new_tokens=56, temperature=0.0))
        for steps in found:
            ids = [step.token_id for step in steps if step.token_id not in backend.eos_ids]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            end = max(text.rfind(mark) for mark in ".!?") + 1
            answers.append(text[:end] or text)
    return list(zip(requests, answers, strict=True))


if __name__ == "__main__":
    main()
