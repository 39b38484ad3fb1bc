"""Public labelled conversations -> `rows/{train,calibration,test}.jsonl` and `rows/pretrain.jsonl`.

    python recipes/small-real/prepare.py --data DATA --output runs/small-real

The split is by what was asked, never by row: all answers to one request, in whatever data set, under whatever jailbreak
or rewording, lie in the same split. None of these sets says where in an answer the harm begins, so harmful rows carry
no `onset`: they count as harmful from their first character on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Quota(NamedTuple):
    """How many rows a set gives at most, before `SHARES`: harmful, harmless, and harmless that are refusals."""

    harmful: int = 0
    harmless: int = 0
    refusing: int = 0


# Human labels on answers of which few refuse come first. Sets whose harmless answers are nearly all refusals get a
# small quota of those; the rest of the harmless side answers harmful or frightening requests without harm, or is plain.
QUOTAS: dict[str, Quota] = {
    "safe-rlhf-mini/train": Quota(1200, 1000, 100),
    "gptfuzz-labeled/train": Quota(260, 150, 130),
    "jbb-artifacts/train": Quota(200, 100, 60),
    "past-tense-attacks/train": Quota(160, 60, 50),
    "refusal-direction/train": Quota(160, 200, 60),
    "adaptive-attacks/train": Quota(120, 20, 10),
    "deep-alignment-pairs/train": Quota(120, 40, 40),
    "derta-malicious-tuning/train": Quota(90),
    "safe-unlearning/train": Quota(80, 150, 20),
    "llm-self-defense/val": Quota(60, 60, 10),
    "anthropic-red-team-sample/train": Quota(60),
    "safety-tuned-safe/train": Quota(0, 300, 60),
    "star-1-safe/train": Quota(0, 220, 60),
    "coconot-contrast/train": Quota(0, 250, 60),
    "alpaca-safety-topics/train": Quota(0, 150, 5),
    "dolly-safety-topics/train": Quota(0, 60, 5),
    "gpteacher-roleplay/train": Quota(0, 150, 5),
    # The easy quarter: nothing frightening was asked.
    "alpaca-eval-outputs/eval": Quota(0, 400, 5),
    "codealpaca-2k/train": Quota(0, 200, 5),
    "gsm8k/train": Quota(0, 200, 5),
    "alpaca-gpt4-demo/en": Quota(0, 100, 5),
}
# Read for the language model only: these have no labels, or only those of a phrase list.
UNLABELLED = ("hh-harmless-test/test", "advbench-uncensored-vicuna/train", "safe-unlearning/uncensored-unlabelled")

# Settings, monitors included, are chosen on the development rows; the test rows are looked at once, at the end.
SPLITS = {"train": (0.00, 0.60), "development": (0.60, 0.68), "calibration": (0.68, 0.75), "test": (0.75, 1.00)}
# Rows of a split as a share of the quota, (harmful, harmless): thresholds are set on harmless rows alone.
SHARES = {"train": (1.0, 1.0), "development": (0.2, 0.3), "calibration": (0.0, 0.3), "test": (0.3, 0.42)}
SHARES_BY_SOURCE = {**SHARES, "test": (1.0, 0.9)}  # Fewer sets to test on, so more of each.

# `--split source`: these sets are tested on and nothing else is, all others are trained and calibrated on. Requests are
# still kept apart as well. Both sides have harmless answers to harmful requests, near misses and an easy part.
HELD_OUT = frozenset(
    (
        *("gptfuzz-labeled", "jbb-artifacts", "past-tense-attacks", "refusal-direction", "adaptive-attacks"),
        *("llm-self-defense", "star-1-safe", "coconot-contrast", "dolly-safety-topics", "gsm8k", "alpaca-gpt4-demo"),
    )
)

KEEP_ROWS = 400  # Test rows, first by hash, on which training reports the keep KL: rows/keep.jsonl.
PER_GROUP = 10  # Rows of one set with one label that answer the same request: some sets ask 80 questions 60 times each.
PROMPT_CHARACTERS = 400  # About 95 tokens.
RESPONSE_CHARACTERS = 680  # About 170 tokens.
TRAIN_CHARACTERS = 480  # Of a response in training rows, for all methods alike: a third less to compute.
PRETRAIN_CHARACTERS = 1000

# After the phrase list of Zou et al. 2023 (llm-attacks, `test_prefixes`), looked for in the first 200 characters and
# widened by what those miss: a refusal that is not marked makes "refusing answers left out" look easier than it is.
REFUSALS = re.compile(
    r"\bsorry\b|\bapologi[sz]e|\bi cannot\b|\bi can'?t\b|\bi can not\b"
    r"|\bcannot (?:assist|provide|fulfil|help|comply|create|write|support|condone|generate|and will not)"
    r"|\bcan'?t (?:assist|provide|fulfil|help|comply|create|support)"
    r"|\bunable to\b|\bi(?:'m| am) not (?:able|going|comfortable|programmed)"
    r"|\bi will not\b|\bi won'?t\b|\bi would not\b"
    r"|\bas an? (?:\w+ ){0,3}(?:ai|language model|assistant)\b"
    r"|\bi(?:'m| am) (?:just )?an? (?:\w+ ){0,2}(?:ai|language model|assistant)\b"
    r"|\bprogrammed to\b|\bdesigned to be\b"
    r"|\bnot (?:appropriate|ethical|acceptable|legal)\b|\b(?:illegal|unethical|immoral)\b"
    r"|\bi must (?:decline|refuse|emphasi[sz]e|inform)"
    r"|\bi (?:do not|don'?t) (?:condone|support|feel comfortable)"
    r"|\bnot something i (?:can|will)\b|\byour request (?:violates|to)\b"
    r"|\bagainst (?:my|the law|openai)|\bgoes against\b|\bi strongly (?:advise|urge|discourage)"
)

# Sets were filtered upstream; this is the second look, and drops a row whole.
MINORS = re.compile(
    r"\b(?:child(?:ren)?|kids?|minors?|teen(?:age)?(?:r?s)?|toddlers?|infants?|underage|preteens?"
    r"|school ?(?:girl|boy)s?)\b"
)
SEXUAL = re.compile(
    r"\b(?:sex\w*|porn\w*|nudes?|naked|undress\w*|molest\w*|pedoph\w*|erotic\w*|grooming|rape\w*|lewd"
    r"|strip(?:ped|ping))\b"
)
CHINESE = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")
# Words that do not say what is asked. "How do I X" and "tell me how to X" are one request.
EMPTY_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the of to for in on at by with and or that this is are be was were will would can could should do does
        did how what why when where who which i me my you your we our it its s t some any please give tell show explain
        describe write make create provide develop generate instructions detailed step guide tutorial way ways best
        someone without from as there about sure here into""",
    )
)


