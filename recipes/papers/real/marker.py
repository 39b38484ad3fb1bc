"""p(marker) before refusals on SmolLM2: equal over wordings (S0.9)? A lower bound of the refusal rate (S0.10)?

    python recipes/papers/real/marker.py --data DATA

Training rows: `past-tense-attacks`, six wordings of each training request with the answer of another model, whose
refusal gets the marker; as many near misses of `coconot-contrast` and ordinary requests of `alpaca-eval-outputs`.
The variants differ in `consistency_coef` (3 is what nano's development rows chose) and `plain_share`.
Tested on requests that no training knows. Consistency: the plain request and four rewordings each. Bound: p(marker)
behind a rewording of each, as trained on, beside the share of 20 sampled answers, the marker banned, that refuse.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from scored import scored
from wordings import asked, first, held_out, odds, plain_requests, within

from redflag.backends import Sampling
from redflag.backends.load import load_flagged
from redflag.data.rows import Row, load_rows, write_rows
from redflag.files import atomic_write
from redflag.prompt import render_prompt
from redflag.stats.intervals import auroc_interval
from redflag.stats.metrics import auroc, clopper_pearson

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "small-real"))
from prepare import clip, is_refusal, read, request_key, split_of  # noqa: E402

TRAIN = """--placement first --answer_coef 1 --answers all --keep_coef 0 --lora_r 12 --learning_rate 1e-3
--per_device_train_batch_size 12 --max_length 192 --consistency logit --consistency_at first --eval_share 0.02
--save_strategy no --categories refusal"""
VARIANTS = {  # consistency_coef, plain_share
    "consistency 0, plain 0.2": (0.0, 0.2),
    "consistency 0.3, plain 0.2": (0.3, 0.2),
    "consistency 3, plain 0.2": (3.0, 0.2),
    "consistency 0, plain 0": (0.0, 0.0),
}
WORDINGS = 6  # of a training request
CHARACTERS = 160  # of an answer
SAMPLES, ANSWER_TOKENS = 20, 40
HARMFUL = ("plain", "past_tense", "future_tense")


def main() -> None:
    """Trains, scores, samples; `marker/report-SEED.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--output", type=Path, default=Path("runs/papers/real/marker"))
    parser.add_argument("--names", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.output / str(arguments.seed)
    given, test = folder / "train.jsonl", test_rows(arguments.data)
    if not given.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(given, training_rows(arguments.data, arguments.seed))
    path = arguments.output / f"report-{arguments.seed}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.names:
        model = trained(arguments.base, given, folder / name.replace(", ", "-").replace(" ", "-"), name, arguments.seed)
        lines = scored("prompts", test, model, str(model), prompts=True)
        probs = [max(line["peak"]) for line in lines]
        result[name] = {"consistency": consistency(test, probs)}
        result[name]["bound"] = bound(test, probs, sampled(model, test, arguments.seed))
        print(name, json.dumps(result[name], indent=1), flush=True)
        with atomic_write(path) as file:
            file.write(json.dumps(result, indent=1).encode())


def training_rows(data: Path, seed: int) -> list[Row]:
    """Wordings of training requests, answered or refused by other models, and as many harmless rows."""
    rng = Random(seed)

    def row(line: dict[str, Any], group: str, refused: bool = False) -> Row:
        answer = clip(line["response"].strip(), CHARACTERS)
        return asked(line["prompt"], str(line["id"]), group, "refusal" if refused else None, answer)

    reworded = [r for r in read(data / "past-tense-attacks/train.jsonl.gz") if split_of(r["group"]) == "train"]
    reworded.sort(key=lambda line: str(line["id"]))
    rng.shuffle(reworded)
    rows = [row(line, line["group"], is_refusal(line["response"])) for line in first(reworded, WORDINGS)]
    each = len(rows) // 2
    for name in ("coconot-contrast/train", "alpaca-eval-outputs/eval"):
        answered = {
            request_key(line["prompt"]): line
            for line in read(data / f"{name}.jsonl.gz")
            if line.get("prompt") and not is_refusal(line["response"]) and line["extra"].get("kind") != "rejected"
        }
        groups = sorted(group for group in answered if split_of(group) == "train")
        rows += [row(answered[group], group) for group in rng.sample(groups, min(each, len(groups)))]
    rng.shuffle(rows)
    return rows


def test_rows(data: Path) -> list[Row]:
    """Requests alone: held-out ones, plain and in four wordings, and harmless ones. The same for every seed."""
    reworded, goals = held_out(data, 0)
    rows = [asked(goal, f"plain-{i}", group) for i, (group, goal) in enumerate(sorted(goals.items()))]
    rows += [asked(r["prompt"], f"{r['extra']['attack']}-{r['id']}", r["group"]) for r in first(reworded, 4)]
    rows += plain_requests(data / "coconot-contrast/train.jsonl.gz", "near-miss", 0)
    return rows + plain_requests(data / "alpaca-eval-outputs/eval.jsonl.gz", "harmless", 0)


def trained(base: Path, given: Path, model: Path, name: str, seed: int) -> Path:
    """The folder of a variant, trained unless it is there."""
    if (model / "redflag.json").exists():
        return model
    coefficient, plain = VARIANTS[name]
    # Of the flag term the marked rows get the share that they are of all rows: p(marker) is then a probability.
    marked = np.mean([row.category is not None for row in load_rows(given).rows]) * (1 - plain)
    command = [sys.executable, "-u", "-m", "redflag.cli", "train", "--model", str(base), "--input", str(given)]
    command += ["--output_dir", str(model), "--seed", str(seed), *TRAIN.split(), "--plain_share", str(plain)]
    command += ["--consistency_coef", str(coefficient), "--harmful_weight", f"{marked:.3f}"]
    print(" ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    return model


def kind_of(row: Row) -> str:
    """plain, past_tense, future_tense, near-miss or harmless."""
    return next(kind for kind in (*HARMFUL, "near-miss", "harmless") if str(row.id).startswith(kind))


def consistency(rows: list[Row], probs: list[float]) -> dict[str, Any]:
    """Variance within a request, of p and of its log-odds; mean p by kind; AUROC of harmful requests."""
    groups: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, list[float]] = defaultdict(list)
    names: dict[str, list[str]] = defaultdict(list)
    for row, p in zip(rows, probs, strict=True):
        kind = "harmful" if kind_of(row) in HARMFUL else kind_of(row)
        kinds[kind].append(p)
        names[kind].append(str(row.group))
        if kind == "harmful":
            groups[str(row.group)].append(p)
    result: dict[str, Any] = {"mean p": {kind: float(np.mean(values)) for kind, values in kinds.items()}}
    for what, of in (("p", np.asarray), ("log-odds", odds)):
        inner = np.array([of(values).var(ddof=1) for values in groups.values()])
        error = float(inner.std(ddof=1) / len(inner) ** 0.5)
        result[f"variance within a request, {what}"] = [float(inner.mean()), error]
    result["log-odds of wordings"] = within(odds(kinds["harmful"]), names["harmful"])
    for other in ("near-miss", "harmless"):
        values = kinds["harmful"] + kinds[other]
        truth = [True] * len(kinds["harmful"]) + [False] * len(kinds[other])
        interval = auroc_interval(values, truth, names["harmful"] + names[other])
        result[f"AUROC against {other}"] = [auroc(values, truth), *interval]
    return result


def sampled(model: Path, rows: list[Row], seed: int) -> dict[str, int]:
    """Of `SAMPLES` answers to a rewording of each request and to 10 harmless requests, how many refuse, by row id."""
    path = model / "refused.json"
    if not path.exists():
        backend, tokenizer, spec = load_flagged(model, dtype="float32")
        chosen = list({row.group: row for row in rows if kind_of(row) in HARMFUL[1:]}.values())
        chosen += [r for k in ("near-miss", "harmless") for r in [row for row in rows if kind_of(row) == k][:5]]
        prompts = [render_prompt(tokenizer, row.messages, spec) for row in chosen for _ in range(SAMPLES)]
        answers = backend.complete(prompts, Sampling(max_new_tokens=ANSWER_TOKENS, seed=100_000 * seed), batch_size=60)
        said = [tokenizer.decode([step.token_id for step in steps], skip_special_tokens=True) for steps in answers]
        parts = {str(row.id): said[i * SAMPLES : (i + 1) * SAMPLES] for i, row in enumerate(chosen)}
        with atomic_write(path) as file:
            file.write(json.dumps(parts, indent=1).encode())
    return {name: sum(map(is_refusal, said)) for name, said in json.loads(path.read_text()).items()}


def bound(rows: list[Row], probs: list[float], refused: dict[str, int]) -> dict[str, Any]:
    """p(marker) beside the refusal rate. Within error: at most the upper end of the rate's one-sided 95% interval."""
    chosen = [(row, p) for row, p in zip(rows, probs, strict=True) if str(row.id) in refused]
    result: dict[str, Any] = {}
    for name, kinds in (("harmful", HARMFUL), ("harmless", ("near-miss", "harmless"))):
        some = [(p, refused[str(row.id)]) for row, p in chosen if kind_of(row) in kinds]
        p, counts = (np.array(values) for values in zip(*some, strict=True))
        highest = np.array([clopper_pearson(int(count), SAMPLES, 0.90)[1] for count in counts])
        gap = counts / SAMPLES - p
        result[name] = {"requests": len(p), "within error": float((p <= highest).mean()), "mean p": float(p.mean())}
        result[name] |= {"refusal rate": float(counts.mean() / SAMPLES), "gap": float(gap.mean())}
        result[name]["gap, 95%"] = float(1.96 * gap.std(ddof=1) / len(gap) ** 0.5)
    return result


if __name__ == "__main__":
    main()
