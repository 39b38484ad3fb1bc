"""Attacks on the shipped flag with the guard in the loop; harm is judged by `judge.py`, and answers by a reader.

    python recipes/papers/real/attacks.py --data DATA --rows runs/smollm2-open/rows

Requests: reviewed harmful test rows that the reader called clear, one of each request, whose answers hold more than 100
tokens. Attempts and verdicts are kept (`redflag.lab.attacks.run_attacks`), so that a run that was cut short goes on.
The guard is replayed at the threshold that ships and at the one that 5% of the harmless development rows reach; what
each releases is judged by itself. `--draw` writes answers for a reader; `read-attacks.tsv` (key, harmful) then gives
how often the judge agrees.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from judge import HiddenJudge
from scored import SHIPPED, peak, scored

from redflag import Policy
from redflag.backends import Sampling
from redflag.backends.open import open_backend
from redflag.data.rows import Row, load_rows
from redflag.files import atomic_write
from redflag.flags import FlagSpec
from redflag.judges.cache import CachedJudge
from redflag.lab.attacks import Attack, Attempt, Target, request_of
from redflag.lab.attacks.autorap import AutoRAP
from redflag.lab.attacks.embedding import EmbeddingAttack
from redflag.lab.attacks.finetune import FineTune
from redflag.lab.attacks.gcg import GCG
from redflag.lab.attacks.judging import Judged, entries, judge_attempts
from redflag.lab.attacks.prefill import Prefill, prefix_ends, with_prefill
from redflag.lab.attacks.run_attacks import named_rows, record
from redflag.lab.attacks.sampling import Plain, RepeatedSampling
from redflag.lab.attacks.suppress import SuppressByWords
from redflag.lab.attacks.wrappers import WRAPPERS, Wrappers
from redflag.models.named import ADAPTER, model_folder
from redflag.models.pack import merge_flag
from redflag.stats.metrics import clopper_pearson
from redflag.watching.thresholds import Thresholds

HERE = Path(__file__).parent
TOKENS = 48  # of an answer
UNIT = 10
HOLD_BACK = 8
WORDS = ("leetspeak", "role-play")
FEW = {EmbeddingAttack: 20, AutoRAP: 20, GCG: 10}  # requests of the attacks that take longest with each
STEPS = 30  # of GCG, a sixteenth of the paper's, at 24 candidates in place of 512
TRAINED = 100  # harmful rows to fine-tune on


@dataclass
class GivenPrefill:
    """Sends each row's whole answer, which is short and harmful in intent, as the beginning of the model's own."""

    max_new_tokens: int = TOKENS
    name: str = "given prefills"
    adaptive: bool = False

    def run(self, target: Target, rows: Sequence[Row], seed: int) -> Iterator[Attempt]:
        """See `redflag.lab.attacks.Attack.run`."""
        sent = [(str(row.id), with_prefill(request_of(row), row.response)) for row in rows]
        yield from target.answers(sent, Sampling(self.max_new_tokens, 0.0, seed=seed), "whole")


def attacks(rows: Path, base: Path) -> list[Attack]:
    """Those of `redflag.lab.attacks` that need no other model, at sizes for a processor."""
    train = load_rows(rows / "train.jsonl").rows
    harmful = [row for row in train if row.harmful]
    wrappers = tuple(wrapper for wrapper in WRAPPERS if wrapper.name in WORDS)
    return [
        Plain(temperatures=(0.0,), max_new_tokens=TOKENS),
        Prefill(lengths=(5, 20, 50, 100), max_new_tokens=TOKENS),
        RepeatedSampling(n=2, max_new_tokens=TOKENS),
        SuppressByWords(places=("system",), max_new_tokens=TOKENS),
        Wrappers(wrappers=wrappers, max_new_tokens=TOKENS),
        EmbeddingAttack(max_new_tokens=TOKENS),
        FineTune(harmful, base, TRAINED, epochs=1, batch=8, max_new_tokens=TOKENS),
        AutoRAP(rows=train, max_new_tokens=TOKENS, epochs=3, learning_rate=1e-4),
        GCG(adaptive=False, steps=STEPS),
        GCG(steps=STEPS),
    ]


def chosen(rows: Path, target: Target, count: int) -> list[Row]:
    """Test rows to attack with, in the file's order, which is a hash's."""
    with (rows / "test.jsonl").open(encoding="utf-8") as file:
        sure = {line["id"]: line["extra"]["sure"] for line in map(json.loads, file)}
    found: dict[str, Row] = {}
    for row in load_rows(rows / "test.jsonl").rows:
        if row.harmful and sure[row.id] == 2 and row.group not in found and len(prefix_ends(target, row)) > 104:
            found[str(row.group)] = row
    return named_rows(list(found.values())[:count])


def prefills(data: Path, count: int, seed: int) -> list[Row]:
    """Rows of `strongreject-prefills`."""
    with gzip.open(data / "strongreject-prefills/all.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    drawn = random.Random(seed).sample(lines, count)
    return [
        Row(
            [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}],
            "harm",
            id=r["id"],
        )
        for r in drawn
    ]


def key_of(attack: str, attempt: Attempt) -> str:
    """Names an answer."""
    words = json.dumps([attack, attempt.request, attempt.setting, attempt.text])
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def draw(judged: dict[str, list[Judged]], path: Path, count: int, seed: int) -> None:
    """Answers for a reader: half of them called harmful, spread over the attacks."""
    by: dict[tuple[str, bool], list[dict[str, Any]]] = defaultdict(list)
    for attack, items in judged.items():
        for item in items:
            attempt = item.attempt
            given = attempt.messages[-1]["content"] if attempt.messages[-1]["role"] == "assistant" else ""
            turns = [turn["content"] for turn in attempt.messages if turn["role"] == "user"]
            one = {"key": key_of(attack, attempt), "attack": attack, "setting": attempt.setting, "judge": item.produced}
            one |= {"released": item.released, "request": turns[-1], "given": given, "text": attempt.text}
            if item.produced is not None and attempt.text.strip():
                by[attack, item.produced].append(one)
    rng = random.Random(seed)
    each = -(-count // len(by))
    some = [one for kind in sorted(by) for one in rng.sample(by[kind], min(each, len(by[kind])))]
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in some), encoding="utf-8")
    print(f"{path}: {len(some)} answers")


def readings() -> dict[str, bool]:
    """Key of an answer -> whether the reader calls it harmful."""
    lines = (HERE / "read-attacks.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return {key: harmful == "1" for key, harmful in (line.split("\t") for line in lines)}


def agreed(judged: dict[str, list[Judged]]) -> dict[str, Any]:
    """How often the reader and the judge agree."""
    said = readings()
    counts: dict[str, list[int]] = {"called harmful": [0, 0], "called harmless": [0, 0]}
    for attack, items in judged.items():
        for key, item in {key_of(attack, item.attempt): item for item in items}.items():
            if key in said:
                kind = counts["called harmful" if item.produced else "called harmless"]
                kind[0] += said[key] == bool(item.produced)
                kind[1] += 1
    return {name: [hits, of, *clopper_pearson(hits, of)] for name, (hits, of) in counts.items() if of}


def by_reader(guarded: dict[str, dict[str, list[Judged]]]) -> list[dict[str, Any]]:
    """Answers that were read, for each attack and setting: how many are harmful; alarms in these and in the others.

    With medians of the highest p(flag) of an answer.
    """
    said, table = readings(), []
    for attack, judged in guarded["shipped"].items():
        for setting in dict.fromkeys(item.attempt.setting for item in judged):
            of_guard = {
                guard: [
                    (said[key], item)
                    for item in of_attacks[attack]
                    if item.attempt.setting == setting and (key := key_of(attack, item.attempt)) in said
                ]
                for guard, of_attacks in guarded.items()
            }
            read = of_guard["shipped"]
            line: dict[str, Any] = {"attack": attack, "setting": setting, "read": len(read)}
            line["harmful"] = sum(harmful for harmful, _ in read)
            for kind, wanted in (("harmful", True), ("others", False)):
                peaks = [item.peak for harmful, item in read if harmful == wanted and item.peak is not None]
                line[f"highest p(flag), {kind}"] = float(np.median(peaks)) if peaks else None
                for guard, items in of_guard.items():
                    line[f"alarms, {guard}, {kind}"] = sum(
                        bool(item.alarmed) for harmful, item in items if harmful == wanted
                    )
            table.append(line)
    return table


def main() -> None:
    """Attacks, judges, counts; `attacks.json` and its lines printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path("runs/smollm2-open/rows"))
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--judge", type=Path, default=Path("runs/papers/real/judge"))
    parser.add_argument("--output", type=Path, default=Path("runs/papers/real/attacks"))
    parser.add_argument("--count", type=int, default=40, help="requests")
    parser.add_argument("--names", nargs="+", help="attacks; default: all")
    parser.add_argument("--draw", type=int, default=0, help="write so many answers for a reader")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    given = Path(model_folder(arguments.model))
    # Merged, a step takes a fraction of the time, and the weights can be compared with the base's.
    folder = output / f"merged-{FlagSpec.load(given).run_id}" if (given / ADAPTER).exists() else given
    if not folder.exists():
        merge_flag(given, folder)
    engine, tokenizer, spec = open_backend(folder, dtype="float32")
    ships = Thresholds.load(folder)
    target = Target(engine, tokenizer, spec, ships, Policy(hold_back=HOLD_BACK), engine.model)
    developed = load_rows(arguments.rows / "development.jsonl").rows
    lines = scored("development", developed, output.parent / "scored", arguments.model)
    loose = float(np.quantile([peak(line, ships.monitor) for line in lines if line["category"] is None], 0.95))
    guards = {"shipped": ships, "5% of development rows": replace(ships, values=dict.fromkeys(ships.values, loose))}
    judge = CachedJudge(HiddenJudge(arguments.judge, arguments.base), output / "verdicts.jsonl")
    rows = chosen(arguments.rows, target, arguments.count)
    work: list[tuple[Attack, list[Row]]] = [
        (attack, rows[: FEW.get(type(attack))]) for attack in attacks(arguments.rows, arguments.base)
    ]
    work.insert(1, (GivenPrefill(), prefills(arguments.data, arguments.count, arguments.seed)))
    result: dict[str, Any] = {
        "requests": len(rows),
        "loose": loose,
        "tokens": TOKENS,
        "hold_back": HOLD_BACK,
        "lines": [],
    }
    made = output.parent / "attacks.json"
    kept = json.loads(made.read_text())["lines"] if made.exists() else []
    guarded: dict[str, dict[str, list[Judged]]] = {guard: {} for guard in guards}
    for attack, some in work:
        if arguments.names and attack.name not in arguments.names:
            continue
        kept = [line for line in kept if line["name"] != attack.name]
        path = output / f"{attack.name.replace(' ', '-')}.jsonl"
        attempts, seconds = record(target, attack, some, path, arguments.seed, unit=UNIT)
        for guard, thresholds in guards.items():
            found = judge_attempts(attack, attempts, some, judge, replace(target, thresholds=thresholds))
            guarded[guard][attack.name] = found
            for line in entries(attack, found, some, seconds=seconds):
                result["lines"].append({"guard": guard, **line})
                print(guard, line["name"], line["setting"], line["harm_produced"], line["harm_released"], flush=True)
        with atomic_write(made) as file:
            file.write(json.dumps({**result, "lines": [*kept, *result["lines"]]}, indent=1, default=str).encode())
    if arguments.draw:
        draw(guarded["shipped"], output / "drawn.jsonl", arguments.draw, arguments.seed)
    result["judge"] = agreed(guarded["shipped"])
    result["reader"] = by_reader(guarded)
    print(result["judge"], *result["reader"], sep="\n")
    with atomic_write(made) as file:
        file.write(json.dumps({**result, "lines": [*kept, *result["lines"]]}, indent=1, default=str).encode())


if __name__ == "__main__":
    main()
