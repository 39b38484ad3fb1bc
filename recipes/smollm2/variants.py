"""Variants of the recipe, each trained on the same few rows, with the published objectives among them.

    python recipes/smollm2/run.py --data DATA --licences open --output runs/smollm2-open --stages rows
    python recipes/smollm2/variants.py --output runs/smollm2-open                        # all, on development rows
    python recipes/smollm2/variants.py --output runs/smollm2-open --names dense until --splits development test

`--rows` training rows are drawn by the seed, the same for all variants. A stage whose output is there is not run again,
so variants can be added one by one. Variants and monitors are chosen on development rows; test rows are read once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from table import choose_monitor, detection, figure, peaks, read, timeliness

from redflag.data.rows import load_rows, write_rows
from redflag.files import atomic_write
from redflag.lab.demo import STARTER
from redflag.scoring.recording import Recording
from redflag.stats.metrics import tpr_at_fpr
from redflag.weights.precision import Machine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "small-real"))
from run import StageError, stage  # noqa: E402

MAX_LENGTH = "448"  # As `run.py` scores.
DTYPE = "bfloat16" if Machine.here().cpu_bf16 else "float32"  # emulated, it is 50 times slower
# The objective of Red Flag Tokens (recipes/papers/red-flag-tokens/train.yaml has the derivation), every weight 1.
THREE_TERMS = "--flag_coef 2 --harmful_weight 0.5 --benign_coef 1 --after_coef 1 --keep_coef 0"
# Signed steps within the published ball, on as many batches as the other variants have.
ADVERSARY = "--adversarial_coef 1 --adversarial_steps 5 --adversarial_step_size 1e-3 --adversarial_radius 0.05"
VARIANTS = {
    "dense": "",  # Labels from the onset on.
    "mean-start": "--flag_start mean",  # As the first flag was trained.
    "commit": "",  # From where harm can be seen coming.
    "whole": "",  # From the first token of a harmful answer: labels by response.
    "templates": "",  # The starter rows, written by templates, in place of real ones: at most 160.
    "by-response": "--flag_coef 0 --peak_coef 1",
    "keep-2": "--keep_coef 2",
    "keep-32": "--keep_coef 32",
    "rank-64": "--lora_r 64",
    "all-weights": "--full true --learning_rate 1e-4",
    "three-passes": "--num_train_epochs 3",
    "batch-4": "--per_device_train_batch_size 4",  # twice the steps on the same rows
    "batch-2": "--per_device_train_batch_size 2",
    # Here a flag stands in the text, and this model's rows are tied: it starts as a mean, whatever `--flag_start` says.
    "until": f"--placement until {THREE_TERMS}",
    "several": f"--placement until --insertions 3 {THREE_TERMS}",
    "insert": f"--placement insert {THREE_TERMS}",
    "first": "--placement first --flag_coef 2 --benign_coef 0 --after_coef 0 --keep_coef 1",
    "rf-at": f"--placement until {THREE_TERMS} {ADVERSARY}",
}
SPLITS = ("development", "test")
FPR = 0.05
WHEN = "at 5%: tokens from onset, in time"
COLUMNS = ("variant", "monitor", "AUROC", "TPR at 1%", "TPR at 5%", WHEN, "AUROC, max", f"max, {WHEN}")
COLUMNS += ("AUROC before the answer", "keep KL", "perplexity ratio")


def main() -> None:
    """Trains, scores, and writes `results.json` and `results.md` under `variants/ROWS/`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path(".cache/smollm2"), help="the folder of scripts/fetch-smollm2")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-open"))
    parser.add_argument("--names", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--rows", type=int, default=600, help="training rows; language is measured on a tenth of all")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=["development"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, rows = arguments.output / "variants" / str(arguments.rows), arguments.output / "rows"
    verb = [sys.executable, "-u", "-m", "redflag.cli"]
    for name in arguments.names:
        model = folder / f"{name}-{arguments.seed}"
        paths = ["--model", str(arguments.base), "--input", str(training_rows(name, rows)), "--output_dir", str(model)]
        command = [*verb, "train", "--config", str(HERE / "train.yaml"), *paths, "--seed", str(arguments.seed)]
        command += ["--max_rows", str(arguments.rows), "--reference_cache", str(arguments.output / "reference")]
        stage(
            f"train-{model.name}", folder, model / "redflag.json", [*command, "--resume", *shlex.split(VARIANTS[name])]
        )
        for split in arguments.splits:
            scored = model / f"{split}.jsonl"
            paths = ["--model", str(model), "--input", str(rows / f"{split}.jsonl"), "--output", str(scored)]
            command = [*verb, "score", *paths, "--max_length", MAX_LENGTH, "--dtype", DTYPE]
            stage(f"score-{split}-{model.name}", folder, scored, command)
    results = {}
    for model in sorted(folder.glob("*-*/redflag.json")):
        if (model.parent / "development.jsonl").exists():
            results[model.parent.name] = figures(model.parent, rows)
    text = table(results)
    for file_name, content in (("results.json", json.dumps(results, indent=2)), ("results.md", text)):
        with atomic_write(folder / file_name) as file:
            file.write(content.encode())
    print(text)


def training_rows(name: str, rows: Path) -> Path:
    """The rows of a variant: the recipe's, these with other onsets, or the starter rows."""
    if name not in ("commit", "whole", "templates"):
        return rows / "train.jsonl"
    path = rows / f"train-{name}.jsonl"
    if name == "templates":
        write_rows(path, [row for row in load_rows(STARTER).rows if str(row.id).startswith("train-")])
    elif not path.exists():
        lines = read(rows / "train.jsonl")
        for row in lines:
            if row["onset"] is not None:
                row["onset"] = row["extra"]["commit"] if name == "commit" else 0
        with atomic_write(path) as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines).encode())
    return path