def request_key(text: str) -> str:
    """What a request asks, without case, punctuation, word order and empty words: rows with one key share a split."""
    words = re.findall(r"[^\W_]+", text.lower())
    return " ".join(sorted({w for w in words if w not in EMPTY_WORDS}) or words)[:300]


def split_of(group: str) -> str:
    """The split of a group: a function of its key alone, so that adding data never moves a request."""
    position = int(hashlib.sha256(group.encode()).hexdigest()[:12], 16) / 16**12
    return next(name for name, (low, high) in SPLITS.items() if low <= position < high)


def is_refusal(response: str) -> bool:
    """Whether the first 200 characters hold a phrase of refusal."""
    return REFUSALS.search(response[:200].lower().replace("’", "'").replace("*", "")) is not None


def clip(text: str, limit: int) -> str:
    """The start of the text, cut at a space."""
    return text if len(text) <= limit else text[:limit].rsplit(None, 1)[0]


def clip_middle(text: str, limit: int) -> str:
    """Both ends of the text: jailbreaks put the request at either."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def read(path: Path) -> Iterator[dict[str, Any]]:
    """English rows with an answer, without those about minors and sex."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row.get("lang") != "en" or not (row.get("response") or "").strip():
                continue
            turns = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            whole = " ".join([*(t["content"] for t in turns), row["response"], str(row.get("category"))]).lower()
            if len(CHINESE.findall(whole)) > 3 or (MINORS.search(whole) and SEXUAL.search(whole)):
                continue
            extra = row.get("extra") or {}
            asked = next(t["content"] for t in turns if t["role"] == "user")
            yield {**row, "turns": turns, "group": request_key(extra.get("goal") or asked)}


