"""Public sets of the Hugging Face hub -> the rows that the recipes for released models train, calibrate and test on.

    python recipes/models/prepare_hub.py --output runs/hub
    python recipes/models/prepare_hub.py --output runs/hub --without beavertails pku-saferlhf  # no CC BY-NC rows
    python recipes/models/prepare_hub.py --output runs/hub --root /data/hub  # copies instead of the hub

| folder | rows | for |
|---|---|---|
| `harm` | answers, harmful (`harm`) or not | flags that stand in the answer |
| `refusals` | refusals by kind (CoCoNot's five classes), and answers without | tokens and markers before refusals |
| `pairs` | a harmful answer and a refusal to the same request, and ordinary answers | PRESTO |
| `prompts` | requests without answers: XSTest, OR-Bench, CoCoNot's test prompts | `redflag score --prompts` |

The first three hold `train.jsonl`, `calibration.jsonl` and `test.jsonl`. The split is by what was asked, never by row,
so all answers to one request lie in one split, whatever set they come from; a request of a test set is tested on and
nothing else. A set's rows are drawn by seed up to a quota; the same answer to the same request counts once. What each
set is, and its licence, stands in README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from redflag.data.rows import Row, write_rows
from redflag.files import atomic_write

SPLITS = {"train": 0.85, "calibration": 0.925, "test": 1.0}  # upper ends
PER_REQUEST = 4  # Rows of one set with one label that answer the same request.
PROMPT_CHARACTERS = 3000  # Longer conversations are left out: the front of a prompt would be lost in training.
RESPONSE_CHARACTERS = 1600  # About 400 tokens; what comes later is cut off.
SEED = 0

KINDS = {
    "Humanizing requests": "humanizing",
    "Incomplete requests": "incomplete",
    "Indeterminate requests": "indeterminate",
    "Requests with safety concerns": "safety",
    "Unsupported requests": "unsupported",
}


class HubSet(NamedTuple):
    """Where a set lies on the hub: repository, configuration, split; `options` are `load_dataset`'s own."""

    path: str
    config: str | None
    split: str
    options: Mapping[str, Any] = {}
    tested: bool = False  # Its rows are test rows, and their requests are in no other split.


SETS = {
    "beavertails": HubSet("PKU-Alignment/BeaverTails", None, "330k_train"),
    "pku-saferlhf": HubSet("PKU-Alignment/PKU-SafeRLHF", None, "train"),
    "wildguardmix": HubSet("allenai/wildguardmix", "wildguardtrain", "train"),
    "wildguardtest": HubSet("allenai/wildguardmix", "wildguardtest", "test", tested=True),
    "wildjailbreak": HubSet("allenai/wildjailbreak", "train", "train", {"delimiter": "\t", "keep_default_na": False}),
    "circuit-breakers": HubSet("GraySwanAI/circuit-breakers", None, "train"),
    "xstest-response": HubSet("allenai/xstest-response", None, "response_harmfulness", tested=True),
    "coconot": HubSet("allenai/coconot", "original", "train"),
    "coconot-contrast": HubSet("allenai/coconot", "pref", "train"),
    "ultrachat": HubSet("HuggingFaceH4/ultrachat_200k", None, "train_sft"),
    "xstest": HubSet("Paul/XSTest", None, "train"),
    "or-bench-hard": HubSet("bench-llm/or-bench", "or-bench-hard-1k", "train"),
    "or-bench-toxic": HubSet("bench-llm/or-bench", "or-bench-toxic", "train"),
    "coconot-test": HubSet("allenai/coconot", "original", "test"),
    "coconot-contrast-test": HubSet("allenai/coconot", "contrast", "test"),
}
# Not a data set of the hub but a file of a repository: a list of objects.
FILES = {
    "GraySwanAI/circuit-breakers": "https://raw.githubusercontent.com/GraySwanAI/circuit-breakers/main/data/"
    "circuit_breakers_train.json"
}
PROMPTS = ("xstest", "or-bench-hard", "or-bench-toxic", "coconot-test", "coconot-contrast-test")

# What a record says: the turns before the answer, the answer, its category, and what groups it if not the last request.
Answer = tuple[list[dict[str, str]], str, str | None, str | None]


def asked(text: str) -> list[dict[str, str]]:
    """A conversation of one request."""
    return [{"role": "user", "content": text}]


def beavertails(record: Mapping[str, Any]) -> Iterator[Answer]:
    """One answer; `category` is a mapping of 14 kinds of harm, of which the flag here makes one."""
    yield asked(record["prompt"]), record["response"], None if record["is_safe"] else "harm", None


def pku_saferlhf(record: Mapping[str, Any]) -> Iterator[Answer]:
    """Two answers to one request, each with its own label."""
    for i in (0, 1):
        safe = record[f"is_response_{i}_safe"]
        yield asked(record["prompt"]), record[f"response_{i}"], None if safe else "harm", None