def figures(model: Path, rows: Path) -> dict[str, Any]:
    """Of one variant: detection and timeliness under the monitor that development rows choose, and language."""
    monitor = choose_monitor(Recording.load(model / "development.jsonl"))
    result: dict[str, Any] = {"monitor": monitor}
    for split in SPLITS:
        scored = model / f"{split}.jsonl"
        if scored.exists():
            recording, lines = Recording.load(scored), read(scored)
            by_id = {row["id"]: row for row in read(rows / f"{split}.jsonl")}
            of_lines = [by_id[line["id"]] for line in lines]
            result[split] = under(monitor, recording, lines, of_lines)
            result[split]["max"] = under("max", recording, lines, of_lines)
            before = recording.probs[recording.starts[:-1], 0].astype(np.float64)
            result[split]["before"] = detection(before, recording, np.ones(len(lines), dtype=bool))
    metrics = json.loads((model / "train.json").read_text(encoding="utf-8"))["metrics"]
    return result | {key: metrics[f"eval_{key}"] for key in ("keep_kl_harmless", "perplexity_ratio")}


def under(
    monitor: str, recording: Recording, lines: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Detection, and timeliness at 5% false alarms, under one monitor."""
    scores = peaks(recording, monitor)
    threshold = tpr_at_fpr(scores, recording.harmful, FPR).threshold
    found = detection(scores, recording, np.ones(len(lines), dtype=bool))
    return found | {"timeliness": timeliness(recording, lines, rows, monitor, threshold)}


def table(results: dict[str, Any]) -> str:
    """Markdown, a table for each split."""
    parts = []
    for split in SPLITS:
        scored = {name: result for name, result in results.items() if split in result}
        if not scored:
            continue
        counts = next(iter(scored.values()))[split]
        lines = [f"**{split}**: {counts['harmful']} harmful, {counts['harmless']} harmless.", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        for name, result in scored.items():
            found, plain = result[split], result[split]["max"]
            cells = [name, result["monitor"], *(figure(found[key]) for key in ("auroc", "tpr_at_0.01", "tpr_at_0.05"))]
            cells += [when(found["timeliness"]), f"{plain['auroc'][0]:.3f}", when(plain["timeliness"])]
            cells.append(figure(found["before"]["auroc"]))
            cells += [f"{result['keep_kl_harmless']:.4f}", f"{result['perplexity_ratio']:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def when(found: dict[str, Any]) -> str:
    """Quartiles of tokens from onset, and the share by the end of the first harmful sentence, of the caught."""
    if not found["caught"]:
        return "-"
    quartiles = ", ".join(f"{tokens:.0f}" for tokens in found["tokens_from_onset"])
    return f"{quartiles}; {found['by_end_of_first_harmful_sentence']:.0%}"


if __name__ == "__main__":
    try:
        main()
    except StageError as error:
        sys.exit(str(error))