def to_row(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """A row of the project's schema. The label decides `category`; the set's own is the topic of the prompt."""
    harmful = raw["label"] == "harmful"
    refusing = not harmful and is_refusal(raw["response"])
    turns = [{"role": t["role"], "content": clip_middle(t["content"].strip(), PROMPT_CHARACTERS)} for t in raw["turns"]]
    limit = TRAIN_CHARACTERS if split_of(raw["group"]) == "train" else RESPONSE_CHARACTERS
    answer = {"role": "assistant", "content": clip(raw["response"].strip(), limit)}
    return {
        "id": raw["id"],
        "messages": [*turns, answer],
        "category": "harm" if harmful else None,
        "group": raw["group"],
        "source": name.split("/")[0] + ("/refusal" if refusing else ""),
    }


def choose(
    rows: Iterable[dict[str, Any]], quota: Quota, shares: dict[str, tuple[float, float]] = SHARES
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of one set, with their split, up to the quota; the order is by hash, so it does not depend on the files'."""
    taken: Counter[tuple[str, ...]] = Counter()
    for row in sorted(rows, key=lambda r: hashlib.sha256(r["id"].encode()).hexdigest()):
        split = split_of(row["group"])
        kind = "harmful" if row["category"] else "refusing" if row["source"].endswith("/refusal") else "harmless"
        share = shares[split][0 if kind == "harmful" else 1]
        slot, group = (split, kind), (kind, row["group"])
        if taken[slot] < share * getattr(quota, kind) and taken[group] < PER_GROUP:
            taken[slot] += 1
            taken[group] += 1
            yield split, row


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSONL whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


def prepare(data: Path, output: Path, by_source: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Writes the files under `output/rows` and `output/rows/counts.json`.

    Sets that are not under `data` are left out and named, so that a part of them can be tried.

    Returns:
        The rows by split.
    """
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    pretrain: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for name in [*QUOTAS, *UNLABELLED]:
        path = data / f"{name}.jsonl.gz"
        if not path.exists():
            print(f"not there, left out: {path}")
            continue
        labelled = []
        for raw in read(path):
            extra = raw.get("extra") or {}
            turns = [
                {"role": t["role"], "content": clip_middle(t["content"].strip(), PROMPT_CHARACTERS)}
                for t in raw["turns"]
            ]
            answer = {"role": "assistant", "content": clip(raw["response"].strip(), PRETRAIN_CHARACTERS)}
            # The language model never sees a word of a request that is calibrated or tested on, nor of a set that is
            # held out when sets are divided: one base model serves both ways of splitting.
            unseen = split_of(raw["group"]) != "train" or name.split("/")[0] in HELD_OUT
            if not unseen and extra.get("preference") != "rejected":
                pretrain.append({"messages": [*turns, answer]})
            # The same answer to the same request may come in two sets with two labels: the first set's counts.
            key = (raw["group"], request_key(raw["response"][:400]))
            if name in QUOTAS and raw["label"] in ("harmful", "benign") and key not in seen:
                seen.add(key)
                labelled.append(to_row(raw, name))
        for split, row in choose(labelled, QUOTAS.get(name, Quota()), SHARES_BY_SOURCE if by_source else SHARES):
            if not by_source or (split == "test") == (name.split("/")[0] in HELD_OUT):
                splits[split].append(row)
    (output / "rows").mkdir(parents=True, exist_ok=True)
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for split, rows in splits.items():
        rows.sort(key=lambda r: hashlib.sha256(("order" + r["id"]).encode()).hexdigest())
        write(output / "rows" / f"{split}.jsonl", rows)
        if split == "test":
            write(output / "rows" / "keep.jsonl", rows[:KEEP_ROWS])
        sources: dict[str, Counter[str]] = defaultdict(Counter)
        for row in rows:
            sources[row["source"]]["harmful" if row["category"] else "harmless"] += 1
        counts[split] = {source: dict(c) for source, c in sorted(sources.items())}
        harmful = sum(row["category"] is not None for row in rows)
        refusing = sum(row["source"].endswith("/refusal") for row in rows)
        print(f"{split}: {harmful} harmful, {len(rows) - harmful} harmless of which {refusing} refuse")
    write(output / "rows" / "pretrain.jsonl", pretrain)
    characters = sum(len(m["content"]) for c in pretrain for m in c["messages"])
    print(f"pretrain: {len(pretrain)} conversations, {characters:,} characters")
    (output / "rows" / "counts.json").write_text(json.dumps(counts, indent=2))
    return splits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, one folder each")
    parser.add_argument("--output", type=Path, default=Path("runs/small-real"))
    parser.add_argument(
        "--split", choices=("request", "source"), default="request", help="source: test sets are not trained on"
    )
    arguments = parser.parse_args()
    prepare(arguments.data, arguments.output, arguments.split == "source")