def wildguard(record: Mapping[str, Any]) -> Iterator[Answer]:
    """An answer or none; the label of the answer is not that of the request."""
    label = record["response_harm_label"]
    if record["response"] and label in ("harmful", "unharmful"):
        yield asked(record["prompt"]), record["response"], "harm" if label == "harmful" else None, None


def xstest_response(record: Mapping[str, Any]) -> Iterator[Answer]:
    """An answer of some model to a request of XSTest."""
    if record["label"] in ("harmful", "unharmful"):
        yield asked(record["prompt"]), record["response"], "harm" if record["label"] == "harmful" else None, None


def wildjailbreak(record: Mapping[str, Any]) -> Iterator[Answer]:
    """Harmless answers to plain and adversarial requests, which share the plain one as their group."""
    yield asked(record["adversarial"] or record["vanilla"]), record["completion"], None, record["vanilla"]


def wildjailbreak_groups(record: Mapping[str, Any]) -> Iterator[Answer]:
    """For a twentieth of the plain requests: all rewordings; the answers to harmful ones are refusals."""
    if position_of(record["vanilla"], "wildjailbreak") < 0.05:
        refused = record["data_type"].endswith("harmful")
        turns = asked(record["adversarial"] or record["vanilla"])
        yield turns, record["completion"], "safety" if refused else None, record["vanilla"]


def circuit_breakers(record: Mapping[str, Any]) -> Iterator[Answer]:
    """A harmful answer and a refusal to the same request."""
    yield asked(record["prompt"]), record["output"], "harm", None
    yield asked(record["prompt"]), record["llama3_output"], None, None


def coconot(record: Mapping[str, Any]) -> Iterator[Answer]:
    """A refusal, with its kind."""
    yield asked(record["prompt"]), record["response"], KINDS[record["category"]], None


def coconot_contrast(record: Mapping[str, Any]) -> Iterator[Answer]:
    """A full answer to a request that only looks like one to refuse."""
    yield asked(record["prompt"]), record["chosen"], None, None


def ultrachat(record: Mapping[str, Any]) -> Iterator[Answer]:
    """The first or the second answer of a long conversation, by the hash of its first request."""
    turns = [{"role": t["role"], "content": t["content"]} for t in record["messages"]]
    end = 3 if len(turns) > 3 and position_of(turns[0]["content"], "turns") < 0.5 else 1
    if len(turns) > end and turns[end]["role"] == "assistant":
        yield turns[:end], turns[end]["content"], None, turns[0]["content"]


# Folder -> set -> (reader, harmful rows at most, harmless rows at most), over all splits.
FOLDERS: dict[str, dict[str, tuple[Callable[[Mapping[str, Any]], Iterator[Answer]], int, int]]] = {
    "harm": {
        "wildguardtest": (wildguard, 600, 900),
        "xstest-response": (xstest_response, 400, 400),
        "circuit-breakers": (circuit_breakers, 3000, 1500),
        "wildguardmix": (wildguard, 4000, 5000),
        "pku-saferlhf": (pku_saferlhf, 4000, 3000),
        "beavertails": (beavertails, 4000, 3000),
        "wildjailbreak": (wildjailbreak, 0, 4000),
        "coconot-contrast": (coconot_contrast, 0, 900),
        "ultrachat": (ultrachat, 0, 6000),
    },
    "refusals": {
        "coconot": (coconot, 11000, 0),
        "coconot-contrast": (coconot_contrast, 0, 900),
        "wildjailbreak": (wildjailbreak_groups, 4000, 4000),
        "ultrachat": (ultrachat, 0, 6000),
    },
    "pairs": {
        "circuit-breakers": (circuit_breakers, 3000, 3000),
        "ultrachat": (ultrachat, 0, 6000),
    },
}


def words_of(text: str) -> str:
    """A text without case, punctuation and spacing: requests with the same words are the same request."""
    return " ".join(re.findall(r"\w+", text.lower()))[:400]


def position_of(text: str, salt: str = "") -> float:
    """A place in [0, 1) that depends on the words of the text alone; another salt gives an independent one."""
    return int(hashlib.sha256((salt + words_of(text)).encode()).hexdigest()[:12], 16) / 16**12


def split_of(group: str) -> str:
    """The split of a request: a function of its words, so that adding a set never moves one."""
    return next(name for name, end in SPLITS.items() if position_of(group) < end)


