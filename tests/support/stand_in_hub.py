"""Folders that look to `datasets.load_dataset` as the sets of the hub do: same files, configurations and columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recipes_of import prepare_hub
from tiny import WORDS

COCONOT = tuple(prepare_hub.KINDS)


def text(seed: int, length: int = 8) -> str:
    """Some words, others for another seed."""
    return " ".join(WORDS[(seed * 7 + j * (1 + seed % 5)) % len(WORDS)] for j in range(length)) + f" {seed}"


def put(folder: Path, configs: Mapping[str, Mapping[str, tuple[str, Iterable[Mapping[str, Any]]]]]) -> None:
    """Files of records, and the card that says which configuration and split each is.

    Args:
        folder: `ROOT/OWNER/NAME`.
        configs: Configuration -> split -> (file, records); the file's ending decides its form.
    """
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, (name, records) in splits.items():
            lines += [f"  - split: {split}", f"    path: {name}"]
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            records = list(records)
            if path.suffix in (".tsv", ".csv"):
                with path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                    writer.writeheader()
                    writer.writerows(records)
            else:
                path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def make(root: Path, n: int = 40) -> Path:
    """All sets of `prepare_hub.SETS`, n requests each; some requests are in several sets."""
    both = range(n)
    beaver = [
        {
            "prompt": text(i // 2),
            "response": text(100 + i),
            "category": {"self_harm": i % 2 == 0},
            "is_safe": i % 2 == 1,
        }
        for i in both
    ]
    put(root / "PKU-Alignment/BeaverTails", {"default": {"330k_train": ("round0/330k/train.jsonl", beaver)}})
    safe = [
        {
            "prompt": text(500 + i),
            **{f"response_{k}": text(600 + 2 * i + k) for k in (0, 1)},
            **{f"is_response_{k}_safe": (i + k) % 2 == 0 for k in (0, 1)},
            **{f"response_{k}_severity_level": 3 * ((i + k) % 2) for k in (0, 1)},
        }
        for i in both
    ]
    put(root / "PKU-Alignment/PKU-SafeRLHF", {"default": {"train": ("data/Alpaca-7B/train.jsonl", safe)}})

    def guard(first: int) -> list[dict[str, Any]]:
        labels = ("harmful", "unharmful", None)
        return [
            {
                "prompt": text(first + i),
                "adversarial": i % 2 == 0,
                "response": None if i % 3 == 2 else text(first + 100 + i),
                "prompt_harm_label": "harmful",
                "response_refusal_label": None if i % 3 == 2 else "compliance",
                "response_harm_label": labels[i % 3],
                "subcategory": "benign",
            }
            for i in both
        ]

    put(
        root / "allenai/wildguardmix",
        {
            "wildguardtrain": {"train": ("train/wildguard_train.jsonl", guard(1000))},
            "wildguardtest": {"test": ("test/wildguard_test.jsonl", guard(1000 + n // 2))},  # half are in both
        },
    )
    kinds = ("vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign")
    jailbreaks = [
        {
            "vanilla": text(2000 + i // 2),
            "adversarial": "" if i % 2 == 0 else f"NA pretend that {text(3000 + i)}",
            "completion": text(3100 + i),
            "data_type": kinds[i % 2 + 2 * (i // 2 % 2)],
        }
        for i in range(10 * n)
    ]
    put(root / "allenai/wildjailbreak", {"train": {"train": ("train/train.tsv", jailbreaks)}})
    pairs = [
        {
            "category": "harm",
            "prompt": text(4000 + i),
            "output": text(4100 + i),
            "llama3_output": f"no {text(4200 + i)}",
        }
        for i in both
    ]
    breakers = root / "GraySwanAI/circuit-breakers"
    breakers.mkdir(parents=True)
    (breakers / "circuit_breakers_train.json").write_text(json.dumps(pairs))
    answers = [
        {"prompt": text(5000 + i), "response": text(5100 + i), "label": ("harmful", "unharmful")[i % 2]} for i in both
    ]
    put(root / "allenai/xstest-response", {"default": {"response_harmfulness": ("data/harm.jsonl", answers)}})
    refusals = [
        {"id": str(i), "category": COCONOT[i % 5], "prompt": text(6000 + i), "response": f"no {text(6100 + i)}"}
        for i in both
    ]
    bare = [{**record, "prompt": f"test {record['prompt']}", "response": ""} for record in refusals]
    preferred = [{"prompt": text(6300 + i), "chosen": text(6400 + i), "rejected": f"no {i}"} for i in both]
    put(
        root / "allenai/coconot",
        {
            "original": {"train": ("original/train.jsonl", refusals), "test": ("original/test.jsonl", bare)},
            "contrast": {"test": ("contrast/test.jsonl", bare)},
            "pref": {"train": ("pref/train.jsonl", preferred)},
        },
    )
    chats = [
        {
            "prompt": text(7000 + i),
            "prompt_id": str(i),
            "messages": [
                {"content": text(7000 + i + 100 * t), "role": ("user", "assistant")[t % 2]}
                for t in range(2 + 2 * (i % 2))
            ],
        }
        for i in both
    ]
    put(root / "HuggingFaceH4/ultrachat_200k", {"default": {"train_sft": ("data/train_sft.jsonl", chats)}})
    asked = [
        {
            "id": i,
            "prompt": text(8000 + i),
            "type": "x",
            "label": ("safe", "unsafe")[i % 2],
            "focus": "",
            "note": "",
        }
        for i in both
    ]
    put(root / "Paul/XSTest", {"default": {"train": ("xstest_prompts.csv", asked)}})
    bench = [{"prompt": text(9000 + i), "category": "violence"} for i in both]
    put(
        root / "bench-llm/or-bench",
        {name: {"train": (f"{name}.csv", bench)} for name in ("or-bench-hard-1k", "or-bench-toxic")},
    )
    return root