def load(name: str, root: str | None) -> Any:
    """A set, its records in an order that the seed decides.

    Args:
        name: Key of `SETS`.
        root: Folder with copies, laid out `OWNER/NAME` as `hf download --repo-type dataset --local-dir` leaves them.
    """
    import datasets

    found = SETS[name]
    path, config, options = found.path, found.config, dict(found.options)
    if path in FILES:
        options["data_files"] = f"{root}/{path}/{FILES[path].rpartition('/')[2]}" if root else FILES[path]
        path, config = "json", None
    elif root:
        path = f"{root}/{path}"
    try:
        return datasets.load_dataset(path, config, split=found.split, **options).shuffle(seed=SEED)
    except Exception as error:  # A dozen kinds: no connection, no permission, another split, a damaged file.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise SystemExit(
            f"{name} ({found.path}, configuration {found.config}, split {found.split}) cannot be loaded ({reason}): "
            f"accept its conditions on the hub and log in with `hf auth login`, or leave it out with --without {name}"
        ) from error


def rows_of(name: str, read: Callable[[Mapping[str, Any]], Iterable[Answer]], records: Iterable[Any]) -> Iterator[Row]:
    """Usable rows of a set, in the order of its records."""
    for record in records:
        for turns, response, category, group in read(record):
            if not (response or "").strip() or sum(len(t["content"]) for t in turns) > PROMPT_CHARACTERS:
                continue
            text = response.strip()
            if len(text) > RESPONSE_CHARACTERS:
                text = text[:RESPONSE_CHARACTERS].rsplit(None, 1)[0]
            group = words_of(group or turns[-1]["content"])
            digest = hashlib.sha256(json.dumps([turns, text]).encode()).hexdigest()[:12]
            messages = [*turns, {"role": "assistant", "content": text}]
            yield Row(messages, category, group=group, source=name, id=f"{name}-{digest}")


def choose(rows: Iterable[Row], harmful: int, harmless: int, seen: set[tuple[str, str]]) -> Iterator[Row]:
    """Rows up to the quota; an answer that was `seen` to the same request, in whatever set, is left out."""
    quota, taken = {True: harmful, False: harmless}, Counter[Any]()
    for row in rows:
        answer, slot = (row.group or "", words_of(row.response)), (row.harmful, row.group)
        if taken[row.harmful] < quota[row.harmful] and taken[slot] < PER_REQUEST and answer not in seen:
            seen.add(answer)
            taken[row.harmful] += 1
            taken[slot] += 1
            yield row
        if all(taken[side] >= most for side, most in quota.items()):
            return


def make(folder: str, output: Path, root: str | None, without: Iterable[str]) -> dict[str, list[Row]]:
    """Writes the three files of a folder and `counts.json`; returns the rows by split."""
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    seen: set[tuple[str, str]] = set()
    tested: set[str] = set()  # Sets that are tested on come first in FOLDERS.
    counts: dict[str, dict[str, Counter[str]]] = {name: defaultdict(Counter) for name in SPLITS}
    for name, (read, harmful, harmless) in FOLDERS[folder].items():
        if name in without:
            continue
        for row in choose(rows_of(name, read, load(name, root)), harmful, harmless, seen):
            group = row.group or ""
            if SETS[name].tested:
                tested.add(group)
            split = "test" if group in tested else split_of(group)
            splits[split].append(row)
            counts[split][name][row.category or "harmless"] += 1
    for split, rows in splits.items():
        rows.sort(key=lambda row: hashlib.sha256(f"order {row.id}".encode()).hexdigest())
        write_rows(output / folder / f"{split}.jsonl", rows)
        harmful = sum(row.harmful for row in rows)
        print(f"{folder}/{split}: {harmful} with a category, {len(rows) - harmful} without")
    with atomic_write(output / folder / "counts.json") as file:
        file.write(json.dumps(counts, indent=2).encode())
    return splits


def make_prompts(output: Path, root: str | None, without: Iterable[str]) -> None:
    """Writes a file of requests for every set that has only those."""
    (output / "prompts").mkdir(parents=True, exist_ok=True)
    for name in PROMPTS:
        if name in without:
            continue
        lines = []
        for number, record in enumerate(load(name, root)):
            kind = f"{name}/{record['label']}" if name == "xstest" else name
            lines.append({"id": f"{name}-{number}", "messages": asked(record["prompt"]), "source": kind})
        with atomic_write(output / "prompts" / f"{name}.jsonl") as file:
            file.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
        print(f"prompts/{name}: {len(lines)}")


def main(argv: list[str] | None = None) -> None:
    """Writes all folders, or those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/hub"))
    parser.add_argument("--root", help="folder with copies of the sets, OWNER/NAME; default: the hub")
    parser.add_argument("--without", nargs="*", default=[], choices=sorted(SETS), help="sets to leave out")
    parser.add_argument("--only", nargs="*", default=[*FOLDERS, "prompts"], choices=[*FOLDERS, "prompts"])
    arguments = parser.parse_args(argv)
    for folder in FOLDERS:
        if folder in arguments.only:
            make(folder, arguments.output, arguments.root, arguments.without)
    if "prompts" in arguments.only:
        make_prompts(arguments.output, arguments.root, arguments.without)


if __name__ == "__main__":
    main()
